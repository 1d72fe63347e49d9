"""How real synthetic frames are, in numbers that need no network and no download.

Every distance is given twice: r2r, real train against real val, says what is normal between two sets of real frames;
r2s, synthetic against the same real val frames, says how far synthetic ones are. All frames are first cut to tiles of
one size, so that sets with other frame sizes compare (a small frame cuts more of its cells).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthaug.errors import InputError
from synthaug.generators.background import cell_contrasts
from synthaug.randomness import SampleKey

Pair = tuple[NDArray[np.float32], NDArray[np.int32]]
"""image float32 [Y, X] in camera counts, labels int32 [Y, X], 0 = background."""
Floats = NDArray[np.float64]

TILE, TEXTURE_TILE, MIN_TILE = 256, 128, 64
"""Largest tile in pixels for cell statistics and for texture features; smallest frame side that can be compared."""

MAX_TILES = 400
"""At most so many tiles of each set are measured, drawn at random: more cost minutes and change little."""

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

PROPERTIES: dict[str, str] = {
    "area": "px",
    "eccentricity": "0 = round",
    "solidity": "share of the convex hull",
    "intensity": "counts over local background",
    "relative_intensity": "of the tile's median cell",
    "nearest_neighbour": "px, centre to centre",
    "density": "cells per 100 × 100 px",
}
"""What `cell_properties` measures, with units."""


def check_pairs(name: str, pairs: Sequence[Pair]) -> None:
    """Raise InputError unless `pairs` is a non-empty sequence of finite images [Y, X] with integer labels [Y, X]."""
    if not len(pairs):
        raise InputError(name, expected="at least one (image, labels) pair", got="none")
    for index, (image, labels) in enumerate(pairs):
        image, labels = np.asarray(image), np.asarray(labels)
        if image.ndim != 2 or image.shape != labels.shape:
            got = f"{image.shape} and {labels.shape}"
            raise InputError(f"{name}[{index}]", expected="image and labels of one shape [Y, X]", got=got)
        if labels.dtype.kind not in "iu":
            raise InputError(f"{name}[{index}]", expected="integer labels", got=labels.dtype)
        if not np.isfinite(image).all():
            raise InputError(f"{name}[{index}]", expected="a finite image", got="NaN or infinity")


def cut_tiles(pairs: Sequence[Pair], tile: int) -> list[Pair]:
    """Tiles [tile, tile] on a centred grid without overlap, labels contiguous from 1 in each."""
    tiles = []
    for image, labels in pairs:
        counts = [n // tile for n in image.shape]
        top, left = ((n - count * tile) // 2 for n, count in zip(image.shape, counts))
        for y in range(counts[0]):
            for x in range(counts[1]):
                box = np.s_[top + y * tile : top + (y + 1) * tile, left + x * tile : left + (x + 1) * tile]
                own = np.asarray(labels[box])
                ids = np.unique(own)
                contiguous = np.searchsorted(ids[ids > 0], own, side="right").astype(np.int32)
                tiles.append((np.asarray(image[box], np.float32), contiguous))
    return tiles


def _draw(items: list[Pair], key: SampleKey) -> list[Pair]:
    if len(items) <= MAX_TILES:
        return items
    return [items[i] for i in np.sort(key.numpy().choice(len(items), MAX_TILES, replace=False))]


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


def cut_by_border(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Ids of the instances that touch the frame's border, sorted."""
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return edge[edge > 0]


