"""Placing cells one after another at free positions of a canvas: naive reference, numba kernel, one torch op.

The sequential placement of Svoboda & Ulman (2013), as the paper's section "Cell Population Synthesis" uses it. Overlaps
are tested on the runs of a cell's mask instead of on the whole canvas, and exactly: reference and kernel give the same
bits, because both get the same random candidates and do the same few float64 operations with them.

There is no Triton version: every cell depends on all cells placed before it, so there is nothing to run in parallel
within a frame, and one frame takes a fraction of a millisecond on a CPU core.

Importing this file imports numba and compiles (or reads from numba's cache) the kernel, so import it where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

LEAST_LEFT = 0.7
"""Share of its pixels that a cell keeps where it is pressed against others."""


def _jit(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile for one signature, from numba's cache where there is a folder it can write to."""

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)
        except (RuntimeError, OSError):  # no folder for the cache can be found, or it cannot be written
            return numba.njit(signature, nogil=True)(function)

    return compile_function


@_jit("int64(uint8[:,::1], int32[:,::1])")
def _find_runs(mask: Any, runs: Any) -> int:
    """Horizontal runs (row, start, end) of a mask in raster order; their number."""
    n = 0
    for y in range(mask.shape[0]):
        x = 0
        while x < mask.shape[1]:
            if mask[y, x]:
                start = x
                while x < mask.shape[1] and mask[y, x]:
                    x += 1
                runs[n, 0], runs[n, 1], runs[n, 2] = y, start, x
                n += 1
            else:
                x += 1
    return n


@_jit("int64(int64[::1], int64, int64)")
def _join(part: Any, a: int, b: int) -> int:
    """Make one of the parts that two runs belong to; how many parts fewer there are."""
    while part[a] != a:
        a = part[a]
    while part[b] != b:
        b = part[b]
    if a == b:
        return 0
    part[max(a, b)] = min(a, b)
    return 1


@_jit("int64(int32[:,::1], int64, int64[::1])")
def _join_runs(runs: Any, n: int, part: Any) -> int:
    """Name the 4-connected part of each run by the index of the part's first run; the number of parts."""
    parts, before, row = 0, 0, 0  # runs before..row-1 lie above those from row on
    for k in range(n):
        part[k] = k
        parts += 1
        if k and runs[k, 0] != runs[k - 1, 0]:
            before, row = row, k
            if runs[k, 0] != runs[k - 1, 0] + 1:
                before = row
        for above in range(before, row):
            if runs[above, 1] < runs[k, 2] and runs[k, 1] < runs[above, 2]:
                parts -= _join(part, above, k)
    for k in range(n):
        part[k] = part[part[k]]
    return parts


@_jit("int64(int32[:,::1], int64)")
def _size(runs: Any, n: int) -> int:
    """Pixels, or voxels, of runs (..., start, end)."""
    size, end = 0, runs.shape[1] - 1
    for k in range(n):
        size += runs[k, end] - runs[k, end - 1]
    return size


@_jit("int64(int32[:,::1], int64, int64[::1], int64[::1])")
def _keep_largest(runs: Any, n: int, part: Any, sizes: Any) -> int:
    """Drop all runs (..., start, end) but those of the largest part (the first of equals); the number left."""
    end = runs.shape[1] - 1
    sizes[:n] = 0
    for k in range(n):
        sizes[part[k]] += runs[k, end] - runs[k, end - 1]
    best = 0
    for k in range(n):
        if sizes[k] > sizes[best]:
            best = k
    kept = 0
    for k in range(n):
        if part[k] == best:
            runs[kept] = runs[k]
            kept += 1
    return kept


@_jit("boolean(int32[:,::1], int64, int64, int64, uint8[:,::1])")
def _is_free(runs: Any, n: int, top: int, left: int, taken: Any) -> bool:
    """No pixel of the shifted runs that lies on the canvas is taken."""
    for k in range(n):
        y = runs[k, 0] + top
        if 0 <= y < taken.shape[0]:
            hit = np.uint8(0)
            for x in range(max(runs[k, 1] + left, 0), min(runs[k, 2] + left, taken.shape[1])):
                hit |= taken[y, x]  # without an exit inside, so that the loop is vectorised
            if hit:
                return False
    return True


