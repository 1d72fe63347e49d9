"""NeuS' rendering of a signed-distance grid along rays, with its gradient: plain-torch reference, numba kernel, torch op.

Wang et al., "NeuS" (NeurIPS 2021), equation 13: with Phi_s the logistic function of slope s, a segment of a ray between
the samples f_i and f_{i+1} has the opacity alpha_i = max((Phi_s(f_i) - Phi_s(f_{i+1})) / Phi_s(f_i), 0). A segment on which
f rises has none, and over a descending run the factors 1 - alpha_i = Phi_s(f_{i+1}) / Phi_s(f_i) cancel but for the first
and the last. So the transmittance of a ray is a product over its descending runs, Phi_s(lowest) / Phi_s(highest): the kernel
looks at all samples, but only the ends of runs need a logistic function and receive a gradient. Nothing is approximated.

There is no Triton version: a cell's rays fit into the cache of one CPU core, and a step takes about a millisecond.

Importing this file imports numba and compiles (or reads from numba's cache) the kernels, so import it where it is used.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from synthaug.kernels.silhouettes import _jit

LEAST_OPACITY = 1e-4
"""Floor under the opacity in the loss: a ray that has lost the surface pulls on, with a bounded force."""


@_jit("float32(float32[:,:,::1], float32, float32, float32)")
def _sample(field: Any, z: Any, y: Any, x: Any) -> Any:
    """Trilinear interpolation; z, y, x >= 0 and < size - 1."""
    i, j, k = int(z), int(y), int(x)
    z, y, x = z - np.float32(i), y - np.float32(j), x - np.float32(k)
    a = field[i, j, k] + x * (field[i, j, k + 1] - field[i, j, k])
    b = field[i, j + 1, k] + x * (field[i, j + 1, k + 1] - field[i, j + 1, k])
    c = field[i + 1, j, k] + x * (field[i + 1, j, k + 1] - field[i + 1, j, k])
    d = field[i + 1, j + 1, k] + x * (field[i + 1, j + 1, k + 1] - field[i + 1, j + 1, k])
    a, c = a + y * (b - a), c + y * (d - c)
    return a + z * (c - a)


@_jit("void(float32[:,:,::1], float32, float32, float32, float32)")
def _spread(field: Any, z: Any, y: Any, x: Any, value: Any) -> None:
    """Add `value` to the eight voxels around a point, by their shares in `_sample`."""
    one = np.float32(1)
    i, j, k = int(z), int(y), int(x)
    z, y, x = z - np.float32(i), y - np.float32(j), x - np.float32(k)
    near, far = value * (one - z), value * z
    a, b, c, d = near * (one - y), near * y, far * (one - y), far * y
    field[i, j, k] += a * (one - x)
    field[i, j, k + 1] += a * x
    field[i, j + 1, k] += b * (one - x)
    field[i, j + 1, k + 1] += b * x
    field[i + 1, j, k] += c * (one - x)
    field[i + 1, j, k + 1] += c * x
    field[i + 1, j + 1, k] += d * (one - x)
    field[i + 1, j + 1, k + 1] += d * x


@_jit("void(float32[:,:,::1], float32[:,::1], float32[:,::1], int32[:,::1])")
def _check_inside(field: Any, origin: Any, along: Any, span: Any) -> None:
    """Both ends of every span lie where `_sample` can look; what lies between them then does, too."""
    for r in range(len(origin)):
        if span[r, 0] < span[r, 1]:
            for axis in range(3):
                first = origin[r, axis] + np.float32(span[r, 0]) * along[r, axis]
                last = origin[r, axis] + np.float32(span[r, 1] - 1) * along[r, axis]
                if not (min(first, last) >= 0 and max(first, last) < field.shape[axis] - 1):
                    raise ValueError("samples outside the grid")


@_jit("void(float32[:,:,::1], float32[:,::1], float32[:,::1], int32[:,::1], float64, int32[:,::1])")
def _trim(field: Any, origin: Any, along: Any, span: Any, reach: Any, out: Any) -> None:
    _check_inside(field, origin, along, span)
    for r in range(len(origin)):
        first, last = 0, -1
        for i in range(span[r, 0], span[r, 1]):
            t = np.float32(i)
            z, y, x = origin[r, 0] + t * along[r, 0], origin[r, 1] + t * along[r, 1], origin[r, 2] + t * along[r, 2]
            if _sample(field, z, y, x) < reach:
                first = i if last < 0 else first
                last = i
        out[r, 0], out[r, 1] = first, last + 1


@_jit("float64(float64)")
def _log_phi(x: Any) -> Any:
    """Logarithm of the logistic function."""
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


@_jit(
    "void(float32[:,:,::1], float32[:,::1], float32[:,::1], int32[:,::1], float32[::1], float64,"
    "float64[::1], float32[:,:,::1])"
)
def _mask_loss(
    field: Any, origin: Any, along: Any, span: Any, target: Any, inv_s: Any, totals: Any, gradient: Any
) -> None:
    _check_inside(field, origin, along, span)
    longest = 2
    for r in range(len(origin)):
        longest = max(longest, span[r, 1] - span[r, 0])
    values, ends = np.empty(longest, np.float32), np.empty(longest + 1, np.int64)
    for r in range(len(origin)):
        first, n = span[r, 0], span[r, 1] - span[r, 0]
        for i in range(n):
            t = np.float32(first + i)
            z, y, x = origin[r, 0] + t * along[r, 0], origin[r, 1] + t * along[r, 1], origin[r, 2] + t * along[r, 2]
            values[i] = _sample(field, z, y, x)
        m, i, log_clear, slope = 0, 0, 0.0, 0.0
        while i < n - 1:
            if values[i + 1] >= values[i]:
                i += 1
                continue
            ends[m] = i
            while i < n - 1 and values[i + 1] < values[i]:
                i += 1
            ends[m + 1] = i
            high, low = values[ends[m]], values[i]
            log_clear += _log_phi(inv_s * low) - _log_phi(inv_s * high)
            slope += low / (1 + math.exp(inv_s * low)) - high / (1 + math.exp(inv_s * high))
            m += 2
        opacity = max(-math.expm1(log_clear), LEAST_OPACITY)
        totals[0] -= target[r] * math.log(opacity) + (1 - target[r]) * log_clear
        pull = target[r] * math.exp(log_clear) / opacity - (1 - target[r])  # derivative by log_clear
        totals[1] += pull * slope
        for e in range(m):
            t = np.float32(first + ends[e])
            z, y, x = origin[r, 0] + t * along[r, 0], origin[r, 1] + t * along[r, 1], origin[r, 2] + t * along[r, 2]
            force = pull * inv_s / (1 + math.exp(inv_s * values[ends[e]]))
            _spread(gradient, z, y, x, np.float32(force if e % 2 else -force))


@torch.library.custom_op("synthaug::trim_rays", mutates_args=())
def trim_rays(field: Tensor, origin: Tensor, along: Tensor, span: Tensor, reach: float) -> Tensor:
    """The part of each ray between its first and its last sample where the field is below `reach`.

    Args:
        field, origin, along, span: As in `mask_loss`.
        reach: Voxels.

    Returns:
        int32 [A, 2], a part of `span`; empty where no sample is.
    """
    out = torch.empty_like(span)
    _trim(*_arrays(field, origin, along, span), reach, out.numpy())
    return out


@trim_rays.register_fake
def _(field: Tensor, origin: Tensor, along: Tensor, span: Tensor, reach: float) -> Tensor:
    return torch.empty_like(span)


@torch.library.custom_op("synthaug::mask_loss", mutates_args=())
def mask_loss(
    field: Tensor, origin: Tensor, along: Tensor, span: Tensor, target: Tensor, inv_s: float
) -> tuple[Tensor, Tensor]:
    """Cross entropy between the accumulated opacity of rays and the silhouettes, and its gradient.

    Args:
        field: float32 [D, D, D], signed distances of one cell.
        origin: float32 [A, 3] (ZYX), voxels; where each ray's sample 0 lies.
        along: float32 [A, 3], voxels from one sample to the next.
        span: int32 [A, 2], first sample and the one after the last; all of them lie between the grid's outermost voxel
            centres, the upper ones left out.
        target: float32 [A] in [0, 1], share of the ray that should be stopped.
        inv_s: Slope of the logistic function, per voxel; NeuS learns its logarithm.

    Returns:
        float64 [2], the loss summed over the rays and its derivative by `inv_s`; float32 [D, D, D], that by the field.
    """
    assert target.dtype == torch.float32, target.dtype
    assert target.shape == origin.shape[:1], (target.shape, origin.shape)
    totals, gradient = torch.zeros(2, dtype=torch.float64), torch.zeros_like(field)
    arrays = _arrays(field, origin, along, span)
    _mask_loss(*arrays, target.contiguous().numpy(), inv_s, totals.numpy(), gradient.numpy())
    return totals, gradient


@mask_loss.register_fake
def _(
    field: Tensor, origin: Tensor, along: Tensor, span: Tensor, target: Tensor, inv_s: float
) -> tuple[Tensor, Tensor]:
    return field.new_empty(2, dtype=torch.float64), torch.empty_like(field)


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    """C-contiguous numpy views of field, origin, along and span; checks what the compiled code relies on."""
    field, origin, along, span = tensors
    assert field.dtype == origin.dtype == along.dtype == torch.float32, [t.dtype for t in tensors]
    assert span.dtype == torch.int32, span.dtype
    assert span.shape == (len(origin), 2), (span.shape, origin.shape)
    assert origin.shape == along.shape == (len(origin), 3), (origin.shape, along.shape)
    assert field.ndim == 3, field.shape
    return [t.contiguous().numpy() for t in tensors]


def accumulated_opacity(values: Tensor, inv_s: Tensor | float) -> Tensor:
    """Accumulated weight of rays by the full discrete alpha of NeuS, equations 11 to 13.

    Args:
        values: [..., S], signed distances at the samples of each ray, in order.
        inv_s: Slope of the logistic function.

    Returns:
        [...], the sum of alpha_i times the product of 1 - alpha_j over j < i.
    """
    phi = torch.sigmoid(inv_s * values)
    alpha = ((phi[..., :-1] - phi[..., 1:]) / phi[..., :-1].clamp_min(torch.finfo(phi.dtype).tiny)).clamp(0, 1)
    clear = functional.pad((1 - alpha).cumprod(-1), (1, 0), value=1.0)[..., :-1]
    return (alpha * clear).sum(-1)


def mask_loss_reference(
    field: Tensor, origin: Tensor, along: Tensor, span: Tensor, target: Tensor, inv_s: float
) -> tuple[Tensor, Tensor]:
    """`mask_loss` by the full discrete alpha and autograd in float64, for tests and as the benchmark's other side."""
    grid = field.detach().double().requires_grad_()
    slope = torch.tensor(inv_s, dtype=torch.float64, requires_grad=True)
    losses = [torch.zeros((), dtype=torch.float64)]
    for o, a, (first, end), t in zip(origin, along, span.tolist(), target.double()):
        if end - first < 2:
            opacity, clear = torch.tensor(LEAST_OPACITY, dtype=torch.float64), torch.ones((), dtype=torch.float64)
        else:
            where = o + torch.arange(first, end, dtype=torch.float32)[:, None] * a
            unit = ((where.flip(1) + 0.5) / torch.tensor(field.shape[::-1]) * 2 - 1).double()
            values = functional.grid_sample(
                grid[None, None], unit[None, None, None], align_corners=False, padding_mode="border"
            )
            total = accumulated_opacity(values.flatten(), slope)
            # The floor holds the value up but lets the gradient through, or a lost ray would never find the surface.
            opacity, clear = total + (LEAST_OPACITY - total).clamp_min(0).detach(), 1 - total
        losses.append(-(t * opacity.log() + (1 - t) * clear.log()))
    loss = torch.stack(losses).sum()
    grad_field, grad_slope = torch.autograd.grad(loss, [grid, slope], allow_unused=True, materialize_grads=True)
    return torch.stack([loss.detach(), grad_slope]), grad_field.float()


