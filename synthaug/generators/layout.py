"""How real cells lie in their frames: outlines, gaps between neighbours, and how much their number varies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist

from synthaug.randomness import SampleKey
from synthaug.types import Cells

Labels = NDArray[np.int32]


def drop_small(labels: NDArray[np.integer[Any]], min_area: int) -> Labels:
    """Labels [Y, X] renumbered from 1 without the instances under `min_area` pixels."""
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
    diagonals = np.array([np.hypot(*mask.shape) for mask in masks])
    side = 8 * int(np.ceil((np.quantile(diagonals, 0.98) + 2) / 8))
    fitting = [mask for mask, diagonal in zip(masks, diagonals) if diagonal + 2 <= side]
    stack = np.zeros((len(fitting), side, side), bool)
    for crop, mask in zip(stack, fitting):
        top, left = (side - mask.shape[0]) // 2, (side - mask.shape[1]) // 2
        crop[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    distances = ndimage.distance_transform_edt
    sdf = np.stack([np.where(crop, 0.5 - distances(crop), distances(~crop) - 0.5) for crop in stack]).astype(np.float32)
    ones = torch.ones(len(fitting))
    return Cells(
        image=torch.from_numpy(stack[:, None].astype(np.float32)),
        sdf=torch.from_numpy(sdf[:, None]),
        brightness=ones,
        scale=ones,
    )


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


def reached_area(size: tuple[int, int], reach: float) -> float:
    """Pixels in which the centre of a cell may lie so that the cell is seen on a canvas of `size`."""
    return (size[0] + reach) * (size[1] + reach)


def reach(masks: Sequence[NDArray[np.bool_]], min_area: int) -> float:
    """Mean number of pixels by which a canvas grows for the centres of these cells if `min_area` pixels must lie on it.

    A cell h rows high can be shifted over Y + h - 1 positions with at least one row on a canvas of Y rows; the first
    and the last few of them show fewer than `min_area` pixels.
    """
    extents = []
    for mask in masks:
        for rows in (mask.sum(1), mask.sum(0)):
            lost = [int(np.searchsorted(np.cumsum(side), min_area)) for side in (rows, rows[::-1])]
            extents.append(len(rows) - 1 - sum(lost))
    return max(float(np.mean(extents)), 0.0)


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
