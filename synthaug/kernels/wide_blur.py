"""Blurs too wide for the full grid of a stack: shrink, filter along the axes, enlarge while adding up.

Plain torch (`wide_blur_volume` and `random_texture_volume` in generators/axial.py, which the tests compare with) makes two
new volumes for every tap of a filter, three for every blur that is added. Here a coarse grid is filtered row by row, and
what is enlarged is never stored at full size. Sums of filters have the order of plain torch; enlarging may differ in the
last bits.

There is no Triton version: volumes are put together by the workers that load data, on the CPU.

Importing this file imports numba and compiles (or reads from numba's cache) the kernels, so import it where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthaug.kernels.placement import _jit

CHUNK = 1024
"""Columns filtered at a time."""


@_jit("int64(int64, int64)")
def _mirror(i: int, size: int) -> int:
    """Position i folded into [0, size) by mirroring, the edge repeated."""
    i %= 2 * size
    return min(i, 2 * size - 1 - i)


@_jit("void(float32[:,:,::1], int64[::1], float32[:,:,::1])")
def _shrink(volume: Any, pools: Any, out: Any) -> None:
    depth, height, width = volume.shape
    pz, py, px = pools[0], pools[1], pools[2]
    total, whole = np.empty(out.shape[2] * px, np.float32), width // px
    share = np.float32(1 / (pz * py * px))
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            total[:] = 0
            for k in range(pz * py):
                line = volume[_mirror(z * pz + k // py, depth), _mirror(y * py + k % py, height)]
                for x in range(width):
                    total[x] += line[x]
            for x in range(width, total.shape[0]):
                total[x] = total[_mirror(x, width)]
            target = out[z, y]
            if px == 1:
                for x in range(whole):
                    target[x] = total[x] * share
            else:
                for x in range(target.shape[0]):
                    sum_ = np.float32(0)
                    for i in range(x * px, x * px + px):
                        sum_ += total[i]
                    target[x] = sum_ * share


@_jit("void(float32[:,:,::1], float32[::1], boolean, float32[:,:,::1])")
def _filter_across(volume: Any, taps: Any, mirrored: bool, out: Any) -> None:
    """Symmetric filter along the middle axis, taps from the middle one outwards; mirrored borders, or none."""
    radius, length, width = taps.shape[0] - 1, volume.shape[1], volume.shape[2]
    start = 0 if mirrored else radius
    for o in range(out.shape[0]):
        for left in range(0, width, CHUNK):  # so many columns of all rows that a filter reaches stay in the cache
            right = min(left + CHUNK, width)
            for k in range(out.shape[1]):
                target, source = out[o, k, left:right], volume[o, k + start, left:right]
                for x in range(right - left):
                    target[x] = source[x] * taps[0]
                for i in range(radius, 0, -1):
                    low, high, weight = k + start - i, k + start + i, taps[i]
                    if mirrored:
                        low, high = _mirror(low, length), _mirror(high, length)
                    one, two = volume[o, low, left:right], volume[o, high, left:right]
                    for x in range(right - left):
                        target[x] += (one[x] + two[x]) * weight


@_jit("void(float32[:,::1], float32[::1], boolean, float32[:,::1])")
def _filter_along(lines: Any, taps: Any, mirrored: bool, out: Any) -> None:
    """The same along the last axis."""
    radius, length = taps.shape[0] - 1, lines.shape[1]
    num = out.shape[1]
    padded = np.empty(num + 2 * radius, np.float32)
    for o in range(lines.shape[0]):
        source, target = lines[o], out[o]
        if mirrored:
            padded[radius : radius + length] = source
            for x in range(radius):
                padded[x] = source[_mirror(x - radius, length)]
                padded[radius + length + x] = source[_mirror(length + x, length)]
        else:
            padded[:] = source
        middle = padded[radius:]
        for x in range(num):
            target[x] = middle[x] * taps[0]
        for i in range(radius, 0, -1):
            one, two, weight = padded[radius - i :], padded[radius + i :], taps[i]
            for x in range(num):
                target[x] += (one[x] + two[x]) * weight


@_jit(
    "void(float32[:,:,::1], float32[:,:,::1], int64[:,::1], float32[:,::1], int64[:,::1], float32[:,::1],"
    " int64[::1], float32[::1], float32, float32[:,:,::1])"
)
def _add_enlarged(
    total: Any,
    coarse: Any,
    rows: Any,
    row_shares: Any,
    planes: Any,
    plane_shares: Any,
    columns: Any,
    column_shares: Any,
    weight: float,
    amplitude: Any,
) -> None:
    width, num = total.shape[2], coarse.shape[2]
    # one more than needed: the neighbour of the last column is read, with share 0
    line = np.zeros(num + 1, np.float32)
    modulated = amplitude.shape[0] > 0
    straight = columns.shape[0] == 0
    for z in range(total.shape[0]):
        c, d = plane_shares[z, 0], plane_shares[z, 1]
        for y in range(total.shape[1]):
            a, b = row_shares[y, 0], row_shares[y, 1]
            upper, lower = coarse[planes[z, 0], rows[y, 0]], coarse[planes[z, 0], rows[y, 1]]
            upper_2, lower_2 = coarse[planes[z, 1], rows[y, 0]], coarse[planes[z, 1], rows[y, 1]]
            for x in range(num):
                line[x] = (c * (a * upper[x] + b * lower[x]) + d * (a * upper_2[x] + b * lower_2[x])) * weight
            line[num] = line[num - 1]
            out = total[z, y]
            if straight:
                if modulated:
                    factor = amplitude[z, y]
                    for x in range(width):
                        out[x] += line[x] * factor[x]
                else:
                    for x in range(width):
                        out[x] += line[x]
            elif modulated:
                factor = amplitude[z, y]
                for x in range(width):
                    i = columns[x]
                    out[x] += (line[i] + column_shares[x] * (line[i + 1] - line[i])) * factor[x]
            else:
                for x in range(width):
                    i = columns[x]
                    out[x] += line[i] + column_shares[x] * (line[i + 1] - line[i])


def _nodes(length: int, factor: int, offset: int, num: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Left node of each of `length` positions of an axis enlarged `factor` times, from `offset` on, and the share of the
    next one; beyond the outermost nodes values stay the same (as `interpolate(align_corners=False)` has it)."""
    place = np.clip((np.arange(offset, offset + length) + 0.5) / factor - 0.5, 0, num - 1)
    left = np.minimum(place.astype(np.int64), max(num - 2, 0))
    return left, (place - left).astype(np.float32)


