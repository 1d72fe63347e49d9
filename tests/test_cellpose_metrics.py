"""AP is the one that Cellpose reports: the same numbers as its own function, at 0.5 to 0.95."""

from __future__ import annotations

import os

import numpy as np
import pytest

if "CELLPOSE" not in os.environ:
    pytest.importorskip(
        "cellpose", reason="Cellpose is not installed here; make test runs this in environments of their own"
    )

import synthaug.datasets.cellpose  # noqa: F401  # Cellpose 4 imports torchvision, which it makes importable
from synthaug.evaluation.metrics import THRESHOLDS, average_precision, f1_score, match_counts
from synthaug.randomness import SampleKey


def frames(num: int = 12, size: int = 60) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Truths with up to 9 squares, and predictions that miss, move, split, merge and invent some of them."""
    rng = SampleKey(0, ("cellpose metrics",)).numpy()
    truths, preds = [], []
    for _ in range(num):
        truth, pred = np.zeros((2, size, size), np.int32)
        for number in range(1, int(rng.integers(1, 10)) + 1):
            y, x = divmod(number - 1, 3)
            side, corner = int(rng.integers(8, 17)), (20 * y, 20 * x)
            truth[corner[0] : corner[0] + side, corner[1] : corner[1] + side] = number
            kind, shift = rng.integers(6), rng.integers(0, 4, 2)
            if kind == 0:
                continue  # missed
            place = tuple(slice(c + int(s), c + int(s) + side) for c, s in zip(corner, shift))
            pred[place] = 1 if kind == 1 else number + 20  # 1: merged with others
            if kind == 2:
                pred[place[0], place[1].start : place[1].start + side // 2] = number + 40  # split
        if rng.integers(2):
            pred[-3:, -3:] = 99  # invented
        truths.append(truth)
        preds.append(np.unique(pred, return_inverse=True)[1].reshape(pred.shape).astype(np.int32))
    return truths, preds


def test_ap_is_that_of_cellpose() -> None:
    from cellpose import metrics

    truths, preds = frames()
    ap, tp, fp, fn = metrics.average_precision(truths, preds, threshold=list(THRESHOLDS))
    counts = match_counts(preds, truths)
    assert np.array_equal(counts, np.stack([tp, fp, fn], -1).astype(int))
    assert average_precision(preds, truths) == pytest.approx(ap.mean(0), abs=1e-6)
    assert 0.1 < average_precision(preds, truths)[0] < 0.9
    assert np.ptp(average_precision(preds, truths)) > 0.2, "thresholds matter here"
    assert f1_score(preds, truths)[0] == pytest.approx((2 * tp / (2 * tp + fp + fn)).mean(0)[0], abs=1e-6)


def test_where_one_side_is_empty() -> None:
    from cellpose import metrics

    truth, nothing = frames(1)[0][0], np.zeros((60, 60), np.int32)
    for pred, real in ((nothing, truth), (truth, nothing)):
        assert metrics.average_precision(real, pred, threshold=[0.5])[0].tolist() == [0.0]
        assert average_precision(pred, real, [0.5]).tolist() == [0.0]
    with np.errstate(invalid="ignore"):
        assert np.isnan(metrics.average_precision(nothing, nothing, threshold=[0.5])[0]).all()
    assert average_precision(nothing, nothing, [0.5]).tolist() == [1.0], "right, and said so in its docstring"
