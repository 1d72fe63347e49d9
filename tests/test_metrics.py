"""Scores against hand-computed cases and against py-ctcmetrics' own reading of the same frames from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from synthaug.errors import InputError
from synthaug.evaluation.metrics import (
    THRESHOLDS,
    average_precision,
    f1_score,
    match_counts,
    overlaps,
    seg,
    segmentation_scores,
)
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED


def squares(*boxes: tuple[int, int, int, int], size: int = 40) -> NDArray[np.int32]:
    """Labels 1, 2, ... in boxes (top, left, height, width)."""
    labels = np.zeros((size, size), np.int32)
    for index, (top, left, height, width) in enumerate(boxes, start=1):
        labels[top : top + height, left : left + width] = index
    return labels


TRUTH = squares((0, 0, 10, 10), (0, 20, 10, 10), (20, 0, 10, 10), (20, 20, 10, 10))
# IoU with the four truths: 1; 80 / 100; covers exactly half, so no match for SEG; 60 / 140. And one false positive.
PRED = squares((0, 0, 10, 10), (0, 20, 8, 10), (20, 0, 5, 10), (24, 20, 10, 10), (36, 36, 4, 4))


def test_seg_of_a_case_computed_by_hand() -> None:
    assert seg(PRED, TRUTH) == pytest.approx((1 + 0.8 + 0 + 60 / 140) / 4)


def test_seg_ignores_false_positives_and_ids() -> None:
    renamed = np.where(PRED == 1, 900, PRED)
    assert seg(renamed, TRUTH * 7) == pytest.approx(seg(PRED, TRUTH))
    assert seg(np.where(PRED == 5, 0, PRED), TRUTH) == pytest.approx(seg(PRED, TRUTH))


def test_seg_weighs_objects_not_frames() -> None:
    empty_pred = np.zeros_like(TRUTH)
    one = squares((5, 5, 10, 10))
    assert seg([TRUTH, empty_pred], [TRUTH, one]) == pytest.approx(4 / 5)


def test_seg_without_background_pixels_in_the_truth() -> None:
    full = np.ones((8, 8), np.int32)
    assert seg(full, full) == 1.0


def test_seg_is_that_of_ctcmetrics_on_files(tmp_path: Path) -> None:
    from ctc_metrics.metrics.technical.seg import seg as ctc_seg
    from ctc_metrics.utils.representations import match

    rng = SampleKey(0, ("test", "metrics")).numpy()
    preds, truths, ids, ious = [], [], [], []
    for frame in range(4):
        boxes = [(int(y), int(x), 9, 9) for y in (0, 12, 25) for x in (1, 13, 26)]
        shifts = rng.integers(-4, 5, (9, 2))
        moved = [(max(y + int(a), 0), max(x + int(b), 0), 9, 9) for (y, x, _, _), (a, b) in zip(boxes, shifts)]
        truths.append(squares(*boxes))
        preds.append(squares(*moved))
        paths = tmp_path / f"truth{frame}.tif", tmp_path / f"pred{frame}.tif"
        tifffile.imwrite(paths[0], truths[-1].astype(np.uint16))
        tifffile.imwrite(paths[1], preds[-1].astype(np.uint16))
        labels_ref, _, _, _, iou = match(str(paths[0]), str(paths[1]))
        ids.append(labels_ref)
        ious.append(iou)
    expected = ctc_seg(ids, ious)
    assert 0.2 < expected < 0.95
    assert seg(preds, truths) == pytest.approx(expected, abs=1e-12)


def test_counts_of_a_case_computed_by_hand() -> None:
    counts = match_counts(PRED, TRUTH, [0.4, 0.5, 0.75, 0.85])
    # IoU are 1, 0.8, 0.5 and 0.4286; five predictions, four truths
    assert counts[0].tolist() == [[4, 1, 0], [3, 2, 1], [2, 3, 2], [1, 4, 3]]
    assert average_precision(PRED, TRUTH, [0.5, 0.85]) == pytest.approx([3 / 6, 1 / 8])
    assert f1_score(PRED, TRUTH, [0.5, 0.85]) == pytest.approx([6 / 9, 2 / 9])


def test_matching_is_one_to_one() -> None:
    truth = squares((0, 0, 10, 10))
    halves = squares((0, 0, 5, 10), (5, 0, 5, 10))  # both have an IoU of exactly 0.5
    assert match_counts(halves, truth, [0.5])[0, 0].tolist() == [1, 1, 0]
    # At a low threshold the greedy choice (0.6 for truth 1) would cost the second match.
    truth = squares((0, 0, 1, 10), (0, 10, 1, 10), size=20)
    pred = squares((0, 3, 1, 12), (0, 0, 1, 3), size=20)
    assert overlaps(pred, truth).iou == pytest.approx(np.array([[7 / 15, 0.3], [5 / 17, 0.0]]))
    assert match_counts(pred, truth, [0.25])[0, 0].tolist() == [2, 0, 0]


def test_mean_is_over_frames() -> None:
    ap = average_precision([TRUTH, np.zeros_like(TRUTH)], [TRUTH, squares((0, 0, 10, 10))])
    assert ap == pytest.approx([0.5] * len(THRESHOLDS))


def test_empty_frames() -> None:
    empty = np.zeros((40, 40), np.int32)
    assert average_precision(empty, empty, [0.5]).tolist() == [1.0]
    assert f1_score(empty, empty, [0.5]).tolist() == [1.0]
    assert average_precision(TRUTH, empty, [0.5]).tolist() == [0.0]
    assert average_precision(empty, TRUTH, [0.5]).tolist() == [0.0]
    assert np.isnan(seg(TRUTH, empty))
    assert seg(empty, TRUTH) == 0.0
    assert seg([empty, TRUTH], [empty, TRUTH]) == 1.0


def test_volumes() -> None:
    volume = np.stack([TRUTH, TRUTH, np.zeros_like(TRUTH)])
    shifted = np.stack([TRUTH, np.zeros_like(TRUTH), np.zeros_like(TRUTH)])
    assert seg(volume, volume) == 1.0
    assert seg(shifted, volume) == 0.0  # exactly half is covered
    assert average_precision(shifted, volume, [0.5]).tolist() == [1.0]


def boxes(num: int, shifts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Cubes 1, 2, ... on a grid, each moved along every axis."""
    labels = np.zeros((24, 44, 44), np.int32)
    corners = [(z, y, x) for z in (2, 13) for y in (2, 16, 30) for x in (2, 16, 30)]
    for index, (corner, shift) in enumerate(list(zip(corners, shifts))[:num], start=1):
        z, y, x = np.maximum(np.add(corner, shift), 0)
        labels[z : z + 8, y : y + 10, x : x + 10] = index
    return labels


