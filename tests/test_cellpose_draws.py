"""Which accesses of the sequences deal a pair, as a loop does that draws like Cellpose's; without Cellpose."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest

from synthaug.datasets.cellpose_draws import Draws, Images, Labels, Pair
from synthaug.errors import InputError


class Numbered:
    """Pair number n is full of n."""

    shape = (2, 3, 5)
    areas = np.array([[0, 1, 1, 2]], np.int32)
    wait_seconds = 1.5

    def __init__(self) -> None:
        self._numbers = count()

    def pair(self) -> Pair:
        number = next(self._numbers)
        return Pair(np.full(self.shape, number, np.float32), np.full((3, 3, 5), number, np.float32))

    def close(self) -> None:
        self.pair = None  # type: ignore[assignment, method-assign]


@pytest.fixture
def data() -> tuple[Images, Labels]:
    draws = Draws(Numbered())
    return Images(draws, 4), Labels(draws, 4)


def numbers(arrays: list[Any]) -> list[int]:
    assert all((array == array.flat[0]).all() for array in arrays)
    return [int(array.flat[0]) for array in arrays]


def look_around(images: Any, labels: Any) -> list[Any]:
    """What train_seg does before it trains; returns the labels it goes on with."""
    assert (labels[0].ndim, images[0].ndim, images[0].ndim) == (3, 3, 3)
    kept = [labels[n].astype(np.float32) for n in range(len(images))]
    assert kept[0].shape == (4, 3, 5)
    assert [len(np.unique(label[0])) - 1 for label in kept] == [2] * 4
    assert [image.shape[0] for image in images] == [2] * 4
    return kept


def test_a_step_gets_images_and_their_labels(data: tuple[Images, Labels]) -> None:
    images, labels = data
    kept = look_around(images, labels)
    dealt = []
    for indices in ([2, 0], [1, 3], [3, 3], [0, 2]):
        drawn = [images[np.int64(i)] for i in indices]
        targets = [kept[i][1:] for i in indices]
        assert numbers(drawn) == numbers(targets)
        dealt += numbers(drawn)
    assert dealt == list(range(8)), "every draw is the next pair, and looking around took none"
    assert images.wait_seconds == 1.5
    images.close()
    with pytest.raises(TypeError):
        images[0]


def test_a_slot_drawn_twice_in_a_step_gives_two_pairs_each_with_its_own_label(data: tuple[Images, Labels]) -> None:
    images, labels = data
    kept = look_around(images, labels)
    assert numbers([images[i] for i in (1, 2, 1, 1)]) == [0, 1, 2, 3]
    assert numbers([kept[i][1:] for i in (1, 2, 1, 1)]) == [0, 1, 2, 3]


def test_looking_at_an_image_before_training_takes_nothing_from_the_stream(data: tuple[Images, Labels]) -> None:
    images, labels = data
    assert numbers([images[3], images[0]]) == [0, 1]
    kept = look_around(images, labels)
    assert numbers([images[0], images[3]]) == [0, 1]
    assert numbers([kept[0][1:], kept[3][1:]]) == [0, 1]


def test_a_training_that_broke_off_between_images_and_labels_can_be_started_again(data: tuple[Images, Labels]) -> None:
    images, labels = data
    look_around(images, labels)
    assert numbers([images[1], images[2]]) == [0, 1]
    kept = look_around(images, labels)
    assert numbers([images[2], kept[2][1:]]) == [0, 0]


def test_images_kept_in_a_list_are_noticed_when_drawn_again(data: tuple[Images, Labels]) -> None:
    images, labels = data
    kept = look_around(images, labels)
    frozen = [images[i] for i in range(4)]  # as Cellpose does where it drops slots of too few masks
    assert numbers([frozen[2], kept[2][1:]]) == [2, 2]
    with pytest.raises(InputError, match=r"slot 2 without an image drawn .*copied into a list"):
        kept[2][1:]


def test_labels_before_images_are_no_labels(data: tuple[Images, Labels]) -> None:
    images, labels = data
    kept = look_around(images, labels)
    with pytest.raises(InputError, match="images of a step to be drawn first"):
        kept[1][1:]


def test_an_image_whose_label_nobody_asked_for_ends_the_training(data: tuple[Images, Labels]) -> None:
    images, labels = data
    kept = look_around(images, labels)
    assert numbers([images[0], images[1], kept[0][1:]]) == [0, 1, 0]
    with pytest.raises(InputError, match=r"the image of slot 2 before .* slots \[1\]"):
        images[2]


@pytest.mark.parametrize(
    "use",
    [
        lambda image: np.moveaxis(image, 0, -1),
        lambda image: np.asarray(image),
        lambda image: image.astype("float32"),
        lambda image: image[0],
    ],
    ids=["moveaxis", "asarray", "astype", "getitem"],
)
def test_whoever_iterates_over_images_to_change_them_is_told_to_switch_normalisation_off(data: Any, use: Any) -> None:
    with pytest.raises(InputError, match="Pass normalize=False to train_seg, and no channels"):
        [use(image) for image in data[0]]


@pytest.mark.parametrize(
    "use", [np.asarray, list, lambda label: label[2], lambda label: label[:2]], ids=["asarray", "list", "[2]", "[:2]"]
)
def test_labels_are_nothing_but_what_cellpose_needs(data: Any, use: Any) -> None:
    with pytest.raises(InputError, match="labels"):
        use(data[1][0])


def test_slots_end_where_the_sequences_do(data: Any) -> None:
    for sequence in data:
        assert len(sequence) == len(list(sequence)) == 4
        for index in (4, -5):
            with pytest.raises(IndexError):
                sequence[index]
        with pytest.raises(TypeError):
            sequence[:2]
