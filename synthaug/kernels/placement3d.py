"""Placing cells one after another at free positions of a volume: naive reference, numba kernel, one torch op.

The same sequential placement as in `placement.py` (Svoboda & Ulman 2013), with runs of voxels along X. What is taken is
kept as one bit a voxel, so that a run is tested by one or two words and the map of a 32 x 512 x 512 volume stays in the
cache. Reference and kernel give the same bits, for the same reasons as in 2D; there is no Triton version, either.

Distances (steps, gaps, clearances) are pixels of the image plane; a plane counts for `z_spacing` of them.

Importing this file imports numba and compiles (or reads from numba's cache) the kernel, so import it where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from synthaug.kernels.placement import LEAST_LEFT, _fits, _jit, _keep_largest, _largest_part, _size
from synthaug.kernels.runs3d import cut_runs, find_runs, is_clear, is_free, is_whole, join_runs


@_jit("boolean(float64, float64, float64, float64[:,::1], float64[::1], float64)")
def _is_accepted(z: float, y: float, x: float, region: Any, weights: Any, chance: float) -> bool:
    """A cell with its middle at (z, y, x) is accepted into the region with the chance of its distance from the middle."""
    dz, dy, dx = z - region[0, 0], y - region[0, 1], x - region[0, 2]
    squares = 0.0
    for axis in range(4, 7):
        along = region[axis, 0] * dz + region[axis, 1] * dy + region[axis, 2] * dx
        squares += along * along
    ring = int(math.sqrt(squares) * weights.shape[0])
    return ring < weights.shape[0] and chance < weights[ring]


@_jit(
    "void(uint8[:,:,:,::1], uint64[:,:,:,::1], int64[::1], float32[:,:,::1], float32[:,:,::1], float32[:,:,::1],"
    " int64[:,::1], int64[:,::1], uint8[::1], float64[:,:,::1], float64[::1], int32[:,:,:,::1], int64, float64,"
    " int32[:,:,:,::1], int64[:,::1])"
)
def _place(
    masks: Any,
    words: Any,
    counts: Any,
    positions: Any,
    directions: Any,
    choices: Any,
    gaps: Any,
    clearances: Any,
    clustered: Any,
    regions: Any,
    weights: Any,
    occupied: Any,
    min_volume: int,
    z_spacing: float,
    labels: Any,
    corners: Any,
) -> None:
    tries, side = positions.shape[1], masks.shape[3]
    depth, height, width = labels.shape[1], labels.shape[2], labels.shape[3]
    rows = masks.shape[1] * masks.shape[2]
    most = rows * (side // 2 + 1)
    runs, clipped, cut = np.empty((most, 4), np.int32), np.empty((most, 4), np.int32), np.empty((most, 4), np.int32)
    part, volumes, in_row = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(rows + 1, np.int64)
    taken = np.empty((depth, height, (width + 63) // 64), np.uint64)
    one, full = np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF)
    first = 0
    for b in range(counts.shape[0]):
        num_old = 0
        taken[:] = 0
        if occupied.shape[0]:
            for z in range(depth):
                for y in range(height):
                    for x in range(width):
                        if occupied[b, z, y, x]:
                            taken[z, y, x >> 6] |= one << np.uint64(x & 63)
                            num_old = max(num_old, occupied[b, z, y, x])
        # Boxes (front, top, left, back, bottom, right) of everything a new cell can be put next to
        boxes = np.empty((num_old + counts[b], 6), np.int64)
        boxes[:, 0], boxes[:, 1], boxes[:, 2], boxes[:, 3:] = depth, height, width, -1
        if num_old:
            for z in range(depth):
                for y in range(height):
                    for x in range(width):
                        if occupied[b, z, y, x]:
                            k = occupied[b, z, y, x] - 1
                            boxes[k, 0], boxes[k, 3] = min(boxes[k, 0], z), max(boxes[k, 3], z)
                            boxes[k, 1], boxes[k, 4] = min(boxes[k, 1], y), max(boxes[k, 4], y)
                            boxes[k, 2], boxes[k, 5] = min(boxes[k, 2], x), max(boxes[k, 5], x)
        num_boxes, num_placed = num_old, 0
        for i in range(first, first + counts[b]):
            n = find_runs(masks[i], words[i], runs)
            if join_runs(runs, n, masks.shape[2], in_row, part) > 1:
                n = _keep_largest(runs, n, part, volumes)
            if n == 0:
                continue
            plane, row, column, h, w = runs[0, 0], masks.shape[2], side, 0, 0
            for k in range(n):
                row, h = min(row, runs[k, 1]), max(h, runs[k, 1] + 1)
                column, w = min(column, runs[k, 2]), max(w, runs[k, 3])
            d, h, w = runs[n - 1, 0] - plane + 1, h - row, w - column
            least = np.float64(_size(runs, n)) * LEAST_LEFT
            for attempt in range(2 * tries):
                whole = 0
                t = attempt % tries
                if (clustered[i] != 0) == (attempt < tries):
                    if num_boxes == 0:
                        continue
                    a = int(np.float64(choices[i, t, 0]) * np.float64(num_boxes))
                    start_z = (boxes[a, 0] + boxes[a, 3] - d + 1) / 2
                    start_y, start_x = (boxes[a, 1] + boxes[a, 4] - h + 1) / 2, (boxes[a, 2] + boxes[a, 5] - w + 1) / 2
                    d_a = (boxes[a, 3] - boxes[a, 0] + 1) * z_spacing
                    h_a, w_a = boxes[a, 4] - boxes[a, 1] + 1, boxes[a, 5] - boxes[a, 2] + 1
                    distance = math.floor((min(d * z_spacing, h, w) + min(d_a, h_a, w_a)) / 4)
                    farthest = math.floor((d * z_spacing + d_a + (h + w + h_a + w_a)) / 2)
                    dz = np.float64(directions[i, t, 0]) / z_spacing
                    dy, dx = np.float64(directions[i, t, 1]), np.float64(directions[i, t, 2])
                    front, top, left, found = 0, 0, 0, False
                    while distance <= farthest:
                        front = math.floor(start_z + distance * dz + 0.5) - plane
                        top = math.floor(start_y + distance * dy + 0.5) - row
                        left = math.floor(start_x + distance * dx + 0.5) - column
                        if is_free(runs, n, front, top, left, width, taken):
                            if found or gaps[i, t] <= 0:
                                found = True
                                break
                            found = True
                            distance += gaps[i, t]
                        elif found:
                            found = False
                            break
                        else:
                            distance += 1
                    if not found or distance > farthest:
                        continue
                    if weights.shape[0] and not _is_accepted(
                        front + plane + (d - 1) / 2,
                        top + row + (h - 1) / 2,
                        left + column + (w - 1) / 2,
                        regions[b],
                        weights,
                        np.float64(choices[i, t, 1]),
                    ):
                        continue
                    if gaps[i, t] < 0 and a >= num_old and 2 * (distance + gaps[i, t]) >= distance:
                        near = distance + gaps[i, t]
                        near_front = math.floor(start_z + near * dz + 0.5) - plane
                        near_top = math.floor(start_y + near * dy + 0.5) - row
                        near_left = math.floor(start_x + near * dx + 0.5) - column
                        whole = cut_runs(runs, n, near_front, near_top, near_left, width, taken, cut)
                        if (
                            np.float64(_size(cut, whole)) >= least
                            and join_runs(cut, whole, masks.shape[2], in_row, part) == 1
                            and is_whole(
                                cut,
                                whole,
                                near_front,
                                near_top,
                                near_left,
                                depth,
                                height,
                                width,
                                min_volume,
                                masks.shape[2],
                                clipped,
                                in_row,
                                part,
                            )
                        ):
                            front, top, left = near_front, near_top, near_left
                        else:
                            whole = 0
                else:
                    p, q, r = (
                        np.float64(positions[i, t, 0]),
                        np.float64(positions[i, t, 1]),
                        np.float64(positions[i, t, 2]),
                    )
                    if weights.shape[0]:
                        m = regions[b]
                        at_z = m[0, 0] + (m[1, 0] * p + m[1, 1] * q + m[1, 2] * r)
                        at_y = m[0, 1] + (m[2, 0] * p + m[2, 1] * q + m[2, 2] * r)
                        at_x = m[0, 2] + (m[3, 0] * p + m[3, 1] * q + m[3, 2] * r)
                        front = math.floor(at_z - (d - 1) / 2 + 0.5) - plane
                        top = math.floor(at_y - (h - 1) / 2 + 0.5) - row
                        left = math.floor(at_x - (w - 1) / 2 + 0.5) - column
                    else:
                        front = int(p * np.float64(depth + d - 1)) - (d - 1) - plane
                        top = int(q * np.float64(height + h - 1)) - (h - 1) - row
                        left = int(r * np.float64(width + w - 1)) - (w - 1) - column
                    if not is_clear(runs, n, front, top, left, width, clearances[i, t], z_spacing, taken):
                        continue
                if whole == 0 and not is_whole(
                    runs,
                    n,
                    front,
                    top,
                    left,
                    depth,
                    height,
                    width,
                    min_volume,
                    masks.shape[2],
                    clipped,
                    in_row,
                    part,
                ):
                    continue
                num_placed += 1
                placed = cut if whole else runs
                for k in range(whole if whole else n):
                    z, y = placed[k, 0] + front, placed[k, 1] + top
                    start, end = max(placed[k, 2] + left, 0), min(placed[k, 3] + left, width)
                    if 0 <= z < depth and 0 <= y < height and start < end:
                        for x in range(start, end):
                            labels[b, z, y, x] = num_placed
                        for word in range(start >> 6, ((end - 1) >> 6) + 1):
                            bits = full
                            if word == start >> 6:
                                bits &= full << np.uint64(start & 63)
                            if word == (end - 1) >> 6:
                                bits &= full >> np.uint64(63 - ((end - 1) & 63))
                            taken[z, y, word] |= bits
                boxes[num_boxes, 0], boxes[num_boxes, 3] = plane + front, plane + front + d - 1
                boxes[num_boxes, 1], boxes[num_boxes, 4] = row + top, row + top + h - 1
                boxes[num_boxes, 2], boxes[num_boxes, 5] = column + left, column + left + w - 1
                num_boxes += 1
                corners[i, 0], corners[i, 1], corners[i, 2], corners[i, 3] = front, top, left, num_placed
                break
        first += counts[b]


@torch.library.custom_op("synthaug::place_cells_3d", mutates_args=(), device_types="cpu")
def place_cells_3d(
    masks: Tensor,
    counts: Tensor,
    positions: Tensor,
    directions: Tensor,
    choices: Tensor,
    gaps: Tensor,
    clearances: Tensor,
    clustered: Tensor,
    regions: Tensor,
    weights: Tensor,
    occupied: Tensor | None,
    size: Sequence[int],
    min_volume: int,
    z_spacing: float,
) -> tuple[Tensor, Tensor]:
    """Place the cells of each volume one after another, none over another; touching ones stay separate.

    The rules are those of `place_cells`, with 6-connected parts. A clustered cell goes outwards from the middle of another
    one's box in steps of one in-plane pixel; a step, a gap and a clearance of g pixels are g / `z_spacing` planes along z
    (a clearance is rounded to whole planes and also kept up and down).

    With a region the middle of a cell's box lies within an ellipsoid: places next to another cell are accepted with a
    chance that depends on the distance from the ellipsoid's middle, places anywhere are given as points of the unit ball.

    Args:
        masks: bool [N, S, P, P], the cells of all volumes, volume after volume.
        counts: int64 [B], cells of each volume, N in sum.
        positions: float32 [N, T, 3] (ZYX), where a cell goes that is placed anywhere. Without a region in [0, 1), from
            just off the canvas on one side to just off it on the other; with one, points that the region maps to voxels.
        directions: float32 [N, T, 3], unit vectors (ZYX) in in-plane pixels.
        choices: float32 [N, T, 2] in [0, 1): next to which cell, and what a region's chance must exceed.
        gaps: int64 [N, T], pixels, for cells placed next to another.
        clearances: int64 [N, T], >= 0, pixels, for cells placed anywhere.
        clustered: bool [N].
        regions: float64 [B, 7, 3] (ZYX), the ellipsoid's middle in voxels, the matrix from the unit ball to voxels, and
            its inverse; ignored if there are no `weights`.
        weights: float64 [W] in [0, 1], chance at W equal steps of the distance from the middle, 0 to the unit ball's
            surface; beyond it is 0. Empty: no region.
        occupied: int32 [B, Z, Y, X], labels of what is there already, from 1 without large holes, or None.
        size: (Z, Y, X) of the canvas.
        min_volume: voxels a cell must keep on the canvas.
        z_spacing: in-plane pixels from plane to plane, > 0.

    Returns:
        labels int32 [B, Z, Y, X] of the new cells, contiguous from 1 in each volume; and int64 [N, 4]: where each mask's
        voxel (0, 0, 0) lies on the canvas (z, y, x), and its label, 0 if it is left out.
    """
    _check(masks, counts, positions, directions, choices, gaps, clearances, clustered, regions, weights, occupied, size)
    assert z_spacing > 0, z_spacing
    labels = np.zeros((len(counts), *size), np.int32)
    corners = np.zeros((masks.shape[0], 4), np.int64)
    if masks.shape[3] % 8:  # whole words in a row
        masks = functional.pad(masks, (0, -masks.shape[3] % 8))
    stack = _array(masks)
    _place(
        stack,
        stack.view(np.uint64),
        *(_array(t) for t in (counts, positions, directions, choices, gaps, clearances, clustered, regions, weights)),
        np.empty((0, 0, 0, 0), np.int32) if occupied is None else _array(occupied),
        min_volume,
        z_spacing,
        labels,
        corners,
    )
    return torch.from_numpy(labels), torch.from_numpy(corners)


@place_cells_3d.register_fake
def _(
    masks: Tensor,
    counts: Tensor,
    positions: Tensor,
    directions: Tensor,
    choices: Tensor,
    gaps: Tensor,
    clearances: Tensor,
    clustered: Tensor,
    regions: Tensor,
    weights: Tensor,
    occupied: Tensor | None,
    size: Sequence[int],
    min_volume: int,
    z_spacing: float,
) -> tuple[Tensor, Tensor]:
    corners = masks.new_empty((masks.shape[0], 4), dtype=torch.int64)
    return masks.new_empty((counts.shape[0], *size), dtype=torch.int32), corners


def _array(tensor: Tensor) -> NDArray[Any]:
    """C-contiguous numpy view, bool as uint8."""
    tensor = tensor.contiguous()
    return np.asarray((tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor).numpy())


def _check(
    masks: Tensor,
    counts: Tensor,
    positions: Tensor,
    directions: Tensor,
    choices: Tensor,
    gaps: Tensor,
    clearances: Tensor,
    clustered: Tensor,
    regions: Tensor,
    weights: Tensor,
    occupied: Tensor | None,
    size: Sequence[int],
) -> None:
    """What the compiled code relies on."""
    floats = (positions, directions, choices)
    assert all(t.dtype == torch.float32 for t in floats), [t.dtype for t in floats]
    assert all(t.dtype == torch.int64 for t in (counts, gaps, clearances)), "counts, gaps, clearances must be int64"
    assert masks.dtype == clustered.dtype == torch.bool, (masks.dtype, clustered.dtype)
    assert regions.dtype == weights.dtype == torch.float64, (regions.dtype, weights.dtype)
    n, tries = positions.shape[:2]
    assert masks.shape == (n, *masks.shape[1:3], masks.shape[2]), masks.shape
    assert positions.shape == directions.shape == (n, tries, 3), (positions.shape, directions.shape)
    assert choices.shape == (n, tries, 2), choices.shape
    assert gaps.shape == clearances.shape == (n, tries), (gaps.shape, clearances.shape)
    assert clustered.shape == (n,), clustered.shape
    assert int(counts.sum()) == n, counts
    assert len(size) == 3, size
    assert regions.shape == (len(counts), 7, 3), regions.shape
    assert bool(torch.isfinite(regions).all() and torch.isfinite(positions).all()), "infinite places"
    assert not any(bool((t < 0).any()) for t in (counts, choices, clearances)), "negative numbers"
    assert bool((choices < 1).all()), "choices must be below 1"
    assert len(weights) or bool(((positions >= 0) & (positions < 1)).all()), "positions must be in [0, 1)"
    if occupied is not None:
        assert occupied.dtype == torch.int32, occupied.dtype
        assert occupied.shape == (len(counts), *size), (occupied.shape, size)
        assert bool((occupied >= 0).all()), "negative labels"


def place_cells_3d_reference(
    masks: Tensor,
    counts: Tensor,
    positions: Tensor,
    directions: Tensor,
    choices: Tensor,
    gaps: Tensor,
    clearances: Tensor,
    clustered: Tensor,
    regions: Tensor,
    weights: Tensor,
    occupied: Tensor | None,
    size: Sequence[int],
    min_volume: int,
    z_spacing: float,
) -> tuple[Tensor, Tensor]:
    """`place_cells_3d` by naive overlap tests on the full canvas, for tests and as the benchmark's other side."""
    labels = np.zeros((len(counts), *size), np.int32)
    corners = np.zeros((masks.shape[0], 4), np.int64)
    position, direction, choice = (t.numpy().astype(float) for t in (positions, directions, choices))
    gap, clearance, region, weight = (t.numpy() for t in (gaps, clearances, regions, weights))
    unit = np.array([z_spacing, 1.0, 1.0])
    first = 0
    for b, count in enumerate(counts.tolist()):
        old = np.zeros(tuple(size), np.int32) if occupied is None else occupied[b].numpy()
        taken, boxes, num_old = old != 0, [], int(old.max(initial=0))
        for box in ndimage.find_objects(old):
            spans = box if box else [slice(side, 0) for side in old.shape]
            boxes.append((np.array([s.start for s in spans]), np.array([s.stop - 1 for s in spans])))
        for i in range(first, first + count):
            mask = _largest_part(masks[i].numpy())
            if not mask.any():
                continue
            voxels = np.argwhere(mask)
            low, extent = voxels.min(0), np.ptp(voxels, axis=0) + 1
            corner = np.zeros(3, np.int64)
            for next_to in (bool(clustered[i]), not clustered[i]):
                for t in range(positions.shape[1]):
                    pressed = False
                    if next_to and boxes:
                        one, other = boxes[int(choice[i, t, 0] * len(boxes))]
                        start, way = (one + other - extent + 1) / 2, direction[i, t] / unit
                        sides, sides_a = extent * unit, (other - one + 1) * unit
                        nearest = math.floor((sides.min() + sides_a.min()) / 4)
                        farthest = math.floor((sides[0] + sides_a[0] + (sides[1:].sum() + sides_a[1:].sum())) / 2)
                        for distance in range(nearest, farthest + 1):
                            corner = np.floor(start + distance * way + 0.5).astype(int) - low
                            if not (_stamp(mask, corner, taken.shape) & taken).any():
                                break
                        else:
                            continue
                        distance += max(int(gap[i, t]), 0)
                        if distance > farthest:
                            continue
                        corner = np.floor(start + distance * way + 0.5).astype(int) - low
                        if len(weight):
                            away = corner + low + (extent - 1) / 2 - region[b, 0]
                            along = [(m[0] * away[0] + m[1] * away[1]) + m[2] * away[2] for m in region[b, 4:]]
                            ring = int(math.sqrt((along[0] ** 2 + along[1] ** 2) + along[2] ** 2) * len(weight))
                            if ring >= len(weight) or choice[i, t, 1] >= weight[ring]:
                                continue
                        nearer = distance + int(gap[i, t])
                        if nearer < distance <= 2 * nearer and int(choice[i, t, 0] * len(boxes)) >= num_old:
                            near = np.floor(start + nearer * way + 0.5).astype(int) - low
                            kept = mask & ~_taken_under(mask, near, taken)
                            pressed = bool(
                                kept.sum() >= LEAST_LEFT * mask.sum()
                                and ndimage.label(kept)[1] == 1
                                and _fits(_window(kept, near, taken.shape)[1], min_volume)
                            )
                            corner = near if pressed else corner
                    elif not next_to:
                        if len(weight):
                            ball = position[i, t]
                            at = [(m[0] * ball[0] + m[1] * ball[1]) + m[2] * ball[2] for m in region[b, 1:4]]
                            corner = np.floor(region[b, 0] + at - (extent - 1) / 2 + 0.5).astype(int) - low
                        else:
                            corner = (position[i, t] * (size + extent - 1)).astype(int) - (extent - 1) - low
                        if any(
                            (_stamp(mask, corner + move, taken.shape) & taken).any()
                            for move in _moves(int(clearance[i, t]), z_spacing)
                        ):
                            continue
                    else:
                        continue
                    free = not (_stamp(mask, corner, taken.shape) & taken).any()
                    if pressed or (free and _fits(_window(mask, corner, taken.shape)[1], min_volume)):
                        break
                else:
                    continue
                corners[i] = *corner, labels[b].max() + 1
                stamp = _stamp(mask, corner, taken.shape) & ~taken
                labels[b][stamp] = corners[i, 3]
                taken |= stamp
                boxes.append((low + corner, low + corner + extent - 1))
                break
        first += count
    return torch.from_numpy(labels), torch.from_numpy(corners)


