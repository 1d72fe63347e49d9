"""What the camera reads out of a stack: correlated noise, skewed as an electron-multiplying camera's, rounding; one pass.

Plain torch (`correlate_noise`, `shape_noise` and `expose` in generators/, which the tests compare with) goes over the volume
some forty times, each time into new memory: large stacks leave the cache, and the system hands out every page anew. The
kernel works row by row. Its sums have the order of plain torch; its logarithm is a polynomial of its own, which gives
the same bits in any place of a row, for any number of threads and with any mathematical library. So a voxel in some 10^6
may differ from plain torch by a count.

There is no Triton version: volumes are put together by the workers that load data, on the CPU.

Importing this file imports numba and compiles (or reads from numba's cache) the kernel, so import it where it is used.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthaug.kernels.placement import _jit


@_jit("void(float32[::1], int32[::1], float32[::1], int32[::1])")
def _log(values: Any, bits: Any, mantissa: Any, mantissa_bits: Any) -> None:
    """Natural logarithms in place, of normal numbers > 0 (S. Moshier's logf of Cephes).

    `bits` and `mantissa_bits` are the memory of `values` and `mantissa`, read as whole numbers.
    """
    one, half, root = np.float32(1), np.float32(0.5), np.float32(0.70710678)
    for x in range(values.shape[0]):
        exponent = np.float32((bits[x] >> 23) - 126)
        mantissa_bits[x] = (bits[x] & 0x007FFFFF) | 0x3F000000  # in [0.5, 1)
        m = mantissa[x]
        low = m < root
        exponent = exponent - one if low else exponent
        m = m + m - one if low else m - one
        square = m * m
        p = np.float32(7.0376836292e-2) * m + np.float32(-1.1514610310e-1)
        p = p * m + np.float32(1.1676998740e-1)
        p = p * m + np.float32(-1.2420140846e-1)
        p = p * m + np.float32(1.4249322787e-1)
        p = p * m + np.float32(-1.6668057665e-1)
        p = p * m + np.float32(2.0000714765e-1)
        p = p * m + np.float32(-2.4999993993e-1)
        p = p * m + np.float32(3.3333331174e-1)
        p = p * m * square + np.float32(-2.12194440e-4) * exponent - half * square
        values[x] = m + p + np.float32(0.693359375) * exponent


@_jit(
    "void(float32[:,:,::1], float32[:,:,::1], float32[:,:,::1], float32[:,::1], float32[:,::1], float32[::1],"
    " float32[::1], boolean, float32[:,:,::1])"
)
def _read_out(
    expected: Any,
    signal: Any,
    white: Any,
    kernel: Any,
    table: Any,
    affine: Any,
    scales: Any,
    integer: bool,
    image: Any,
) -> None:
    level, flat, gain, floor, saturation = affine[0], affine[1], affine[2], affine[3], affine[4]
    one, read, fewest, first, a_row, least, a_column = (
        scales[0],
        scales[1],
        scales[2],
        scales[3],
        scales[4],
        scales[5],
        scales[6],
    )
    taps, width = kernel.shape[0], expected.shape[2]
    rows, columns = table.shape
    zero, two, unit = np.float32(0), np.float32(2), np.float32(1)
    last_row, last_column = np.float32(rows - 1), np.float32(columns - 1)
    noise, variance = np.empty(width, np.float32), np.empty(width, np.float32)
    row, mantissa = np.empty(width, np.float32), np.empty(width, np.float32)
    row_bits, mantissa_bits = row.view(np.int32), mantissa.view(np.int32)
    entries = table.reshape(-1)
    for z in range(expected.shape[0]):
        for y in range(expected.shape[1]):
            line = white[z, y]
            weight = kernel[0, 0]
            for x in range(width):
                noise[x] = line[x] * weight
            for k in range(1, taps * taps):
                line, weight = white[z, y + k // taps, k % taps :], kernel[k // taps, k % taps]
                for x in range(width):
                    noise[x] += line[x] * weight
            source = signal[z, y]
            for x in range(width):
                variance[x] = max(flat + gain * (source[x] - level), floor)
            if rows:
                for x in range(width):
                    row[x] = max((variance[x] / one - read) / two, fewest)
                _log(row, row_bits, mantissa, mantissa_bits)
                for x in range(width):
                    down = min(max((row[x] - first) * a_row, zero), last_row)
                    right = min(max((noise[x] - least) * a_column, zero), last_column)
                    # NaN becomes the least whole number there is: it must not be an address
                    i = max(min(np.int32(down), np.int32(rows - 2)), np.int32(0))
                    j = max(min(np.int32(right), np.int32(columns - 2)), np.int32(0))
                    down, right, at = down - np.float32(i), right - np.float32(j), i * np.int32(columns) + j
                    upper = entries[at] * (unit - right) + entries[at + 1] * right
                    lower = entries[at + columns] * (unit - right) + entries[at + columns + 1] * right
                    noise[x] = upper * (unit - down) + lower * down
            source, out = expected[z, y], image[z, y]
            if integer:
                for x in range(width):
                    value = source[x] + np.sqrt(max(variance[x], zero)) * noise[x]
                    out[x] = min(max(np.rint(value), zero), saturation)
            else:
                for x in range(width):
                    out[x] = min(source[x] + np.sqrt(max(variance[x], zero)) * noise[x], saturation)


@torch.library.custom_op("synthaug::read_out", mutates_args=(), device_types="cpu")
def read_out(
    expected: Tensor,
    signal: Tensor,
    white: Tensor,
    kernel: Tensor,
    table: Tensor,
    level: float,
    flat: float,
    gain: float,
    read_noise: float,
    fewest_electrons: float,
    most_electrons: float,
    widest: float,
    integer: bool,
    saturation: float,
) -> Tensor:
    """Counts of one stack; the noise has the variance flat + gain * (signal - level), 0.1 * flat at least.

    Args:
        expected: float32 [Z, Y, X], counts.
        signal: float32 [Z, Y, X], counts: what the variance grows with.
        white: float32 [Z, Y + 2r, X + 2r], standard normal.
        kernel: float32 [2r+1, 2r+1], the filter that correlates the noise, of unit energy.
        table: float32 [R, C], quantiles of the noise at R mean numbers of electrons, geometrically spaced, and C evenly
            spaced standard normal values; [0, 0] for Gaussian noise.
        level, flat, gain: counts, counts^2, counts.
        read_noise: in counts of one multiplied electron.
        fewest_electrons, most_electrons: of the table's first and last row.
        widest: standard normal value of the table's last column, its first is -widest.
        integer: whether the camera gives whole counts, from 0 to `saturation`.
        saturation: largest count.

    Returns:
        float32 [Z, Y, X], counts.
    """
    margin = kernel.shape[0] - 1
    assert white.shape == (expected.shape[0], expected.shape[1] + margin, expected.shape[2] + margin), white.shape
    assert signal.shape == expected.shape, (signal.shape, expected.shape)
    one = np.float32(0.5) * np.float32(max(gain, 1e-6))  # counts of one electron
    first = math.log(fewest_electrons)
    a_row = (table.shape[0] - 1) / (math.log(most_electrons) - first)
    scales = [one * one, read_noise**2, fewest_electrons, first, a_row, -widest, (table.shape[1] - 1) / (2 * widest)]
    image = np.empty(expected.shape, np.float32)
    _read_out(
        *(t.contiguous().numpy() for t in (expected, signal, white, kernel, table)),
        np.array([level, flat, gain, 0.1 * flat, saturation], np.float32),
        np.array(scales, np.float32),
        integer,
        image,
    )
    return torch.from_numpy(image)


@read_out.register_fake
def _(
    expected: Tensor,
    signal: Tensor,
    white: Tensor,
    kernel: Tensor,
    table: Tensor,
    level: float,
    flat: float,
    gain: float,
    read_noise: float,
    fewest_electrons: float,
    most_electrons: float,
    widest: float,
    integer: bool,
    saturation: float,
) -> Tensor:
    return torch.empty_like(expected, memory_format=torch.contiguous_format)
