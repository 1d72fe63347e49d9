"""Random shapes: the basis, what every kind has to be, and distances against exact ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthaug.errors import InputError
from synthaug.generators.cameras import VIEW_RADIUS, build_cameras
from synthaug.generators.shapes import (
    BEZIER,
    ELLIPSOID,
    LUMPY,
    REACH,
    SMOOTH,
    ShapeConfig,
    StarShapes,
    directions,
    draw_shapes,
    draw_star_shapes,
    frame_by_outline,
    harmonics,
    random_rotations,
    silhouettes,
    solid_angles,
    view_distance,
    voxelise,
)
from synthaug.randomness import SampleKey

KINDS = [SMOOTH, LUMPY, ELLIPSOID, BEZIER]


def keys(count: int, start: int = 0) -> list[SampleKey]:
    return [SampleKey(3, ("shape", start + i)) for i in range(count)]


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_the_basis_is_orthonormal_over_the_sphere():
    basis = harmonics(8)
    assert basis.shape == (65**2, 9**2 - 4)
    product = (basis * solid_angles()[:, None]).T @ basis
    assert torch.allclose(product, torch.eye(len(product)), atol=3e-3)


def test_the_basis_begins_with_the_harmonics_of_degree_2():
    z, y, x = directions().unbind(1)
    wanted = torch.stack([2 * x * y, 2 * y * z, (3 * z**2 - 1) / 3**0.5, 2 * x * z, x**2 - y**2], 1) * (15 / 4) ** 0.5
    assert torch.allclose(harmonics(4)[:, :5], wanted, atol=1e-4)


def test_the_power_of_a_degree_follows_the_law():
    shapes = draw_star_shapes(keys(60), replace(SMOOTH, power=-4.0, amplitude=0.02, order=8))
    radii = shapes.radii.flatten(1)
    coefficients = (radii / radii.mean(1, keepdim=True) * solid_angles()) @ harmonics(8)
    for degree in (2, 4, 6):
        first = degree**2 - 4
        power = coefficients[:, first : first + 2 * degree + 1].square().sum(1).mean()
        assert float(power) == pytest.approx(0.02 * degree**-4.0, rel=0.2)


def test_lumpy_shapes_are_rougher_than_smooth_ones():
    first_high = 6**2 - 4
    roughness = []
    for config in (SMOOTH, LUMPY):
        radii = draw_star_shapes(keys(16), config).radii.flatten(1)
        roughness.append(((radii * solid_angles()) @ harmonics(20))[:, first_high:].square().sum(1).mean())
    assert roughness[1] > 5 * roughness[0]


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("frame", ["volume", "outline"])
def test_every_shape_is_one_part_without_cavities_and_inside_the_cube(config, frame):
    for sdf in draw_shapes(keys(6), config, 32, frame=frame):
        inside = sdf.numpy() < 0
        assert inside.any()
        assert ndimage.label(inside)[1] == 1
        assert ndimage.label(~inside)[1] == 1
        outer = np.ones_like(inside)
        outer[1:-1, 1:-1, 1:-1] = False
        assert not (inside & outer).any()


@pytest.mark.parametrize("config", KINDS)
def test_a_shape_depends_on_its_own_key_alone(config):
    together = draw_shapes(keys(5), config, 24, frame="outline")
    assert torch.equal(draw_shapes([keys(5)[3]], config, 24, frame="outline")[0], together[3])
    assert torch.equal(draw_shapes(keys(5)[::-1], config, 24, frame="outline"), together.flip(0))
    assert len(together.flatten(1).unique(dim=0)) == 5


@pytest.mark.parametrize("config", KINDS)
def test_the_frame_by_volume_keeps_volume_and_centre(config):
    # Without the cap nothing shrinks; the radius is drawn from a single value.
    sdf = draw_shapes(keys(4), replace(config, radius=(0.4, 0.4)), 48)
    inside = sdf < 0
    volume = inside.flatten(1).float().mean(1) * 8
    assert torch.allclose(volume, torch.full((4,), 4 / 3 * torch.pi * 0.4**3), rtol=0.02)
    for shape in inside:
        centre = (torch.nonzero(shape).float().mean(0) + 0.5) / 48 * 2 - 1
        assert float(centre.abs().max()) < 0.01


def test_the_frame_by_volume_shrinks_what_would_leave_the_cube():
    sdf = draw_shapes(keys(4), replace(SMOOTH, radius=(0.9, 0.9)), 32)
    reach = [((torch.nonzero(s < 0).float() + 0.5) / 32 * 2 - 1).abs().max() for s in sdf]
    assert all(REACH - 2 / 32 <= float(r) <= REACH + 1 / 32 for r in reach)


@pytest.mark.parametrize("config", KINDS)
def test_the_frame_by_outline_fits_the_view_along_the_optical_axis(config):
    points = frame_by_outline(draw_star_shapes(keys(6), config)).points()
    radius = points[..., 1:].norm(dim=2).amax(1)
    assert torch.allclose(radius, torch.full((6,), VIEW_RADIUS), atol=1e-4)
    # A smallest circle is held from all sides: no half of it is free of points that are nearly on it.
    for flat, reach in zip(points[..., 1:], radius):
        on_circle = flat[flat.norm(dim=1) > 0.96 * reach]
        angle = torch.atan2(on_circle[:, 0], on_circle[:, 1]).sort().values
        gaps = torch.cat([angle[1:] - angle[:-1], (angle[0] - angle[-1] + 2 * torch.pi)[None]])
        assert float(gaps.max()) < 1.15 * torch.pi


def test_deep_shapes_are_compressed_into_the_cube():
    radii = draw_star_shapes(keys(1), ELLIPSOID).radii.fill_(1.0)
    needle = StarShapes(radii, torch.zeros(1, 3), torch.tensor([[3.0, 1.0, 1.0]]))
    points = frame_by_outline(needle).points()[0]
    assert float(points[:, 0].abs().max()) == pytest.approx(REACH, abs=1e-3)
    assert float(points[:, 1:].norm(dim=1).max()) == pytest.approx(VIEW_RADIUS, abs=1e-3)


def test_a_straight_bezier_shape_is_an_ellipsoid_of_revolution():
    config = replace(BEZIER, bend=0.0, taper=0.0, spread=0.3)
    for inside in draw_shapes(keys(4), config, 48) < 0:
        where = torch.nonzero(inside).double() + 0.5
        where -= where.mean(0)
        # Points of a solid ellipsoid are within sqrt(5) standard deviations along all axes.
        covariance = where.T @ where / len(where)
        reach = (where @ torch.linalg.inv(covariance) * where).sum(1).max().sqrt()
        assert float(reach) == pytest.approx(5**0.5, abs=0.12)


def test_bend_makes_shapes_concave():
    from scipy.spatial import ConvexHull

    def solidity(config: ShapeConfig) -> float:
        shares = []
        for sdf in draw_shapes(keys(6), config, 32):
            where = torch.nonzero(sdf < 0).numpy()
            shares.append(len(where) / ConvexHull(where).volume)
        return float(np.mean(shares))

    assert solidity(replace(BEZIER, bend=0.8)) < solidity(replace(BEZIER, bend=0.0)) - 0.03


def test_orientations_are_rotations_and_fill_the_sphere():
    turns = random_rotations(keys(400))
    assert torch.allclose(turns @ turns.transpose(1, 2), torch.eye(3).expand_as(turns), atol=1e-5)
    assert torch.allclose(torch.linalg.det(turns), torch.ones(400), atol=1e-5)
    assert float(turns[:, 0].mean(0).abs().max()) < 0.1
    assert torch.allclose(turns[:, 0].square().mean(0), torch.full((3,), 1 / 3), atol=0.06)


def ball(radius: float, centre: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> StarShapes:
    return StarShapes(torch.full((1, 65, 65), radius), torch.tensor([centre]), torch.ones(1, 3))


@pytest.mark.parametrize("exact", [False, True])
def test_distances_to_a_ball(exact):
    centre = (0.1, -0.05, 0.2)
    sdf = voxelise(ball(0.5, centre), 40, exact)[0]
    axis = (torch.arange(40) + 0.5) / 20 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    true = ((grid - torch.tensor(centre)).norm(dim=-1) - 0.5) * 20
    away = (true - sdf).abs()[true > -8]
    assert float(away.max()) < (0.6 if exact else 0.1)
    assert float((true - sdf).abs()[true.abs() < 1].max()) < 0.1
    assert torch.equal(sdf < 0, true < 0)


def test_exact_distances_are_better_far_from_a_long_ellipsoid():
    shapes = replace(ball(1.0), scale=torch.tensor([[0.85, 0.3, 0.3]]))
    z = torch.linspace(-1, 1, 4001)
    outline = torch.stack([0.85 * z, 0.3 * (1 - z**2).clamp_min(0).sqrt()], 1)
    axis = (torch.arange(32) + 0.5) / 16 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    flat = torch.stack([grid[..., 0], grid[..., 1:].norm(dim=-1)], -1)
    true = torch.cdist(flat.reshape(-1, 2), outline).amin(1).reshape(32, 32, 32) * 16
    outside = (voxelise(shapes, 32)[0] > 0) & (true > 4)
    fast, exact = (voxelise(shapes, 32, e)[0][outside] - true[outside] for e in (False, True))
    assert float(exact.abs().mean()) < 0.2
    assert float(exact.abs().mean()) < float(fast.abs().mean())


def test_occupied_voxels_have_the_silhouettes_of_their_distances():
    sdf = draw_shapes(keys(2), SMOOTH, 48)
    cameras = build_cameras("hemisphere", 4)
    for a, b in zip(silhouettes(sdf, cameras, 48), silhouettes(sdf < 0, cameras, 48)):
        assert all(overlap(one, two) > 0.94 for one, two in zip(a, b))


def test_view_distances_keep_area_and_measure_in_pooled_pixels():
    yy, xx = torch.meshgrid(*[torch.arange(64) - 31.5] * 2, indexing="ij")
    disc = (yy**2 + xx**2).sqrt() < 20
    sdf = view_distance(disc[None, None], pool=2)
    assert sdf.shape == (1, 1, 32, 32)
    assert int((sdf < 0).sum()) == pytest.approx(int(disc.sum()) / 4, rel=0.03)
    true = ((yy**2 + xx**2).sqrt() - 20).reshape(32, 2, 32, 2).mean((1, 3)) / 2
    assert float((sdf[0, 0] - true).abs()[true > -6].max()) < 0.4
    assert float(view_distance(disc, truncation=3.0).abs().max()) == 3.0


def test_no_shapes_at_all():
    for config in KINDS:
        assert draw_shapes([], config, 16).shape == (0, 16, 16, 16)
        assert draw_shapes([], config, 16, frame="outline").shape == (0, 16, 16, 16)
    assert view_distance(torch.zeros(0, 3, 8, 8, dtype=torch.bool)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "cube"},
        {"radius": (0.5, 0.2)},
        {"radius": (0.0, 0.2)},
        {"order": 1},
        {"least": 1.0},
        {"bend": -0.1},
    ],
)
def test_configs_that_mean_nothing_are_refused(wrong):
    with pytest.raises(InputError):
        ShapeConfig(**wrong)


def test_an_unknown_frame_is_refused():
    with pytest.raises(InputError, match="frame"):
        draw_shapes(keys(1), SMOOTH, 16, frame="mass")  # type: ignore[arg-type]
