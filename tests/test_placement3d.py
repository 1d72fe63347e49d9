"""The compiled placement in volumes gives the reference's bits, at awkward sizes, and never breaks the rules of labels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthaug.kernels.placement3d import place_cells_3d, place_cells_3d_reference

NAMES = (
    *("masks", "counts", "positions", "directions", "choices", "gaps", "clearances", "clustered", "regions", "weights"),
    *("occupied", "size", "min_volume", "z_spacing"),
)


def candidates(
    counts: list[int],
    side: int,
    tries: int,
    size: tuple[int, int, int],
    radii: tuple[float, float] = (2, 6),
    *,
    slices: int = 9,
    seed: int = 0,
    occupied: bool = False,
    region: bool = False,
    min_volume: int = 1,
    z_spacing: float = 2.3,
    press: int = 0,
) -> dict[str, Any]:
    """Arguments of `place_cells_3d`: ellipsoids (with specks beside them), half of them clustered; gaps from -`press`."""
    random, n = np.random.default_rng(seed), sum(counts)
    z, y, x = (np.arange(m) - (m - 1) / 2 for m in (slices, side, side))
    masks = np.zeros((n, slices, side, side), bool)
    for mask in masks:
        c, a, b = random.uniform(*radii, 3)
        mask[:] = (z[:, None, None] / c * 1.5) ** 2 + (y[:, None] / a) ** 2 + (x / b) ** 2 <= 1
        mask[0, 0, 0] = random.random() < 0.3
    direction = random.normal(size=(n, tries, 3))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    positions = random.random((n, tries, 3), dtype=np.float32)
    regions, weights = np.zeros((len(counts), 7, 3)), np.zeros(0)
    if region:
        middle, axes = np.array(size) / 2, np.array(size) * [0.4, 0.3, 0.35]
        turn = np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]])
        regions[:] = np.concatenate([middle[None], turn * axes, (turn / axes).T])
        weights = np.array([0.2, 0.6, 1.0, 0.5])
        ball = random.normal(size=positions.shape)
        positions = (ball / np.linalg.norm(ball, axis=-1, keepdims=True) * positions[..., :1]).astype(np.float32)
    old = None
    if occupied:  # with a hole in the numbering
        old = np.zeros((len(counts), *size), np.int32)
        old[:, 1:3, 2:5, 3:9] = 1
        old[:, 2:4, 8:10, 5:6] = 4
    values = (
        *(masks, np.array(counts, np.int64), positions, direction.astype(np.float32)),
        random.random((n, tries, 2), dtype=np.float32),
        *(random.integers(-p, 4, (n, tries)) * random.integers(0, 2, (n, tries)) for p in (press, 0)),
        *(random.random(n) < 0.5, regions, weights, old),
    )
    tensors = [None if v is None else torch.from_numpy(v) for v in values]
    return dict(zip(NAMES, [*tensors, list(size), min_volume, z_spacing], strict=True))


AWKWARD: dict[str, dict[str, Any]] = {
    "no volume": {"counts": [], "side": 8, "tries": 4, "size": (4, 9, 9)},
    "no cell": {"counts": [0], "side": 16, "tries": 5, "size": (6, 20, 20)},
    "one volume empty": {"counts": [5, 0, 7], "side": 16, "tries": 8, "size": (12, 40, 50)},
    "rows of two words": {"counts": [30], "side": 16, "tries": 8, "size": (8, 20, 130), "occupied": True},
    "100 cells": {"counts": [100], "side": 16, "tries": 6, "size": (14, 48, 48), "occupied": True, "min_volume": 12},
    "side of no whole word": {"counts": [20], "side": 11, "tries": 8, "size": (12, 40, 41), "radii": (2, 5.4)},
    "one-voxel cells": {"counts": [40], "side": 5, "tries": 10, "size": (5, 12, 13), "radii": (0.2, 1.2)},
    "canvas smaller than a cell": {"counts": [4], "side": 16, "tries": 30, "size": (3, 5, 9), "radii": (5, 8)},
    "canvas of one voxel": {"counts": [3], "side": 9, "tries": 10, "size": (1, 1, 1), "radii": (1, 4)},
    "one plane": {"counts": [9], "side": 12, "tries": 10, "size": (1, 30, 64), "min_volume": 2, "slices": 7},
    "planes far apart": {"counts": [25], "side": 16, "tries": 10, "size": (9, 40, 40), "z_spacing": 7.0},
    "planes closer than pixels": {"counts": [25], "side": 16, "tries": 10, "size": (20, 40, 40), "z_spacing": 0.4},
    "a region": {"counts": [30, 12], "side": 16, "tries": 12, "size": (16, 48, 52), "region": True, "min_volume": 8},
    "a region with cells in it": {"counts": [30], "side": 16, "tries": 12, "size": (16, 48, 52), "region": True}
    | {"occupied": True},
    "pressed together": {"counts": [60], "side": 16, "tries": 6, "size": (14, 48, 70), "occupied": True, "press": 6}
    | {"min_volume": 12},
    "a region, pressed": {"counts": [30], "side": 16, "tries": 12, "size": (16, 48, 52), "region": True, "press": 4},
    "no try": {"counts": [2], "side": 12, "tries": 0, "size": (8, 32, 32)},
}


@pytest.mark.parametrize("name", AWKWARD)
def test_the_kernel_gives_the_bits_of_the_reference(name: str) -> None:
    for seed in range(2):
        inputs = candidates(**AWKWARD[name], seed=seed)
        compiled, reference = place_cells_3d(**inputs), place_cells_3d_reference(**inputs)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(compiled, reference))


@pytest.mark.parametrize("occupied", [False, True])
def test_labels_are_the_masks_and_nothing_overlaps(occupied: bool) -> None:
    inputs = candidates([40, 25], 16, 20, (16, 50, 70), occupied=occupied, min_volume=10)
    labels, corners = (t.numpy() for t in place_cells_3d(**inputs))
    masks = inputs["masks"].numpy()
    for b, rows in enumerate((range(40), range(40, 65))):
        volume = labels[b]
        assert not occupied or not (volume[inputs["occupied"][b].numpy() > 0] > 0).any()
        placed = [i for i in rows if corners[i, 3]]
        assert sorted(corners[placed, 3]) == list(range(1, len(placed) + 1)) == list(np.unique(volume)[1:])
        assert len(placed) >= 15
        for i in placed:
            parts, _ = ndimage.label(masks[i])
            at = np.argwhere(parts == np.bincount(parts.ravel())[1:].argmax() + 1) + corners[i, :3]
            at = at[((at >= 0) & (at < volume.shape)).all(1)]
            own = volume == corners[i, 3]
            # Every visible voxel of the mask is its own: nothing was overwritten
            assert own.sum() == len(at) >= 10
            assert own[tuple(at.T)].all()
            assert ndimage.label(own)[1] == 1


def test_pressed_cells_share_a_face_and_keep_most_of_themselves() -> None:
    z, y, x = (np.arange(n) - (n - 1) / 2 for n in (11, 24, 24))
    ball = (2 * z[:, None, None]) ** 2 + y[:, None] ** 2 + x**2 <= 9**2
    inputs = candidates([2], 24, 30, (30, 70, 70), slices=11, z_spacing=2.0)
    inputs["masks"] = torch.from_numpy(ball).expand(2, -1, -1, -1)
    inputs["positions"][0, 0] = 0.5  # the first one in the middle
    inputs["clustered"] = torch.tensor([False, True])
    shared, volumes = {}, {}
    for gap in (0, -2, -4, -30):
        inputs["gaps"] = torch.full_like(inputs["gaps"], gap)
        made = place_cells_3d(**inputs)[0][0].numpy()
        assert int((made == 1).sum()) == int(ball.sum()), "the first cell keeps every voxel"
        sides = [np.diff(made, axis=axis) != 0 for axis in range(3)]
        both = [made.take(range(1, n), a) * made.take(range(n - 1), a) == 2 for a, n in enumerate(made.shape)]
        shared[gap] = sum(int((side & two).sum()) for side, two in zip(sides, both))
        volumes[gap] = int((made == 2).sum())
    assert shared[0] < 25 < shared[-2] < shared[-4]
    assert volumes[0] > volumes[-2] > volumes[-4] >= 0.7 * volumes[0]
    assert (shared[-30], volumes[-30]) == (shared[0], volumes[0]), "too much: placed beside it"


def test_border_cells_occur_on_all_sides() -> None:
    volume = place_cells_3d(**candidates([60], 16, 30, (20, 60, 60)))[0][0].numpy()
    for axis in range(3):
        for side in (0, -1):
            assert len(np.unique(volume.take(side, axis))) > 2


def test_a_cell_cut_in_two_by_the_border_is_refused() -> None:
    inputs = candidates([1], 8, 200, (8, 8, 8), slices=8)
    bridge = torch.zeros((1, 8, 8, 8), dtype=torch.bool)
    bridge[0, :, :, :2] = bridge[0, :, :, -2:] = bridge[0, -2:] = True
    still = torch.zeros((1, 200), dtype=torch.int64)
    inputs |= {"masks": bridge, "gaps": still, "clearances": still, "clustered": torch.tensor([False])}
    # Candidates that leave only the two walls on the canvas: the cell's first plane at z = 4
    inputs["positions"][:] = (torch.tensor([4, 0, 0]) + 7 + 0.5) / 15
    assert int(place_cells_3d(**inputs)[1][0, 3]) == 0
    inputs["positions"][:, -1, 0] = (-4 + 7 + 0.5) / 15  # the bridge stays
    assert place_cells_3d(**inputs)[1][0].tolist() == [-4, 0, 0, 1]


def test_a_full_canvas_takes_nothing_and_ends() -> None:
    inputs = candidates([50], 16, 64, (8, 32, 32))
    inputs["occupied"] = torch.ones((1, 8, 32, 32), dtype=torch.int32)
    labels, corners = place_cells_3d(**inputs)
    assert int(labels.max()) == 0
    assert int(corners.abs().max()) == 0


@pytest.mark.parametrize("z_spacing", [1.0, 3.0])
def test_clustered_cells_touch_and_others_keep_their_clearance(z_spacing: float) -> None:
    inputs = candidates([10], 16, 64, (24, 90, 90), (4, 7), z_spacing=z_spacing)
    inputs["masks"][:, 0, 0, 0] = False
    inputs["gaps"] = torch.zeros_like(inputs["gaps"])
    inputs["clearances"] = torch.full_like(inputs["clearances"], 6)
    for clustered in (False, True):
        inputs["clustered"] = torch.full((10,), clustered)
        labels = place_cells_3d(**inputs)[0][0].numpy()
        assert labels.max() == 10
        gaps = []
        for i in range(1, 11):
            others = (labels == 0) | (labels == i)
            gaps.append(ndimage.distance_transform_edt(others, sampling=(z_spacing, 1, 1))[labels == i].min())
        if clustered:
            assert max(gaps) <= max(z_spacing, 1) * 1.8  # neighbours, over an edge or a corner at most
        else:
            assert min(gaps) >= 4


def test_gaps_and_clearances_count_planes_by_their_spacing() -> None:
    """Two cells of one plane, the second straight above the first with a gap of 6 pixels: 2 planes of 3 pixels, not 6."""
    inputs = candidates([2], 8, 1, (20, 9, 9), slices=1, z_spacing=3.0)
    masks = torch.zeros((2, 1, 8, 8), dtype=torch.bool)
    masks[:, 0, 1:6, 1:6] = True
    inputs |= {"masks": masks, "gaps": torch.tensor([[0], [6]]), "clustered": torch.tensor([False, True])}
    inputs["clearances"] = torch.zeros((2, 1), dtype=torch.int64)
    inputs["positions"][:] = 0.5
    inputs["directions"][:] = torch.tensor([1.0, 0.0, 0.0])
    corners = place_cells_3d(**inputs)[1]
    assert corners[:, 3].tolist() == [1, 2]
    assert (corners[1] - corners[0])[:3].tolist() == [1 + 2, 0, 0]  # the next plane is the first free one
    # Two planes further a clearance of 6 pixels is broken: moved by two planes the cell would meet the first one
    inputs |= {"clustered": torch.tensor([False, False]), "size": [3, 5, 5]}
    inputs["positions"][:] = torch.tensor([[0.1, 0.5, 0.5], [0.9, 0.5, 0.5]])[:, None]
    for clearance, label in ((6, 0), (4, 2)):  # 4 pixels are rounded to one plane
        inputs["clearances"][1] = clearance
        assert int(place_cells_3d(**inputs)[1][1, 3]) == label


def test_a_region_holds_all_middles() -> None:
    inputs = candidates([60], 16, 40, (24, 64, 64), (2, 5), region=True)
    corners = place_cells_3d(**inputs)[1].numpy()
    region = inputs["regions"][0].numpy()
    distances = []
    for i in np.flatnonzero(corners[:, 3]):
        parts, _ = ndimage.label(inputs["masks"][i].numpy())
        at = np.argwhere(parts == np.bincount(parts.ravel())[1:].argmax() + 1) + corners[i, :3]
        distances.append(np.linalg.norm(region[4:] @ ((at.min(0) + at.max(0)) / 2 - region[0])))
    assert len(distances) > 20
    assert max(distances) < 1 + 0.05  # rounded to whole voxels
    inputs["weights"] = torch.zeros(4, dtype=torch.float64)  # accepts nothing next to others
    inputs["positions"] = torch.zeros_like(inputs["positions"])  # and all elsewhere want the same place
    assert int(place_cells_3d(**inputs)[1][:, 3].max()) == 1


def test_one_result_in_many_threads() -> None:
    inputs = candidates([40, 40], 16, 20, (12, 60, 60))
    expected = place_cells_3d(**inputs)[0]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(expected, out[0]) for out in pool.map(lambda _: place_cells_3d(**inputs), range(12)))


@pytest.mark.parametrize("occupied", [False, True])
def test_the_op_is_registered_properly(occupied: bool) -> None:
    inputs = candidates([5, 7], 16, 6, (8, 30, 30), occupied=occupied)
    torch.library.opcheck(place_cells_3d, tuple(inputs.values()))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("masks", torch.Tensor.byte),
        ("positions", lambda t: t + 1),
        ("clearances", lambda t: t - 9),
        ("choices", lambda t: t + 1),
        ("regions", lambda t: t * float("nan")),
        ("size", lambda s: s[1:]),
        ("z_spacing", lambda z: z * 0),
    ],
)
def test_broken_candidates_are_caught(name: str, change: Any) -> None:
    inputs = candidates([5], 16, 6, (8, 30, 30))
    inputs[name] = change(inputs[name])
    with pytest.raises(AssertionError):
        place_cells_3d(**inputs)