def cell_properties(tiles: Sequence[Pair], min_piece: float = 0.0) -> dict[str, Floats]:
    """Every property in `PROPERTIES`, pooled over tiles of one size.

    Instances cut by a tile's border count half for the density, are neighbours of others, and are left out otherwise.
    `relative_intensity` needs five whole cells in the tile, `nearest_neighbour` a second one.

    Args:
        tiles: From `cut_tiles`.
        min_piece: Cut pieces smaller than this many pixels are ignored, since generators drop such slivers.

    Returns:
        One float64 array a property: a value a cell, for `density` a value a tile.
    """
    from scipy.spatial import cKDTree
    from skimage.measure import regionprops_table

    found: dict[str, list[Floats]] = {name: [] for name in PROPERTIES}
    for image, labels in tiles:
        columns = ("label", "area", "eccentricity", "solidity", "centroid")
        table = {k: np.asarray(v, np.float64) for k, v in regionprops_table(labels, properties=columns).items()}
        cut = np.isin(table["label"], cut_by_border(labels))
        kept = ~cut | (table["area"] >= min_piece)
        whole = ~cut
        found["density"].append(np.array([(whole.sum() + 0.5 * (cut & kept).sum()) / labels.size * 1e4]))
        for name in ("area", "eccentricity", "solidity"):
            found[name].append(table[name][whole])
        intensity = cell_contrasts(image, labels)[0].astype(np.float64)[whole] if whole.any() else np.zeros(0)
        found["intensity"].append(intensity)
        if whole.sum() >= 5 and np.median(intensity) > 0:
            found["relative_intensity"].append(intensity / np.median(intensity))
        if kept.sum() >= 2:
            centres = np.stack([table["centroid-0"], table["centroid-1"]], 1)
            distance = cKDTree(centres[kept]).query(centres[whole], k=2)[0]
            found["nearest_neighbour"].append(distance[:, 1])
    return {name: np.concatenate([np.zeros(0), *values]) for name, values in found.items()}


_NUM_RADII, _NUM_ANGLES, _REACH, _TEXTURE_WEIGHT, _NUM_CANDIDATES = 12, 64, 1.6, 2.0, 64


def polar_descriptors(pairs: Sequence[Pair], sigma: float, min_area: int = 20) -> NDArray[np.float32]:
    """Every whole cell, masked and divided by its mean intensity, resampled on rings around its centre.

    Polar, because aligning by the principal axis fails for nearly round cells: of training cells rotated by 33° it
    found 10 in 100 at best, trying all rotations of polar samples finds 99 (BBBC039).

    Args:
        pairs: Frames of any size; cells cut by a border and cells under `min_area` pixels are left out.
        sigma: Gaussian smoothing in pixels, against camera noise and resampling.

    Returns:
        float32 [N, 24, 64]: 12 radii up to 1.6 times that of a disc of the same area, first of the soft mask, then of
        the texture (mean 0, weighted by 2), by 64 angles. Squared differences sum to a mean over the disc.
    """
    from scipy import ndimage

    radii = (np.arange(_NUM_RADII) + 0.5) / _NUM_RADII * _REACH
    angles = np.arange(_NUM_ANGLES) * 2 * np.pi / _NUM_ANGLES
    weight = np.sqrt(radii / (radii.sum() * _NUM_ANGLES))[:, None]
    pad = math.ceil(4 * sigma) + 1
    out = []
    for image, labels in pairs:
        free = ndimage.distance_transform_edt(labels == 0) > 6
        base = float(np.median(image[free])) if free.any() else float(image.min())
        cut = set(cut_by_border(labels).tolist())
        for index, box in enumerate(ndimage.find_objects(labels), start=1):
            if box is None or index in cut:
                continue
            own = np.pad(labels[box] == index, pad).astype(np.float32)
            area = own.sum()
            light = own * np.pad(image[box] - base, pad)
            if area < min_area or light.sum() <= 0:
                continue
            centre = ndimage.center_of_mass(own)
            reach = np.sqrt(area / np.pi) * radii[:, None]
            where = [centre[0] + reach * np.sin(angles), centre[1] + reach * np.cos(angles)]
            mask = ndimage.map_coordinates(ndimage.gaussian_filter(own, sigma), where, order=1)
            inside = ndimage.map_coordinates(ndimage.gaussian_filter(light, sigma), where, order=1) * area / light.sum()
            out.append(np.concatenate([mask * weight, _TEXTURE_WEIGHT * (inside - mask) * weight]))
    return np.asarray(out, np.float32).reshape(-1, 2 * _NUM_RADII, _NUM_ANGLES)