@_jit("void(float32[:,:,::1], float64, float64, float64, float64, float64[::1], float32[:,:,::1])")
def _shape_loss(field: Any, eikonal: Any, volume: Any, inv_s: Any, band: Any, totals: Any, gradient: Any) -> None:
    half = np.float32(0.5)
    for i in range(1, field.shape[0] - 1):
        for j in range(1, field.shape[1] - 1):
            for k in range(1, field.shape[2] - 1):
                value = field[i, j, k]
                if abs(value) < band:
                    z = (field[i + 1, j, k] - field[i - 1, j, k]) * half
                    y = (field[i, j + 1, k] - field[i, j - 1, k]) * half
                    x = (field[i, j, k + 1] - field[i, j, k - 1]) * half
                    slope = max(math.sqrt(z * z + y * y + x * x), 1e-6)
                    totals[0] += eikonal * (slope - 1) ** 2
                    force = np.float32(eikonal * (slope - 1) / slope)  # twice the half of the central difference
                    gradient[i + 1, j, k] += force * z
                    gradient[i - 1, j, k] -= force * z
                    gradient[i, j + 1, k] += force * y
                    gradient[i, j - 1, k] -= force * y
                    gradient[i, j, k + 1] += force * x
                    gradient[i, j, k - 1] -= force * x
                    inside = 1 / (1 + math.exp(inv_s * value))
                    totals[0] += volume * inside
                    gradient[i, j, k] -= np.float32(volume * inv_s * inside * (1 - inside))


