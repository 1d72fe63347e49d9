"""Silhouettes of voxel shapes: the kernel against analytic outlines and against the reference."""

from __future__ import annotations

import pytest
import torch

from synthaug.generators.cameras import build_cameras
from synthaug.generators.shapes import LUMPY, SMOOTH, draw_shapes
from synthaug.kernels.silhouettes import lowest_on_rays, lowest_on_rays_reference
from synthaug.randomness import SampleKey

CAMERAS = build_cameras("hemisphere", 8)


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a & b).sum((-2, -1)) / (a | b).sum((-2, -1))


def pixels(size: int) -> torch.Tensor:
    """Pixel centres (down, right) in [-1, 1]^2, [size, size, 2]."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)


def ellipsoid(axes: torch.Tensor, turn: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """About signed distances [size]^3 in voxels, and the matrix A of p^T A p < 1."""
    matrix = turn.T @ torch.diag(axes**-2) @ turn
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    reach = (grid @ matrix * grid).sum(-1).sqrt()
    slope = (grid @ matrix).norm(dim=-1) / reach
    return (reach - 1) / slope * size / 2, matrix


@pytest.mark.parametrize("axes", [(0.6, 0.6, 0.6), (0.8, 0.35, 0.5), (0.3, 0.7, 0.45)])
def test_outlines_of_ellipsoids(axes):
    turn = build_cameras("hemisphere", 5).rotation[3]
    sdf, matrix = ellipsoid(torch.tensor(axes), turn, 48)
    seen = lowest_on_rays(sdf[None], CAMERAS.rotation, 64)[0] < 0
    where = pixels(64)
    for camera, view in zip(CAMERAS.rotation, seen):
        # Seen along depth d, p^T A p < 1 becomes q^T (Schur complement of A_dd) q < 1.
        turned = camera @ matrix @ camera.T
        flat = turned[1:, 1:] - turned[1:, :1] @ turned[:1, 1:] / turned[0, 0]
        true = (where @ flat * where).sum(-1) < 1
        assert float(overlap(view, true)) > 0.985


@pytest.mark.parametrize("size", [16, 33])
@pytest.mark.parametrize("side", [17, 24, 40])
def test_the_kernel_sees_what_the_reference_sees(size, side):
    sdf = draw_shapes([SampleKey(1, (i,)) for i in range(2)], SMOOTH if size > 20 else LUMPY, side)
    fast, slow = (f(sdf, CAMERAS.rotation, size) for f in (lowest_on_rays, lowest_on_rays_reference))
    differ = (fast < 0) != (slow < 0)
    # Only rays that graze the surface may differ.
    assert float(slow[differ].abs().max() if differ.any() else 0) < 0.1
    assert float(differ.float().mean()) < 0.003
    near = (slow > 0) & (slow < 3)
    assert float((fast - slow)[near].abs().mean()) < 0.15


def test_the_value_outside_is_the_distance_to_the_outline():
    axis = (torch.arange(40) + 0.5) / 20 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    sdf = (grid.norm(dim=-1) - 0.5) * 20
    seen = lowest_on_rays(sdf[None], CAMERAS.rotation, 40)[0]
    true = (pixels(40).norm(dim=-1) - 0.5) * 20
    ring = (true > 0) & (true < 6)
    assert float((seen - true)[:, ring].abs().max()) < 0.3
    assert bool((seen[:, true < -0.2] < 0).all())


def test_rays_beyond_the_cube_see_nothing():
    seen = lowest_on_rays(torch.full((1, 8, 8, 8), -3.0), CAMERAS.rotation, 64)[0]
    assert bool((seen[0] == -3).all())
    assert bool(((seen == -3) | (seen == 8)).all())
    # A camera at an angle looks past the cube at the corners of its image only where the cube ends.
    turned = torch.tensor([[[1.0, 0, 0], [0, 0.5**0.5, 0.5**0.5], [0, -(0.5**0.5), 0.5**0.5]]])
    corner = lowest_on_rays(torch.full((1, 8, 8, 8), -3.0), turned, 64)[0, 0]
    assert bool((corner == (-3.0)).sum() == (pixels(64).abs().sum(-1) <= 2**0.5).sum())


def test_silhouettes_have_no_holes_and_do_not_depend_on_the_others():
    from scipy import ndimage

    sdf = draw_shapes([SampleKey(2, (i,)) for i in range(3)], LUMPY, 32)
    seen = lowest_on_rays(sdf, CAMERAS.rotation, 64)
    for view in (seen < 0).flatten(0, 1).numpy():
        assert ndimage.label(view)[1] == 1
        assert ndimage.label(~view)[1] == 1
    assert torch.equal(lowest_on_rays(sdf[1:2], CAMERAS.rotation, 64)[0], seen[1])


def test_the_op_is_whole():
    sdf = draw_shapes([SampleKey(0)], SMOOTH, 8)
    torch.library.opcheck(lowest_on_rays, (sdf, CAMERAS.rotation, 8), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(AssertionError):
        lowest_on_rays(sdf.double(), CAMERAS.rotation, 8)
    with pytest.raises(AssertionError):
        lowest_on_rays(sdf[:, :4], CAMERAS.rotation, 8)
