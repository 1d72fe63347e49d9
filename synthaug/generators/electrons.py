"""Cameras that multiply electrons (EMCCD): noise so skewed that a Gaussian would be seen not to be it.

Read as quantiles in the place of those of a normal distribution, so that everything else about noise stays as in
`camera.py`: drawn as standard normal, correlated by a filter, scaled by its standard deviation.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

ELECTRONS = np.geomspace(0.02, 200.0, 49)
"""Mean electrons a pixel of the rows of a noise table; with more of them the noise is Gaussian for all purposes."""

QUANTILES = np.linspace(-4.8, 4.8, 97)
"""Standard normal values of the columns of a noise table."""

READ_NOISES = (0.02, 0.05, 0.08, 0.12, 0.17, 0.25, 0.35, 0.5, 0.7, 1.0)
"""Read noises tried in a fit, in units of the gain of one electron."""


def multiplied_noise(read_noise: float) -> NDArray[np.float32]:
    """Quantiles of the noise of an electron-multiplying camera, whose bright single electrons make it skewed.

    n electrons, Poisson distributed, come out as a gamma distribution of shape n (Hirsch et al., PLoS ONE 8:e53671, 2013);
    the sum over n is inverted from its characteristic function exp(lambda / (1 - it) - lambda - (read t)^2 / 2).

    Args:
        read_noise: Standard deviation of the read-out, in counts of one multiplied electron.

    Returns:
        float32 [len(ELECTRONS), len(QUANTILES)]: values of zero mean and unit variance in the place of those of a normal
        distribution.
    """
    table = np.zeros((len(ELECTRONS), len(QUANTILES)), np.float32)
    wanted = special.ndtr(QUANTILES)
    num = 1 << 13
    for row, electrons in enumerate(ELECTRONS):
        sd = math.sqrt(2 * electrons + read_noise**2)
        low, high = -6 * read_noise - 1.0, electrons + 8 * sd + 22.0
        step = (high - low) / num
        t = 2 * np.pi * np.fft.fftfreq(num, step)
        # a read noise under a step would ring
        read = max(read_noise, step)
        phi = np.exp(electrons / (1 - 1j * t) - electrons - 0.5 * (read * t) ** 2 - 1j * t * low)
        density = np.clip(np.fft.fft(phi).real, 0.0, None)
        # each bin's mass lies around its centre; a floor makes the sum strictly increase, as an inverse needs
        cdf = np.cumsum(density + 1e-12 * density.max())
        cdf = (cdf - 0.5 * density) / cdf[-1]
        value = np.interp(wanted, cdf, low + step * np.arange(num))
        table[row] = (value - electrons) / sd
    return table


def shape_noise(normal: Tensor, electrons: Tensor, table: Tensor) -> Tensor:
    """Noise of zero mean and unit variance with the distribution of a noise table, from standard normal noise.

    Args:
        normal: float32 [B, 1, ...].
        electrons: float32, same shape: mean electrons a pixel.
        table: float32, from `multiplied_noise`.

    Returns:
        float32, same shape.
    """
    rows, columns = table.shape
    first, last = math.log(ELECTRONS[0]), math.log(ELECTRONS[-1])
    row = (electrons.clamp(min=float(ELECTRONS[0])).log() - first) * ((rows - 1) / (last - first))
    column = (normal - float(QUANTILES[0])) * ((columns - 1) / float(QUANTILES[-1] - QUANTILES[0]))
    row, column = row.clamp(0, rows - 1), column.clamp(0, columns - 1)
    i, j = row.long().clamp(max=rows - 2), column.long().clamp(max=columns - 2)
    down, right = row - i, column - j
    flat, at = table.flatten(), i * columns + j
    upper = flat[at] * (1 - right) + flat[at + 1] * right
    lower = flat[at + columns] * (1 - right) + flat[at + columns + 1] * right
    return upper * (1 - down) + lower * down


def fit_read_noise(flat: NDArray[np.float64], variance: float, gain: float) -> float:
    """Read noise of an electron-multiplying camera, in units of the gain of one electron; 0 if the noise is Gaussian.

    Args:
        flat: Counts of pixels of one expected value.
        variance: Of them, counts^2.
        gain: Slope of the variance over the expected value, counts; twice the gain of one electron.
    """
    if len(flat) < 1000 or gain <= 0 or variance <= 0:
        return 0.0
    probabilities = np.array([0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99])
    # whole counts are spread evenly over their bin
    spread = np.sort(flat) + (np.arange(len(flat)) * 0.6180339887 % 1.0 - 0.5)
    seen = (np.quantile(spread, probabilities) - flat.mean()) / flat.std()
    normal = special.ndtri(probabilities)
    best, smallest = 0.0, float(np.abs(seen - normal).sum())
    one = 0.5 * gain
    for read in READ_NOISES:
        electrons = (variance / one**2 - read**2) / 2
        if electrons <= 0:
            continue
        share = np.interp(math.log(electrons), np.log(ELECTRONS), np.arange(len(ELECTRONS)))
        table = multiplied_noise(read)
        low = int(min(share, len(ELECTRONS) - 2))
        row = table[low] + (share - low) * (table[low + 1] - table[low])
        error = float(np.abs(seen - np.interp(normal, QUANTILES, row)).sum())
        if error < smallest:
            best, smallest = read, error
    return best