@_jit("boolean(int32[:,::1], int64, int64, int64, int64, uint8[:,::1])")
def _is_clear(runs: Any, n: int, top: int, left: int, clearance: int, taken: Any) -> bool:
    """The place is free, and it stays free if the cell is moved by `clearance` pixels in any of eight directions."""
    if not _is_free(runs, n, top, left, taken):
        return False
    if clearance:
        oblique = (7 * clearance + 5) // 10
        for dy in range(-1, 2):
            for dx in range(-1, 2):
                step = oblique if dy and dx else clearance
                if (dy or dx) and not _is_free(runs, n, top + dy * step, left + dx * step, taken):
                    return False
    return True


@_jit("boolean(int32[:,::1], int64, int64, int64, int64, int64, int64, int32[:,::1], int64[::1])")
def _is_whole(
    runs: Any, n: int, top: int, left: int, height: int, width: int, min_area: int, clipped: Any, part: Any
) -> bool:
    """At least min_area pixels of the shifted runs lie on the canvas, and these are one 4-connected part."""
    kept, area, cut = 0, 0, False
    for k in range(n):
        y, start, end = runs[k, 0] + top, max(runs[k, 1] + left, 0), min(runs[k, 2] + left, width)
        if 0 <= y < height and start < end:
            clipped[kept, 0], clipped[kept, 1], clipped[kept, 2] = y, start, end
            kept += 1
            area += end - start
            cut = cut or end - start < runs[k, 2] - runs[k, 1]
        else:
            cut = True
    return area >= min_area and area > 0 and (not cut or _join_runs(clipped, kept, part) == 1)


@_jit("int64(int32[:,::1], int64, int64, int64, uint8[:,::1], int32[:,::1])")
def _cut_runs(runs: Any, n: int, top: int, left: int, taken: Any, cut: Any) -> int:
    """What the shifted runs keep where nothing is taken, beyond the canvas included; their number."""
    kept = 0
    for k in range(n):
        y, x, end = runs[k, 0] + top, runs[k, 1], runs[k, 2]
        inside = 0 <= y < taken.shape[0]
        while x < end:
            if inside and 0 <= x + left < taken.shape[1] and taken[y, x + left]:
                x += 1
                continue
            start = x
            while x < end and not (inside and 0 <= x + left < taken.shape[1] and taken[y, x + left]):
                x += 1
            cut[kept, 0], cut[kept, 1], cut[kept, 2] = runs[k, 0], start, x
            kept += 1
    return kept


