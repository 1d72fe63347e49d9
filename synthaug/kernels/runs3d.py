"""Cells of a volume as runs of voxels along X, for `placement3d.py`: found, joined, cut, tested against what is taken.

What is taken is kept as one bit a voxel, so that a run is tested by one or two words.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from synthaug.kernels.placement import _jit, _join


@_jit("int64(uint8[:,:,::1], uint64[:,:,::1], int32[:,::1])")
def find_runs(mask: Any, words: Any, runs: Any) -> int:
    """Runs along X (plane, row, start, end) of a mask in raster order; their number. `words` are eight voxels each."""
    n, full = 0, np.uint64(0x0101010101010101)
    for z in range(mask.shape[0]):
        for y in range(mask.shape[1]):
            some = np.uint64(0)
            for w in range(words.shape[2]):
                some |= words[z, y, w]
            if some == 0:
                continue
            start = -1
            for w in range(words.shape[2]):
                word = words[z, y, w]
                if word == full:
                    if start < 0:
                        start = 8 * w
                    continue
                if word == 0:
                    if start >= 0:
                        runs[n, 0], runs[n, 1], runs[n, 2], runs[n, 3] = z, y, start, 8 * w
                        n += 1
                        start = -1
                    continue
                # Most runs are longer than a word: it holds one end, which the number of its voxels tells
                k: Any = np.int64((word * full) >> np.uint64(56))
                if start < 0 and word == full << np.uint64(64 - 8 * k):
                    start = 8 * w + 8 - k
                elif start >= 0 and word == full >> np.uint64(64 - 8 * k):
                    runs[n, 0], runs[n, 1], runs[n, 2], runs[n, 3] = z, y, start, 8 * w + k
                    n += 1
                    start = -1
                else:
                    for x in range(8 * w, 8 * w + 8):
                        if mask[z, y, x]:
                            if start < 0:
                                start = x
                        elif start >= 0:
                            runs[n, 0], runs[n, 1], runs[n, 2], runs[n, 3] = z, y, start, x
                            n += 1
                            start = -1
            if start >= 0:
                runs[n, 0], runs[n, 1], runs[n, 2], runs[n, 3] = z, y, start, mask.shape[2]
                n += 1
    return n


@_jit("int64(int32[:,::1], int64, int64, int64[::1], int64[::1])")
def join_runs(runs: Any, n: int, height: int, first: Any, part: Any) -> int:
    """Name the 6-connected part of each run by the index of the part's first run; the number of parts.

    `first` is working space: where the runs of each row (plane x height + row) begin.
    """
    row = 0
    for k in range(n):
        part[k] = k
        own = runs[k, 0] * height + runs[k, 1]
        while row <= own:
            first[row] = k
            row += 1
    while row < first.shape[0]:
        first[row] = n
        row += 1
    parts = n
    for k in range(n):
        own = runs[k, 0] * height + runs[k, 1]
        for side in range(2):
            other = own - 1 if side == 0 else own - height
            if other < 0 or (side == 0 and runs[k, 1] == 0):
                continue
            for j in range(first[other], first[other + 1]):
                if runs[j, 2] < runs[k, 3] and runs[k, 2] < runs[j, 3]:
                    parts -= _join(part, j, k)
    for k in range(n):
        part[k] = part[part[k]]
    return parts


@_jit("boolean(int32[:,::1], int64, int64, int64, int64, int64, uint64[:,:,::1])")
def is_free(runs: Any, n: int, front: int, top: int, left: int, width: int, taken: Any) -> bool:
    """No voxel of the shifted runs that lies on the canvas is taken (one bit a voxel)."""
    full = np.uint64(0xFFFFFFFFFFFFFFFF)
    for i in range(n):
        # Cells meet at their middles more often than at their ends
        k = i + n // 2 if i < n - n // 2 else i - (n - n // 2)
        z, y = runs[k, 0] + front, runs[k, 1] + top
        start, end = max(runs[k, 2] + left, 0), min(runs[k, 3] + left, width) - 1
        if 0 <= z < taken.shape[0] and 0 <= y < taken.shape[1] and start <= end:
            a, b = start >> 6, end >> 6
            head, tail = full << np.uint64(start & 63), full >> np.uint64(63 - (end & 63))
            if a == b:
                if taken[z, y, a] & head & tail:
                    return False
            else:
                hit = (taken[z, y, a] & head) | (taken[z, y, b] & tail)
                for w in range(a + 1, b):
                    hit |= taken[z, y, w]
                if hit:
                    return False
    return True


@_jit("boolean(int32[:,::1], int64, int64, int64, int64, int64, int64, float64, uint64[:,:,::1])")
def is_clear(
    runs: Any, n: int, front: int, top: int, left: int, width: int, clearance: int, z_spacing: float, taken: Any
) -> bool:
    """The place is free, and it stays free if the cell is moved by `clearance`: eight ways in plane, up and down."""
    if not is_free(runs, n, front, top, left, width, taken):
        return False
    if clearance:
        oblique, planes = (7 * clearance + 5) // 10, math.floor(clearance / z_spacing + 0.5)
        for dy in range(-1, 2):
            for dx in range(-1, 2):
                step = oblique if dy and dx else clearance
                if (dy or dx) and not is_free(runs, n, front, top + dy * step, left + dx * step, width, taken):
                    return False
        for dz in (-planes, planes):
            if dz and not is_free(runs, n, front + dz, top, left, width, taken):
                return False
    return True


@_jit(
    "boolean(int32[:,::1], int64, int64, int64, int64, int64, int64, int64, int64, int64, int32[:,::1], int64[::1],"
    " int64[::1])"
)
def is_whole(
    runs: Any,
    n: int,
    front: int,
    top: int,
    left: int,
    depth: int,
    height: int,
    width: int,
    min_volume: int,
    rows: int,
    clipped: Any,
    first: Any,
    part: Any,
) -> bool:
    """At least min_volume voxels of the shifted runs lie on the canvas, and these are one 6-connected part."""
    kept, volume, cut = 0, 0, False
    for k in range(n):
        z, y = runs[k, 0] + front, runs[k, 1] + top
        start, end = max(runs[k, 2] + left, 0), min(runs[k, 3] + left, width)
        if 0 <= z < depth and 0 <= y < height and start < end:
            clipped[kept, 0], clipped[kept, 1], clipped[kept, 2], clipped[kept, 3] = runs[k, 0], runs[k, 1], start, end
            kept += 1
            volume += end - start
            cut = cut or end - start < runs[k, 3] - runs[k, 2]
        else:
            cut = True
    if volume < min_volume or volume == 0:
        return False
    return not cut or join_runs(clipped, kept, rows, first, part) == 1


@_jit("int64(int32[:,::1], int64, int64, int64, int64, int64, uint64[:,:,::1], int32[:,::1])")
def cut_runs(runs: Any, n: int, front: int, top: int, left: int, width: int, taken: Any, cut: Any) -> int:
    """What the shifted runs keep where nothing is taken (one bit a voxel), beyond the canvas included; their number."""
    kept, one = 0, np.uint64(1)
    for k in range(n):
        z, y = runs[k, 0] + front, runs[k, 1] + top
        inside = 0 <= z < taken.shape[0] and 0 <= y < taken.shape[1]
        start = -1
        for x in range(runs[k, 2], runs[k, 3]):
            at = x + left
            if inside and 0 <= at < width and (taken[z, y, at >> 6] >> np.uint64(at & 63)) & one:
                if start >= 0:
                    cut[kept, 0], cut[kept, 1], cut[kept, 2], cut[kept, 3] = runs[k, 0], runs[k, 1], start, x
                    kept += 1
                    start = -1
            elif start < 0:
                start = x
        if start >= 0:
            cut[kept, 0], cut[kept, 1], cut[kept, 2], cut[kept, 3] = runs[k, 0], runs[k, 1], start, runs[k, 3]
            kept += 1
    return kept