def moved_boxes() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    shifts = SampleKey(0, ("test", "volumes")).numpy().integers(-2, 3, (18, 3))
    return boxes(18, shifts), boxes(18, np.zeros_like(shifts))


def test_seg_of_volumes_is_that_of_ctcmetrics_on_files(tmp_path: Path) -> None:
    from ctc_metrics.metrics.technical.seg import seg as ctc_seg
    from ctc_metrics.utils.representations import match

    pred, truth = moved_boxes()
    gold = tmp_path / "man_seg000.tif", tmp_path / "mask000.tif"
    tifffile.imwrite(gold[0], truth.astype(np.uint16))
    tifffile.imwrite(gold[1], pred.astype(np.uint16))
    ids, _, _, _, iou = match(str(gold[0]), str(gold[1]))
    expected = ctc_seg([ids], [iou])
    assert 0.2 < expected < 0.9
    assert seg(pred, truth) == pytest.approx(expected, abs=1e-12)

    # One gold slice of another time point: man_seg_001_006.tif is compared with plane 6.
    tifffile.imwrite(tmp_path / "man_seg001_006.tif", truth[6].astype(np.uint16))
    ids, _, _, _, iou = match(str(tmp_path / "man_seg001.tif"), str(gold[1]))
    expected = ctc_seg([ids], [iou])
    sparse = np.full_like(truth, UNLABELLED)
    sparse[6] = truth[6]
    assert 0.2 < expected < 0.9
    assert seg(pred, sparse) == pytest.approx(expected, abs=1e-12)
    assert seg(pred[6], truth[6]) == pytest.approx(expected, abs=1e-12)


