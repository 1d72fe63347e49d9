"""The compiled placement gives the reference's bits, at awkward sizes, and never breaks the rules of labels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthaug.kernels import placement
from synthaug.kernels.placement import place_cells, place_cells_reference


def candidates(
    counts: list[int],
    side: int,
    tries: int,
    size: tuple[int, int],
    radii: tuple[float, float] = (3, 9),
    *,
    seed: int = 0,
    occupied: bool = False,
    press: int = 0,
) -> list[Any]:
    """Arguments of `place_cells`: ellipses (with specks beside them), half of them clustered; gaps down to -`press`."""
    random, n = np.random.default_rng(seed), sum(counts)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    masks = np.zeros((n, side, side), bool)
    for mask in masks:
        (a, b), angle = random.uniform(*radii, 2), random.uniform(0, np.pi)
        u, v = y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)
        mask[:] = (u / a) ** 2 + (v / b) ** 2 <= 1
        mask[0, 0] = random.random() < 0.3
    direction = random.uniform(0, 2 * np.pi, (n, tries))
    old = np.zeros((len(counts), *size), np.int32)
    if occupied:  # with a hole in the numbering
        old[:, 2:5, 3:9] = 1
        old[:, 8:10, 5:6] = 4
    return [
        torch.from_numpy(masks),
        torch.tensor(counts, dtype=torch.int64),
        torch.from_numpy(random.random((n, tries, 2), dtype=np.float32)),
        torch.from_numpy(np.stack([np.sin(direction), np.cos(direction)], -1).astype(np.float32)),
        torch.from_numpy(random.integers(-press, 4, (n, tries)) * random.integers(0, 2, (n, tries))),
        torch.from_numpy(random.integers(0, 6, (n, tries)) * random.integers(0, 2, (n, tries))),
        torch.from_numpy(random.random(n) < 0.5),
        torch.from_numpy(old),
    ]


AWKWARD: dict[str, tuple[dict[str, Any], int]] = {
    "no frame": ({"counts": [], "side": 8, "tries": 4, "size": (9, 9)}, 1),
    "no cell": ({"counts": [0], "side": 16, "tries": 5, "size": (20, 20)}, 1),
    "one frame empty": ({"counts": [5, 0, 7], "side": 24, "tries": 8, "size": (40, 50)}, 1),
    "300 cells": ({"counts": [300], "side": 24, "tries": 6, "size": (96, 96), "occupied": True}, 12),
    "one-pixel cells": ({"counts": [40], "side": 5, "tries": 10, "size": (30, 31), "radii": (0.2, 1.2)}, 1),
    "canvas smaller than a cell": ({"counts": [4], "side": 32, "tries": 30, "size": (5, 9), "radii": (8, 15)}, 3),
    "canvas of one pixel": ({"counts": [3], "side": 9, "tries": 10, "size": (1, 1), "radii": (1, 4)}, 1),
    "one row": ({"counts": [9], "side": 12, "tries": 10, "size": (1, 64), "radii": (1, 6)}, 2),
    "300 cells pressed together": (
        {"counts": [300], "side": 24, "tries": 6, "size": (96, 96), "occupied": True, "press": 9},
        12,
    ),
    "small canvas, pressed": ({"counts": [9], "side": 24, "tries": 30, "size": (24, 30), "press": 7}, 3),
    "no try": ({"counts": [2], "side": 12, "tries": 0, "size": (32, 32)}, 1),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_the_kernel_gives_the_bits_of_the_reference(name: str) -> None:
    arguments, min_area = AWKWARD[name]
    for seed in range(3):
        inputs = candidates(**arguments, seed=seed)
        inputs.append(min_area)
        labels, corners = place_cells(*inputs)
        expected_labels, expected_corners = place_cells_reference(*inputs)
        assert torch.equal(labels, expected_labels)
        assert torch.equal(corners, expected_corners)


def test_pressed_cells_share_an_edge_and_keep_most_of_themselves() -> None:
    y, x = np.mgrid[:41, :41] - 20
    disc = torch.from_numpy(np.hypot(y, x) <= 12)
    inputs = candidates([2], 41, 40, (120, 120))
    inputs[0] = disc.expand(2, -1, -1)
    inputs[2][0, 0] = 0.5  # the first one in the middle
    inputs[6] = torch.tensor([False, True])
    shared, areas = {}, {}
    for gap in (0, -3, -6, -30):
        inputs[4] = torch.full_like(inputs[4], gap)
        frame = place_cells(*inputs, 10)[0][0].numpy()
        assert sorted(np.unique(frame)) == [0, 1, 2]
        pairs = [frame[1:] * frame[:-1], frame[:, 1:] * frame[:, :-1]]
        shared[gap], areas[gap] = sum(int((p == 2).sum()) for p in pairs), int((frame == 2).sum())
        assert int((frame == 1).sum()) == int(disc.sum()), "the first cell keeps every pixel"
    # Discs of radius 12 that overlap by 3 and 6 pixels: chords of 11 and 16, up to 1.4 times as many edges of pixels.
    assert shared[0] <= 6 < 11 <= shared[-3] < shared[-6] < 26
    assert areas[0] > areas[-3] > areas[-6] >= 0.7 * areas[0]
    assert (shared[-30], areas[-30]) == (shared[0], areas[0]), "too much: placed beside it"


def test_cells_that_are_there_already_are_not_pressed_against() -> None:
    inputs = candidates([30], 24, 20, (60, 60), press=8)
    inputs[7][0, 20:40, 20:40] = 1
    alone = [t.clone() for t in inputs]
    alone[4] = alone[4].clamp(min=0)
    alone[6][:] = inputs[6][:] = True
    first = [place_cells(*x, 10)[1][0].tolist() for x in (inputs, alone)]
    assert first[0] == first[1]


@pytest.mark.parametrize("occupied", [False, True])
def test_labels_are_the_masks_and_nothing_overlaps(occupied: bool) -> None:
    inputs = candidates([60, 25], 24, 20, (90, 70), occupied=occupied)
    labels, corners = place_cells(*inputs, 10)
    masks, old = inputs[0].numpy(), inputs[-1].numpy()
    for b, rows in enumerate((range(60), range(60, 85))):
        frame = labels[b].numpy()
        assert not (frame[old[b] > 0] > 0).any()
        placed = [i for i in rows if corners[i, 2]]
        assert sorted(corners[placed, 2].tolist()) == list(range(1, len(placed) + 1)) == list(np.unique(frame)[1:])
        assert len(placed) >= 15
        for i in placed:
            parts, _ = ndimage.label(masks[i])
            y, x = np.nonzero(parts == np.bincount(parts.ravel())[1:].argmax() + 1)
            y, x = y + int(corners[i, 0]), x + int(corners[i, 1])
            inside = (y >= 0) & (y < 90) & (x >= 0) & (x < 70)
            own = frame == int(corners[i, 2])
            # Every visible pixel of the mask is its own: nothing was overwritten
            assert own.sum() == inside.sum() >= 10
            assert own[y[inside], x[inside]].all()
            assert ndimage.label(own)[1] == 1


def test_border_cells_occur() -> None:
    labels, _ = place_cells(*candidates([40], 24, 30, (90, 90)), 1)
    border = np.concatenate([labels[0, 0], labels[0, -1], labels[0, :, 0], labels[0, :, -1]])
    assert len(np.unique(border)) > 4


def test_a_cell_cut_in_two_by_the_border_is_refused() -> None:
    horseshoe = torch.zeros((1, 8, 8), dtype=torch.bool)
    horseshoe[0, :, :2] = horseshoe[0, :, -2:] = horseshoe[0, -2:] = True
    inputs = candidates([1], 8, 200, (8, 8))
    inputs[0] = horseshoe
    wanted = torch.zeros((1, 200), dtype=torch.int64)
    # Candidates that leave only the two legs on the canvas: the cell's top row at y = 4
    inputs[2][:, :, 0], inputs[2][:, :, 1] = (4 + 7 + 0.5) / 15, (0 + 7 + 0.5) / 15
    inputs[4], inputs[5], inputs[6] = wanted, wanted, torch.tensor([False])
    assert int(place_cells(*inputs, 1)[1][0, 2]) == 0
    inputs[2][:, -1, 0] = (-4 + 7 + 0.5) / 15  # the closed end stays
    assert place_cells(*inputs, 1)[1][0].tolist() == [-4, 0, 1]


def test_a_full_canvas_takes_nothing_and_ends() -> None:
    inputs = candidates([50], 24, 64, (64, 64))
    inputs[-1] = torch.ones((1, 64, 64), dtype=torch.int32)
    labels, corners = place_cells(*inputs, 1)
    assert int(labels.max()) == 0
    assert int(corners.abs().max()) == 0


def test_clustered_cells_touch_and_others_keep_their_clearance() -> None:
    inputs = candidates([12], 24, 64, (160, 160), (5, 9))
    inputs[0][:, 0, 0] = False
    inputs[4] = torch.zeros_like(inputs[4])
    inputs[5] = torch.full_like(inputs[5], 6)
    for clustered in (False, True):
        inputs[6] = torch.full((12,), clustered)
        labels = place_cells(*inputs, 1)[0][0].numpy()
        assert labels.max() == 12
        gaps = [
            ndimage.distance_transform_edt((labels == 0) | (labels == i))[labels == i].min() - 1 for i in range(1, 13)
        ]
        if clustered:
            assert max(gaps) <= 1  # in a slanted direction the last step frees up to a pixel more
        else:
            assert min(gaps) >= 3.5


def test_one_result_in_many_threads() -> None:
    inputs = candidates([80, 80], 24, 20, (128, 128))
    expected = place_cells(*inputs, 5)[0]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(expected, out[0]) for out in pool.map(lambda _: place_cells(*inputs, 5), range(12)))


def test_the_op_is_registered_properly() -> None:
    torch.library.opcheck(place_cells, (*candidates([5, 7], 16, 6, (40, 40)), 3))


@pytest.mark.parametrize(("position", "change"), [(0, torch.Tensor.byte), (2, lambda t: t + 1), (5, lambda t: t - 9)])
def test_broken_candidates_are_caught(position: int, change: Any) -> None:
    inputs = candidates([5], 16, 6, (40, 40))
    inputs[position] = change(inputs[position])
    with pytest.raises(AssertionError):
        place_cells(*inputs, 1)


def test_it_compiles_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, asked = placement.numba.njit, []

    def unwritable(signature: str, *, nogil: bool, cache: bool = False) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compiled(signature, nogil=nogil)

    monkeypatch.setattr(placement.numba, "njit", unwritable)
    assert placement._jit("int64(int64)")(lambda x: x + 1)(41) == 42
    assert asked == [True, False]
