"""Visual hulls (Laurentini 1994): what remains of a cube when every silhouette has been carved out of it.

`carve` packs the silhouettes of 64 cells into the bits of one word, so that one look-up and one AND serve 64 cells; with
the cameras fixed, all of them share the pixel a voxel falls on. `hull_distance` is the same hull as a distance, finer than
a voxel. Both kernels give the bits of their references, because both do the same few operations in the same order.

There is no Triton version: the hull is where the fit of a surface starts, and that runs on the CPU.

Importing this file imports numba and compiles (or reads from numba's cache) the kernels, so import it where it is used.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from synthaug.kernels.silhouettes import _jit

WORD = 64
"""Cells in one word."""


@_jit("void(uint8[:,:,:,::1], float64[:,:,::1], uint64[:,:,::1], uint8[:,:,:,::1])")
def _carve(silhouettes: Any, rotation: Any, packed: Any, out: Any) -> None:
    """Hulls of at most 64 cells; `packed` [N, H, H] is room for their silhouettes."""
    cells, num_views, side = silhouettes.shape[0], silhouettes.shape[1], silhouettes.shape[2]
    size = out.shape[1]
    packed[:] = 0
    for b in range(cells):
        bit = np.uint64(1) << np.uint64(b)
        for n in range(num_views):
            for i in range(side):
                for j in range(side):
                    packed[n, i, j] |= bit * silhouettes[b, n, i, j]
    words = np.empty(size, np.uint64)
    for z in range(size):
        pz = (z + 0.5) / size * 2 - 1
        for y in range(size):
            py = (y + 0.5) / size * 2 - 1
            for x in range(size):
                px = (x + 0.5) / size * 2 - 1
                word = ~np.uint64(0)
                for n in range(num_views):
                    down = pz * rotation[n, 1, 0] + py * rotation[n, 1, 1] + px * rotation[n, 1, 2]
                    right = pz * rotation[n, 2, 0] + py * rotation[n, 2, 1] + px * rotation[n, 2, 2]
                    i, j = int(np.floor((down + 1) / 2 * side)), int(np.floor((right + 1) / 2 * side))
                    if i < 0 or j < 0 or i >= side or j >= side:
                        word = np.uint64(0)
                    else:
                        word &= packed[n, i, j]
                    if word == 0:
                        break
                words[x] = word
            for b in range(cells):
                shift = np.uint64(b)
                for x in range(size):
                    out[b, z, y, x] = (words[x] >> shift) & np.uint64(1)


@torch.library.custom_op("synthaug::carve", mutates_args=())
def carve(silhouettes: Tensor, rotation: Tensor, size: int) -> Tensor:
    """The visual hull of each cell: the voxels whose centres fall on a pixel of every silhouette.

    Args:
        silhouettes: bool [B, N, H, H], on the CPU.
        rotation: float32 [N, 3, 3], of `Cameras`.
        size: Voxels on a side of the cube [-1, 1]^3.

    Returns:
        bool [B, size, size, size]. What lies beyond a camera's image is carved away.
    """
    assert silhouettes.dtype == torch.bool, silhouettes.dtype
    _check_views(silhouettes, rotation)
    views, turn = silhouettes.contiguous().view(torch.uint8).numpy(), rotation.double().contiguous().numpy()
    out = torch.empty((len(views), size, size, size), dtype=torch.bool)
    target, packed = out.view(torch.uint8).numpy(), np.empty(views.shape[1:], np.uint64)
    for first in range(0, len(views), WORD):
        _carve(views[first : first + WORD], turn, packed, target[first : first + WORD])
    return out


@carve.register_fake
def _(silhouettes: Tensor, rotation: Tensor, size: int) -> Tensor:
    return silhouettes.new_empty((silhouettes.shape[0], size, size, size))


def carve_reference(silhouettes: Tensor, rotation: Tensor, size: int) -> Tensor:
    """`carve` one camera after the other, for tests and as the benchmark's other side."""
    side = silhouettes.shape[-1]
    hull = torch.ones((len(silhouettes), size, size, size), dtype=torch.bool)
    for n, camera in enumerate(rotation.double()):
        i, j = (((p + 1) / 2 * side).floor().long() for p in _project(camera, size))
        seen = (i >= 0) & (j >= 0) & (i < side) & (j < side)
        hull &= silhouettes[:, n, i.clamp(0, side - 1), j.clamp(0, side - 1)] & seen
    return hull


