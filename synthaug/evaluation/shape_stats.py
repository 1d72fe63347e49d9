"""Shapes of cells in three dimensions, as numbers: of one cell, of all cells of a volume, and how far two sets differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthaug.errors import InputError
from synthaug.evaluation.tiles import Floats, VoxelSize, check_sets, cut_by_border, is_sparse
from synthaug.generators.frame_fit import cell_contrasts
from synthaug.types import Cells, Pair

SPECK = 50
"""Objects of fewer voxels are annotation specks, and left out."""

SHAPES: dict[str, tuple[str, str]] = {
    "volume": ("µm³", "voxels"),
    "sphericity": ("1 = ball", "1 = ball"),
    "elongation": ("longest / shortest axis", "longest / shortest axis"),
    "z_extent": ("µm", "planes"),
    "equatorial_area": ("µm²", "px"),
    "solidity": ("share of the convex hull", "share of the convex hull"),
}
"""What `shape_statistics` measures, with units where the voxel size is known and where it is not."""

PROPERTIES: dict[str, tuple[str, str]] = {
    **SHAPES,
    "intensity": ("counts over local background", "counts over local background"),
    "relative_intensity": ("of the volume's median cell", "of the volume's median cell"),
    "nearest_neighbour": ("µm, centre to centre", "voxels, centre to centre"),
    "density": ("cells per 100 × 100 × 100 µm", "cells per 100 × 100 × 100 voxels"),
}
"""What `volume_properties` measures, with units."""

_MARGIN = 4


def _shape(mask: NDArray[np.bool_], spacing: Floats) -> tuple[float, ...]:
    """The statistics of `SHAPES` of one cell, in their order; bool [Z, Y, X], spacing float64 [3]."""
    from scipy import ndimage
    from scipy.spatial import ConvexHull
    from skimage.measure import marching_cubes, mesh_surface_area

    count = int(mask.sum())
    # Staircases of the bare mask would add a tenth to the area of a ball. Smoothed over a voxel, cut where the volume is kept.
    smooth = ndimage.gaussian_filter(np.pad(mask, _MARGIN).astype(np.float32), 1.0)
    ranked = np.sort(smooth, axis=None)[::-1]
    level = float(ranked[count - 1 : count + 1].mean())
    vertices, faces, _, _ = marching_cubes(smooth, level, spacing=tuple(spacing))
    area = float(mesh_surface_area(vertices, faces))
    corners = vertices[faces].astype(np.float64)
    enclosed = abs(float(np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum())) / 6

    where = np.argwhere(mask) * spacing
    # A voxel is a box, not a point: its own moments keep flat objects from an axis of length 0.
    moments = np.cov(where, rowvar=False, bias=True) + np.diag(spacing**2) / 12
    axes = np.sqrt(np.linalg.eigvalsh(moments))
    sections = mask.sum((1, 2))
    return (
        count * float(spacing.prod()),
        float(np.pi ** (1 / 3) * (6 * enclosed) ** (2 / 3) / area),
        float(axes[-1] / axes[0]),
        float((sections > 0).sum() * spacing[0]),
        float(sections.max() * spacing[1] * spacing[2]),
        enclosed / float(ConvexHull(vertices).volume),
    )


def shape_statistics(
    labels: NDArray[np.integer[Any]] | NDArray[np.bool_],
    voxel_size_um: Sequence[float] | None = None,
    *,
    min_voxels: int = SPECK,
) -> dict[str, Floats]:
    """Shape of every whole cell of a volume.

    Sphericity is pi^(1/3) (6 V)^(2/3) / A (Wadell 1935) and solidity V / V of the convex hull, both of the surface by
    marching cubes (Lewiner 2003) of the mask after a Gaussian of one voxel; volume and areas are those of the voxels.
    Elongation compares the principal axes of the voxels' positions; z_extent runs from the first to the last plane.

    Args:
        labels: integer [Z, Y, X] of instances, or bool of one.
        voxel_size_um: (Z, Y, X); None: voxels count as cubes of side 1.
        min_voxels: Smaller objects are left out, as are those cut by the volume's border.

    Returns:
        For every name in `SHAPES` float64 [n], n cells in the order of their ids.

    Raises:
        InputError: `labels` is no volume of integers, or not all of its planes are annotated.
    """
    from scipy import ndimage

    labels = np.asarray(labels)
    if labels.dtype == bool:
        labels = labels.astype(np.int32)
    if labels.ndim != 3 or labels.dtype.kind not in "iu":
        got = f"{labels.dtype} of shape {labels.shape}"
        raise InputError("labels", expected="integers or bool of shape [Z, Y, X]", got=got)
    if labels.size and labels.min() < 0:
        raise InputError("labels", expected="a volume with all planes annotated", got=f"minimum {labels.min()}")
    spacing = np.asarray(voxel_size_um if voxel_size_um is not None else (1, 1, 1), np.float64)
    if spacing.shape != (3,) or not (spacing > 0).all():
        raise InputError("voxel_size_um", expected="(Z, Y, X) > 0 in micrometres", got=voxel_size_um)
    # Ids may be large and far apart: objects are found by number.
    ids = np.unique(labels)
    numbers = np.searchsorted(ids[ids > 0], labels, side="right").astype(np.int32) * (labels > 0)
    cut = set(cut_by_border(numbers).tolist())
    rows = []
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        own = numbers[box] == number
        if number not in cut and own.sum() >= min_voxels:
            rows.append(_shape(own, spacing))
    table = np.asarray(rows, np.float64).reshape(-1, len(SHAPES))
    return dict(zip(SHAPES, table.T.copy()))


def pooled_statistics(
    volumes: Sequence[NDArray[np.integer[Any]]], voxel_size_um: Sequence[float] | None = None
) -> dict[str, Floats]:
    """`shape_statistics` of the cells of several volumes [Z, Y, X], one after another."""
    tables = [shape_statistics(labels, voxel_size_um) for labels in volumes]
    return {name: np.concatenate([np.zeros(0), *(table[name] for table in tables)]) for name in SHAPES}


def cell_statistics(cells: Cells, voxel_size_um: Sequence[float] | None = None) -> dict[str, Floats]:
    """`shape_statistics` of generated cells.

    Args:
        cells: B cells of S > 1 slices; a crop's pixel is `scale` image pixels wide.
        voxel_size_um: (Z, Y, X) of the images the cells are made for.

    Returns:
        For every name in `SHAPES` float64 [n], n <= B: cells that touch the crop's border are left out.

    Raises:
        InputError: The cells have one slice only.
    """
    if cells.image.shape[1] < 2:
        raise InputError("cells", expected="stacks of several slices", got=tuple(cells.image.shape))
    size = np.asarray(voxel_size_um if voxel_size_um is not None else (1, 1, 1), np.float64)
    tables = [
        shape_statistics(mask, tuple(size * (1, scale, scale)))
        for mask, scale in zip(cells.mask.cpu().numpy(), cells.scale.tolist())
    ]
    return {name: np.concatenate([np.zeros(0), *(table[name] for table in tables)]) for name in SHAPES}


def compare(real: Mapping[str, Floats], synthetic: Mapping[str, Floats]) -> dict[str, float]:
    """Wasserstein-1 distance of every statistic, in standard deviations of the real cells; NaN where one side is empty.

    >>> compare({"volume": np.array([1.0, 3.0])}, {"volume": np.array([2.0, 4.0])})
    {'volume': 1.0}
    """
    from scipy.stats import wasserstein_distance

    distances = {}
    for name, values in real.items():
        other = synthetic[name]
        known = bool(len(values) and len(other))
        scale = max(float(values.std()), 1e-9) if known else 1.0
        distances[name] = float(wasserstein_distance(values, other)) / scale if known else float("nan")
    return distances


def volume_properties(
    volumes: Sequence[Pair], voxel_size_um: VoxelSize | None = None, min_piece: float = 0.0
) -> dict[str, Floats]:
    """Every property in `PROPERTIES`, pooled over volumes of one size.

    Instances cut by the border count half for the density, are neighbours of others, and are left out otherwise.
    `relative_intensity` needs five whole cells in the volume, `nearest_neighbour` a second one.

    Args:
        volumes: Wholly annotated, labels contiguous from 1; from `cut_tiles`.
        voxel_size_um: Of all of them; None: lengths in voxels.
        min_piece: Cut pieces smaller than this many voxels are ignored.

    Returns:
        One float64 array a property: a value a cell, for `density` a value a volume.

    Raises:
        InputError: Some plane is not annotated, or the pairs do not fit.
    """
    from scipy import ndimage
    from scipy.spatial import cKDTree

    if check_sets({"volumes": volumes}, voxel_size_um) != 3 or is_sparse(volumes):
        raise InputError("volumes", expected="volumes with all planes annotated", got="others")
    spacing = np.asarray(voxel_size_um if voxel_size_um is not None else (1, 1, 1), np.float64)
    found: dict[str, list[Floats]] = {name: [] for name in PROPERTIES}
    for image, labels in volumes:
        for name, values in shape_statistics(labels, voxel_size_um).items():
            found[name].append(values)
        counts = np.bincount(labels.ravel())[1:]
        ids = np.arange(1, len(counts) + 1)
        cut = np.isin(ids, cut_by_border(labels))
        whole = ~cut & (counts >= SPECK)
        kept = whole | (cut & (counts >= min_piece))
        space = labels.size * float(spacing.prod())
        found["density"].append(np.array([(whole.sum() + 0.5 * (cut & kept).sum()) / space * 1e6]))
        intensity = cell_contrasts(image, labels)[0].astype(np.float64)[whole] if whole.any() else np.zeros(0)
        found["intensity"].append(intensity)
        if whole.sum() >= 5 and np.median(intensity) > 0:
            found["relative_intensity"].append(intensity / np.median(intensity))
        if whole.any() and kept.sum() >= 2:
            centres = np.asarray(ndimage.center_of_mass(labels > 0, labels, ids)) * spacing
            found["nearest_neighbour"].append(cKDTree(centres[kept]).query(centres[whole], k=2)[0][:, 1])
    return {name: np.concatenate([np.zeros(0), *values]) for name, values in found.items()}