def nearest_distances(cells: NDArray[np.float32], training: NDArray[np.float32]) -> Floats:
    """Distance of each cell to the training cell it resembles most, over all rotations and mirror images.

    The 64 training cells with the most similar rotation-invariant moduli (one matrix product) are compared in full, by
    circular correlation over the angle.

    Args:
        cells: float32 [N, 24, 64] of `polar_descriptors`.
        training: float32 [M, 24, 64], M >= 1.

    Returns:
        float64 [N], >= 0; 0 = identical.
    """
    turns, training_turns = np.fft.rfft(cells), np.fft.rfft(training)
    invariant, training_invariant = (
        np.abs(f[..., :12]).reshape(len(f), -1).astype(np.float32) for f in (turns, training_turns)
    )
    norms = (training.astype(np.float64) ** 2).sum((1, 2))
    count = min(_NUM_CANDIDATES, len(training))
    best = np.empty(len(cells))
    for start in range(0, len(cells), 512):
        block = slice(start, start + 512)
        rough = (training_invariant**2).sum(1) - 2 * invariant[block] @ training_invariant.T
        for row, near in enumerate(np.argpartition(rough, count - 1, axis=1)[:, :count], start=start):
            products = [(f * training_turns[near]).sum(1) for f in (turns[row].conj(), turns[row])]
            alike = np.fft.irfft(np.stack(products), n=_NUM_ANGLES).max((0, 2))
            squared = (cells[row].astype(np.float64) ** 2).sum() + norms[near] - 2 * alike
            best[row] = np.sqrt(max(float(squared.min()), 0.0))
    return best


@dataclass(frozen=True)
class Distance:
    """One distance between real and real, and between synthetic and real; `*_sd` over subsamples, 0 without any."""

    r2r: float
    r2s: float
    r2r_sd: float = 0.0
    r2s_sd: float = 0.0

    @property
    def ratio(self) -> float:
        """r2s / r2r; NaN where r2r is 0 or unknown."""
        return self.r2s / self.r2r if self.r2r > 0 else float("nan")


@dataclass(frozen=True)
class NearCopies:
    """How many cells are near-copies of a training cell.

    Attributes:
        threshold: Distances under it count as near-copies: where 1 % of the val cells would lie if their log distances
            were normal, by their median and lower quartile. (Their own 1 % quantile would be set by the duplicates that
            some data sets hold.)
        val_share: Of the val cells, in [0, 1]. Much over 0.01 says that val and train share cells.
        synthetic_share: Of the synthetic cells. Smooth or featureless cells are near to some training cell too, so a
            large share asks for a look, it does not prove copying.
        control_share: Of training cells after a rotation by 33° with interpolation: how many copies the test finds.
        val_median: Median distance of val cells to their nearest training cell.
        synthetic_median: The same for synthetic cells.
        num_train: Training cells compared with.
        num_val: Val cells compared.
        num_synthetic: Synthetic cells compared.
    """

    threshold: float
    val_share: float
    synthetic_share: float
    control_share: float
    val_median: float
    synthetic_median: float
    num_train: int
    num_val: int
    num_synthetic: int