def _taken_under(mask: NDArray[np.bool_], corner: NDArray[np.int64], taken: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is taken where the mask lies; nothing beyond the canvas."""
    out = np.zeros_like(mask)
    spans = _window(mask, corner, taken.shape)[0]
    inside = tuple(slice(s.start - c, s.stop - c) for s, c in zip(spans, corner))
    out[inside] = taken[spans]
    return out


def _moves(clearance: int, z_spacing: float) -> list[tuple[int, int, int]]:
    """The ten moves by which a cell keeps its clearance; none without one."""
    if not clearance:
        return []
    oblique, planes = int(7 * clearance + 5) // 10, math.floor(clearance / z_spacing + 0.5)
    flat = [
        (y * (oblique if x else clearance), x * (oblique if y else clearance)) for y in (-1, 0, 1) for x in (-1, 0, 1)
    ]
    return [(0, *move) for move in flat if any(move)] + [(-planes, 0, 0), (planes, 0, 0)]


def _window(
    mask: NDArray[np.bool_], corner: NDArray[np.int64], shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], NDArray[np.bool_]]:
    """Where on the canvas the mask lies, and the part of it that does."""
    spans = tuple(slice(max(c, 0), max(min(c + n, s), max(c, 0))) for c, n, s in zip(corner, mask.shape, shape))
    return spans, mask[tuple(slice(s.start - c, s.stop - c) for s, c in zip(spans, corner))]


def _stamp(mask: NDArray[np.bool_], corner: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The mask on an empty canvas, cut at its border."""
    canvas = np.zeros(shape, bool)
    spans, part = _window(mask, corner, shape)
    canvas[spans] = part
    return canvas
