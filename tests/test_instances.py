"""Back from probabilities to instances, in frames and in volumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from synthaug.evaluation.instances import instances_from_probabilities, volume_instances
from synthaug.evaluation.segmenter import targets_from_labels
from synthaug.evaluation.targets import BACKGROUND, BORDER, INTERIOR, volume_targets
from tests.test_segmenter import discs


def as_probabilities(target: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.stack([np.where(target == c, 0.9, 0.05) for c in (BACKGROUND, INTERIOR, BORDER)])


def test_perfect_probabilities_give_back_the_labels() -> None:
    for index in range(4):
        _, labels = discs(index)
        found = instances_from_probabilities(as_probabilities(targets_from_labels(labels)))
        assert found.dtype == np.int32
        overlap = [np.bincount(found[labels == i]).max() / (labels == i).sum() for i in range(1, labels.max() + 1)]
        assert found.max() == labels.max()
        assert min(overlap) > 0.95
        np.testing.assert_array_equal(found > 0, labels > 0)


def test_ids_stay_contiguous_when_specks_are_dropped() -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[2:12, 2:12], labels[15:19, 15:19], labels[25:35, 25:35] = 1, 2, 3
    probabilities = as_probabilities(targets_from_labels(labels))
    assert np.unique(instances_from_probabilities(probabilities, min_area=10)).tolist() == [0, 1, 2, 3]
    assert np.unique(instances_from_probabilities(probabilities, min_area=17)).tolist() == [0, 1, 2]


def test_border_without_interior_is_no_cell() -> None:
    target = np.zeros((20, 20), np.int64)
    target[5:15, 5:15] = BORDER
    assert not instances_from_probabilities(as_probabilities(target)).any()
    target[6:8, 6:8] = INTERIOR  # a speck of 4 pixels
    assert not instances_from_probabilities(as_probabilities(target)).any()
    target[9:12, 9:12] = INTERIOR
    assert instances_from_probabilities(as_probabilities(target)).sum() == 100


# Volumes ----------------------------------------------------------------------------------------------------------------


def balls(*places: tuple[float, float, float, float], size: tuple[int, int, int] = (16, 40, 40)) -> NDArray[np.int32]:
    """Balls (z, y, x, radius) in pixels of the plane, planes twice as far apart; the first keeps what it touches."""
    zyx = np.indices(size) * np.array([2, 1, 1])[:, None, None, None]
    labels = np.zeros(size, np.int32)
    for number, (z, y, x, radius) in enumerate(places, start=1):
        inside = sum((a - c) ** 2 for a, c in zip(zyx, (2 * z, y, x))) < radius**2
        labels[inside & (labels == 0)] = number
    return labels


def seen(labels: NDArray[np.int32]) -> NDArray[np.float64]:
    return as_probabilities(volume_targets(torch.from_numpy(labels)[None])[0].numpy())


def test_perfect_probabilities_of_a_volume_give_back_its_cells() -> None:
    labels = balls((8, 12, 12, 7), (8, 12, 26, 7), (5, 30, 20, 6))
    found = volume_instances(seen(labels), 20, (2, 1, 1))
    assert found.dtype == np.int32
    assert found.max() == labels.max() == 3
    np.testing.assert_array_equal(found > 0, labels > 0)
    for i in (1, 2, 3):
        assert np.bincount(found[labels == i]).max() > 0.9 * (labels == i).sum()


def test_a_leak_between_two_cells_does_not_join_them() -> None:
    probabilities = seen(balls((8, 20, 12, 7), (8, 20, 26, 7)))
    probabilities[:, 7:10, 18:23, 16:23] = as_probabilities(np.full((3, 5, 7), INTERIOR))
    assert instances_from_probabilities(probabilities[:, 8]).max() == 1  # what connected interiors make of it
    found = volume_instances(probabilities, 20, (2, 1, 1))
    assert found.max() == 2
    assert found[8, 20, 10] != found[8, 20, 28]


def test_small_cells_are_found_and_specks_are_not() -> None:
    target = np.zeros((16, 40, 40), np.int64)
    target[4:7, 5:10, 5:10], target[4:7, 6:9, 6:9] = BORDER, INTERIOR
    target[10:12, 30:32, 30:32] = BORDER
    found = volume_instances(as_probabilities(target), 50, (2, 1, 1))
    assert found.max() == 1
    assert (found > 0).sum() == 75
    assert not volume_instances(as_probabilities(target), 76, (2, 1, 1)).any()
    assert not volume_instances(as_probabilities(np.full((4, 8, 8), BACKGROUND)), 5).any()


@pytest.mark.parametrize("spacing", [None, (2.4, 0.8, 0.8)])
def test_rough_outlines_do_not_split_a_cell(spacing: tuple[float, float, float] | None) -> None:
    labels = balls((8, 20, 20, 11))
    rough = labels * (np.random.default_rng(0).random(labels.shape) > 0.02)
    assert volume_instances(seen(rough.astype(np.int32)), 20, spacing).max() == 1
