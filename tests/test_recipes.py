"""Pieces of the recipes: seeded weights, held-out crops, timesteps, turns."""

from __future__ import annotations

import pytest
import torch

from synthaug.datasets.crops import extract_crops
from synthaug.generators.masks import MaskConfig, MaskDDPM
from synthaug.generators.texture import TextureDiffusion, tiny_config
from synthaug.randomness import SampleKey
from synthaug.training import recipes
from synthaug.types import Cells
from tests.shapes import ellipse_frame


def weights(seed: int) -> torch.Tensor:
    stage = MaskDDPM(MaskConfig(block_out_channels=(16, 32)))
    recipes.initialise(stage.unet, SampleKey(seed))
    return torch.cat([p.detach().flatten() for p in stage.unet.parameters()])


@pytest.mark.usefixtures("untouched_random_state")
def test_a_seed_names_the_weights():
    with torch.random.fork_rng():  # building a diffusers network draws from the global generator
        one, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    assert 0.01 < float(one.std()) < 0.3


def test_the_control_branch_still_begins_silent():
    with torch.random.fork_rng():
        stage = TextureDiffusion(tiny_config(32, vae_channels=(8, 16), block_out_channels=(8, 16)))
    recipes.initialise(stage.controlnet, SampleKey(0))
    for block in stage.controlnet.controlnet_down_blocks:
        assert not block.weight.any()


def test_held_out_crops_are_apart_from_the_training_ones():
    with pytest.warns(UserWarning, match="whole cells"):
        crops = extract_crops([ellipse_frame(0)])
    training, held_out = recipes.split_crops(crops, seed=0)
    assert len(training) + len(held_out) == len(crops)
    assert len(held_out) >= 4
    distance = (training.image[:, None] - held_out.image[None]).abs().flatten(2).sum(2)
    assert float(distance.min()) > 0
    again = recipes.split_crops(crops, seed=0)[1]
    assert torch.equal(again.image, held_out.image)


def test_timesteps_cover_every_stratum():
    steps = recipes._timesteps(10, torch.Generator().manual_seed(0))
    assert (steps // 100).tolist() == list(range(10))


def test_the_eight_turns_differ_and_keep_the_values():
    x = torch.arange(9.0).reshape(1, 3, 3)
    turned = [recipes._dihedral(x, which) for which in range(8)]
    assert len({tuple(t.flatten().tolist()) for t in turned}) == 8
    assert all(torch.equal(t.flatten().sort().values, x.flatten()) for t in turned)


def test_the_autoencoder_loss_falls_with_the_error_and_ignores_far_background():
    class Perfect:
        """Stands for a trained stage: decodes the image plus a given error."""

        def __init__(self, error: torch.Tensor) -> None:
            self.error = error

        def encode_moments(self, image):
            return torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)

        def decode_raw(self, latent):
            return image + self.error

    image = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0))
    sdf = torch.full((1, 32, 32), 20.0)
    sdf[:, 8:24, 8:24] = -3.0
    inside = torch.zeros(1, 32, 32)
    inside[:, 12:20, 12:20] = 0.2
    outside = torch.zeros(1, 32, 32)
    outside[:, :4, :16] = 0.2
    zero = torch.zeros(1, 1, 1, 1)
    losses = [float(recipes._vae_loss(Perfect(e), image, sdf, zero)) for e in (0 * inside, outside, inside)]
    assert losses[0] == pytest.approx(0.0, abs=1e-6)
    assert losses[0] < losses[1] < 0.3 * losses[2]


def test_contrast_is_that_of_the_texture_inside():
    sdf = torch.full((1, 48, 48), 5.0)
    sdf[:, 8:40, 8:40] = -6.0
    rows = (torch.arange(48) // 3 % 2).float()  # stripes of 3 px: texture, not pixel noise
    striped = rows[None, :, None].expand(1, 48, 48)
    assert recipes.texture_contrast(striped, sdf) > 0.1
    assert recipes.texture_contrast(2 * striped, sdf) == pytest.approx(2 * recipes.texture_contrast(striped, sdf))
    assert recipes.texture_contrast(torch.ones(1, 48, 48), sdf) == pytest.approx(0, abs=1e-5)
    assert recipes.texture_contrast(striped, sdf.abs()) == 0.0


def test_calibration_finds_the_scale_that_gives_the_contrast_back():
    with pytest.warns(UserWarning, match="whole cells"):
        crops = extract_crops([ellipse_frame(0)], crop_size=64)

    class Half:
        """Paints stripes whose height is 0.87 times the noise scale; real ones have height 1."""

        config = tiny_config(64)

        def encode(self, image):
            return image

        def stripes(self, height):
            rows = (torch.arange(64) // 3 % 2).float() * height
            return rows[None, :, None].expand(len(crops), 64, 64)

        def decode(self, latent):
            return self.stripes(1.0)

        def draw(self, keys):
            return {}

        def __call__(self, masks, noise):
            image = self.stripes(0.87 * self.config.noise_scale)[:, None]
            return Cells(image, masks.sdf[:, None], masks.brightness, masks.scale)

    assert recipes.calibrate_contrast(Half(), crops, seed=0) == pytest.approx(1 / 0.87, abs=0.01)
