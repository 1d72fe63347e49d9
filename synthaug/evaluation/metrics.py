"""How good a segmentation is: SEG of the Cell Tracking Challenge, average precision as Cellpose reports it, and F1.

Labels are integer arrays, 0 = background; the ids need be neither contiguous nor the same in truth and prediction. In the
truth of a volume, planes that nobody annotated are UNLABELLED in every pixel: nothing in them counts for or against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthaug.errors import InputError
from synthaug.types import UNLABELLED

Labels = NDArray[np.integer[Any]]

THRESHOLDS: tuple[float, ...] = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""IoU thresholds 0.50, 0.55, ..., 0.95."""


@dataclass(frozen=True)
class Overlaps:
    """How the objects of one frame's truth and prediction overlap.

    Where not all planes of a volume are annotated, objects are the sections of cells in single planes.

    Attributes:
        truth_ids: int64 [T], ids of the true objects; of sections plane * (largest id of the volume + 1) + id.
        pred_ids: int64 [P], ids of the predicted objects, in the same way.
        cover: float64 [T, P] in [0, 1], share of the true object's pixels that the predicted one holds.
        iou: float64 [T, P] in [0, 1], intersection over union.
    """

    truth_ids: NDArray[np.int64]
    pred_ids: NDArray[np.int64]
    cover: NDArray[np.float64]
    iou: NDArray[np.float64]


