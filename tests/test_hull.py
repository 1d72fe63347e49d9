"""Carving gives the reference's bits at awkward sizes; the hull of a ball is a little larger than the ball."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from synthaug.generators.cameras import build_cameras
from synthaug.kernels.hull import carve, carve_reference, hull_distance, hull_distance_reference


def discs(cells: int, num_views: int, side: int, radius: float) -> Tensor:
    """Signed distances to circles about the middle, pixels; one size and place a cell."""
    axis = torch.arange(side) + 0.5 - side / 2
    shift = torch.linspace(0, 1, cells)[:, None, None, None]
    distance = ((axis[:, None] - shift) ** 2 + axis**2).sqrt() - radius - shift
    return distance.expand(cells, num_views, side, side).float().contiguous()


def noisy(cells: int, num_views: int, side: int, share: float) -> Tensor:
    random = np.random.default_rng(cells)
    return torch.from_numpy(random.random((cells, num_views, side, side)) < share)


@pytest.mark.parametrize(
    ("cells", "num_views", "side", "size"),
    [(0, 4, 9, 8), (1, 2, 2, 2), (5, 16, 33, 17), (63, 3, 8, 5), (64, 3, 7, 9), (65, 5, 6, 11), (130, 2, 5, 4)],
)
def test_carving_gives_the_bits_of_the_reference(cells: int, num_views: int, side: int, size: int) -> None:
    cameras = build_cameras("hemisphere", num_views)
    views = noisy(cells, num_views, side, 0.8)
    hull = carve(views, cameras.rotation, size)
    assert hull.shape == (cells, size, size, size)
    assert torch.equal(hull, carve_reference(views, cameras.rotation, size))
    if cells > 1 and size > 4:
        assert hull.any()
        assert not hull.all()


def test_a_cell_does_not_depend_on_the_others_of_its_word() -> None:
    rotation = build_cameras().rotation
    views = noisy(70, 16, 12, 0.97)
    order = torch.arange(70).flip(0)
    assert torch.equal(carve(views, rotation, 10)[order], carve(views[order], rotation, 10))
    assert torch.equal(carve(views, rotation, 10)[66:67], carve(views[66:67], rotation, 10))


def test_one_empty_view_carves_everything_away() -> None:
    views = torch.ones((2, 16, 16, 16), dtype=torch.bool)
    rotation = build_cameras().rotation
    assert carve(views, rotation, 8).any()
    views[1, 7] = False
    assert carve(views, rotation, 8).flatten(1).any(1).tolist() == [True, False]


@pytest.mark.parametrize("preset", ["hemisphere", "ring"])
def test_the_hull_of_a_ball_holds_it_and_little_more(preset: str) -> None:
    rotation = build_cameras(preset, 16).rotation  # type: ignore[arg-type]
    axis = torch.arange(40) + 0.5 - 20
    ball = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt() - 12
    silhouettes = discs(1, 16, 40, 12.0) < 0
    distance = hull_distance(discs(1, 16, 40, 12.0), rotation, 40)[0]
    # A voxel's centre falls on a pixel whose own centre is up to 0.71 pixels away.
    assert carve(silhouettes, rotation, 40)[0][ball < -0.75].all()
    near = ball.abs() < 5  # at the centre distances have a kink, and farther out images end
    assert (distance <= ball + 0.05)[near].all()
    assert 1.0 <= float((distance < 0).sum() / (ball < 0).sum()) < 1.05
    middle = (slice(18, 22),) * 3
    assert torch.allclose(distance[middle], ball[middle], atol=0.7)  # exact inside, but for the kink at the centre


@pytest.mark.parametrize(("cells", "side", "size"), [(0, 8, 8), (1, 2, 3), (3, 21, 10), (2, 8, 19)])
def test_the_distance_gives_the_bits_of_the_reference(cells: int, side: int, size: int) -> None:
    rotation = build_cameras("hemisphere", 7).rotation
    sdf = discs(cells, 7, side, side / 4) + 0.3 * torch.arange(7)[:, None, None]
    assert torch.equal(hull_distance(sdf, rotation, size), hull_distance_reference(sdf, rotation, size))


def test_distances_are_in_voxels_of_the_size_asked_for() -> None:
    rotation = build_cameras().rotation
    coarse, fine = (hull_distance(discs(1, 16, 32, 9.0), rotation, size)[0] for size in (16, 48))
    assert torch.allclose(coarse * 3, fine[1::3, 1::3, 1::3], atol=1e-3)


@pytest.mark.parametrize("operation", [carve, hull_distance])
def test_operations_trace_without_running(operation: torch.library.CustomOpDef) -> None:
    views = noisy(2, 4, 8, 0.9) if operation is carve else discs(2, 4, 8, 3.0)
    torch.library.opcheck(operation, (views, build_cameras("hemisphere", 4).rotation, 6))


def test_misshapen_input_is_refused() -> None:
    rotation = build_cameras("hemisphere", 4).rotation
    with pytest.raises(AssertionError):
        carve(torch.ones((1, 3, 8, 8), dtype=torch.bool), rotation, 8)
    with pytest.raises(AssertionError):
        carve(torch.ones((1, 4, 8, 8)), rotation, 8)
    with pytest.raises(AssertionError):
        hull_distance(torch.ones((1, 4, 8, 9)), rotation, 8)
