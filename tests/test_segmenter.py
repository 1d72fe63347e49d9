"""Targets, augmentation, training and the way back to instances, on discs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from synthaug.errors import InputError
from synthaug.evaluation import segmenter
from synthaug.evaluation.segmenter import (
    TrainTransform,
    build_segmenter,
    normalise,
    predict_instances,
    predict_probabilities,
    score,
    targets_from_labels,
    train_segmenter,
    weights_from_labels,
)
from synthaug.evaluation.targets import BACKGROUND, BORDER, INTERIOR, SEAM_WEIGHT
from synthaug.randomness import SampleKey

Pair = tuple[NDArray[np.float32], NDArray[np.int32]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing by a second thread, and lose much by it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def discs(index: int, size: int = 64, num_pairs: int = 2) -> Pair:
    """Pairs of discs that touch, in camera counts; all but the first pair may be left out for want of space."""
    rng = SampleKey(index, ("discs",)).numpy()
    labels = np.zeros((size, size), np.int32)
    y, x = np.mgrid[:size, :size]
    for _ in range(num_pairs):
        radius, angle = rng.uniform(6, 9), rng.uniform(0, np.pi)
        centre = rng.uniform(2 * radius, size - 2 * radius, 2)
        step = (radius - 0.5) * np.array([np.sin(angle), np.cos(angle)])
        first, second = (np.hypot(y - c[0], x - c[1]) < radius for c in (centre - step, centre + step))
        if not labels[first | second].any():
            labels[first] = labels.max() + 1
            labels[second & (labels == 0)] = labels.max() + 1
    levels = np.concatenate([[0], rng.uniform(250, 500, labels.max())])
    image = 150 + levels[labels] + rng.normal(0, 15, labels.shape)
    return image.astype(np.float32), labels


def batches(num: int, size: int = 64, batch_size: int = 8) -> Iterator[dict[str, Tensor]]:
    transform = TrainTransform()
    for b in range(num):
        pairs = [discs(b * batch_size + i, size) for i in range(batch_size)]
        samples = [transform({"image": image[None], "label": labels[None]}) for image, labels in pairs]
        yield {key: torch.stack([s[key] for s in samples]) for key in samples[0]}


class Oracle(nn.Module):
    """Reads the classes off an image that shows them as 0, 1 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor([0.0, 0.5, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return -50 * (x - self.values[None, :, None, None]) ** 2


# Targets ------------------------------------------------------------------------------------------------------------


def num_parts(mask: NDArray[np.bool_]) -> int:
    from scipy import ndimage

    return int(ndimage.label(mask)[1])


@pytest.mark.parametrize("index", range(5))
def test_targets_part_every_pair_of_touching_cells(index: int) -> None:
    _, labels = discs(index)
    assert num_parts(labels > 0) < labels.max(), "these cells do not touch, so they prove nothing"
    target = targets_from_labels(labels)
    assert target.dtype == np.int64
    assert target.shape == labels.shape
    assert num_parts(target == INTERIOR) == labels.max()
    np.testing.assert_array_equal(target > BACKGROUND, labels > 0)  # interior and border together are the cell


def test_border_is_thicker_where_cells_touch() -> None:
    labels = np.zeros((20, 30), np.int64)
    labels[5:15, 4:14] = 7
    labels[5:15, 14:24] = 3
    row = targets_from_labels(labels)[10]
    assert row[3:25].tolist() == [0, 2, *[1] * 7, 2, 2, 2, 2, *[1] * 7, 2, 0]


def test_a_gap_stays_background() -> None:
    labels = np.zeros((20, 30), np.uint16)
    labels[5:15, 4:14] = 1
    labels[5:15, 15:24] = 2
    assert targets_from_labels(labels)[10, 12:17].tolist() == [INTERIOR, BORDER, BACKGROUND, BORDER, INTERIOR]


def test_an_image_ends_without_border() -> None:
    assert (targets_from_labels(np.ones((8, 8), np.int32)) == INTERIOR).all()


def test_the_smallest_cells_keep_an_interior() -> None:
    labels = np.zeros((12, 12), np.int32)
    labels[2, 2:8] = 1  # one pixel thick
    labels[3, 2:8] = 2  # and touched along its whole length
    labels[8:10, 8:10] = 3
    target = targets_from_labels(labels)
    assert {1, 2, 3} == set(np.unique(labels[target == INTERIOR]))


def test_targets_of_an_empty_frame() -> None:
    assert not targets_from_labels(np.zeros((9, 7), np.int32)).any()


def test_seams_between_cells_weigh_more() -> None:
    labels = np.zeros((20, 40), np.uint16)
    labels[5:15, 4:14] = 1
    labels[5:15, 15:24] = 2  # 1 pixel from the first
    labels[5:15, 31:38] = 3  # 7 pixels from the second
    weights = weights_from_labels(labels)
    assert weights.dtype == np.float32
    assert np.unique(weights).tolist() == [1, SEAM_WEIGHT]
    assert np.flatnonzero(weights[10] == SEAM_WEIGHT).tolist() == [12, 13, 14, 15, 16]  # the gap included
    assert (weights_from_labels(np.zeros((5, 5), np.int32)) == 1).all()
    assert (weights_from_labels(np.ones((5, 5), np.int32)) == 1).all()


def test_the_weights_count_in_the_loss() -> None:
    batch = next(batches(1, 48, 2))
    wrong = (batch["target"] == BORDER).float()  # the oracle sees a blank image: everything is background
    blank = {**batch, "image": torch.zeros_like(batch["image"])}
    losses = [
        train_segmenter([{**blank, "weight": 1 + factor * wrong}], 1, model=Oracle())[1].losses[0] for factor in (0, 9)
    ]
    assert losses[1] > 2 * losses[0]


@pytest.mark.parametrize("labels", [np.zeros((4, 4), np.float32), np.zeros((1, 4, 4), np.int32)])
def test_targets_refuse_what_is_no_label_image(labels: Any) -> None:
    with pytest.raises(InputError, match=r"integers \[Y, X\]"):
        targets_from_labels(labels)


# Normalisation and augmentation -----------------------------------------------------------------------------------------


def test_exposure_and_offset_play_no_part() -> None:
    image, _ = discs(0)
    np.testing.assert_allclose(normalise(image), normalise(3 * image + 1000), atol=1e-4)
    assert np.percentile(normalise(image), [1, 99.8]) == pytest.approx([0, 1], abs=1e-3)


def test_a_flat_image_and_a_hot_pixel() -> None:
    assert not normalise(np.full((8, 8), 300.0)).any()
    image = discs(0)[0].copy()
    image[0, 0] = 65535
    assert normalise(image).max() == 4


@pytest.mark.usefixtures("untouched_random_state")
def test_the_seed_decides_the_augmentation() -> None:
    image, labels = discs(1)
    sample = {"image": torch.from_numpy(image)[None], "label": torch.from_numpy(labels)[None]}
    transform = TrainTransform()
    first, second = transform.set_random_state(seed=5)(sample), transform(sample)
    again = transform.set_random_state(seed=5)(sample)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["image"], second["image"])
    assert not torch.equal(first["image"], transform.set_random_state(seed=6)(sample)["image"])


def test_image_label_and_target_stay_aligned() -> None:
    image, labels = discs(1)
    seen = set()
    for seed in range(30):
        out = TrainTransform(seed=seed)({"image": image[None], "label": labels[None]})
        assert (out["image"].dtype, out["label"].dtype, out["target"].dtype) == (
            torch.float32,
            torch.int32,
            torch.int64,
        )
        cell = out["label"][0] > 0
        apart = out["image"][0][cell].mean() - out["image"][0][~cell].mean()
        bright = out["image"][0] > out["image"][0][~cell].mean() + apart / 2
        assert (bright == cell).float().mean() > 0.97
        np.testing.assert_array_equal(out["target"], targets_from_labels(out["label"][0].numpy()))
        np.testing.assert_array_equal(out["weight"], weights_from_labels(out["label"][0].numpy()))
        seen.add(out["label"].numpy().tobytes())
    assert len(seen) == 8  # four quarter turns, flipped and not


def test_without_augmentation_it_only_normalises() -> None:
    image, labels = discs(1)
    out = TrainTransform(augment=False)({"image": image[None], "label": labels[None]})
    np.testing.assert_array_equal(out["image"][0], normalise(image))
    np.testing.assert_array_equal(out["label"][0], labels)


# Network and training ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untouched_random_state")
def test_the_seed_decides_the_weights() -> None:
    first, again, other = build_segmenter(0), build_segmenter(0), build_segmenter(1)
    assert 2e5 < sum(p.numel() for p in first.parameters()) < 1e6
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    for (name, a), b in zip(first.named_parameters(), other.parameters()):
        drawn = a.ndim == 4  # biases and normalisation start at constants
        assert torch.equal(a, b) != drawn, name


@pytest.mark.usefixtures("untouched_random_state")
def test_the_same_batches_give_the_same_network() -> None:
    networks = [train_segmenter(batches(3, 48, 2), 3, seed=4)[0] for _ in range(2)]
    states = [n.state_dict() for n in networks]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not networks[0].training


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return train_segmenter(batches(240), 240)[0]


def test_a_short_training_parts_touching_discs(trained: nn.Module) -> None:
    held_out = [discs(10_000 + i) for i in range(8)]
    scores = score(trained, held_out)
    assert scores.seg > 0.8
    assert scores.at(0.5)[0] > 0.85
    fresh = score(build_segmenter().eval(), held_out)
    assert fresh.seg < 0.5, "the score does not tell a trained network from a fresh one"


def test_larger_images_are_tiled(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    image, labels = discs(20_000, size=121, num_pairs=6)
    whole = predict_instances(trained, image)
    monkeypatch.setattr(segmenter, "TILE", 64)
    tiled = predict_instances(trained, image)
    assert whole.shape == tiled.shape == labels.shape
    assert tiled.max() == whole.max() > 1
    assert ((tiled > 0) == (whole > 0)).mean() > 0.98


@pytest.mark.parametrize("shape", [(37, 53), (16, 16), (5, 70)])
def test_images_of_any_size(trained: nn.Module, shape: tuple[int, int]) -> None:
    image = SampleKey(0).numpy().normal(100, 5, shape)
    probabilities = predict_probabilities(trained, image)
    assert probabilities.shape == (3, *shape)
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("image", [np.full((8, 8), np.nan), np.zeros((1, 8, 8))])
def test_prediction_refuses_what_is_no_image(image: Any) -> None:
    with pytest.raises(InputError, match="finite grey values"):
        predict_probabilities(Oracle(), image)


def test_training_says_what_is_wrong_with_the_batches() -> None:
    with pytest.raises(InputError, match="one for each of the 3 steps, got 1 batches"):
        train_segmenter(batches(1, 48, 1), 3)
    with pytest.raises(InputError, match="TrainTransform"):
        train_segmenter([{"image": torch.zeros(1, 1, 32, 32)}], 1)
    with pytest.raises(InputError, match="steps: expected"):
        train_segmenter([], 0)
    target = torch.zeros(2, 32, 32, dtype=torch.int64)
    bad = {"image": torch.full((2, 1, 32, 32), torch.nan), "target": target, "weight": torch.ones(2, 32, 32)}
    with pytest.raises(FloatingPointError, match="at step 0"):
        train_segmenter([bad], 1)


def test_the_report_counts_the_time_spent_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(segmenter.time, "perf_counter", lambda: clock[0])

    class Slow(Oracle):
        def forward(self, x: Tensor) -> Tensor:
            clock[0] += 3  # a step takes 3 s
            return super().forward(x)

    def late() -> Iterator[dict[str, Tensor]]:
        for i, batch in enumerate(batches(4, 48, 2)):
            clock[0] += 10 if i == 0 else 1
            yield batch

    lines: list[str] = []
    report = train_segmenter(late(), 4, model=Slow(), log=lines.append)[1]
    assert (report.steps, report.samples, report.seconds, report.wait_seconds) == (4, 8, 25.0, 13.0)
    assert report.first_wait_seconds == 10
    assert report.stall_share == pytest.approx(13 / 25)
    assert report.running_stall_share == pytest.approx(3 / 15)
    assert report.pairs_per_second == pytest.approx(8 / 25)
    assert len(report.losses) == len(lines) == 4


def test_the_score_of_an_oracle_and_of_a_blind_one() -> None:
    pairs = [(targets_from_labels(labels).astype(np.float32), labels) for _, labels in (discs(i) for i in range(3))]
    oracle = Oracle().eval()
    scores = score(oracle, pairs)
    assert scores.seg > 0.97
    assert scores.at(0.5) == (1.0, 1.0)
    assert scores.num_truth == scores.num_pred == sum(int(labels.max()) for _, labels in pairs)
    blind = score(oracle, [(np.zeros_like(image), labels) for image, labels in pairs])
    assert (blind.seg, blind.num_pred) == (0.0, 0)