def _sections(labels: Labels, annotated: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The annotated planes, with ids that no two of them share."""
    own = labels[annotated].astype(np.int64)
    first = np.flatnonzero(annotated)[:, None, None] * (int(labels.max()) + 1)
    return np.where(own > 0, own + first, 0)


def overlaps(pred: Labels, truth: Labels) -> Overlaps:
    """Overlap of every true with every predicted object of one frame.

    Where some planes of a volume are UNLABELLED, the others are compared one by one: as the Cell Tracking Challenge scores
    its gold truth of single slices, and because ids of different planes need not belong together then.

    Args:
        pred: integer [(Z,) Y, X], 0 = background.
        truth: integer of the same shape; whole planes of a volume may be UNLABELLED.

    Raises:
        InputError: The shapes differ, or an array does not hold integers >= 0.
    """
    pred, truth = np.asarray(pred), np.asarray(truth)
    for name, value, least in (("pred", pred, 0), ("truth", truth, UNLABELLED if truth.ndim == 3 else 0)):
        if value.dtype.kind not in "iu" or (value.size and value.min() < least):
            got = f"{value.dtype}" if value.dtype.kind not in "iu" else f"minimum {value.min()}"
            raise InputError(name, expected="integer labels, 0 = background", got=got)
    if pred.shape != truth.shape:
        raise InputError("pred", expected=f"the shape of the truth, {truth.shape}", got=pred.shape)
    if truth.ndim == 3 and (missing := truth == UNLABELLED).any():
        annotated = ~missing.all((1, 2))
        if missing[annotated].any() or not annotated.any():
            got = f"{UNLABELLED} in {'some pixels of a plane' if annotated.any() else 'all planes'}"
            raise InputError("truth", expected=f"{UNLABELLED} in whole planes, but not in all", got=got)
        pred, truth = _sections(pred, annotated), _sections(truth, annotated)
    truth_ids, truth_index = np.unique(truth, return_inverse=True)
    pred_ids, pred_index = np.unique(pred, return_inverse=True)
    shape = (len(truth_ids), len(pred_ids))
    joint = np.bincount(truth_index.ravel() * shape[1] + pred_index.ravel(), minlength=shape[0] * shape[1])
    both = joint.reshape(shape).astype(np.float64)
    area_truth, area_pred = both.sum(1, keepdims=True), both.sum(0, keepdims=True)
    rows, columns = truth_ids != 0, pred_ids != 0
    inner = np.ix_(rows, columns)
    return Overlaps(
        truth_ids[rows].astype(np.int64),
        pred_ids[columns].astype(np.int64),
        (both / area_truth)[inner],
        (both / (area_truth + area_pred - both))[inner],
    )


def _frames(preds: Labels | Sequence[Labels], truths: Labels | Sequence[Labels]) -> list[Overlaps]:
    if isinstance(preds, np.ndarray) or isinstance(truths, np.ndarray):
        preds, truths = [np.asarray(preds)], [np.asarray(truths)]
    if len(preds) != len(truths) or not len(truths):
        raise InputError("preds", expected=f"one frame for each of the {len(truths)} truths (>= 1)", got=len(preds))
    return [overlaps(pred, truth) for pred, truth in zip(preds, truths)]


def seg(pred: Labels | Sequence[Labels], truth: Labels | Sequence[Labels]) -> float:
    """SEG: mean over all true objects of the IoU with the one prediction that covers more than half of it, else 0.

    Source: Maška et al., Bioinformatics 2014, section 2.3.1; the mean over objects is py-ctcmetrics' `seg`. Its `match`
    reads files only, so the same rule (more than 50 % of the reference object's area) is applied to arrays here. False
    positives do not count. The objects of all frames weigh the same, as in the challenge. Single annotated planes of a
    volume are scored one by one (py-ctcmetrics pools those of a volume by id, which needs ids that go through it).

    Args:
        pred: integer [(Z,) Y, X], 0 = background; or a list of such frames.
        truth: the same for the truth. An array is one frame or one volume, a list is several.

    Returns:
        SEG in [0, 1]; NaN where no frame has a true object (nothing can be said then).

    Raises:
        InputError: Shapes, dtypes or the numbers of frames do not fit.

    >>> truth = np.array([[1, 1, 1, 1, 0, 2, 2]])
    >>> seg(np.array([[1, 1, 1, 0, 0, 0, 2]]), truth)  # 3 of 4 pixels; exactly half is not enough
    0.375
    """
    from ctc_metrics.metrics.technical.seg import seg as mean_over_objects

    ids: list[list[int]] = []
    ious: list[list[float]] = []
    for frame in _frames(pred, truth):
        ids.append(frame.truth_ids.tolist())
        ious.append(frame.iou[frame.cover > 0.5].tolist())
    if not any(ids):
        return float("nan")
    return float(mean_over_objects(ids, ious))


def match_counts(
    preds: Labels | Sequence[Labels], truths: Labels | Sequence[Labels], thresholds: Sequence[float] = THRESHOLDS
) -> NDArray[np.int64]:
    """True positives, false positives and false negatives of every frame at every threshold.

    Objects are matched one to one by the Hungarian method, first for as many pairs with IoU >= threshold as possible,
    then for the largest sum of IoU: the rule of Cellpose's and StarDist's reports.

    Args:
        preds: integer [(Z,) Y, X], 0 = background; or a list of N such frames.
        truths: the same for the truth.
        thresholds: T numbers in (0, 1].

    Returns:
        int64 [N, T, 3]: TP, FP, FN.

    Raises:
        InputError: A threshold is outside (0, 1], or shapes, dtypes or the numbers of frames do not fit.
    """
    from scipy.optimize import linear_sum_assignment

    if not len(thresholds) or not all(0 < t <= 1 for t in thresholds):
        raise InputError("thresholds", expected="numbers in (0, 1]", got=list(thresholds))
    frames = _frames(preds, truths)
    counts = np.zeros((len(frames), len(thresholds), 3), np.int64)
    for n, frame in enumerate(frames):
        num_truth, num_pred = frame.iou.shape
        for t, threshold in enumerate(thresholds):
            # The IoU term stays under one whole match in sum, so it only decides between equally many matches.
            gain = (frame.iou >= threshold) + frame.iou / (2 * max(min(num_truth, num_pred), 1))
            rows, columns = linear_sum_assignment(gain, maximize=True)
            tp = int((frame.iou[rows, columns] >= threshold).sum())
            counts[n, t] = tp, num_pred - tp, num_truth - tp
    return counts


def _mean_ratio(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> NDArray[np.float64]:
    ratio = np.where(denominator > 0, numerator / np.maximum(denominator, 1), 1.0)
    mean: NDArray[np.float64] = ratio.mean(0)
    return mean


def average_precision(
    preds: Labels | Sequence[Labels], truths: Labels | Sequence[Labels], thresholds: Sequence[float] = THRESHOLDS
) -> NDArray[np.float64]:
    """AP = TP / (TP + FP + FN) of each frame, mean over the frames, at each IoU threshold.

    Source: Stringer et al., Nature Methods 2021, equation 1 (Cellpose). A frame with neither true nor predicted objects
    counts as 1 (it was segmented correctly; Cellpose's own function gives NaN there), one with objects on one side
    only as 0.

    Args:
        preds: integer [(Z,) Y, X], 0 = background; or a list of such frames.
        truths: the same for the truth.
        thresholds: T numbers in (0, 1].

    Returns:
        float64 [T] in [0, 1].

    Raises:
        InputError: As `match_counts`.

    >>> truth = np.array([[1, 1, 0, 2, 2, 2]])
    >>> average_precision(np.array([[1, 1, 0, 0, 2, 2]]), truth, [0.5, 0.9]).round(3).tolist()
    [1.0, 0.333]
    """
    counts = match_counts(preds, truths, thresholds)
    return _mean_ratio(counts[..., 0], counts.sum(-1))


def f1_score(
    preds: Labels | Sequence[Labels], truths: Labels | Sequence[Labels], thresholds: Sequence[float] = THRESHOLDS
) -> NDArray[np.float64]:
    """F1 = 2 TP / (2 TP + FP + FN) of each frame, mean over the frames, at each IoU threshold.

    Source: Caicedo et al., Cytometry A 2019. Arguments, errors and the rule for empty frames are `average_precision`'s.

    Returns:
        float64 [T] in [0, 1].
    """
    counts = match_counts(preds, truths, thresholds)
    return _mean_ratio(2 * counts[..., 0], counts.sum(-1) + counts[..., 0])


@dataclass(frozen=True)
class SegmentationScores:
    """What is reported of a segmentation of several frames.

    Attributes:
        seg: SEG in [0, 1], NaN without any true object.
        thresholds: T IoU thresholds.
        ap: AP at each of them, in [0, 1].
        f1: F1 at each of them, in [0, 1].
        num_frames: frames compared.
        num_truth: true objects in them.
        num_pred: predicted objects in them.
    """

    seg: float
    thresholds: tuple[float, ...]
    ap: tuple[float, ...]
    f1: tuple[float, ...]
    num_frames: int
    num_truth: int
    num_pred: int

    def at(self, threshold: float) -> tuple[float, float]:
        """AP and F1 at one of the thresholds."""
        close = np.flatnonzero(np.isclose(self.thresholds, threshold))
        if not len(close):
            raise InputError("threshold", expected=f"one of {self.thresholds}", got=threshold)
        return self.ap[close[0]], self.f1[close[0]]


def segmentation_scores(
    preds: Labels | Sequence[Labels], truths: Labels | Sequence[Labels], thresholds: Sequence[float] = THRESHOLDS
) -> SegmentationScores:
    """SEG, AP and F1 of the same frames. Arguments and errors are those of `average_precision`."""
    counts = match_counts(preds, truths, thresholds)
    return SegmentationScores(
        seg=seg(preds, truths),
        thresholds=tuple(float(t) for t in thresholds),
        ap=tuple(_mean_ratio(counts[..., 0], counts.sum(-1)).tolist()),
        f1=tuple(_mean_ratio(2 * counts[..., 0], counts.sum(-1) + counts[..., 0]).tolist()),
        num_frames=len(counts),
        num_truth=int((counts[:, 0, 0] + counts[:, 0, 2]).sum()),
        num_pred=int((counts[:, 0, 0] + counts[:, 0, 1]).sum()),
    )
