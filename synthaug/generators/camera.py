"""Optics and camera: slow fields and wide blurs; noise with a spatial autocorrelation, quantisation, saturation.

Noise model: variance = flat + gain * (expected - level), the affine law of shot noise plus read noise (Foi et al., IEEE
TIP 17:1737, 2008), written around the background so that `flat` is what empty areas show and no offset has to be known.
Its variance is read from a high-pass that a blurred object cannot reach (after Immerkaer, CVIU 64:300, 1996, at the
fourth difference instead of the second: measured on nuclei, the second still holds up to a quarter of texture).

Everything drawn by these functions is made of shifts, sums and interpolation, never of convolutions or matrix products,
whose bits may depend on the size of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

NOISE_RADIUS = 3
"""Largest lag in pixels at which the noise may be correlated."""

_DIFFERENCE = np.array([1.0, -4.0, 6.0, -4.0, 1.0]) / np.sqrt(70.0)
QUANTISATION = 1.0 / 12.0
"""Variance that rounding to whole counts adds, counts^2."""


def high_pass(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Separable fourth difference [Y, X] of an image, scaled so that white noise keeps its variance."""
    rows = ndimage.correlate1d(image, _DIFFERENCE, axis=0, mode="reflect")
    return ndimage.correlate1d(rows, _DIFFERENCE, axis=1, mode="reflect")


def autocovariance(
    residual: NDArray[np.float64], valid: NDArray[np.bool_], lags: Sequence[tuple[int, int]]
) -> NDArray[np.float64]:
    """Mean product of pairs of valid pixels at each lag.

    Args:
        residual: float64 [Y, X].
        valid: bool [Y, X].
        lags: (dy, dx) with dy >= 0.

    Returns:
        float64 [len(lags)]; 0 where fewer than 50 pairs exist.
    """
    weight = valid.astype(np.float32)
    value = np.where(valid, residual, 0.0).astype(np.float32)
    rows, columns = value.shape
    out = np.zeros(len(lags))
    for i, (dy, dx) in enumerate(lags):
        if dy >= rows or abs(dx) >= columns:
            continue
        one = (slice(0, rows - dy), slice(max(-dx, 0), columns - max(dx, 0)))
        two = (slice(dy, rows), slice(max(dx, 0), columns - max(-dx, 0)))
        pairs = float(np.vdot(weight[one].ravel(), weight[two].ravel()))
        out[i] = float(np.vdot(value[one].ravel(), value[two].ravel())) / pairs if pairs >= 50 else 0.0
    return out


def noise_kernel(correlation: NDArray[np.float64], *, gate: float = 0.12) -> NDArray[np.float32]:
    """A symmetric filter that gives white noise a wanted autocorrelation: the root of its power spectrum, windowed.

    Args:
        correlation: float64 [2R+1, 2R+1], autocorrelation at lags -R..R, 1 in the centre.
        gate: If no correlation is larger, the noise is taken for white: a little comes from structure.

    Returns:
        float32 [2r+1, 2r+1] with unit energy, r <= R as small as the correlation allows; `[[1]]` for white noise.
    """
    radius = correlation.shape[0] // 2
    rho = 0.5 * (correlation + correlation[::-1, ::-1])
    rho[radius, radius] = 0.0
    if np.abs(rho).max() < gate:
        return np.ones((1, 1), np.float32)
    rho = np.where(np.abs(rho) < 0.02, 0.0, rho)  # the error of an estimate from a few frames
    reach = int(np.abs(np.argwhere(rho) - radius).max())
    rho[radius, radius] = 1.0
    size = 32
    wrapped = np.zeros((size, size))
    offsets = np.arange(-radius, radius + 1) % size
    wrapped[np.ix_(offsets, offsets)] = rho
    # a truncated estimate need not be a spectrum: negative power is set to zero
    root = np.fft.ifft2(np.sqrt(np.clip(np.fft.fft2(wrapped).real, 0.0, None))).real
    wide = np.arange(-radius, radius + 1)
    kernel = root[np.ix_(wide % size, wide % size)]
    trim = radius - min(reach + 1, radius)  # one tap more than the longest lag: roots have tails
    kernel = kernel[trim : kernel.shape[0] - trim, trim : kernel.shape[1] - trim]
    return (kernel / np.sqrt((kernel**2).sum())).astype(np.float32)


