"""What orthographic cameras see of voxel shapes: naive reference, numba kernel, one torch op.

In an orthographic image the distance of a ray to a body is the distance of its pixel to the body's outline: a pixel is
inside the silhouette where the lowest signed distance along its ray is negative. The kernel walks each ray in steps as long
as the distances allow (sphere tracing, Hart 1996) and stops inside the body, at about 10 samples a ray instead of D.

There is no Triton version: silhouettes are made for training data only, on the CPU.

Importing this file imports numba and compiles (or reads from numba's cache) the kernel, so import it where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import torch
from torch import Tensor
from torch.nn import functional

INSIDE = -1.0
"""A ray ends where the signed distance falls below this many voxels: how deep it goes does not matter for the outline."""

CAUTION = 0.8
"""Share of the distance a step covers; distances of lumpy shapes are only approximate."""

SHORTEST = 0.4
"""Shortest step, voxels."""


def _jit(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile for one signature, from numba's cache where there is a folder it can write to."""

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)
        except (RuntimeError, OSError):  # no folder for the cache can be found, or it cannot be written
            return numba.njit(signature, nogil=True)(function)

    return compile_function


@_jit("void(float32[:,:,:,::1], float32[:,:,::1], float32[:,:,:,::1])")
def _trace(sdf: Any, rotation: Any, out: Any) -> None:
    size, side = sdf.shape[1], out.shape[2]
    half = size / 2
    last = size - 1.0
    for b in range(out.shape[0]):
        for n in range(out.shape[1]):
            # A ray's voxel position is base + t * along, t in voxels from the cube's middle.
            az, ay, ax = float(rotation[n, 0, 0]), float(rotation[n, 0, 1]), float(rotation[n, 0, 2])
            for i in range(side):
                down = ((i + 0.5) / side * 2 - 1) * half
                for j in range(side):
                    right = ((j + 0.5) / side * 2 - 1) * half
                    bz = down * rotation[n, 1, 0] + right * rotation[n, 2, 0] + half - 0.5
                    by = down * rotation[n, 1, 1] + right * rotation[n, 2, 1] + half - 0.5
                    bx = down * rotation[n, 1, 2] + right * rotation[n, 2, 2] + half - 0.5
                    start, end = -2.0 * size, 2.0 * size
                    for base, along in ((bz, az), (by, ay), (bx, ax)):
                        if abs(along) < 1e-6:
                            if base < -0.5 or base > last + 0.5:
                                start, end = 1.0, 0.0
                        else:
                            one, two = (-0.5 - base) / along, (last + 0.5 - base) / along
                            start, end = max(start, min(one, two)), min(end, max(one, two))
                    lowest = numba.float64(size)
                    ray = start
                    while ray <= end:
                        z = min(max(bz + ray * az, 0.0), last)
                        y = min(max(by + ray * ay, 0.0), last)
                        x = min(max(bx + ray * ax, 0.0), last)
                        z0, y0, x0 = min(int(z), size - 2), min(int(y), size - 2), min(int(x), size - 2)
                        z, y, x = z - z0, y - y0, x - x0
                        a = sdf[b, z0, y0, x0] * (1 - x) + sdf[b, z0, y0, x0 + 1] * x
                        c = sdf[b, z0, y0 + 1, x0] * (1 - x) + sdf[b, z0, y0 + 1, x0 + 1] * x
                        d = sdf[b, z0 + 1, y0, x0] * (1 - x) + sdf[b, z0 + 1, y0, x0 + 1] * x
                        e = sdf[b, z0 + 1, y0 + 1, x0] * (1 - x) + sdf[b, z0 + 1, y0 + 1, x0 + 1] * x
                        value = (a * (1 - y) + c * y) * (1 - z) + (d * (1 - y) + e * y) * z
                        lowest = min(lowest, value)
                        if value < INSIDE:
                            break
                        ray += max(CAUTION * value, SHORTEST)
                    out[b, n, i, j] = lowest


@torch.library.custom_op("synthaug::lowest_on_rays", mutates_args=())
def lowest_on_rays(sdf: Tensor, rotation: Tensor, size: int) -> Tensor:
    """The lowest signed distance along each pixel's ray.

    Args:
        sdf: float32 [B, D, D, D], voxels, negative inside, on the cube [-1, 1]^3; 2 <= D.
        rotation: float32 [N, 3, 3], of `Cameras`.
        size: Pixels on a side of the square images.

    Returns:
        float32 [B, N, size, size], voxels: outside the silhouette about the distance to its outline, inside it
        anything negative. A ray that misses the cube has D.
    """
    assert sdf.dtype == rotation.dtype == torch.float32, (sdf.dtype, rotation.dtype)
    assert sdf.ndim == 4, sdf.shape
    assert sdf.shape[1] == sdf.shape[2] == sdf.shape[3] >= 2, sdf.shape
    assert rotation.shape[1:] == (3, 3), rotation.shape
    out = torch.empty((sdf.shape[0], rotation.shape[0], size, size))
    _trace(sdf.contiguous().numpy(), rotation.contiguous().numpy(), out.numpy())
    return out


@lowest_on_rays.register_fake
def _(sdf: Tensor, rotation: Tensor, size: int) -> Tensor:
    return sdf.new_empty((sdf.shape[0], rotation.shape[0], size, size))


def lowest_on_rays_reference(sdf: Tensor, rotation: Tensor, size: int) -> Tensor:
    """`lowest_on_rays` by samples at every quarter voxel, for tests and as the benchmark's other side.

    It agrees with the kernel on the sign of all but a few grazing rays, and on the value just outside to about a tenth of
    a voxel; deep inside it goes on where the kernel stops.
    """
    depth = sdf.shape[1]
    pixel = (torch.arange(size) + 0.5) / size * 2 - 1
    reach = math.sqrt(3)
    along = torch.linspace(-reach, reach, 4 * math.ceil(reach * depth) + 1)
    views = []
    for camera in rotation:
        seen = torch.stack(torch.meshgrid(along, pixel, pixel, indexing="ij"), -1) @ camera
        where = seen.flip(-1).expand(len(sdf), -1, -1, -1, -1)
        value = functional.grid_sample(sdf[:, None], where, padding_mode="border", align_corners=False)[:, 0]
        outside = (seen.abs() > 1).any(-1)
        views.append(value.masked_fill(outside, depth).amin(1))
    return torch.stack(views, 1)
