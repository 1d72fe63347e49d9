"""Correlation of planes: known ones are found under camera noise, and rho is found again."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from synthaug.errors import InputError
from synthaug.generators.texture import TextureDiffusion, tiny_config
from synthaug.training.correlation import extract_patches, fit_rho, plane_statistics, synthetic_planes
from synthaug.types import UNLABELLED
from tests.test_axial import disc


def patches(correlation: float, noise: float, num: int = 120, size: int = 32) -> list[tuple[np.ndarray, np.ndarray]]:
    """Light 1 with texture of a standard deviation of 0.2, of two layers mixed from plane to plane."""
    rng = np.random.default_rng(0)
    mask = disc(13.0, size)
    out = []
    for _ in range(num):
        layers = ndimage.gaussian_filter(rng.standard_normal((4, size, size)), (0, 1.0, 1.0))
        layers /= layers.std()
        planes = np.sqrt(correlation) * layers[0] + np.sqrt(1 - correlation) * layers[1:]
        light = mask * (1 + 0.2 * planes) + noise * rng.standard_normal(planes.shape)
        out.append((light.astype(np.float32), mask))
    return out


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_camera_noise_does_not_hide_the_correlation(noise):
    for correlation in (0.3, 0.8):
        found = plane_statistics(patches(correlation, noise))
        assert found.correlation == pytest.approx((correlation, correlation), abs=0.08)
        assert found.num_cells == 120
        # lag one of a Gaussian texture of sigma 1, less what the trend takes; the same with and without noise
        assert found.contrast == pytest.approx(0.83 * 0.2 * np.exp(-1 / 8), rel=0.05)


def test_planes_beyond_a_cells_end_do_not_count():
    dark = [(np.stack([p[0] * 0.1, p[1], p[2]]), m) for p, m in patches(0.8, 0.0)]
    assert plane_statistics(dark).correlation[0] == pytest.approx(0.8, abs=0.08)
    assert plane_statistics(dark).correlation[1] == 0.0  # no pair two planes apart is left
    with pytest.raises(InputError, match="patches"):
        plane_statistics([(np.ones((3, 32, 32), np.float32), disc(3.0, 32))])


def test_patches_are_cut_around_annotated_outlines():
    labels = np.full((7, 64, 64), UNLABELLED, np.int32)
    labels[2] = 0
    labels[2, 2:16, 12:26] = 1  # too near to the border for a patch of 32
    labels[2, 30:44, 30:44] = 2
    labels[6] = labels[2]  # no plane behind it
    image = np.full(labels.shape, 100.0, np.float32)
    image[1:4, 30:44, 30:44] += np.array([50, 100, 150])[:, None, None]
    ((light, mask),) = extract_patches([(image, labels)], 32)
    assert light.shape == (3, 32, 32)
    assert mask.sum() == 14 * 14
    assert light[:, mask].mean(1).tolist() == [50.0, 100.0, 150.0]
    assert len(extract_patches([(image, labels)] * 9, 32, most=4)) == 4


class PaintedNoise(TextureDiffusion):
    """A stage whose textures are the latent noise itself: light 1 with a standard deviation of about 0.2."""

    def predict(self, latent: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        return -latent  # from pure noise, minus the velocity is the clean sample

    def decode(self, latent: Tensor) -> Tensor:
        return 1 + 0.2 * functional.interpolate(latent[:, :1], scale_factor=4, mode="bilinear")[:, 0]


@pytest.fixture(scope="module")
def texture() -> TextureDiffusion:
    config = tiny_config(32, latent_size=8, vae_channels=(8, 16), block_out_channels=(8, 16), num_inference_steps=1)
    return PaintedNoise(config).eval()


def test_correlation_of_images_rises_with_rho_and_survives_no_change_of_config(texture):
    before = texture.config
    masks = [disc(13.0, 32)] * 8
    found = [
        plane_statistics(synthetic_planes(texture, masks, rho=rho, seed=0)).correlation[0] for rho in (0.0, 0.7, 2.0)
    ]
    assert found[0] < found[1] - 0.1 < found[2] - 0.2
    assert texture.config is before


def test_rho_is_found_again(texture):
    masks = [disc(13.0, 32)] * 12
    real = synthetic_planes(texture, masks, rho=1.0, seed=5)
    rng = np.random.default_rng(0)
    real = [(50 * (p + 0.1 * rng.standard_normal(p.shape)).astype(np.float32), m) for p, m in real]
    fit = fit_rho(texture, real, num_cells=6)
    assert fit.slice_sigma < 0.6  # equal at both distances: no blur
    assert fit.rho == pytest.approx(1.0, abs=0.45)
    assert fit.synthetic.correlation == pytest.approx(fit.real.correlation, abs=0.08)
    assert fit.independent.correlation[0] < fit.synthetic.correlation[0]
    with pytest.raises(InputError, match="32 x 32"):
        fit_rho(texture, [(real[0][0][:, :16, :16], real[0][1][:16, :16])])


def test_planes_that_grow_apart_are_told_from_common_noise(texture):
    masks = [disc(13.0, 32)] * 12
    real = synthetic_planes(texture, masks, rho=0.5, slice_sigma=1.2, seed=5)
    fit = fit_rho(texture, real, num_cells=12)
    assert fit.slice_sigma == pytest.approx(1.2, abs=0.4)
    assert fit.real.correlation[0] > fit.real.correlation[1] + 0.1
    assert fit.synthetic.correlation == pytest.approx(fit.real.correlation, abs=0.1)
