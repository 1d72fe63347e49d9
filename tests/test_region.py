"""Regions: what is fitted comes out again, windows show their share, and few cells do not lead astray."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from synthaug.errors import InputError
from synthaug.generators.region import FEWEST_CENTRES, Region
from synthaug.randomness import SampleKey

pytestmark = pytest.mark.usefixtures("untouched_random_state")

SIZE, REACH = (51, 124, 127), (14.0, 16.0, 16.0)
SHELL = Region(
    semi_axes=((20.0, 50.0, 40.0), (15.0, 45.0, 44.0), (22.0, 60.0, 55.0)),
    counts=(8.0, 20.0, 32.0),
    radii=tuple(0.6 + 0.4 * (i + 0.5) / 16 for i in range(16)),
)


def ball(key: SampleKey, num: int, innermost: float = 0.0) -> np.ndarray:
    """Points evenly in the unit ball, or in a shell of it."""
    random = key.numpy()
    points = random.standard_normal((num, 3))
    radius = random.uniform(innermost**3, 1, (num, 1)) ** (1 / 3)
    return points / np.linalg.norm(points, axis=1, keepdims=True) * radius


def volumes(num: int, innermost: float = 0.0) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
    """Cell centres in the ellipsoid of semi-axes (20, 50, 40), turned in plane, and the moments of its voxels."""
    centres, moments = [], []
    for i in range(num):
        angle = SampleKey(1, (i,)).numpy().random() * np.pi
        turn = np.eye(3)
        turn[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        place = turn * [20, 50, 40]
        centres.append(np.array([25, 62, 60]) + ball(SampleKey(2, (i,)), 200, innermost) @ place.T)
        voxels = np.array([25, 62, 60]) + ball(SampleKey(3, (i,)), 4000) @ place.T
        moments.append((voxels.mean(0), np.cov(voxels.T)))
    return centres, moments


@pytest.mark.parametrize("innermost", [0.0, 0.7])
def test_fit_finds_the_ellipsoid_and_tells_a_shell_from_a_ball(innermost: float) -> None:
    centres, moments = volumes(10, innermost)
    region = Region.fit([SIZE] * 10, centres, [12 + i for i in range(10)], moments)
    assert region is not None
    assert np.mean(region.semi_axes, axis=0) == pytest.approx([20, 50, 40], rel=0.03)
    assert region.counts == tuple(12.0 + i for i in range(10))
    expected = np.quantile(np.linalg.norm(ball(SampleKey(9), 9999, innermost), axis=1), [0.25, 0.5, 0.75])
    assert np.quantile(region.radii, [0.25, 0.5, 0.75]) == pytest.approx(expected, abs=0.03)
    assert (region.weights()[5] < 0.1) == (innermost > 0)


def test_fit_from_centres_alone_leaves_out_volumes_with_few() -> None:
    centres, _ = volumes(10)
    sparse = [c if i % 2 else c[: FEWEST_CENTRES - 1] for i, c in enumerate(centres)]
    region = Region.fit([SIZE] * 10, sparse, [30] * 10)
    assert region is not None
    assert len(region.semi_axes) == 5
    assert np.mean(region.semi_axes, axis=0) == pytest.approx([20, 50, 40], rel=0.2)
    assert Region.fit([SIZE] * 10, [c[:3] for c in centres], [30] * 10) is None


def test_light_alone_tells_the_ellipsoid_of_a_single_annotated_plane() -> None:
    covariance = np.diag([12.0, 50.0, 40.0]) ** 2 / 5
    region = Region.fit([SIZE], [np.array([[20.0, 60.0, 60.0]] * 3)], [12], [(np.array(SIZE) / 2, covariance)])
    assert region is not None
    assert region.semi_axes[0] == pytest.approx((12, 50, 40), rel=0.01)
    assert np.array(region.radii) ** 3 == pytest.approx((np.arange(32) + 0.5) / 32, abs=1e-3)  # a ball, evenly filled
    everywhere = np.diag(np.array(SIZE, float)) ** 2 / 12
    assert Region.fit([SIZE], [np.zeros((0, 3))], [12], [(np.array(SIZE) / 2, everywhere)]) is None


def test_cells_all_over_the_volume_are_not_confined() -> None:
    everywhere = [SampleKey(i).numpy().random((30, 3)) * SIZE for i in range(5)]
    assert Region.fit([SIZE] * 5, everywhere, [30] * 5) is None
    confined = [points * 0.5 + 10 for points in everywhere]
    assert Region.fit([SIZE] * 5, confined, [30] * 5) is not None


def test_an_ellipsoid_is_one_of_the_table_and_wholly_on_a_large_canvas() -> None:
    for i, count in enumerate([8, 20, 32] * 5):
        found = SHELL.ellipsoid(SampleKey(0, (i,)).numpy(), SIZE, REACH, count, SIZE)
        assert found[1:4] @ found[4:] == pytest.approx(np.eye(3), abs=1e-9)
        lengths = np.linalg.norm(found[1:4], axis=0) / SHELL.radii[-1]
        row = SHELL.counts.index(count)  # many cells come with the ellipsoid of many
        assert lengths == pytest.approx(SHELL.semi_axes[row])
        half = np.linalg.norm(found[1:4], axis=1) / SHELL.radii[-1]
        assert (found[0] + 0.5 >= half - 1e-9).all()
        assert (found[0] + 0.5 <= np.array(SIZE) - half + 1e-9).all()
    first = [SHELL.ellipsoid(SampleKey(1, (i,)).numpy(), SIZE, REACH, 8, SIZE) for i in range(40)]
    angles = [np.arctan2(found[3, 1], found[2, 1]) % np.pi for found in first]
    assert np.histogram(angles, 4, (0, np.pi))[0].min() >= 3  # turned by any angle


def test_a_window_shows_a_part() -> None:
    keys = [SampleKey(0, ("window", i)) for i in range(300)]
    whole = [SHELL.count(key, SIZE, REACH, 20.0, SIZE) for key in keys]
    assert np.mean(whole) == pytest.approx(20, abs=0.5)
    part = [SHELL.count(key, (16, 48, 48), REACH, 20.0, SIZE) for key in keys]
    assert 1 < np.mean(part) < 10
    assert np.std(part) > 1  # some windows show the middle of a shell, some its side
    assert min(part) >= 0
    assert [SHELL.count(key, SIZE, REACH, 0.0, SIZE) for key in keys[:20]] == [0] * 20


def test_windows_lie_anywhere_in_a_real_volume() -> None:
    """As many cells are seen as crops of a volume with the region in its middle hold."""
    one = Region(SHELL.semi_axes[1:2], SHELL.counts[1:2], SHELL.radii)
    canvas, random = np.array([24, 80, 80]), SampleKey(7).numpy()
    seen = []
    for i in range(300):
        ellipsoid = one.ellipsoid(SampleKey(6, (i,)).numpy(), SIZE, REACH, 20, SIZE)
        places = ellipsoid[0] + one._points(SampleKey(5, (i,)).numpy(), 100) @ ellipsoid[1:4].T
        places += np.array(SIZE) / 2 - 0.5 - ellipsoid[0]
        corner = random.random(3) * (np.array(SIZE) - canvas)
        seen.append(((places >= corner) & (places < corner + canvas)).all(1).mean())
    counts = [one.count(SampleKey(0, ("crop", i)), canvas.tolist(), (0, 0, 0), 20.0, SIZE) for i in range(300)]
    assert np.mean(counts) == pytest.approx(20 * np.mean(seen), rel=0.12)
    assert np.std(counts) == pytest.approx(20 * np.std(seen), rel=0.3)


def test_positions_lie_on_the_canvas_and_follow_the_radii() -> None:
    key, size = SampleKey(4), (16, 48, 48)
    ellipsoid = SHELL.ellipsoid(key.numpy(), size, REACH, 6, SIZE)
    points = SHELL.positions(key.child("p").numpy(), ellipsoid, size, REACH, 500).astype(float)
    places = ellipsoid[0] + points @ ellipsoid[1:4].T
    assert (places >= -np.array(REACH) / 2 - 0.5 - 1e-3).all()
    assert (places <= np.array(size) - 0.5 + np.array(REACH) / 2 + 1e-3).all()
    everywhere = SHELL.positions(key.child("q").numpy(), ellipsoid, (999, 999, 999), (9999.0,) * 3, 4000)
    radii = np.linalg.norm(everywhere, axis=1) * SHELL.radii[-1]
    assert np.quantile(radii, [0.1, 0.5, 0.9]) == pytest.approx([0.64, 0.8, 0.96], abs=0.02)
    away = np.concatenate([[[1e4, 0, 0]], ellipsoid[1:]])  # a window without any cell: still that many points
    assert SHELL.positions(key.numpy(), away, size, REACH, 7).shape == (7, 3)


def test_the_region_of_cells_that_are_there() -> None:
    ellipsoid = SHELL.ellipsoid(SampleKey(0).numpy(), SIZE, REACH, 20, SIZE)
    assert SHELL.around(np.zeros(SIZE, np.int32), ellipsoid) is ellipsoid
    z, y, x = np.mgrid[:51, :124, :127]
    inside = ((z - 20) / 12) ** 2 + ((y - 60) / 40) ** 2 + ((x - 70) / 30) ** 2 <= 1
    one = SHELL.around(inside.astype(np.int32), ellipsoid)
    assert one[0] == pytest.approx([20, 60, 70], abs=0.1)
    assert np.array_equal(one[1:], ellipsoid[1:])
    many = SHELL.around(np.where(inside, 1 + z % 12, 0), ellipsoid)
    lengths = np.linalg.norm(many[1:4], axis=0) / SHELL.radii[-1]
    assert lengths == pytest.approx([12, 40, 30], rel=0.03)
    assert many[1:4] @ many[4:] == pytest.approx(np.eye(3), abs=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        {"semi_axes": ((1.0, 2.0),) * 3},
        {"semi_axes": ((1.0, 2.0, 0.0),) * 3},
        {"semi_axes": (), "counts": ()},
        {"counts": (1.0, 2.0)},
        {"counts": (1.0, 2.0, 0.0)},
        {"radii": (0.5,)},
        {"radii": (0.5, 0.4)},
        {"radii": (0.0, 0.4)},
    ],
)
def test_wrong_tables_are_named(change: dict) -> None:
    with pytest.raises(InputError, match="Region"):
        replace(SHELL, **change)