@_jit(
    "void(uint8[:,:,::1], int64[::1], float32[:,:,::1], float32[:,:,::1], int64[:,::1], int64[:,::1], uint8[::1],"
    " int32[:,:,::1], int64, int32[:,:,::1], int64[:,::1])"
)
def _place(
    masks: Any,
    counts: Any,
    positions: Any,
    directions: Any,
    gaps: Any,
    clearances: Any,
    clustered: Any,
    occupied: Any,
    min_area: int,
    labels: Any,
    corners: Any,
) -> None:
    size, tries = masks.shape[1], positions.shape[1]
    height, width = labels.shape[1], labels.shape[2]
    most = size * (size // 2 + 1)
    runs, clipped, cut = np.empty((most, 3), np.int32), np.empty((most, 3), np.int32), np.empty((most, 3), np.int32)
    part, areas = np.empty(most, np.int64), np.empty(most, np.int64)
    taken = np.empty((height, width), np.uint8)
    first = 0
    for b in range(counts.shape[0]):
        num_old = 0
        for y in range(height):
            for x in range(width):
                taken[y, x] = occupied[b, y, x] != 0
                num_old = max(num_old, occupied[b, y, x])
        # Boxes (top, left, bottom, right) of everything a new cell can be put next to
        boxes = np.empty((num_old + counts[b], 4), np.int64)
        boxes[:, 0], boxes[:, 1], boxes[:, 2], boxes[:, 3] = height, width, -1, -1
        if num_old:
            for y in range(height):
                for x in range(width):
                    if occupied[b, y, x]:
                        k = occupied[b, y, x] - 1
                        boxes[k, 0], boxes[k, 1] = min(boxes[k, 0], y), min(boxes[k, 1], x)
                        boxes[k, 2], boxes[k, 3] = max(boxes[k, 2], y), max(boxes[k, 3], x)
        num_boxes, num_placed = num_old, 0
        for i in range(first, first + counts[b]):
            n = _find_runs(masks[i], runs)
            if _join_runs(runs, n, part) > 1:
                n = _keep_largest(runs, n, part, areas)
            if n == 0:
                continue
            row, column, w = runs[0, 0], size, 0
            for k in range(n):
                column, w = min(column, runs[k, 1]), max(w, runs[k, 2])
            h, w = runs[n - 1, 0] - row + 1, w - column
            least = np.float64(_size(runs, n)) * LEAST_LEFT
            for attempt in range(2 * tries):
                kept = 0
                t = attempt % tries
                if (clustered[i] != 0) == (attempt < tries):
                    if num_boxes == 0:
                        continue
                    a = int(positions[i, t, 0] * np.float64(num_boxes))
                    start_y, start_x = (boxes[a, 0] + boxes[a, 2] - h + 1) / 2, (boxes[a, 1] + boxes[a, 3] - w + 1) / 2
                    h_a, w_a = boxes[a, 2] - boxes[a, 0] + 1, boxes[a, 3] - boxes[a, 1] + 1
                    distance, farthest = (min(h, w) + min(h_a, w_a)) // 4, (h + w + h_a + w_a) // 2
                    dy, dx = np.float64(directions[i, t, 0]), np.float64(directions[i, t, 1])
                    found = False
                    while distance <= farthest:
                        top = math.floor(start_y + distance * dy + 0.5) - row
                        left = math.floor(start_x + distance * dx + 0.5) - column
                        if _is_free(runs, n, top, left, taken):
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
                    if gaps[i, t] < 0 and a >= num_old and 2 * (distance + gaps[i, t]) >= distance:
                        near_top = math.floor(start_y + (distance + gaps[i, t]) * dy + 0.5) - row
                        near_left = math.floor(start_x + (distance + gaps[i, t]) * dx + 0.5) - column
                        kept = _cut_runs(runs, n, near_top, near_left, taken, cut)
                        if (
                            np.float64(_size(cut, kept)) >= least
                            and _join_runs(cut, kept, part) == 1
                            and _is_whole(cut, kept, near_top, near_left, height, width, min_area, clipped, part)
                        ):
                            top, left = near_top, near_left
                        else:
                            kept = 0
                else:
                    top = int(positions[i, t, 0] * np.float64(height + h - 1)) - (h - 1) - row
                    left = int(positions[i, t, 1] * np.float64(width + w - 1)) - (w - 1) - column
                    if not _is_clear(runs, n, top, left, clearances[i, t], taken):
                        continue
                if kept == 0 and not _is_whole(runs, n, top, left, height, width, min_area, clipped, part):
                    continue
                num_placed += 1
                placed = cut if kept else runs
                for k in range(kept if kept else n):
                    y = placed[k, 0] + top
                    if 0 <= y < height:
                        for x in range(max(placed[k, 1] + left, 0), min(placed[k, 2] + left, width)):
                            labels[b, y, x] = num_placed
                            taken[y, x] = 1
                boxes[num_boxes, 0], boxes[num_boxes, 1] = row + top, column + left
                boxes[num_boxes, 2], boxes[num_boxes, 3] = row + top + h - 1, column + left + w - 1
                num_boxes += 1
                corners[i, 0], corners[i, 1], corners[i, 2] = top, left, num_placed
                break
        first += counts[b]


@torch.library.custom_op("synthaug::place_cells", mutates_args=(), device_types="cpu")
def place_cells(
    masks: Tensor,
    counts: Tensor,
    positions: Tensor,
    directions: Tensor,
    gaps: Tensor,
    clearances: Tensor,
    clustered: Tensor,
    occupied: Tensor,
    min_area: int,
) -> tuple[Tensor, Tensor]:
    """Place the cells of each frame one after another, none over another; touching ones stay separate.

    Only the largest 4-connected part of a mask counts. A clustered cell goes next to a placed (or occupied) one: from
    the middle of a random one's bounding box outwards in a random direction until it is free, then `gaps` pixels
    further. With a negative gap the two are pressed together: it goes so many pixels back and loses what others have there,
    unless that is more than 30 % of it, leaves it in several parts, halves the distance of their middles, or the other one is
    among the occupied. Any other cell goes anywhere free, centres beyond the border included, and there it keeps its clearance:
    the place must stay free if the cell is moved that far in any of eight directions. A position is refused unless at
    least `min_area` pixels lie on the canvas as one 4-connected part. A cell refused T times in its own way has T tries
    in the other way, then it is left out; so the work is bounded.

    Args:
        masks: bool [N, P, P], the cells of all frames, frame after frame.
        counts: int64 [B], cells of each frame, N in sum.
        positions: float32 [N, T, 2] in [0, 1): where on the canvas (y, x); the first one also says next to which cell.
        directions: float32 [N, T, 2], unit vectors (y, x).
        gaps: int64 [N, T], pixels, for cells placed next to another.
        clearances: int64 [N, T], >= 0, pixels, for cells placed anywhere.
        clustered: bool [N].
        occupied: int32 [B, Y, X], 0 where free, else labels of what is there already, from 1 without large holes.
        min_area: pixels a cell must keep on the canvas.

    Returns:
        labels int32 [B, Y, X] of the new cells, contiguous from 1 in each frame; and int64 [N, 3]: where each mask's
        pixel (0, 0) lies on the canvas (y, x), and its label, 0 if it is left out.
    """
    labels = np.zeros(tuple(occupied.shape), np.int32)
    corners = np.zeros((masks.shape[0], 3), np.int64)
    _place(
        *_arrays(masks, counts, positions, directions, gaps, clearances, clustered, occupied), min_area, labels, corners
    )
    return torch.from_numpy(labels), torch.from_numpy(corners)


@place_cells.register_fake
def _(
    masks: Tensor,
    counts: Tensor,
    positions: Tensor,
    directions: Tensor,
    gaps: Tensor,
    clearances: Tensor,
    clustered: Tensor,
    occupied: Tensor,
    min_area: int,
) -> tuple[Tensor, Tensor]:
    corners = masks.new_empty((masks.shape[0], 3), dtype=torch.int64)
    return occupied.new_empty(occupied.shape, dtype=torch.int32), corners


def _arrays(*tensors: Tensor) -> list[NDArray[Any]]:
    """C-contiguous numpy views, bool as uint8; checks what the compiled code relies on."""
    masks, counts, positions, directions, gaps, clearances, clustered, occupied = tensors
    n, tries = positions.shape[:2]
    kinds = [torch.bool, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64, torch.bool, torch.int32]
    assert [t.dtype for t in tensors] == kinds, [t.dtype for t in tensors]
    assert masks.shape == (n, masks.shape[1], masks.shape[1]), masks.shape
    assert positions.shape == directions.shape == (n, tries, 2), (positions.shape, directions.shape)
    assert gaps.shape == clearances.shape == (n, tries), (gaps.shape, clearances.shape)
    assert clustered.shape == (n,), clustered.shape
    assert counts.shape == occupied.shape[:1], (counts.shape, occupied.shape)
    assert int(counts.sum()) == n, counts
    assert not any(bool((t < 0).any()) for t in (counts, positions, clearances, occupied)), "negative numbers"
    assert bool((positions < 1).all()), "positions must be below 1"
    flat = [t.contiguous() for t in tensors]
    return [(t.view(torch.uint8) if t.dtype == torch.bool else t).numpy() for t in flat]


def place_cells_reference(
    masks: Tensor,
    counts: Tensor,
    positions: Tensor,
    directions: Tensor,
    gaps: Tensor,
    clearances: Tensor,
    clustered: Tensor,
    occupied: Tensor,
    min_area: int,
) -> tuple[Tensor, Tensor]:
    """`place_cells` by naive overlap tests on the full canvas, for tests and as the benchmark's other side."""
    labels = np.zeros(tuple(occupied.shape), np.int32)
    corners = np.zeros((masks.shape[0], 3), np.int64)
    position, direction, gap, clearance = (t.numpy().astype(float) for t in (positions, directions, gaps, clearances))
    first = 0
    for b, count in enumerate(counts.tolist()):
        old = occupied[b].numpy()
        boxes, num_old = [], int(old.max(initial=0))
        for box in ndimage.find_objects(old):
            y, x = box if box else (slice(old.shape[0], 0), slice(old.shape[1], 0))
            boxes.append((y.start, x.start, y.stop - 1, x.stop - 1))
        for i in range(first, first + count):
            mask = _largest_part(masks[i].numpy())
            if not mask.any():
                continue
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            row, column, h, w = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
            taken = (old != 0) | (labels[b] != 0)
            stamp, top, left = np.zeros_like(taken), 0, 0
            for next_to in (bool(clustered[i]), not clustered[i]):
                for t in range(positions.shape[1]):
                    if next_to and boxes:
                        box = boxes[int(position[i, t, 0] * len(boxes))]
                        start = np.array([(box[0] + box[2]) / 2 - (h - 1) / 2, (box[1] + box[3]) / 2 - (w - 1) / 2])
                        h_a, w_a = box[2] - box[0] + 1, box[3] - box[1] + 1
                        farthest = (h + w + h_a + w_a) // 2
                        for distance in range((min(h, w) + min(h_a, w_a)) // 4, farthest + 1):
                            top, left = np.floor(start + distance * direction[i, t] + 0.5).astype(int) - (row, column)
                            if not (_stamp(mask, top, left, taken.shape) & taken).any():
                                break
                        else:
                            continue
                        distance += max(gap[i, t], 0)
                        if distance > farthest:
                            continue
                        top, left = np.floor(start + distance * direction[i, t] + 0.5).astype(int) - (row, column)
                        nearer = distance + gap[i, t]
                        if nearer < distance <= 2 * nearer and int(position[i, t, 0] * len(boxes)) >= num_old:
                            y, x = np.floor(start + nearer * direction[i, t] + 0.5).astype(int) - (row, column)
                            left_over, whole = _left_over(mask, y, x, taken)
                            stamp = _stamp(mask, y, x, taken.shape) & ~taken
                            if left_over >= LEAST_LEFT * mask.sum() and whole and _fits(stamp, min_area):
                                top, left = y, x
                                break
                    elif not next_to:
                        top = int(position[i, t, 0] * (taken.shape[0] + h - 1)) - (h - 1) - row
                        left = int(position[i, t, 1] * (taken.shape[1] + w - 1)) - (w - 1) - column
                        straight, oblique = int(clearance[i, t]), int(7 * clearance[i, t] + 5) // 10
                        moves = [(0, straight), (straight, 0), (oblique, oblique), (oblique, -oblique)]
                        shifts = [(top + s * y, left + s * x) for y, x in moves for s in (-1, 1)]
                        if any((_stamp(mask, *shift, taken.shape) & taken).any() for shift in shifts if straight):
                            continue
                    else:
                        continue
                    stamp = _stamp(mask, top, left, taken.shape)
                    if not (stamp & taken).any() and _fits(stamp, min_area):
                        break
                else:
                    continue
                corners[i] = top, left, labels[b].max() + 1
                labels[b][stamp] = corners[i, 2]
                boxes.append((row + top, column + left, row + top + h - 1, column + left + w - 1))
                break
        first += count
    return torch.from_numpy(labels), torch.from_numpy(corners)


def _fits(stamp: NDArray[np.bool_], min_area: int) -> bool:
    return bool(stamp.sum() >= max(min_area, 1) and ndimage.label(stamp)[1] == 1)


def _left_over(mask: NDArray[np.bool_], top: int, left: int, taken: NDArray[np.bool_]) -> tuple[int, bool]:
    """Pixels of the mask where nothing is taken, beyond the canvas included, and whether they are one part."""
    wide = np.pad(taken, len(mask))
    y, x = max(top + len(mask), 0), max(left + len(mask), 0)
    kept = mask & ~wide[y : y + len(mask), x : x + len(mask)]
    return int(kept.sum()), ndimage.label(kept)[1] == 1


def _largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    parts, n = ndimage.label(mask)
    return mask if n < 2 else parts == np.bincount(parts.ravel())[1:].argmax() + 1


def _stamp(mask: NDArray[np.bool_], top: int, left: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The mask on an empty canvas, cut at its border."""
    canvas = np.zeros(shape, bool)
    y = slice(max(top, 0), max(min(top + mask.shape[0], shape[0]), 0))
    x = slice(max(left, 0), max(min(left + mask.shape[1], shape[1]), 0))
    part = mask[max(-top, 0) :, max(-left, 0) :]
    window = canvas[y, x]
    window[:] = part[: window.shape[0], : window.shape[1]]
    return canvas