@_jit("void(float32[:,:,:,::1], float64[:,:,::1], float32[:,:,:,::1])")
def _hull_distance(sdf: Any, rotation: Any, out: Any) -> None:
    side, size = sdf.shape[2], out.shape[1]
    unit = size / side
    for b in range(out.shape[0]):
        for z in range(size):
            pz = (z + 0.5) / size * 2 - 1
            for y in range(size):
                py = (y + 0.5) / size * 2 - 1
                for x in range(size):
                    px = (x + 0.5) / size * 2 - 1
                    farthest = numba.float64(-4.0 * side)
                    for n in range(sdf.shape[1]):
                        down = pz * rotation[n, 1, 0] + py * rotation[n, 1, 1] + px * rotation[n, 1, 2]
                        right = pz * rotation[n, 2, 0] + py * rotation[n, 2, 1] + px * rotation[n, 2, 2]
                        row, column = (down + 1) / 2 * side - 0.5, (right + 1) / 2 * side - 0.5
                        v, u = min(max(row, 0.0), side - 1.0), min(max(column, 0.0), side - 1.0)
                        i, j = min(int(v), side - 2), min(int(u), side - 2)
                        v, u = v - i, u - j
                        upper = sdf[b, n, i, j] * (1 - u) + sdf[b, n, i, j + 1] * u
                        lower = sdf[b, n, i + 1, j] * (1 - u) + sdf[b, n, i + 1, j + 1] * u
                        value = upper * (1 - v) + lower * v
                        beyond = max(abs(row - (side - 1) / 2) - (side - 1) / 2, 0.0)
                        beyond += max(abs(column - (side - 1) / 2) - (side - 1) / 2, 0.0)
                        farthest = max(farthest, value + beyond)
                    out[b, z, y, x] = farthest * unit


@torch.library.custom_op("synthaug::hull_distance", mutates_args=())
def hull_distance(sdf: Tensor, rotation: Tensor, size: int) -> Tensor:
    """Signed distance to the visual hull: the largest of the distances to the outlines, interpolated between pixels.

    Exact inside the hull; outside it never more than the distance. Beyond a camera's image the distance to the image is
    added to that at its border.

    Args:
        sdf: float32 [B, N, H, H], of `Views`, pixels, negative inside; 2 <= H.
        rotation: float32 [N, 3, 3], of `Cameras`.
        size: Voxels on a side of the cube [-1, 1]^3.

    Returns:
        float32 [B, size, size, size], voxels.
    """
    assert sdf.dtype == torch.float32, sdf.dtype
    _check_views(sdf, rotation)
    out = torch.empty((len(sdf), size, size, size))
    _hull_distance(sdf.contiguous().numpy(), rotation.double().contiguous().numpy(), out.numpy())
    return out


@hull_distance.register_fake
def _(sdf: Tensor, rotation: Tensor, size: int) -> Tensor:
    return sdf.new_empty((sdf.shape[0], size, size, size))


def hull_distance_reference(sdf: Tensor, rotation: Tensor, size: int) -> Tensor:
    """`hull_distance` one camera after the other, for tests."""
    side = sdf.shape[-1]
    last, middle = side - 1, (side - 1) / 2
    farthest = torch.full((len(sdf), size, size, size), -4.0 * side, dtype=torch.float64)
    for n, camera in enumerate(rotation.double()):
        row, column = ((p + 1) / 2 * side - 0.5 for p in _project(camera, size))
        v, u = row.clamp(0, last), column.clamp(0, last)
        i, j = v.long().clamp(max=side - 2), u.long().clamp(max=side - 2)
        v, u = v - i, u - j
        view = sdf[:, n].double()
        upper = view[:, i, j] * (1 - u) + view[:, i, j + 1] * u
        lower = view[:, i + 1, j] * (1 - u) + view[:, i + 1, j + 1] * u
        beyond = sum(((p - middle).abs() - middle).clamp_min(0) for p in (row, column))
        farthest = torch.maximum(farthest, upper * (1 - v) + lower * v + beyond)
    return (farthest * (size / side)).float()


def _project(camera: Tensor, size: int) -> list[Tensor]:
    """Down and right of all voxel centres in a camera's image, float64 [size, size, size] each, in half sides."""
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 2 - 1
    z, y, x = axis[:, None, None], axis[:, None], axis
    return [z * row[0] + y * row[1] + x * row[2] for row in camera[1:]]


def _check_views(views: Tensor, rotation: Tensor) -> None:
    assert views.ndim == 4, views.shape
    assert views.shape[2] == views.shape[3] >= 2, views.shape
    assert rotation.dtype == torch.float32, rotation.dtype
    assert rotation.shape == (views.shape[1], 3, 3), (rotation.shape, views.shape)
