"""How real cells lie in their frames: outlines, gaps between neighbours, and how much their number varies.

Annotated planes of volumes are frames of their own here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance

from synthaug.generators.frame_fit import spaced
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED, Cells

Labels = NDArray[np.int32]

TOUCHING = 0.35
"""What `presses` would find for discs that merely touch, whose outlines are made of pixels; whatever their size."""

FAR_OUTSIDE = 99.0
"""Distance to the outline in a slice that a cell does not reach, pixels."""


def drop_small(labels: NDArray[np.integer[Any]], min_area: int) -> Labels:
    """Labels [(Z,) Y, X] renumbered from 1 without the instances under `min_area` pixels (voxels)."""
    ids, inverse = np.unique(labels, return_inverse=True)
    keep = (np.bincount(inverse.ravel(), minlength=len(ids)) >= min_area) & (ids != 0)
    return np.where(keep, np.cumsum(keep), 0)[inverse].reshape(labels.shape).astype(np.int32)


def whole_masks(labels: Labels) -> list[NDArray[np.bool_]]:
    """Bounding-box masks of the instances that do not touch the border of the frame."""
    masks = []
    for i, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None and all(s.start > 0 and s.stop < n for s, n in zip(box, labels.shape)):
            masks.append(labels[box] == i)
    return masks


def cells_of_masks(masks: Sequence[NDArray[np.bool_]]) -> Cells:
    """Cells without texture, light 1 inside; the largest 2 % are left out, lest one of them blow up every crop."""
    stack = _crops(masks)
    sdf = np.stack([_distances(crop) for crop in stack])
    ones = torch.ones(len(stack))
    return Cells(
        image=torch.from_numpy(stack[:, None].astype(np.float32)),
        sdf=torch.from_numpy(sdf[:, None]),
        brightness=ones,
        scale=ones,
    )


def cells_of_sections(masks: Sequence[NDArray[np.bool_]], depth: float, most: int = 64) -> Cells:
    """Stacks without texture whose middle slices are these masks, and which get thinner as a ball does.

    Planes cut cells at any height; the larger half of the sections passes for cuts near the middle.

    Args:
        masks: bool [y, x] each, sections of whole cells.
        depth: planes that a cell of median size spans.
        most: cells made.
    """
    areas = np.array([mask.sum() for mask in masks])
    central = [mask for mask, area in zip(masks, areas) if area >= np.median(areas)]
    crops = _crops(spaced(central, most))
    inside = [ndimage.distance_transform_edt(crop) for crop in crops]
    radii = np.array([distance.max() for distance in inside])
    depths = depth * radii / np.median(radii)
    slices = int(np.ceil(depths.max()))
    height = (np.arange(slices) - (slices - 1) / 2) / (depths[:, None] / 2)  # -1 and 1 are the poles
    sdf = np.full((len(crops), slices, *crops.shape[1:]), FAR_OUTSIDE, np.float32)
    for i, k in np.argwhere(np.abs(height) < 1):
        mask = inside[i] > radii[i] * (1 - np.sqrt(1 - height[i, k] ** 2))
        if mask.any():
            sdf[i, k] = _distances(mask)
    ones = torch.ones(len(crops))
    return Cells(torch.from_numpy((sdf < 0).astype(np.float32)), torch.from_numpy(sdf), ones, ones)


def _crops(masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """The masks in the middle of square crops [n, P, P] in which they can be turned, without the largest 2 %."""
    diagonals = np.array([np.hypot(*mask.shape) for mask in masks])
    side = 8 * int(np.ceil((np.quantile(diagonals, 0.98) + 2) / 8))
    fitting = [mask for mask, diagonal in zip(masks, diagonals) if diagonal + 2 <= side]
    stack = np.zeros((len(fitting), side, side), bool)
    for crop, mask in zip(stack, fitting):
        top, left = (side - mask.shape[0]) // 2, (side - mask.shape[1]) // 2
        crop[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return stack


def _distances(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    distances = ndimage.distance_transform_edt
    return np.asarray(np.where(mask, 0.5 - distances(mask), distances(~mask) - 0.5), np.float32)


def annotated(volume: NDArray[np.integer[Any]]) -> list[int]:
    """Planes of labels [Z, Y, X] that somebody annotated."""
    return [int(z) for z in np.flatnonzero((volume != UNLABELLED).any((1, 2)))]


def depth(labels: Sequence[Labels]) -> float:
    """Mean number of planes that instances of wholly annotated volumes span, those cut by the border left out."""
    spans = [
        box[0].stop - box[0].start
        for volume in labels
        for box in ndimage.find_objects(volume)
        if box is not None and all(s.start > 0 and s.stop < n for s, n in zip(box, volume.shape))
    ]
    return float(np.mean(spans)) if spans else 0.0


def neighbour_gaps(labels: Labels) -> NDArray[np.float64]:
    """Free pixels between each instance and its nearest neighbour, float64 [n] (none for fewer than two instances).

    The distance between their closest pixel centres minus 1: 0 for instances that share an edge.
    """
    boxes = ndimage.find_objects(labels)
    edge = np.zeros(labels.shape, bool)
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = labels[one] != labels[other]
        edge[one] |= differs
        edge[other] |= differs
    outlines = []
    for i, box in enumerate(boxes, start=1):
        if box is not None:
            own = labels[box] == i
            outline = own & edge[box] if (own & edge[box]).any() else own  # one that fills the frame has no edge
            outlines.append(np.argwhere(outline) + np.array([box[0].start, box[1].start], np.float64))
    if len(outlines) < 2:
        return np.empty(0)
    low, high = np.array([o.min(0) for o in outlines]), np.array([o.max(0) for o in outlines])
    gaps = np.full(len(outlines), np.inf)
    for i, outline in enumerate(outlines):
        apart = np.maximum(np.maximum(low - high[i], low[i] - high), 0)
        bound = np.hypot(apart[:, 0], apart[:, 1])
        bound[i] = np.inf
        for other in np.argsort(bound, kind="stable"):
            if bound[other] >= gaps[i]:
                break
            gaps[i] = min(gaps[i], np.sqrt(cdist(outline, outlines[other], "sqeuclidean").min()))
    return gaps - 1


def middles(labels: Labels) -> NDArray[np.float64]:
    """Centres of the instances of a wholly annotated volume, float64 [n, 3]."""
    ids = np.arange(1, labels.max(initial=0) + 1)
    return np.array(ndimage.center_of_mass(labels > 0, labels, ids), np.float64).reshape(-1, 3)


def moments(volumes: Sequence[Labels]) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Mean [3] and covariance [3, 3] of the positions of all labelled voxels of each wholly annotated volume."""
    voxels = [np.argwhere(volume > 0).astype(np.float64) for volume in volumes]
    few = (np.zeros(3), np.zeros((3, 3)))
    return [(v.mean(0), np.cov(v.T)) if len(v) > 1 else few for v in voxels]


