"""The camera's read-out in one pass gives what plain torch gives, wherever in a volume a voxel stands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from synthaug.generators.camera import correlate_noise, expose
from synthaug.generators.electrons import ELECTRONS, QUANTILES, multiplied_noise, shape_noise
from synthaug.kernels.exposure import read_out

SPANS = (float(ELECTRONS[0]), float(ELECTRONS[-1]), float(QUANTILES[-1]))
TABLE = torch.from_numpy(multiplied_noise(0.17))
AFFINE = (103.0, 50.0, 30.5)
"""Level, flat variance and gain."""


def inputs(size: tuple[int, int, int], radius: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Expected counts from far under the level to bright, white noise, and a filter of unit energy."""
    random = np.random.default_rng(seed)
    expected = 80 + 900 * random.random(size, np.float32) ** 4
    white = random.standard_normal((size[0], size[1] + 2 * radius, size[2] + 2 * radius), np.float32)
    kernel = random.random((2 * radius + 1, 2 * radius + 1), np.float32)
    return torch.from_numpy(expected), torch.from_numpy(white), torch.from_numpy(kernel / np.linalg.norm(kernel))


def reference(expected: Tensor, white: Tensor, kernel: Tensor, read_noise: float, integer: bool) -> Tensor:
    level, flat, gain = AFFINE
    variance = (flat + gain * (expected - level)).clamp(min=0.1 * flat)
    noise = correlate_noise(white, kernel)
    if read_noise:
        noise = shape_noise(noise, (variance / (0.5 * gain) ** 2 - read_noise**2) / 2, TABLE)
    return expose(expected, variance, noise, integer=integer, saturation=700.0)


def made(expected: Tensor, white: Tensor, kernel: Tensor, read_noise: float, integer: bool) -> Tensor:
    table = TABLE if read_noise else torch.zeros(0, 0)
    return read_out(expected, expected, white, kernel, table, *AFFINE, read_noise, *SPANS, integer, 700.0)


@pytest.mark.parametrize("read_noise", [0.0, 0.17])
@pytest.mark.parametrize(
    ("size", "radius"), [((1, 1, 1), 0), ((2, 3, 5), 1), ((3, 31, 67), 2), ((9, 64, 64), 0), ((0, 4, 4), 1)]
)
def test_counts_are_those_of_plain_torch(size: tuple[int, int, int], radius: int, read_noise: float) -> None:
    values = inputs(size, radius)
    counts, wanted = made(*values, read_noise, True), reference(*values, read_noise, True)
    assert counts.shape == size
    # a last bit may carry a value over the middle between two counts
    assert int((counts != wanted).sum()) <= 1 + counts.numel() // 10_000
    assert torch.allclose(counts, wanted, atol=1)
    plain, wanted = made(*values, read_noise, False), reference(*values, read_noise, False)
    assert torch.allclose(plain, wanted, atol=2e-3, rtol=1e-6)
    if counts.numel() > 1000:
        assert counts.max() == plain.max() == 700.0


def test_variance_may_follow_another_signal_than_the_expected_counts() -> None:
    """Cells added to a real image bring the noise of their own light alone."""
    expected, white, kernel = inputs((2, 20, 20), 1)
    light = torch.zeros_like(expected)
    light[:, 5:9, 5:9] = 200
    out = read_out(expected, light, white, kernel, TABLE, 0.0, 0.0, 30.5, 0.17, *SPANS, False, 1e9)
    assert torch.equal(out[light == 0], expected[light == 0])
    spread = (out - expected)[light > 0].std().item()
    assert spread == pytest.approx((30.5 * 200) ** 0.5, rel=0.5)


def test_a_plane_has_the_same_bits_alone_and_at_any_width() -> None:
    expected, white, kernel = inputs((4, 30, 71), 1)
    whole = made(expected, white, kernel, 0.17, False)
    for z in range(4):
        assert torch.equal(made(expected[z : z + 1], white[z : z + 1], kernel, 0.17, False)[0], whole[z])
    part = made(expected[:, 3:20, 5:18], white[:, 3:22, 5:20], kernel, 0.17, False)
    assert torch.equal(part, whole[:, 3:20, 5:18])


def test_what_is_not_a_number_stays_so_and_harms_no_other_voxel() -> None:
    expected, white, kernel = inputs((2, 8, 9), 1)
    whole = made(expected, white, kernel, 0.17, False)
    expected[1, 3, 4] = float("nan")
    broken = made(expected, white, kernel, 0.17, False)
    rest = torch.arange(broken.numel()) != expected.isnan().flatten().nonzero()[0]
    assert torch.equal(broken.flatten()[rest], whole.flatten()[rest])


def test_shapes_must_fit() -> None:
    expected, white, kernel = inputs((2, 4, 4), 1)
    with pytest.raises(AssertionError):
        made(expected, white[:, :-1], kernel, 0.17, True)
