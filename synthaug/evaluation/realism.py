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

from synthaug.errors import InputError
from synthaug.evaluation.copies import NearCopies, near_copies
from synthaug.evaluation.texture_features import FEATURE_NAMES, TextureFeatures, frechet_distance
from synthaug.evaluation.tiles import (
    MIN_TILE,
    TEXTURE_TILE,
    TILE,
    Floats,
    Pair,
    check_pairs,
    cut_by_border,
    cut_tiles,
    draw_tiles,
)
from synthaug.generators.background import cell_contrasts
from synthaug.randomness import SampleKey

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
    images = [[image for image, _ in draw_tiles(cut_tiles(pairs, texture_tile), draw)] for pairs in sets]
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
    cells = [cell_properties(draw_tiles(cut_tiles(pairs, tile), draw), min_piece) for pairs in sets]
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