def test_planes_that_nobody_annotated_do_not_count() -> None:
    pred, truth = moved_boxes()
    sparse = np.full_like(truth, UNLABELLED)
    sparse[[4, 6, 15]] = truth[[4, 6, 15]]
    garbage = np.where(sparse == UNLABELLED, 999, pred)
    scores = segmentation_scores(pred, sparse)
    assert scores == segmentation_scores(garbage, sparse)
    found = [pred[[z]] for z in (4, 6, 15)], [truth[[z]] for z in (4, 6, 15)]
    counts = match_counts(*found, THRESHOLDS)
    assert match_counts(pred, sparse)[0].tolist() == counts.sum(0).tolist()
    assert 0 < counts[:, 5, 0].sum() < 27
    assert scores.seg == pytest.approx(seg(*found))
    assert (scores.num_frames, scores.num_truth) == (1, 27)
    assert scores.ap != segmentation_scores(pred, truth).ap


def test_sections_in_several_planes_need_no_common_ids() -> None:
    _, truth = moved_boxes()
    sparse = np.full_like(truth, UNLABELLED)
    for z in (3, 5, 8):
        ids = np.unique(truth[z])[1:]
        sparse[z] = np.searchsorted(ids, truth[z], side="right") * (truth[z] > 0) + 50 * z * (truth[z] > 0)
    assert seg(truth, sparse) == 1.0
    assert average_precision(truth, sparse, [0.95]).tolist() == [1.0]
    frame = overlaps(truth, sparse)
    assert len(frame.truth_ids) == len(np.unique(frame.truth_ids)) == 27


@pytest.mark.parametrize("where", [np.s_[2, :3], np.s_[:]])
def test_unlabelled_pixels_make_whole_planes(where: object) -> None:
    pred, truth = moved_boxes()
    truth[where] = UNLABELLED  # type: ignore[index]
    with pytest.raises(InputError, match="truth: expected -1 in whole planes, but not in all"):
        seg(pred, truth)


def test_scores_hold_the_same_numbers() -> None:
    scores = segmentation_scores([PRED, TRUTH], [TRUTH, TRUTH])
    assert scores.seg == pytest.approx(seg([PRED, TRUTH], [TRUTH, TRUTH]))
    assert scores.thresholds == THRESHOLDS
    assert scores.ap == pytest.approx(average_precision([PRED, TRUTH], [TRUTH, TRUTH]).tolist())
    assert scores.f1 == pytest.approx(f1_score([PRED, TRUTH], [TRUTH, TRUTH]).tolist())
    assert (scores.num_frames, scores.num_truth, scores.num_pred) == (2, 8, 9)
    assert scores.at(0.85) == (scores.ap[7], scores.f1[7])
    with pytest.raises(InputError, match="threshold: expected one of"):
        scores.at(0.42)


@pytest.mark.parametrize(
    ("pred", "truth", "message"),
    [
        (TRUTH.astype(np.float32), TRUTH, "pred: expected integer labels, 0 = background, got float32"),
        (TRUTH - 1, TRUTH, "got minimum -1"),
        (TRUTH, TRUTH - 1, "truth: .* got minimum -1"),
        (TRUTH[None] - 1, TRUTH[None], "pred: .* got minimum -1"),
        (TRUTH[None], TRUTH[None] - 2, "truth: .* got minimum -2"),
        (TRUTH[:20], TRUTH, r"expected the shape of the truth, \(40, 40\), got \(20, 40\)"),
        ([TRUTH], [TRUTH, TRUTH], "one frame for each of the 2 truths"),
        ([], [], "one frame for each of the 0 truths"),
    ],
)
def test_bad_input(pred: object, truth: object, message: str) -> None:
    for function in (seg, average_precision):
        with pytest.raises(InputError, match=message):
            function(pred, truth)  # type: ignore[arg-type]


@pytest.mark.parametrize("thresholds", [[], [0.0], [1.2]])
def test_bad_thresholds(thresholds: list[float]) -> None:
    with pytest.raises(InputError, match="thresholds: expected numbers in"):
        average_precision(TRUTH, TRUTH, thresholds)