def filter_correlation(kernel: NDArray[np.float64], lags: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """Autocorrelation at the lags (dy, dx) of white noise filtered by a kernel of unit energy."""
    size = kernel.shape[0] + 2 * NOISE_RADIUS
    padded = np.zeros((size, size))
    padded[: kernel.shape[0], : kernel.shape[1]] = kernel
    return np.array([float((padded * np.roll(padded, lag, (0, 1))).sum()) for lag in lags])


def correlate_noise(white: Tensor, kernel: Tensor) -> Tensor:
    """Filter white noise by shifts and sums, whose bits do not depend on the batch as those of a convolution may.

    Args:
        white: float32 [B, 1, (Z,) Y + 2r, X + 2r].
        kernel: float32 [2r+1, 2r+1].

    Returns:
        float32 [B, 1, (Z,) Y, X].
    """
    taps = kernel.shape[0]
    rows, columns = white.shape[-2] - taps + 1, white.shape[-1] - taps + 1
    out = white[..., :rows, :columns] * kernel[0, 0]
    for i in range(taps):
        for j in range(taps):
            if i or j:
                out = out + white[..., i : i + rows, j : j + columns] * kernel[i, j]
    return out


def expose(expected: Tensor, variance: Tensor, noise: Tensor, *, integer: bool, saturation: float) -> Tensor:
    """What the camera reads out.

    Args:
        expected: float32 [B, 1, Y, X], expected counts.
        variance: float32 [B, 1, Y, X], noise variance in counts^2, before quantisation.
        noise: float32 [B, 1, Y, X], unit variance.
        integer: Whether the camera gives whole counts, from 0 to `saturation`.
        saturation: Largest count.

    Returns:
        float32 [B, 1, Y, X], counts.
    """
    image = expected + variance.clamp(min=0.0).sqrt() * noise
    if not integer:
        return image.clamp(max=saturation)
    return image.round().clamp(0.0, saturation)


def saturation_of(largest: float, integer: bool) -> float:
    """Largest count of the camera: the full scale of the smallest usual ADC that holds what was seen; counts.

    >>> saturation_of(4095, True), saturation_of(107, True), saturation_of(0.8, False)
    (4095.0, 255.0, 0.8)
    """
    if integer:
        for bits in (8, 10, 12, 14, 16):
            if largest <= 2**bits - 1:
                return float(2**bits - 1)
    return float(largest)


def legendre(coefficients: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """A slow field of second order with zero mean over [-1, 1]^2.

    Args:
        coefficients: float32 [B, 5], of x, y, P2(x), x*y, P2(y).
        y: float32 [B, Y], position within the frame, -1 at its top, 1 at its bottom.
        x: float32 [B, X].

    Returns:
        float32 [B, 1, Y, X].
    """
    a, b, c, d, e = (coefficients[:, i, None, None, None] for i in range(5))
    column, row = x[:, None, None, :], y[:, None, :, None]
    across = a * column + c * (1.5 * column * column - 0.5)
    down = b * row + e * (1.5 * row * row - 0.5)
    return across + down + d * column * row


def mirror_index(start: int, length: int, size: int) -> Tensor:
    """int64 [length], positions start, start + 1, ... folded into [0, size) by mirroring, the edge repeated."""
    folded = torch.arange(start, start + length) % (2 * size)
    return torch.minimum(folded, 2 * size - 1 - folded)


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [B, 1, Y, X] with mirrored borders, sigma in pixels."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (taps / taps.sum()).tolist()
    for axis in (2, 3):
        size = image.shape[axis]
        padded = image.index_select(axis, mirror_index(-radius, size + 2 * radius, size).to(image.device))
        image = padded.narrow(axis, radius, size) * weights[radius]
        for i in range(radius):
            pair = padded.narrow(axis, i, size) + padded.narrow(axis, 2 * radius - i, size)
            image = image + pair * weights[i]
    return image


def wide_blur(image: Tensor, sigma: float) -> Tensor:
    """`gaussian_blur` on a grid coarse enough to be cheap."""
    rows, columns = image.shape[2:]
    pool = max(1, 2 ** int(math.log2(max(sigma / 2.4, 1.0))))
    if pool == 1:
        return gaussian_blur(image, sigma)
    up, wide = -(-rows // pool) * pool, -(-columns // pool) * pool
    if (up, wide) != (rows, columns):
        image = image.index_select(2, mirror_index(0, up, rows).to(image.device))
        image = image.index_select(3, mirror_index(0, wide, columns).to(image.device))
    coarse = gaussian_blur(functional.avg_pool2d(image, pool), sigma / pool)
    fine = functional.interpolate(coarse, size=(up, wide), mode="bilinear", align_corners=False)
    return fine[:, :, :rows, :columns]


def texture_pitch(sigma: float) -> int:
    """Grid spacing in pixels on which a random texture of that sigma is drawn."""
    return max(1, round(sigma / 2))


def texture_grid(size: tuple[int, int], sigma: float) -> tuple[int, int]:
    """Shape of the white noise that `random_texture` needs for a canvas of (Y, X) pixels."""
    pitch = texture_pitch(sigma)
    margin = 2 * math.ceil(3 * sigma / pitch) + 2
    return -(-size[0] // pitch) + margin, -(-size[1] // pitch) + margin


def random_texture(white: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """A Gaussian random field of unit variance whose autocorrelation is exp(-r^2 / (4 sigma^2)).

    Args:
        white: float32 [B, 1, *texture_grid(size, sigma)], standard normal.
        size: Canvas (Y, X) in pixels.
        sigma: Of the blur that makes it, in pixels.

    Returns:
        float32 [B, 1, Y, X].
    """
    pitch = texture_pitch(sigma)
    grid = sigma / pitch
    radius = math.ceil(3 * grid)
    taps = [math.exp(-0.5 * (i / grid) ** 2) for i in range(-radius, radius + 1)]
    energy = math.sqrt(sum(w * w for w in taps))
    # between two nodes with correlation c, linear interpolation keeps 2/3 + c/3 of the variance on average
    kept = 2 / 3 + math.exp(-0.25 / grid**2) / 3 if pitch > 1 else 1.0
    field = white
    for axis in (2, 3):
        length = field.shape[axis] - 2 * radius
        total = field.narrow(axis, radius, length) * (taps[radius] / energy)
        for i in range(radius):
            pair = field.narrow(axis, i, length) + field.narrow(axis, 2 * radius - i, length)
            total = total + pair * (taps[i] / energy)
        field = total
    nodes = (field.shape[2] * pitch, field.shape[3] * pitch)
    fine = functional.interpolate(field, size=nodes, mode="bilinear", align_corners=False) if pitch > 1 else field
    return fine[:, :, pitch : pitch + size[0], pitch : pitch + size[1]] / kept


_TAILS = np.linspace(0.05, 1.1, 43)


def tail_of(skewness: float) -> float:
    """The parameter of `skew` for a wanted skewness; between 0.05 (none to speak of) and 1.1 (skewness 8.3)."""
    growth = np.exp(_TAILS**2)
    return float(np.interp(skewness, (growth + 2) * np.sqrt(growth - 1), _TAILS))


def skew(field: Tensor, tail: Tensor) -> Tensor:
    """Shifted log-normal of zero mean and unit variance from a standard normal field: few bright spots, a flat floor.

    Args:
        field: float32 [B, 1, Y, X].
        tail: float32, broadcastable, > 0: standard deviation of the logarithm.
    """
    square = tail * tail
    return ((tail * field - 0.5 * square).exp() - 1.0) / torch.expm1(square).sqrt()
