"""Texture features that are computed, not learned, and the Fréchet distance between two sets of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from synthaug.evaluation.tiles import Floats

_QUANTILES, _SD_QUANTILES = (25, 50, 75, 90, 95, 99), (5, 25, 50, 75, 95)
_NUM_BANDS, _NUM_SCALES, _NUM_PATTERNS = 10, 4, 9

FEATURE_NAMES: tuple[str, ...] = (
    "level",
    "log_spread",
    *(f"quantile_{q}" for q in _QUANTILES),
    *(f"log_power_{band}" for band in range(_NUM_BANDS)),
    *(f"log_haar_{scale}" for scale in range(_NUM_SCALES)),
    *(f"log_haar_sparsity_{scale}" for scale in range(_NUM_SCALES)),
    *(f"log_local_sd_{q}" for q in _SD_QUANTILES),
    "log_noise_5",
    "log_noise_25",
    "mean_sd_correlation",
    *(f"pattern_{k}" for k in range(_NUM_PATTERNS)),
)
"""The 43 features of `TextureFeatures`, in order."""


class TextureFeatures:
    """The fixed extractor behind `frechet_distance`: `FEATURE_NAMES` of one tile, standardised by reference tiles.

    A tile is shifted by its 5 % quantile and divided by its spread (99.5 % minus 5 % quantile, at least a tenth of the
    reference's median spread, so that empty tiles do not turn into pure noise). Then, in numpy, scipy and scikit-image:

    - `level`, `log_spread`: the 5 % quantile and the spread themselves, in units of the reference's;
    - `quantile_*`: percentiles of the tile;
    - `log_power_*`: log mean power (Hann window) in 10 rings of equal log width from 1.5 / tile to 0.5 cycles a pixel;
    - `log_haar_*`, `log_haar_sparsity_*`: log RMS of the Haar details at 4 scales, and log of mean |detail| over RMS;
    - `log_local_sd_*`: log percentiles of the standard deviation in 5 x 5 windows;
    - `log_noise_*`: two of them not divided by the tile's own spread, that is the camera noise of flat areas;
    - `mean_sd_correlation`: of local mean and log local standard deviation;
    - `pattern_*`: square roots of the shares of the uniform local binary patterns (8 neighbours, radius 1, after a
      Gaussian of 1 px; Ojala et al., PAMI 2002).

    Nothing depends on the camera's range or offset: images a * x + b give the same features if the reference does too.
    Standardised features are cut off at 5 standard deviations, so that a single odd tile does not decide a distance.

    Args:
        reference: Image tiles [Y, X], all of one size, by which level, spread, mean and standard deviation are fixed.
    """

    def __init__(self, reference: Sequence[NDArray[np.float32]]) -> None:
        low, high = np.percentile(np.stack(reference), (5, 99.5), axis=(1, 2))
        self.level = float(np.median(low))
        self.spread = max(float(np.median(high - low)), 1e-6)
        raw = np.stack([self._measure(tile) for tile in reference])
        self.mean: Floats = raw.mean(0)
        # All features are logs, shares or quantiles of order 1: with less spread than that a feature is constant.
        self.sd: Floats = np.maximum(raw.std(0), 0.01)

    def __call__(self, tiles: Sequence[NDArray[np.float32]]) -> Floats:
        """Standardised features, float64 [N, 43], of image tiles [Y, X] of the reference's size."""
        raw = np.stack([self._measure(tile) for tile in tiles])
        return np.clip((raw - self.mean) / self.sd, -5.0, 5.0)

    def _measure(self, tile: NDArray[np.float32]) -> Floats:
        from scipy import ndimage
        from skimage.feature import local_binary_pattern

        image = tile.astype(np.float64)
        low, high = np.percentile(image, (5, 99.5))
        spread = max(high - low, 0.1 * self.spread)
        image = (image - low) / spread

        window = np.hanning(len(image))[:, None] * np.hanning(image.shape[1])
        power = np.abs(np.fft.rfft2((image - image.mean()) * window)) ** 2 / (window**2).sum()
        frequency = np.hypot(np.fft.fftfreq(len(image))[:, None], np.fft.rfftfreq(image.shape[1]))
        band = np.digitize(frequency, np.geomspace(1.5 / len(image), 0.5, _NUM_BANDS + 1)) - 1
        bands = [np.log(power[band == i].mean() + 1e-8) for i in range(_NUM_BANDS)]

        energy, sparsity = [], []
        coarse = image[: len(image) // 16 * 16, : image.shape[1] // 16 * 16]
        for _ in range(_NUM_SCALES):
            a, b, c, d = coarse[::2, ::2], coarse[::2, 1::2], coarse[1::2, ::2], coarse[1::2, 1::2]
            detail = np.stack([a + b - c - d, a - b + c - d, a - b - c + d]) / 2
            coarse = (a + b + c + d) / 2
            rms = np.sqrt((detail**2).mean() + 1e-10)
            energy.append(np.log(rms))
            sparsity.append(np.log(np.abs(detail).mean() / rms + 1e-3))

        local_mean = ndimage.uniform_filter(image, 5)
        variance = np.maximum(ndimage.uniform_filter(image**2, 5) - local_mean**2, 0)
        log_sd = 0.5 * np.log(variance + 1e-8)[2:-2, 2:-2]
        sd_quantiles = np.percentile(log_sd, _SD_QUANTILES)
        noise = sd_quantiles[:2] + np.log(spread / self.spread)
        means = local_mean[2:-2, 2:-2]
        scale = means.std() * log_sd.std()
        correlation = ((means - means.mean()) * (log_sd - log_sd.mean())).mean() / scale if scale > 1e-9 else 0.0

        # Whole numbers, as scikit-image asks for here: ties in float images depend on rounding.
        smooth = np.rint(ndimage.gaussian_filter(image, 1.0) * 2**16).astype(np.int64)
        pattern = local_binary_pattern(smooth, 8, 1, "uniform").astype(np.int64)
        shares = np.sqrt(np.bincount(pattern.ravel(), minlength=_NUM_PATTERNS + 1)[:_NUM_PATTERNS] / pattern.size)

        own = [(low - self.level) / self.spread, np.log(spread / self.spread), *np.percentile(image, _QUANTILES)]
        return np.array([*own, *bands, *energy, *sparsity, *sd_quantiles, *noise, correlation, *shares])


def frechet_distance(first: Floats, second: Floats) -> float:
    """Squared Fréchet distance between Gaussians fitted to two feature sets; 0 = same mean and covariance.

    |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) (Dowson & Landau 1982). The formula is FID's (Heusel et al. 2017), the
    features are not: numbers compare with those of `TextureFeatures` on the same data set only, never with a published
    FID. Off-diagonal covariances are shrunk by F / (F + N), so that a few dozen tiles do not blow it up.

    Args:
        first: float64 [N, F], N >= 2.
        second: float64 [M, F], M >= 2. Use M = N where distances are compared: the bias depends on the count.
    """

    def moments(x: Floats) -> tuple[Floats, Floats]:
        covariance = np.atleast_2d(np.cov(x, rowvar=False))
        keep = len(x) / (x.shape[1] + len(x))
        return x.mean(0), keep * covariance + (1 - keep) * np.diag(np.diag(covariance))

    (mean_1, cov_1), (mean_2, cov_2) = moments(first), moments(second)
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_2 @ root), 0)).sum()
    return max(float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * cross), 0.0)