def near_copies(
    train: Sequence[Pair],
    val: Sequence[Pair],
    synthetic: Sequence[Pair],
    *,
    max_cells: int = 2000,
    seed: int = 0,
) -> NearCopies:
    """Share of near-copies of training cells among synthetic cells, beside that among val cells.

    Args:
        train: All frames the generator was trained on; every whole cell of them is compared with.
        val: Real frames it has not seen.
        synthetic: Frames it made.
        max_cells: So many val and so many synthetic cells are compared at most, drawn at random.
        seed: For that draw.

    Returns:
        `NearCopies`; NaN shares where a set has no whole cell.
    """
    from scipy import ndimage

    def chosen(cells: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        rng = SampleKey(seed, ("near_copies", name)).numpy()
        return cells if len(cells) <= max_cells else cells[np.sort(rng.choice(len(cells), max_cells, replace=False))]

    areas = np.concatenate([np.bincount(labels.ravel())[1:] for _, labels in train])
    sigma = max(0.08 * math.sqrt(float(np.median(areas[areas > 0])) / math.pi), 0.5) if areas.any() else 1.0
    training = polar_descriptors(train, sigma)
    others = chosen(polar_descriptors(val, sigma), "val"), chosen(polar_descriptors(synthetic, sigma), "synthetic")
    counts = len(training), len(others[0]), len(others[1])
    if not all(counts):
        unknown = float("nan")
        return NearCopies(unknown, unknown, unknown, unknown, unknown, unknown, *counts)
    val_distances, distances = (nearest_distances(cells, training) for cells in others)
    quartile, median = np.quantile(np.log(val_distances + 1e-6), (0.25, 0.5))
    threshold = float(np.exp(median - 2.326 * (median - quartile) / 0.6745))

    rotated: list[Pair] = []
    for image, labels in train[:: max(len(train) // 8, 1)]:
        whole = np.where(np.isin(labels, cut_by_border(labels)), 0, labels)
        turned = ndimage.rotate(image, 33.0, order=1, mode="reflect")
        rotated.append((turned, ndimage.rotate(whole, 33.0, order=0)))
    control = chosen(polar_descriptors(rotated, sigma), "control")
    control_share = float((nearest_distances(control, training) < threshold).mean()) if len(control) else float("nan")
    return NearCopies(
        threshold,
        float((val_distances < threshold).mean()),
        float((distances < threshold).mean()),
        control_share,
        float(np.median(val_distances)),
        float(np.median(distances)),
        *counts,
    )


@dataclass(frozen=True)
class RealismReport:
    """All numbers on one set of synthetic frames.

    Attributes:
        tile: Side in pixels of the tiles cells were measured in.
        texture_tile: Side in pixels of the tiles texture was measured in.
        num_tiles: Texture tiles on each side of every Fréchet distance.
        num_frames: Frames of train, val and synthetic.
        num_cells: Whole cells in the tiles of train, val and synthetic.
        frechet: Fréchet distance of `TextureFeatures`, mean and standard deviation over subsamples of tiles.
        shifts: For every feature, |difference of the means| in standard deviations of the train tiles: what to mend.
        wasserstein: For every property of `PROPERTIES`, the Wasserstein-1 distance in standard deviations of train.
        ks: For every property, the Kolmogorov-Smirnov distance in [0, 1].
        copies: Near-copies of training cells.
    """

    tile: int
    texture_tile: int
    num_tiles: int
    num_frames: tuple[int, int, int]
    num_cells: tuple[int, int, int]
    frechet: Distance
    shifts: dict[str, Distance]
    wasserstein: dict[str, Distance]
    ks: dict[str, Distance]
    copies: NearCopies

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers for JSON; None for what could not be measured."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [plain(v) for v in value]
            return None if isinstance(value, float) and math.isnan(value) else value

        out: dict[str, Any] = plain(dataclasses.asdict(self))
        return out

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The report as text cells: measure, r2r, r2s, r2s / r2r. For near-copies, val stands under r2r."""

        def ratio(distance: Distance) -> str:
            return "–" if math.isnan(distance.ratio) else f"{distance.ratio:.1f}"

        fd = self.frechet
        rows = [
            (
                "Fréchet texture distance",
                f"{fd.r2r:.2f} ± {fd.r2r_sd:.2f}",
                f"{fd.r2s:.2f} ± {fd.r2s_sd:.2f}",
                ratio(fd),
            )
        ]
        for kind, distances in (("W1 / sd", self.wasserstein), ("KS", self.ks)):
            for name, d in distances.items():
                rows.append((f"{name.replace('_', ' ')}, {kind}", f"{d.r2r:.3f}", f"{d.r2s:.3f}", ratio(d)))
        shares = Distance(self.copies.val_share, self.copies.synthetic_share)
        rows.append(("near-copies of training cells", f"{shares.r2r:.1%}", f"{shares.r2s:.1%}", ratio(shares)))
        medians = Distance(self.copies.val_median, self.copies.synthetic_median)
        rows.append(("distance to nearest training cell", f"{medians.r2r:.3f}", f"{medians.r2s:.3f}", ratio(medians)))
        return rows

    def notes(self) -> list[str]:
        """What the numbers rest on, a sentence each."""
        top = sorted(self.shifts, key=lambda name: -self.shifts[name].r2s)[:5]
        return [
            "r2r: real train against real val; r2s: synthetic against the same real val.",
            "Frames (train, val, synthetic): {}, {}, {}.".format(*self.num_frames)
            + " Whole cells: {}, {}, {}.".format(*self.num_cells)
            + f" Tiles of {self.tile} px, for texture {self.num_tiles} of {self.texture_tile} px.",
            f"The near-copy test finds {self.copies.control_share:.0%} of rotated training cells.",
            "Texture features furthest off (in sd): " + ", ".join(f"{n} {self.shifts[n].r2s:.1f}" for n in top) + ".",
        ]

    def table(self) -> str:
        """The report as text for a terminal."""
        rows = [("", "r2r", "r2s", "r2s/r2r"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            row[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))
            for row in rows
        ]
        return "\n".join([*lines, "", *self.notes()])


def realism_report(
    train: Sequence[Pair],
    val: Sequence[Pair],
    synthetic: Sequence[Pair],
    *,
    tile: int | None = None,
    num_repeats: int = 10,
    seed: int = 0,
) -> RealismReport:
    """Compare synthetic frames with real ones.

    Where all training images hold whole numbers only, synthetic images are rounded first: that is what a file would
    hold, and 8-bit data would otherwise differ by their steps alone.

    Args:
        train: (image float32 [Y, X] in counts, labels int32 [Y, X]) of the frames the generator was fitted to. They
            also fix the scale of every feature.
        val: The same for real frames it has not seen.
        synthetic: The same for frames it made.
        tile: Side in pixels all frames are cut to; by default 256, or the smallest side of all frames if that is less.
        num_repeats: Subsamples of tiles over which the Fréchet distance is averaged; each holds 80 % of the smallest
            set, the same number on all sides.
        seed: For the draw of tiles, subsamples and cells.

    Raises:
        InputError: A set is empty or holds fewer than 4 texture tiles, a frame is smaller than the tile or than 64 px,
            or images and labels do not fit.
    """
    from scipy import stats

    sets: list[list[Pair]] = []
    for name, pairs in (("train", train), ("val", val), ("synthetic", synthetic)):
        check_pairs(name, pairs)
        sets.append([(np.asarray(image, np.float32), np.asarray(labels).astype(np.int32)) for image, labels in pairs])
    if all(np.array_equal(image, np.rint(image)) for image, _ in sets[0]):
        sets[2] = [(np.rint(image), labels) for image, labels in sets[2]]
    smallest = min(min(image.shape) for pairs in sets for image, _ in pairs)
    tile = min(TILE, smallest) if tile is None else tile
    if not MIN_TILE <= tile <= smallest:
        expected = f"{MIN_TILE} px up to the smallest side of all frames ({smallest} px)"
        raise InputError("tile", expected=expected, got=tile, remedy="Leave out smaller frames or make larger ones.")

    texture_tile = min(TEXTURE_TILE, tile)
    draw = SampleKey(seed, ("tiles",))
    images = [[image for image, _ in _draw(cut_tiles(pairs, texture_tile), draw)] for pairs in sets]
    fewest = min(len(group) for group in images)
    if fewest < 4:
        got = [len(group) for group in images]
        raise InputError("train, val, synthetic", expected=f"4 tiles of {texture_tile} px each", got=got)
    extract = TextureFeatures(images[0])
    features = [extract(group) for group in images]
    count = max(int(0.8 * fewest), 4)
    distances: list[tuple[float, float]] = []
    for repeat in range(num_repeats):
        rng = SampleKey(seed, ("frechet", repeat)).numpy()
        real, unseen, made = (group[rng.choice(len(group), count, replace=False)] for group in features)
        distances.append((frechet_distance(real, unseen), frechet_distance(made, unseen)))
    mean, sd = np.mean(distances, 0), np.std(distances, 0)
    r2r, r2s = (np.abs(features[i].mean(0) - features[1].mean(0)) for i in (0, 2))
    shifts = {name: Distance(float(a), float(b)) for name, a, b in zip(FEATURE_NAMES, r2r, r2s)}

    areas = np.concatenate([np.bincount(labels.ravel())[1:] for _, labels in sets[0]])
    min_piece = 0.1 * float(np.median(areas[areas > 0])) if areas.any() else 0.0
    cells = [cell_properties(_draw(cut_tiles(pairs, tile), draw), min_piece) for pairs in sets]
    wasserstein, ks = {}, {}
    for name in PROPERTIES:
        known, unseen_cells, made_cells = (table[name] for table in cells)
        if not all(map(len, (known, unseen_cells, made_cells))):
            wasserstein[name] = ks[name] = Distance(float("nan"), float("nan"))
            continue
        scale = max(float(known.std()), 1e-9)
        w1 = [float(stats.wasserstein_distance(v, unseen_cells)) / scale for v in (known, made_cells)]
        wasserstein[name] = Distance(*w1)
        ks[name] = Distance(*(float(stats.ks_2samp(v, unseen_cells).statistic) for v in (known, made_cells)))
    return RealismReport(
        tile=tile,
        texture_tile=texture_tile,
        num_tiles=count,
        num_frames=(len(train), len(val), len(synthetic)),
        num_cells=(len(cells[0]["area"]), len(cells[1]["area"]), len(cells[2]["area"])),
        frechet=Distance(float(mean[0]), float(mean[1]), float(sd[0]), float(sd[1])),
        shifts=shifts,
        wasserstein=wasserstein,
        ks=ks,
        copies=near_copies(*sets, seed=seed),
    )
