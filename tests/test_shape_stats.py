"""Shape statistics of bodies whose volume, area and axes are known, and distances between sets of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from synthaug.errors import InputError
from synthaug.evaluation.shape_stats import (
    PROPERTIES,
    SHAPES,
    cell_statistics,
    compare,
    pooled_statistics,
    shape_statistics,
    volume_properties,
)
from synthaug.types import UNLABELLED, Cells


def ellipsoid(
    half_axes: tuple[float, float, float], shape: tuple[int, int, int] = (40, 40, 40), turn: float = 0.0
) -> NDArray[np.bool_]:
    """In the middle of the volume, turned about y."""
    z, y, x = (i - (n - 1) / 2 for i, n in zip(np.mgrid[tuple(slice(n) for n in shape)], shape))
    z, x = z * np.cos(turn) + x * np.sin(turn), x * np.cos(turn) - z * np.sin(turn)
    a, b, c = half_axes
    return np.asarray((z / a) ** 2 + (y / b) ** 2 + (x / c) ** 2 < 1)


def only(statistics: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    assert set(statistics) == set(SHAPES)
    assert all(len(values) == 1 for values in statistics.values())
    return {name: float(values[0]) for name, values in statistics.items()}


def area_of_spheroid(a: float, c: float) -> float:
    """Prolate: half axes a, a, c with c > a."""
    e = np.sqrt(1 - (a / c) ** 2)
    return float(2 * np.pi * a**2 * (1 + c / (a * e) * np.arcsin(e)))


@pytest.mark.parametrize("radius", [6.0, 9.0, 13.0])
def test_a_ball(radius: float) -> None:
    found = only(shape_statistics(ellipsoid((radius,) * 3)))
    assert found["volume"] == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)
    assert 0.97 < found["sphericity"] <= 1.0  # about 0.91 with staircases
    assert found["elongation"] == pytest.approx(1, abs=0.01)
    assert found["z_extent"] == 2 * radius
    assert found["equatorial_area"] == pytest.approx(np.pi * radius**2, rel=0.03)
    assert 0.98 < found["solidity"] <= 1.0


@pytest.mark.parametrize("turn", [0.0, 0.5])
def test_a_spheroid_in_any_direction(turn: float) -> None:
    found = only(shape_statistics(ellipsoid((16, 8, 8), turn=turn)))
    volume = 4 / 3 * np.pi * 16 * 8 * 8
    expected = np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / area_of_spheroid(8, 16)
    assert found["volume"] == pytest.approx(volume, rel=0.02)
    assert found["sphericity"] == pytest.approx(expected, abs=0.015)
    assert found["elongation"] == pytest.approx(2, abs=0.03)
    assert found["solidity"] > 0.98


def test_a_ball_in_flat_voxels() -> None:
    size = (2.0, 0.5, 0.5)
    found = only(shape_statistics(ellipsoid((5, 20, 20), (16, 48, 48)), size))
    assert found["volume"] == pytest.approx(4 / 3 * np.pi * 1000, rel=0.02)
    assert found["sphericity"] > 0.97
    assert found["elongation"] == pytest.approx(1, abs=0.03)
    assert found["z_extent"] == 20.0
    assert found["equatorial_area"] == pytest.approx(np.pi * 100, rel=0.02)


def test_lumps_and_dents_show() -> None:
    ball = only(shape_statistics(ellipsoid((10, 10, 10))))
    dumbbell = ellipsoid((8, 8, 8), (20, 24, 60))
    two = np.roll(dumbbell, -9, 2) | np.roll(dumbbell, 9, 2)
    found = only(shape_statistics(two))
    assert found["solidity"] < ball["solidity"] - 0.1
    assert found["sphericity"] < ball["sphericity"] - 0.1
    dented = ellipsoid((10, 10, 10)) & ~np.roll(ellipsoid((6, 6, 6)), 9, 0)
    assert only(shape_statistics(dented))["solidity"] < 0.95


def test_specks_and_cut_cells_are_left_out_and_ids_may_be_any() -> None:
    labels = np.zeros((30, 40, 40), np.int64)
    labels[10:20, 5:15, 5:15] = 70000
    labels[:8, 20:30, 20:30] = 3  # cut by the first plane
    labels[12:22, 20:30, 30:40] = 4  # by the last column
    labels[20, 20:26, 8:16] = 9  # 48 voxels
    labels[26, 20:26, 8:17] = 5  # 54, one plane thick
    found = shape_statistics(labels)
    assert found["volume"].tolist() == [54, 1000]  # in the order of ids
    assert all(np.isfinite(values).all() for values in found.values())
    assert shape_statistics(labels, min_voxels=40)["volume"].tolist() == [54, 48, 1000]
    pooled = pooled_statistics([labels, np.zeros_like(labels), labels])
    assert pooled["z_extent"].tolist() == [1, 10, 1, 10]
    assert {len(v) for v in pooled_statistics([np.zeros_like(labels)]).values()} == {0}


def test_generated_cells_count_in_their_own_pixels() -> None:
    masks = [
        ellipsoid((6, 6, 6), (21, 24, 24)),
        ellipsoid((6, 3, 3), (21, 24, 24)),
        ellipsoid((12, 6, 6), (21, 24, 24)),
    ]
    sdf = torch.tensor(np.where(masks, -1, 1), dtype=torch.float32)
    cells = Cells(torch.zeros_like(sdf), sdf, torch.ones(3), torch.tensor([1.0, 2.0, 1.0]))
    found = cell_statistics(cells, (2.0, 1.0, 1.0))
    assert len(found["volume"]) == 2  # the third one reaches the first and the last slice
    assert found["volume"].tolist() == [2 * masks[0].sum(), 8 * masks[1].sum()]  # pixels of the second one are 2 x 2
    assert found["elongation"] == pytest.approx([2, 2], abs=0.15)
    flat = Cells(sdf[:, :1], sdf[:, :1], torch.ones(3), torch.ones(3))
    with pytest.raises(InputError, match="stacks of several slices"):
        cell_statistics(flat)


def test_distance_is_in_standard_deviations_of_the_real_cells() -> None:
    rng = np.linspace(0, 1, 101)
    real = {"volume": 100 + 10 * rng, "solidity": rng}
    found = compare(real, {"volume": 105 + 10 * rng[::-1], "solidity": np.zeros(0)})
    assert found["volume"] == pytest.approx(5 / real["volume"].std())
    assert np.isnan(found["solidity"])
    assert compare(real, real) == {"volume": 0.0, "solidity": 0.0}


def test_properties_of_a_known_volume() -> None:
    labels = np.zeros((30, 60, 60), np.int32)
    for index, (z, y, x) in enumerate([(12, 12, 12), (12, 12, 36), (16, 40, 20)], start=1):
        labels[z - 4 : z + 4, y - 4 : y + 4, x - 4 : x + 4] = index
    labels[10:18, 52:60, 32:40] = 4  # cut
    labels[29, 59, 59] = 5  # a sliver
    image = (50 + 200 * (labels > 0) + 100 * (labels == 3)).astype(np.float32)
    found = volume_properties([(image, labels)], (2.0, 0.5, 0.5), min_piece=50)
    assert set(found) == set(PROPERTIES)
    assert found["volume"].tolist() == [256, 256, 256]
    assert found["intensity"] == pytest.approx([200, 200, 300])
    assert found["density"] == pytest.approx([3.5 / (30 * 60 * 60 * 0.5) * 1e6])  # the cut one counts half
    # 1 to 2: 24 columns; 3 to the cut cell, whose centre is at 13.5, 55.5, 35.5
    near = np.linalg.norm((np.array([15.5, 39.5, 19.5]) - [13.5, 55.5, 35.5]) * [2, 0.5, 0.5])
    assert found["nearest_neighbour"] == pytest.approx([12, 12, near])
    assert len(found["relative_intensity"]) == 0
    in_voxels = volume_properties([(image, labels)], min_piece=50)
    assert in_voxels["nearest_neighbour"][0] == 24
    empty = volume_properties([(image, np.zeros_like(labels))])
    assert empty["density"].tolist() == [0.0]
    assert all(len(values) == 0 for name, values in empty.items() if name != "density")


def test_bad_input() -> None:
    ball = ellipsoid((6, 6, 6)).astype(np.int32)
    sparse = ball.copy()
    sparse[::2] = UNLABELLED
    with pytest.raises(InputError, match=r"integers or bool of shape \[Z, Y, X\], got int32 of shape \(40, 40\)"):
        shape_statistics(ball[0])
    with pytest.raises(InputError, match="got float64"):
        shape_statistics(ball.astype(np.float64))
    with pytest.raises(InputError, match="all planes annotated, got minimum -1"):
        shape_statistics(sparse)
    with pytest.raises(InputError, match="voxel_size_um"):
        shape_statistics(ball, (1.0, 0.0, 1.0))
    image = ball.astype(np.float32)
    for pairs in ([(image, sparse)], [(image[0], ball[0])]):
        with pytest.raises(InputError, match="volumes with all planes annotated"):
            volume_properties(pairs)