@torch.library.custom_op("synthaug::shape_loss", mutates_args=())
def shape_loss(field: Tensor, eikonal: float, volume: float, inv_s: float, band: float) -> tuple[Tensor, Tensor]:
    """What a field near its surface costs by itself, and the gradient of that.

    Args:
        field: float32 [D, D, D], signed distances of one cell in voxels.
        eikonal: Weight of (|gradient of the field| - 1)^2 (NeuS, equation 16), by central differences.
        volume: Weight of the volume, a soft count of the voxels inside.
        inv_s: Slope of the logistic function by which voxels count as inside, per voxel.
        band: Only voxels with distances below this count; the outermost layer never does.

    Returns:
        float64 [1], the sum over the voxels; float32 [D, D, D], its derivative by the field.
    """
    assert field.dtype == torch.float32, field.dtype
    assert field.ndim == 3, field.shape
    totals, gradient = torch.zeros(1, dtype=torch.float64), torch.zeros_like(field)
    _shape_loss(field.contiguous().numpy(), eikonal, volume, inv_s, band, totals.numpy(), gradient.numpy())
    return totals, gradient


@shape_loss.register_fake
def _(field: Tensor, eikonal: float, volume: float, inv_s: float, band: float) -> tuple[Tensor, Tensor]:
    return field.new_empty(1, dtype=torch.float64), torch.empty_like(field)


def shape_loss_reference(
    field: Tensor, eikonal: float, volume: float, inv_s: float, band: float
) -> tuple[Tensor, Tensor]:
    """`shape_loss` by autograd in float64, for tests."""
    grid = field.detach().double().requires_grad_()
    inner = (slice(1, -1),) * 3
    near = grid.detach()[inner].abs() < band
    differences = [((grid.roll(-1, axis) - grid.roll(1, axis)) / 2)[inner] for axis in range(3)]
    slope = torch.stack(differences).square().sum(0).clamp_min(1e-12).sqrt()
    cost = eikonal * (slope - 1).square() + volume * torch.sigmoid(-inv_s * grid[inner])
    loss = cost[near].sum()
    (gradient,) = torch.autograd.grad(loss, [grid])
    return loss.detach()[None], gradient.float()