def presses(labels: Labels) -> NDArray[np.float64]:
    """How far two cells that share edges are pressed together, pixels, float64 [n], one for each such pair.

    By as much as two discs of their areas would overlap whose outlines cross where the shared edge begins and ends. In three
    annotated data sets of nuclei that is 8 to 19 % of the sum of their radii in the median: discs that merely touch, as
    cells placed one beside another do, have hardly an edge in common.
    """
    edges: dict[tuple[int, int], list[NDArray[np.int64]]] = {}
    for step in (np.array([0, 1]), np.array([1, 0])):
        one, other = labels[: labels.shape[0] - step[0], : labels.shape[1] - step[1]], labels[step[0] :, step[1] :]
        for place in np.argwhere((one != other) & (one > 0) & (other > 0)):
            low, high = sorted((int(one[tuple(place)]), int(other[tuple(place)])))
            edges.setdefault((low, high), []).append(2 * place + step)
    radii = np.sqrt(np.bincount(labels.ravel().clip(0)) / np.pi)
    depths = []
    for pair, places in edges.items():
        ends = np.array(places, np.float64) / 2
        half = (np.hypot(*(ends[:, None] - ends).transpose(2, 0, 1)).max() + 1) / 2
        depths.append(sum(r - np.sqrt(max(r * r - half * half, 0.0)) for r in radii[list(pair)]))
    return np.maximum(np.array(depths, np.float64) - TOUCHING, 0.0)


def near_gaps(gaps: NDArray[np.float64], diameter: float, frames: Sequence[Labels]) -> tuple[int, ...]:
    """Quantiles of the gaps between cells that lie next to each other, whole pixels.

    Args:
        gaps: of `neighbour_gaps`.
        diameter: of a typical cell, pixels.
        frames: labels in which cells that touch tell by how much they are pressed together. Half a radius is the most.
    """
    near = np.sort(gaps[gaps <= max(diameter / 8, 1)])  # farther neighbours are there without clustering, too
    touching = int((near == 0).sum())
    depths = np.minimum(np.concatenate([presses(frame) for frame in frames]), diameter / 4)
    if len(depths) and touching:
        near[:touching] = -np.quantile(depths, 1 - (np.arange(touching) + 0.5) / touching)
    return tuple(int(g) for g in np.quantile(near, (np.arange(32) + 0.5) / 32).round()) if len(near) else (0,)


