"""Shrinking, filtering and enlarging of stacks: the compiled kernels against plain torch, at awkward sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synthaug.generators.axial import blur_axis, blur_widely, random_texture_volume, texture_grid_volume
from synthaug.kernels.wide_blur import add_enlarged, filter_axis, shrink
from synthaug.randomness import SampleKey

SIZES = [(1, 1, 1), (2, 3, 5), (7, 33, 18), (16, 64, 61), (3, 5, 1500)]


def noise(*size: int) -> Tensor:
    return torch.randn(size, generator=SampleKey(0, size).generator())


@pytest.mark.parametrize("size", SIZES)
def test_filters_are_those_of_plain_torch(size: tuple[int, int, int]) -> None:
    volume = noise(*size)
    for axis in range(3):
        for sigma in (0.3, 1.7, 4.0):  # reaches beyond the borders of small volumes, and is mirrored back again
            made = blur_axis(volume[None, None], sigma, axis + 2)
            plain = blur_axis(volume[None, None].double(), sigma, axis + 2)
            assert torch.allclose(made.double(), plain, atol=1e-6)
        if size[axis] > 2:
            short = filter_axis(volume, [0.5, 0.25], axis, False)
            wanted = filter_axis(volume, [0.5, 0.25], axis, True).narrow(axis, 1, size[axis] - 2)
            assert torch.equal(short, wanted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sigmas", [(8.0, 4.0, 4.0), (24.0, 12.0, 12.0), (24.0, 40.0, 40.0), (1.0, 1.0, 9.0)])
def test_wide_blurs_are_those_of_plain_torch(size: tuple[int, int, int], sigmas: tuple[float, float, float]) -> None:
    volume, amplitude = noise(1, 1, *size), noise(1, 1, *size).abs()
    total, plain = torch.ones_like(volume), torch.ones_like(volume, dtype=torch.float64)
    blur_widely(volume, sigmas).add_to(total, 3.0, amplitude)
    blur_widely(volume.double(), sigmas).add_to(plain, 3.0, amplitude.double())
    assert torch.allclose(total.double(), plain, atol=1e-5)
    blur_widely(volume, sigmas).add_to(total)
    blur_widely(volume.double(), sigmas).add_to(plain)
    assert torch.allclose(total.double(), plain, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_textures_are_those_of_plain_torch(size: tuple[int, int, int]) -> None:
    for sigmas in ((2.0, 4.0, 4.0), (6.0, 12.0, 12.0), (3.0, 1.0, 1.0)):
        white = noise(1, 1, *texture_grid_volume(size, sigmas))
        total, plain = torch.zeros(1, 1, *size), torch.zeros(1, 1, *size, dtype=torch.float64)
        random_texture_volume(white, sigmas).add_to(total, 2.0)
        random_texture_volume(white.double(), sigmas).add_to(plain, 2.0)
        assert torch.allclose(total.double(), plain, atol=1e-5)


def test_batches_are_filtered_volume_by_volume() -> None:
    volumes = noise(2, 1, 6, 20, 24)
    total = torch.zeros_like(volumes)
    blur_widely(volumes, (8.0, 4.0, 4.0)).add_to(total)
    for i in range(2):
        one = torch.zeros(1, 1, 6, 20, 24)
        blur_widely(volumes[i : i + 1], (8.0, 4.0, 4.0)).add_to(one)
        assert torch.equal(total[i], one[0])


def test_shrinking_takes_means_and_mirrors_the_far_border() -> None:
    volume = torch.arange(10.0).reshape(1, 2, 5)
    assert shrink(volume, [1, 2, 2])[0].tolist() == [[3.0, 5.0, 6.5]]
    assert torch.equal(shrink(volume, [1, 1, 1]), volume)


def test_what_is_not_contiguous_cannot_be_added_to() -> None:
    with pytest.raises(AssertionError, match="in place"):
        add_enlarged(noise(4, 4, 4).transpose(1, 2), noise(2, 2, 2), [2, 2, 2], [0, 0, 0], 1.0, None)
