"""The exact ratio, the order of the real samples, and what real samples may look like."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from synthaug.datasets.mixing import Mix, RealOrder, check_real, exact_ratio, read_real, relabel
from synthaug.errors import InputError
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED

RATIOS = [0, 0.1, 0.25, 1 / 3, 0.5, Fraction(2, 7), 0.618033988749895, 0.9, 0.999, 1e-4, 1]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 17, 64])
def test_every_batch_is_within_one_and_nothing_drifts(ratio: Any, batch_size: int) -> None:
    mix = Mix(batch_size, ratio, seed=0, num_real=3)
    counts = [mix.num_synthetic(b) for b in [*range(3000), *range(10**9, 10**9 + 50)]]
    assert all(abs(n - ratio * batch_size) < 1 for n in counts)
    totals = np.cumsum(counts[:3000]) - np.arange(1, 3001) * batch_size * float(ratio)
    assert abs(totals).max() < 1 + 1e-6
    assert abs(mix._synthetic_before(10**6) - ratio * 10**6 * batch_size) <= 1 + 1e-4


def test_slots_and_real_samples_fill_every_batch() -> None:
    mix = Mix(5, 0.3, seed=1, num_real=4)
    seen: list[int] = []
    places = Counter()
    for batch in range(400):
        slots = mix.synthetic_slots(batch)
        assert slots == sorted(set(slots))
        assert len(slots) == mix.num_synthetic(batch)
        places.update(slots)
        real = mix.real_indices(batch)
        assert len(real) + len(slots) == 5
        seen += real
    assert set(places) == set(range(5))
    assert max(places.values()) < 1.5 * min(places.values())
    epochs = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs), "every epoch visits each real sample once"
    assert len({tuple(epoch) for epoch in epochs}) > 15, "in another order each time"
    assert mix.real_indices(3) == Mix(5, 0.3, seed=1, num_real=4).real_indices(3), "whatever was asked before"


def test_real_order_is_a_batch_sampler() -> None:
    order = RealOrder(7, batch_size=4, seed=3, num_batches=10)
    assert len(order) == 10
    batches = list(order)
    assert all(len(b) == 4 for b in batches)
    assert batches[6:] == list(RealOrder(7, 4, 3, num_batches=4, start=6))
    assert batches != list(RealOrder(7, 4, 4, num_batches=10))
    assert list(itertools.islice(RealOrder(7, 4, 3), 10)) == batches
    with pytest.raises(TypeError, match="endless"):
        len(RealOrder(7, 4))
    with pytest.raises(InputError, match="num_real"):
        RealOrder(0, 4)


@pytest.mark.parametrize("ratio", [-0.1, 1.01, float("nan"), "0.5", None, True])
def test_bad_ratios(ratio: Any) -> None:
    with pytest.raises(InputError, match="synthetic_ratio"):
        exact_ratio(ratio)


def test_what_can_be_real() -> None:
    half = Fraction(1, 2)
    assert check_real(None, Fraction(1)) == 0
    assert check_real([1, 2], half) == 2
    with pytest.raises(InputError, match=r"synthetic_ratio=1\.0"):
        check_real(None, half)
    with pytest.raises(InputError, match="map-style"):
        check_real(iter([]), half)
    with pytest.raises(InputError, match="empty"):
        check_real([], half)


IMAGE = np.arange(12 * 9, dtype=np.uint16).reshape(12, 9)
LABEL = (IMAGE // 40).astype(np.int64) * 5
KEY = SampleKey(0, ("crop",))


@pytest.mark.parametrize(
    "item",
    [
        (IMAGE, LABEL),
        [IMAGE[None], LABEL[None]],
        {"image": IMAGE.astype(np.float64), "label": LABEL.astype(np.uint32), "name": "x"},
        {"image": torch.from_numpy(IMAGE), "label": torch.from_numpy(LABEL.astype(np.uint8))[None]},
        {"image": MetaTensor(IMAGE.astype(np.float32)[None]), "label": MetaTensor(LABEL[None])},
        {"image": torch.from_numpy(IMAGE.astype(np.float32)).requires_grad_(), "label": LABEL.astype(">u2")},
        {"image": torch.from_numpy(IMAGE.astype(np.float32)).bfloat16(), "label": LABEL.astype(np.int8)},
    ],
)
def test_items_of_every_kind(item: Any) -> None:
    image, label = read_real([item], 0, (12, 9), KEY)
    assert type(image) is type(label) is torch.Tensor
    assert (image.dtype, label.dtype) == (torch.float32, torch.int32)
    np.testing.assert_allclose(image[0], IMAGE.astype(np.float32), rtol=1e-2)
    np.testing.assert_array_equal(label[0], LABEL // 5)


def test_volumes_too() -> None:
    volume = np.zeros((4, 12, 9), np.float32)
    image, label = read_real([(volume, volume.astype(np.uint8))], 0, (2, 5, 5), KEY)
    assert image.shape == label.shape == (1, 2, 5, 5)


VOLUME = np.arange(9 * 8 * 7, dtype=np.uint16).reshape(9, 8, 7)


def sparse_label(*planes: int) -> np.ndarray:
    """Labels 5, 6, 7 ... in these planes of `VOLUME`, `UNLABELLED` in the others."""
    label = np.full(VOLUME.shape, UNLABELLED, np.int32)
    for i, z in enumerate(planes):
        label[z], label[z, :, :3] = 0, i + 5
    return label


def test_crops_hold_an_annotated_plane() -> None:
    seen = Counter()
    for i in range(300):
        image, label = read_real([(VOLUME, sparse_label(1, 7))], 0, (3, 8, 7), SampleKey(0, (i,)))
        z = int(image[0, 0, 0, 0]) // 56
        seen[z] += 1
        np.testing.assert_array_equal(image[0], VOLUME[z : z + 3])
        planes = [p for p in range(3) if (label[0, p] != UNLABELLED).all()]
        assert planes == [p - z for p in (1, 7) if z <= p < z + 3]
        assert planes
        assert label.unique().tolist() == [UNLABELLED, 0, 1], "contiguous, and what is unknown stays so"
    assert sorted(seen) == [0, 1, 5, 6], "3 of the 7 places hold no annotation"
    assert min(seen.values()) > 45
    with pytest.raises(InputError, match=r"real\[0\] label.*at least one annotated plane"):
        read_real([(VOLUME, sparse_label())], 0, (3, 8, 7), KEY)


def test_short_volumes_are_continued_by_their_mirror_image() -> None:
    label = np.zeros(VOLUME.shape, np.int32)
    label[2:4, 3:5, 3:4] = 4  # mirrored at no side
    label[5:7, 0:2, 3:4] = 9  # touches its image across y
    label[7:8, 2:4, 5:6] = 6  # does not touch its image across x
    image, _ = read_real([(VOLUME, label)], 0, (6, 12, 10), SampleKey(0))
    z = int(image[0, 0, 2, 1]) // 56
    np.testing.assert_array_equal(image[0], np.pad(VOLUME[z : z + 6], ((0, 0), (2, 2), (1, 2)), mode="reflect"))
    _, out = read_real([(VOLUME, label)], 0, (9, 10, 11), SampleKey(0))
    assert out.unique().tolist() == [0, 1, 2, 3, 4]
    inner = out[0, :, 1:9, 2:9].numpy()
    assert (
        len(np.unique(inner[label == 4])) == len(np.unique(inner[label == 9])) == len(np.unique(inner[label == 6])) == 1
    )
    assert int((out == inner[label == 9][0]).sum()) == 6, "the cell and its image are one"
    assert int((out == inner[label == 6][0]).sum()) == 2, "the cell and its image are two"
    _, out = read_real([(VOLUME, sparse_label(4))], 0, (12, 8, 7), SampleKey(0))
    known = (out[0] != UNLABELLED).all(2).all(1)
    assert known.tolist() == ((out[0] != UNLABELLED).any(2).any(1)).tolist()
    assert int(known.sum()) == 1


def test_crops_are_keyed_aligned_and_everywhere() -> None:
    corners = set()
    for i in range(300):
        image, label = read_real([(IMAGE, IMAGE + 1)], 0, (10, 6), SampleKey(0, (i,)))
        y, x = divmod(int(image[0, 0, 0]), 9)
        corners.add((y, x))
        np.testing.assert_array_equal(image[0], IMAGE[y : y + 10, x : x + 6])
        assert label.unique().tolist() == list(range(1, 61)), "contiguous from 1"
    assert corners == {(y, x) for y in range(3) for x in range(4)}
    image.fill_(0)
    assert IMAGE[11, 8] == 107, "a crop never shares memory with the data set"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((IMAGE, LABEL[:, :8]), "one shape"),
        ((IMAGE, LABEL.astype(float)), r"real\[0\] label.*integer type"),
        ((IMAGE, LABEL > 0), "measure.label"),
        ((IMAGE, -LABEL), "down to -10"),
        ((np.stack([IMAGE] * 3), LABEL), r"\[1, Y, X\].*shape \(3, 12, 9\)"),
        ((IMAGE > 3, LABEL), "grey values"),
        (("a.tif", "b.tif"), "array or a tensor"),
        ({"img": IMAGE, "label": LABEL}, r"keys \['img', 'label'\]"),
        (IMAGE, "got ndarray"),
        ((IMAGE[:8], LABEL[:8]), r"real\[0\]: expected at least \(10, 9\) pixels.*got \(8, 9\).*smaller size"),
    ],
)
def test_bad_items_are_named(item: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_real([item], 0, (10, 9), KEY)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.where(VOLUME < 60, UNLABELLED, 1), "whole planes"),
        (np.full(VOLUME.shape, -2), "down to -2"),
        (np.zeros((3, 8, 7), int), r"one shape"),
    ],
)
def test_bad_volumes_are_named(label: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=rf"real\[0\].*{message}"):
        read_real([(VOLUME, label)], 0, (3, 8, 7), KEY)


def test_volumes_far_too_small_are_named() -> None:
    for size in ((19, 8, 7), (9, 17, 7), (2, 2, 15)):
        with pytest.raises(InputError, match=r"at least .*got \(9, 8, 7\)"):
            read_real([(VOLUME, VOLUME)], 0, size, KEY)
    assert read_real([(VOLUME, VOLUME)], 0, (18, 16, 14), KEY)[0].shape == (1, 18, 16, 14)


def test_an_error_of_the_data_set_names_the_item() -> None:
    class Broken:
        def __getitem__(self, index: int) -> None:
            raise OSError("disk")

    with pytest.raises(OSError, match="disk") as caught:
        read_real(Broken(), 5, (4, 4), KEY)
    assert "real[5]" in caught.value.__notes__[0]


def test_relabel_keeps_order_and_background() -> None:
    assert relabel(np.array([[9, 9], [4, 4]])).tolist() == [[2, 2], [1, 1]]
    assert relabel(np.array([[0, 2**40], [3, 0]])).tolist() == [[0, 2], [1, 0]]
    assert relabel(np.zeros((2, 2), np.uint8)).dtype == np.int32
    assert relabel(np.array([-1, 4, -1, 9])).tolist() == [-1, 1, -1, 2]
    assert relabel(np.zeros((0, 2), np.int16)).shape == (0, 2)
