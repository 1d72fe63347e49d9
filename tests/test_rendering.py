"""The rendering kernel gives loss and gradients of the full discrete alpha; the other terms those of autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from synthaug.kernels.rendering import (
    accumulated_opacity,
    mask_loss,
    mask_loss_reference,
    shape_loss,
    shape_loss_reference,
    trim_rays,
)


def wavy(size: int = 12, seed: int = 0) -> Tensor:
    """A field that rises and falls several times along a ray."""
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.normal(0.3, 1.0, (size,) * 3).astype(np.float32))


def some_rays(count: int, size: int = 12, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """origin, along, span and target of rays that stay inside the grid."""
    random = np.random.default_rng(seed)
    ends = random.uniform(0.01, size - 1.01, (2, count, 3))
    samples = random.integers(2, 17, count)
    first = random.integers(0, 4, count)
    along = (ends[1] - ends[0]) / (samples - 1)[:, None] * 0.999
    origin = ends[0] - first[:, None] * along
    span = np.stack([first, first + samples], 1)
    arrays = (origin.astype(np.float32), along.astype(np.float32), span.astype(np.int32))
    return *(torch.from_numpy(a) for a in arrays), torch.from_numpy(random.random(count, dtype=np.float32))


@pytest.mark.parametrize("inv_s", [0.7, 2.0, 5.0])
def test_loss_and_gradients_are_those_of_the_full_discrete_alpha(inv_s: float) -> None:
    rays = some_rays(60)
    totals, gradient = mask_loss(wavy(), *rays, inv_s)
    expected, expected_gradient = mask_loss_reference(wavy(), *rays, inv_s)
    assert torch.allclose(totals, expected, rtol=1e-4)
    assert torch.allclose(gradient, expected_gradient, atol=1e-4 * float(expected_gradient.abs().max()))
    assert float(expected_gradient.abs().max()) > 0.1


def test_a_ray_that_lost_the_surface_still_pulls_on_it() -> None:
    rays = some_rays(20)
    field = wavy() + 8
    totals, gradient = mask_loss(field, *rays, 3.0)
    expected, expected_gradient = mask_loss_reference(field, *rays, 3.0)
    assert torch.allclose(totals, expected, rtol=1e-4)
    assert torch.allclose(gradient, expected_gradient, atol=1e-4 * float(expected_gradient.abs().max()))
    assert float(gradient.abs().max()) > 1e-8  # the surface is eight voxels away


def test_the_opacity_of_one_descent_telescopes() -> None:
    values = torch.tensor([5.0, 3.0, 1.0, -0.5, 0.5, 2.0], dtype=torch.float64)
    lowest, first = torch.sigmoid(2 * values[3]), torch.sigmoid(2 * values[0])
    assert float(accumulated_opacity(values, 2.0)) == pytest.approx(float(1 - lowest / first), abs=1e-12)


def test_rising_rays_are_clear_and_deep_ones_opaque() -> None:
    assert float(accumulated_opacity(torch.tensor([-1.0, 0.0, 2.0]), 4.0)) == 0
    assert float(accumulated_opacity(torch.tensor([4.0, 0.0, -4.0]), 4.0)) == pytest.approx(1, abs=1e-5)


def test_rays_of_no_or_one_sample_are_clear() -> None:
    origin, along, span, _ = some_rays(2)
    span[:, 1] = span[:, 0] + torch.tensor([0, 1], dtype=torch.int32)
    totals, gradient = mask_loss(wavy(), origin, along, span, torch.tensor([0.0, 1.0]), 3.0)
    assert float(totals[0]) == pytest.approx(-math.log(1e-4))
    assert not gradient.any()


def test_without_rays_nothing_is_lost() -> None:
    totals, gradient = mask_loss(wavy(), *some_rays(0), 3.0)
    assert not totals.any()
    assert not gradient.any()


def test_samples_outside_the_grid_are_refused() -> None:
    origin, along, span, target = some_rays(3)
    span[1, 1] += 40
    for call in (
        lambda: mask_loss(wavy(), origin, along, span, target, 3.0),
        lambda: trim_rays(wavy(), origin, along, span, 1.0),
    ):
        with pytest.raises(ValueError, match="outside the grid"):
            call()


def test_rays_are_cut_to_where_the_field_is_low() -> None:
    axis = torch.arange(12.0)
    field = ((axis - 6).abs() - 2).expand(12, 12, 12).contiguous()
    origin, along = torch.tensor([[3.0, 3.0, 0.5], [3.0, 0.5, 0.5]]), torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    span = torch.tensor([[0, 10], [0, 10]], dtype=torch.int32)
    assert trim_rays(field, origin, along, span, 1.0).tolist() == [[3, 9], [0, 0]]


def test_shape_terms_are_those_of_autograd() -> None:
    for weights in ((1.0, 0.0), (0.0, 0.3), (0.7, 0.1)):
        totals, gradient = shape_loss(wavy(), *weights, 2.0, 1.5)
        expected, expected_gradient = shape_loss_reference(wavy(), *weights, 2.0, 1.5)
        assert torch.allclose(totals, expected, rtol=1e-5)
        assert torch.allclose(gradient, expected_gradient, atol=1e-5)
        assert gradient.abs().max() > 0.01


def test_operations_trace_without_running() -> None:
    origin, along, span, target = some_rays(4)
    torch.library.opcheck(mask_loss, (wavy(), origin, along, span, target, 2.0))
    torch.library.opcheck(trim_rays, (wavy(), origin, along, span, 1.0))
    torch.library.opcheck(shape_loss, (wavy(), 1.0, 0.1, 2.0, 1.5))