@torch.library.custom_op("synthaug::shrink", mutates_args=(), device_types="cpu")
def shrink(volume: Tensor, pools: Sequence[int]) -> Tensor:
    """Means over blocks of float32 [Z, Y, X], mirrored at the far borders where its sides are no multiples of `pools`."""
    out = np.empty([-(-n // p) for n, p in zip(volume.shape, pools)], np.float32)
    _shrink(volume.contiguous().numpy(), np.array(pools, np.int64), out)
    return torch.from_numpy(out)


@shrink.register_fake
def _(volume: Tensor, pools: Sequence[int]) -> Tensor:
    return volume.new_empty([-(-n // p) for n, p in zip(volume.shape, pools)])


@torch.library.custom_op("synthaug::filter_axis", mutates_args=(), device_types="cpu")
def filter_axis(volume: Tensor, taps: Sequence[float], axis: int, mirrored: bool) -> Tensor:
    """Symmetric filter along one axis.

    Args:
        volume: float32 [Z, Y, X].
        taps: r + 1 weights, the middle one first.
        axis: 0, 1 or 2.
        mirrored: borders are mirrored, the edge repeated; if not, the axis gets 2r shorter.

    Returns:
        float32 [Z, Y, X], or with that axis 2r shorter.
    """
    shape = [*volume.shape]
    if not mirrored:
        shape[axis] -= 2 * (len(taps) - 1)
    source, weights, out = volume.contiguous().numpy(), np.array(taps, np.float32), np.empty(shape, np.float32)
    if axis == 2:
        _filter_along(source.reshape(-1, source.shape[2]), weights, mirrored, out.reshape(-1, shape[2]))
    else:
        flat = (1, source.shape[0], -1) if axis == 0 else source.shape
        # `shape` itself as the target's shape: an empty axis leaves nothing for -1 to be told from
        target = (1, shape[0], shape[1] * shape[2]) if axis == 0 else shape
        _filter_across(source.reshape(flat), weights, mirrored, out.reshape(target))
    return torch.from_numpy(out)


@filter_axis.register_fake
def _(volume: Tensor, taps: Sequence[float], axis: int, mirrored: bool) -> Tensor:
    shape = [*volume.shape]
    if not mirrored:
        shape[axis] -= 2 * (len(taps) - 1)
    return volume.new_empty(shape)


@torch.library.custom_op("synthaug::add_enlarged", mutates_args=("total",), device_types="cpu")
def add_enlarged(
    total: Tensor,
    coarse: Tensor,
    factors: Sequence[int],
    offsets: Sequence[int],
    weight: float,
    amplitude: Tensor | None,
) -> None:
    """total += weight * (a window of the coarse grid, enlarged by linear interpolation) * amplitude, in place.

    Args:
        total: float32 [Z, Y, X], contiguous.
        coarse: float32 [z, y, x]; the enlarged grid covers the window.
        factors: fine voxels a coarse one, (Z, Y, X).
        offsets: where the window begins on the enlarged grid.
        weight: a factor.
        amplitude: float32 [Z, Y, X] or None.
    """
    assert total.is_contiguous(), "added to in place"
    sides = zip(total.shape, factors, offsets, coarse.shape)
    (z, dz), (y, dy), (x, dx) = (_nodes(length, factor, offset, num) for length, factor, offset, num in sides)
    pairs = []
    for left, share, num in ((y, dy, coarse.shape[1]), (z, dz, coarse.shape[0])):
        pairs += [np.stack([left, np.minimum(left + 1, num - 1)], 1), np.stack([1 - share, share], 1)]
    straight = factors[2] == 1 and offsets[2] == 0
    _add_enlarged(
        total.numpy(),
        coarse.contiguous().numpy(),
        *pairs,
        x[:0] if straight else x,
        dx,
        weight,
        np.empty((0, 0, 0), np.float32) if amplitude is None else amplitude.contiguous().numpy(),
    )


@add_enlarged.register_fake
def _(
    total: Tensor,
    coarse: Tensor,
    factors: Sequence[int],
    offsets: Sequence[int],
    weight: float,
    amplitude: Tensor | None,
) -> None:
    return None
