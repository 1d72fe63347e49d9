"""How real synthetic frames and volumes are, in numbers that need no network and no download.

Every distance is given twice: r2r, real train against real val, says what is normal between two sets of real frames;
r2s, synthetic against the same real val frames, says how far synthetic ones are. All frames are first cut to tiles of
one size, so that sets with other frame sizes compare (a small frame cuts more of its cells).

Of volumes, texture is measured on planes across the optical axis (xy) and along it (xz, square pixels), shapes and
positions of cells in three dimensions. Where only some planes are annotated, cells are compared in those planes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from synthaug.errors import InputError
from synthaug.evaluation import shape_stats
from synthaug.evaluation.copies import NearCopies, near_copies
from synthaug.evaluation.texture_features import FEATURE_NAMES, TextureFeatures, frechet_distance
from synthaug.evaluation.tiles import (
    MIN_ROWS,
    MIN_TILE,
    TEXTURE_TILE,
    TILE,
    Floats,
    Pair,
    VoxelSize,
    aspect,
    check_sets,
    common_shape,
    cut_by_border,
    cut_tiles,
    draw_tiles,
    is_sparse,
    planes,
)
from synthaug.generators.frame_fit import cell_contrasts
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
    """All numbers on one set of synthetic frames or volumes.

    Attributes:
        tile: Side in pixels of the tiles cells were measured in; for volumes the sides (Z, Y, X) of those boxes.
        texture_tile: Side in pixels of the tiles texture was measured in; for volumes that of "xy" tiles.
        num_tiles: Texture tiles on each side of every Fréchet distance.
        num_frames: Frames of train, val and synthetic.
        num_cells: Whole cells in the tiles of train, val and synthetic.
        frechet: Fréchet distance of `TextureFeatures`, mean and standard deviation over subsamples of tiles; for volumes
            the mean of those in `frechet_planes`.
        shifts: For every feature, |difference of the means| in standard deviations of the train tiles: what to mend.
        wasserstein: For every property that was compared (see `cell_tables`), the Wasserstein-1 distance in standard
            deviations of train.
        ks: For every property, the Kolmogorov-Smirnov distance in [0, 1].
        copies: Near-copies of training cells; of volumes, the planes in which a cell is largest are compared.
        frechet_planes: Of volumes, the Fréchet distances of "xy" tiles and, where volumes are deep enough, "xz" tiles.
        sections: Whether cells of volumes were compared in planes, since not all planes are annotated.
    """

    tile: int | tuple[int, ...]
    texture_tile: int
    num_tiles: int
    num_frames: tuple[int, int, int]
    num_cells: tuple[int, int, int]
    frechet: Distance
    shifts: dict[str, Distance]
    wasserstein: dict[str, Distance]
    ks: dict[str, Distance]
    copies: NearCopies
    frechet_planes: dict[str, Distance] = field(default_factory=dict)
    sections: bool = False

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

        textures = {"": self.frechet, **{f", {kind}": fd for kind, fd in self.frechet_planes.items()}}
        rows = [
            (
                f"Fréchet texture distance{kind}",
                f"{fd.r2r:.2f} ± {fd.r2r_sd:.2f}",
                f"{fd.r2s:.2f} ± {fd.r2s_sd:.2f}",
                ratio(fd),
            )
            for kind, fd in textures.items()
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
        sides = (self.tile,) if isinstance(self.tile, int) else self.tile
        notes = [
            "r2r: real train against real val; r2s: synthetic against the same real val.",
            f"{'Volumes' if self.frechet_planes else 'Frames'} (train, val, synthetic): "
            + "{}, {}, {}.".format(*self.num_frames)
            + " Whole cells: {}, {}, {}.".format(*self.num_cells)
            + f" Tiles of {' x '.join(map(str, sides))} px, for texture {self.num_tiles} of {self.texture_tile} px.",
            f"The near-copy test finds {self.copies.control_share:.0%} of rotated training cells.",
            "Texture features furthest off (in sd): " + ", ".join(f"{n} {self.shifts[n].r2s:.1f}" for n in top) + ".",
        ]
        if self.frechet_planes:
            both = "the mean of xy and xz" if "xz" in self.frechet_planes else "of xy alone, the volumes are shallow"
            notes.append(f"The Fréchet distance without a plane is {both}.")
        if self.sections:
            notes.append("Not all planes are annotated: cells are compared in planes, not in three dimensions.")
        return notes

    def table(self) -> str:
        """The report as text for a terminal."""
        rows = [("", "r2r", "r2s", "r2s/r2r"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            row[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))
            for row in rows
        ]
        return "\n".join([*lines, "", *self.notes()])


def cell_tables(
    sets: Sequence[Sequence[Pair]],
    tile: int | Sequence[int],
    voxel_size_um: VoxelSize | None = None,
    key: SampleKey | None = None,
) -> tuple[list[dict[str, Floats]], dict[str, str]]:
    """What is compared of the cells, for every set, and the units.

    Frames: `PROPERTIES`. Volumes: those of `shape_stats`, or `PROPERTIES` of the sections in up to `MAX_PLANES` annotated
    planes of every volume where some set has planes without annotation.

    Args:
        sets: Several sets of frames or of volumes; the first one decides which cut pieces are too small to count.
        tile: Side or sides of the tiles; for volumes the last one is that of the planes too.
        voxel_size_um: Of volumes.
        key: Draws `MAX_TILES` tiles of each set; None: all are measured.
    """
    volumes, sparse = sets[0][0][0].ndim == 3, any(is_sparse(pairs) for pairs in sets)
    if volumes and sparse:
        sets = [planes(pairs, "xy", annotated=True) for pairs in sets]
        tile = tile if isinstance(tile, int) else tile[1:]
    sizes = np.concatenate([np.bincount(labels.ravel())[1:] for _, labels in sets[0]])
    min_piece = 0.1 * float(np.median(sizes[sizes > 0])) if sizes.any() else 0.0
    tiles = [cut_tiles(pairs, tile) for pairs in sets]
    if key is not None:
        tiles = [draw_tiles(group, key) for group in tiles]
    if not volumes or sparse:
        return [cell_properties(group, min_piece) for group in tiles], PROPERTIES
    units = {name: known if voxel_size_um else unknown for name, (known, unknown) in shape_stats.PROPERTIES.items()}
    return [shape_stats.volume_properties(group, voxel_size_um, min_piece) for group in tiles], units


def _texture_tiles(
    sets: Sequence[Sequence[Pair]], side: int, voxel_size_um: VoxelSize | None
) -> dict[str, list[list[Pair]]]:
    """Texture tiles of every set; of volumes by the planes they lie in."""
    if sets[0][0][0].ndim == 2:
        return {"": [cut_tiles(pairs, side) for pairs in sets]}
    tiles = {"xy": [cut_tiles(planes(pairs, "xy"), side) for pairs in sets]}
    shape = common_shape(sets)
    rows = min(round(shape[0] * aspect(voxel_size_um)), TEXTURE_TILE)
    if rows >= MIN_ROWS:
        tiles["xz"] = [cut_tiles(planes(pairs, "xz", voxel_size_um), (rows, side)) for pairs in sets]
    return tiles


def realism_report(
    train: Sequence[Pair],
    val: Sequence[Pair],
    synthetic: Sequence[Pair],
    *,
    tile: int | None = None,
    num_repeats: int = 10,
    seed: int = 0,
    voxel_size_um: VoxelSize | None = None,
) -> RealismReport:
    """Compare synthetic frames, or volumes, with real ones.

    Where all training images hold whole numbers only, synthetic images are rounded first: that is what a file would
    hold, and 8-bit data would otherwise differ by their steps alone.

    Args:
        train: (image float32 [(Z,) Y, X] in counts, labels int32 of the same shape) of what the generator was fitted to.
            They also fix the scale of every feature.
        val: The same, real, that it has not seen.
        synthetic: The same that it made.
        tile: Side in pixels all frames are cut to; by default 256, or the smallest side of all frames if that is less.
            Volumes: along Y and X, while their depth is that of the shallowest one.
        num_repeats: Subsamples of tiles over which the Fréchet distance is averaged; each holds 80 % of the smallest
            set, the same number on all sides.
        seed: For the draw of tiles, subsamples and cells.
        voxel_size_um: (Z, Y, X) of all volumes: xz planes then have square pixels, and shapes physical units.

    Raises:
        InputError: A set is empty or holds fewer than 4 texture tiles, a frame is smaller than the tile or than 64 px,
            images and labels do not fit, or frames and volumes are mixed.
    """
    from scipy import stats

    ndim = check_sets({"train": train, "val": val, "synthetic": synthetic}, voxel_size_um)
    sets: list[list[Pair]] = [
        [(np.asarray(image, np.float32), np.asarray(labels).astype(np.int32)) for image, labels in pairs]
        for pairs in (train, val, synthetic)
    ]
    if all(np.array_equal(image, np.rint(image)) for image, _ in sets[0]):
        sets[2] = [(np.rint(image), labels) for image, labels in sets[2]]
    shape = common_shape(sets)
    smallest = min(shape[-2:])
    tile = min(TILE, smallest) if tile is None else tile
    if not MIN_TILE <= tile <= smallest:
        expected = f"{MIN_TILE} px up to the smallest side of all frames ({smallest} px)"
        raise InputError("tile", expected=expected, got=tile, remedy="Leave out smaller frames or make larger ones.")

    texture_tile, count = min(TEXTURE_TILE, tile), 0
    draw = SampleKey(seed, ("tiles",))
    by_plane: dict[str, list[tuple[float, float]]] = {}
    shifts: dict[str, Distance] = {}
    for kind, groups in _texture_tiles(sets, texture_tile, voxel_size_um).items():
        images = [[image for image, _ in draw_tiles(group, draw)] for group in groups]
        fewest = min(len(group) for group in images)
        if fewest < 4:
            got = [len(group) for group in images]
            raise InputError("train, val, synthetic", expected=f"4 tiles of {texture_tile} px each", got=got)
        extract = TextureFeatures(images[0])
        features = [extract(group) for group in images]
        count = max(int(0.8 * fewest), 4)
        by_plane[kind] = []
        for repeat in range(num_repeats):
            rng = SampleKey(seed, ("frechet", repeat)).numpy()
            real, unseen, made = (group[rng.choice(len(group), count, replace=False)] for group in features)
            by_plane[kind].append((frechet_distance(real, unseen), frechet_distance(made, unseen)))
        r2r, r2s = (np.abs(features[i].mean(0) - features[1].mean(0)) for i in (0, 2))
        names = [f"{kind} {name}".strip() for name in FEATURE_NAMES]
        shifts |= {name: Distance(float(a), float(b)) for name, a, b in zip(names, r2r, r2s)}

    def summary(distances: Floats) -> Distance:
        (r2r, r2s), (r2r_sd, r2s_sd) = distances.mean(0), distances.std(0)
        return Distance(float(r2r), float(r2s), float(r2r_sd), float(r2s_sd))

    box = tile if ndim == 2 else (shape[0], tile, tile)
    cells, _ = cell_tables(sets, box, voxel_size_um, draw)
    wasserstein, ks = {}, {}
    for name in cells[0]:
        known, unseen_cells, made_cells = (table[name] for table in cells)
        if not all(map(len, (known, unseen_cells, made_cells))):
            wasserstein[name] = ks[name] = Distance(float("nan"), float("nan"))
            continue
        scale = max(float(known.std()), 1e-9)
        w1 = [float(stats.wasserstein_distance(v, unseen_cells)) / scale for v in (known, made_cells)]
        wasserstein[name] = Distance(*w1)
        ks[name] = Distance(*(float(stats.ks_2samp(v, unseen_cells).statistic) for v in (known, made_cells)))
    num_cells = [len(next(iter(table.values()))) for table in cells]
    return RealismReport(
        tile=box,
        texture_tile=texture_tile,
        num_tiles=count,
        num_frames=(len(train), len(val), len(synthetic)),
        num_cells=(num_cells[0], num_cells[1], num_cells[2]),
        frechet=summary(np.mean(list(by_plane.values()), axis=0)),
        shifts=shifts,
        wasserstein=wasserstein,
        ks=ks,
        copies=near_copies(*sets, seed=seed),
        frechet_planes={kind: summary(np.array(values)) for kind, values in by_plane.items() if kind},
        sections=ndim == 3 and any(is_sparse(pairs) for pairs in sets),
    )