def fit_clustering(
    real: NDArray[np.float64], diameter: float, trial: Callable[[float, int], NDArray[np.float64]]
) -> tuple[float, int]:
    """Clustering probability and clearance (pixels) with which trials give the real gaps between neighbours.

    The boundary-to-boundary gap is compared, not that of centroids: it is what clustering changes, whatever the cells'
    sizes and elongations. The clearance goes by all gaps (Wasserstein distance), the probability by the share of cells
    that touch another one or nearly do: wide gaps outweigh what separates cells in a segmentation and what does not.

    Args:
        real: gaps, pixels.
        diameter: of a typical cell, pixels.
        trial: from clustering probability and clearance to the gaps they give.
    """

    made = functools.cache(trial)

    def distance(clustering: float, clearance: int) -> float:
        gaps = made(clustering, clearance)
        return float(wasserstein_distance(real, gaps)) if len(gaps) else np.inf

    def near(gaps: NDArray[np.float64]) -> float:
        return float((gaps <= 1).mean()) if len(gaps) else 0.0

    p = 0.2
    for step in (0.1, 0.05):
        clearance = min((round(diameter * c / 5) for c in range(6)), key=lambda c: distance(p, c))
        around = np.arange(11) / 10 if step == 0.1 else np.clip([p - step, p, p + step], 0, 1)
        p = min((round(float(q), 2) for q in around), key=lambda q: abs(near(made(q, clearance)) - near(real)))
    return p, clearance


def reached_area(size: Sequence[int], reach: float, reach_z: float = 0.0) -> float:
    """Pixels (voxels) in which the centre of a cell may lie so that the cell is seen on a canvas of `size`."""
    flat = (size[-2] + reach) * (size[-1] + reach)
    return flat if len(size) == 2 else (size[0] + reach_z) * flat


def reach(masks: Sequence[NDArray[np.bool_]], min_area: int) -> float:
    """Mean number of pixels by which a canvas grows for the centres of these cells if `min_area` pixels must lie on it.

    A cell h rows high can be shifted over Y + h - 1 positions with at least one row on a canvas of Y rows; the first
    and the last few of them show fewer than `min_area` pixels.

    Args:
        masks: bool [y, x] each.
        min_area: pixels.
    """
    return max(float(np.mean([_extent(rows, min_area) for mask in masks for rows in (mask.sum(1), mask.sum(0))])), 0.0)


def reach_volume(masks: NDArray[np.bool_], min_volume: int) -> tuple[float, float]:
    """The same for stacks [n, S, P, P]: voxels along z, and along each axis of the plane."""
    projections = [[mask.sum(tuple({0, 1, 2} - {axis})) for mask in masks] for axis in range(3)]
    means = [float(np.mean([_extent(np.trim_zeros(rows), min_volume) for rows in axis])) for axis in projections]
    return max(means[0], 0.0), max((means[1] + means[2]) / 2, 0.0)


def _extent(rows: NDArray[np.integer[Any]], least: int) -> int:
    """Positions beyond those of its canvas at which an object with these row sums shows `least` pixels."""
    lost = [int(np.searchsorted(np.cumsum(side), least)) for side in (rows, rows[::-1])]
    return len(rows) - 1 - sum(lost)


def dispersion(frames: Sequence[Labels], reach: float, min_area: int) -> float:
    """Variance over mean of the number of instances in windows of half the frame's sides.

    Relative to what the frame's own size allows: a window as large as the frame does not vary (finite population
    correction). 1 for cells that lie at random, more for clumps, less for regular layouts.
    """
    random = SampleKey(0, ("fit dispersion",)).numpy()
    squares, expected = 0.0, 0.0
    for frame in frames:
        size = (max(frame.shape[0] // 2, 1), max(frame.shape[1] // 2, 1))
        share = reached_area(size, reach) / reached_area((frame.shape[0], frame.shape[1]), reach)
        mean = float(frame.max(initial=0)) * share
        for _ in range(16):
            y, x = (int(random.integers(0, n - s + 1)) for n, s in zip(frame.shape, size))
            areas = np.bincount(frame[y : y + size[0], x : x + size[1]].ravel())[1:]
            squares += (float((areas >= min_area).sum()) - mean) ** 2
            expected += mean * (1 - share)
    return squares / expected if expected > 0 else 0.0
