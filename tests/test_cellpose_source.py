"""Streams dealt out as pairs for Cellpose, in order, a batch ahead, and what is refused on the way; without Cellpose."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest
import torch

from synthaug.datasets import cellpose as adapter
from synthaug.datasets.cellpose_draws import Pair
from synthaug.datasets.cellpose_source import StreamSource, areas_as_label
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError, ProducerError
from tests.fakes import FakeCascade, FakeCascade3D

CPU = torch.device("cpu")


def plain(image: np.ndarray, label: np.ndarray) -> Pair:
    assert set(np.unique(label)) - {0} == set(range(1, label.max() + 1)), "labels are contiguous"
    return Pair(image.astype(np.float32), np.stack([label] * 3).astype(np.float32))


def source_of(stream: Any, min_masks: int = 0, **settings: Any) -> StreamSource:
    return StreamSource(stream, settings.pop("make_pair", plain), 2, min_masks, CPU)


def stream_of(cascade: Any = None, **settings: Any) -> SynthDataset:
    return SynthDataset(cascade or FakeCascade(), **({"size": (48, 40), "batch_size": 3, "num_cells": 4} | settings))


@pytest.mark.parametrize("num_batches", [None, 2])
def test_pairs_come_in_the_streams_order_over_its_epochs(num_batches: int | None) -> None:
    stream, same = stream_of(num_batches=num_batches), stream_of()
    source = source_of(stream)
    expected = [batch["image"][i].numpy() for batch, _ in zip(same, range(6)) for i in range(3)]
    for image in expected:
        assert np.array_equal(source.pair().image, image)
    assert (source.shape, source.batch_size) == ((1, 48, 40), 3)
    assert source.wait_seconds > 0
    stream.close()
    same.close()


@pytest.mark.usefixtures("untouched_random_state")
def test_workers_make_the_same_pairs() -> None:
    source, same = source_of(stream_of().loader(num_workers=2)), source_of(stream_of())
    for _ in range(10):
        assert np.array_equal(source.pair().image, same.pair().image)


def test_the_next_batch_is_made_while_the_present_one_is_dealt() -> None:
    made = threading.Semaphore(0)

    def make_pair(image: np.ndarray, label: np.ndarray) -> Pair:
        made.release()
        return plain(image, label)

    source = source_of(stream_of(batch_size=8), make_pair=make_pair)
    for _ in range(16):  # the first batch, and one that nobody asked for
        assert made.acquire(timeout=60)
    source.pair()
    assert not made.acquire(timeout=0.3), "one batch ahead, not two"


def test_a_closed_source_says_so_instead_of_waiting_for_ever() -> None:
    source = source_of(stream_of())
    source.close()
    assert not source._thread._thread.is_alive()
    with pytest.raises(InputError, match=r"got one closed\. Call cellpose_data once more"):
        [source.pair() for _ in range(100)]


def test_what_cellpose_sees_of_all_cells_has_their_median_area() -> None:
    source = source_of(stream_of())
    shown = np.unique(source.areas, return_counts=True)[1][1:]
    frames = [batch["label"][i].numpy() for batch, _ in zip(stream_of(), range(3)) for i in range(3)]
    areas = np.concatenate([np.unique(frame, return_counts=True)[1][1:] for frame in frames])
    assert len(shown) >= 1000
    assert np.median(shown) == np.median(areas)
    assert set(shown) == set(areas)
    assert areas_as_label(np.array([], np.int64)).tolist() == [[0]]


def test_a_fault_of_the_producer_comes_up_where_the_next_pair_is_taken() -> None:
    source = source_of(stream_of(FakeCascade(fail_at=20), max_reuse=1, num_lanes=1))
    with pytest.raises(ProducerError) as caught:
        [source.pair() for _ in range(1000)]
    assert isinstance(caught.value.__cause__, ArithmeticError)


def emptied(*numbers: int) -> Any:
    """A transform that takes the cells of samples number n out of their labels."""
    calls = itertools.count()
    return lambda s: {**s, "label": torch.zeros_like(s["label"])} if next(calls) in numbers else s


def test_an_empty_frame_late_in_the_stream_comes_up_late_where_none_is_allowed() -> None:
    source = source_of(stream_of(transform=emptied(30)), min_masks=1)
    for _ in range(30):
        source.pair()
    with pytest.raises(
        InputError, match=r"synthetic sample 0 of batch 10: expected at least min_masks=1 .* got 0\. Raise"
    ):
        source.pair()


def test_min_masks_is_a_bound() -> None:
    with pytest.raises(
        InputError, match=r"at least min_masks=5 cells, got [0-4]\. Raise num_cells.*a smaller min_masks"
    ):
        source_of(stream_of(num_cells=4), min_masks=5)
    real = [(np.ones((48, 40)), np.zeros((48, 40), int))]
    with pytest.raises(InputError, match=r"real sample . of batch 0: expected at least min_masks=1"):
        source_of(stream_of(num_cells=9, real=real, synthetic_ratio=0.5), min_masks=1)


def test_single_empty_frames_are_pairs_like_others() -> None:
    source = source_of(stream_of(transform=emptied(*range(0, 200, 2))))
    assert [bool(source.pair().target.any()) for _ in range(40)] == [False, True] * 20


def test_frames_are_looked_at_until_there_is_a_cell_to_measure() -> None:
    source = source_of(stream_of(transform=emptied(*range(20))))
    assert source.areas.max() >= 1000
    assert [bool(source.pair().target.any()) for _ in range(22)] == [False] * 20 + [True] * 2


@pytest.mark.parametrize("real", [False, True], ids=["synthetic", "real"])
def test_nothing_but_empty_frames_is_an_error_that_says_what_to_change(real: bool) -> None:
    settings: dict[str, Any] = {"num_cells": 0}
    if real:
        settings = {"real": [(np.ones((48, 40)), np.zeros((48, 40), int))], "synthetic_ratio": 0.5}
    kind = "real" if real else "synthetic"
    message = rf"{kind} samples up to batch \d+: expected cells in some of them, got 33 in a row without any\. Raise num_cells"
    with pytest.raises(InputError, match=message):
        [source.pair() for source in [source_of(stream_of(**settings))] for _ in range(100)]


def test_volumes_are_refused_and_planes_of_them_taken() -> None:
    stream = stream_of(FakeCascade3D(), size=(12, 48, 40))
    with pytest.raises(InputError, match=r"\[B, C, Y, X\].*\(3, 1, 12, 48, 40\).*take a plane of every volume"):
        source_of(stream)
    stream.close()
    planes = stream_of(
        FakeCascade3D(), size=(12, 48, 40), transform=lambda s: {k: v[:, 6] for k, v in s.items()}, num_cells=30
    )
    assert source_of(planes).shape == (1, 48, 40)
    planes.close()


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda s: {**s, "label": s["label"] - 1}, "whole numbers >= 0, got .* labels from -1"),
        (lambda s: {**s, "label": s["label"] + 0.5}, "whole numbers >= 0"),
        (lambda s: {**s, "image": s["image"] * torch.nan}, "finite grey values"),
        (lambda s: {**s, "image": s["image"].expand(3, -1, -1)}, r"at most 2 channels .* got \(3, 48, 40\)"),
        (lambda s: {**s, "image": s["image"][:, 1:]}, "of one size"),
    ],
    ids=["negative", "fractions", "nan", "channels", "size"],
)
def test_a_transform_that_makes_no_pairs_is_told_what_is_wrong(transform: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        source_of(stream_of(transform=transform))


def test_labels_without_background_and_with_gaps_are_cells_all_the_same() -> None:
    def fill(sample: dict[str, Any]) -> dict[str, Any]:
        label = torch.full_like(sample["label"], 7)
        label[:, :3] = 3
        return {**sample, "label": label}

    pair = source_of(stream_of(transform=fill)).pair()
    assert np.unique(pair.target).tolist() == [1, 2]


def test_normalised_to_the_1st_and_99th_percentile() -> None:
    image = np.arange(2 * 50 * 60).reshape(2, 50, 60).astype(np.uint16)
    image[1] = 5
    before = image.copy()
    out = adapter.normalise(image)
    assert out.dtype == np.float32
    assert np.array_equal(image, before)
    assert np.percentile(out[0], (1, 99)) == pytest.approx((0, 1), abs=1e-6)
    assert (np.diff(out[0].ravel()) > 0).all(), "nothing is cut off"
    assert out[0].max() > 1
    assert not out[1].any()


@pytest.mark.parametrize("version", [None, "2.3.2", "3.0.11", "5.0.1"])
def test_without_a_cellpose_that_fits_the_remedy_names_the_extras(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> str:
        if version is None:
            raise adapter.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(adapter.importlib.metadata, "version", find)
    with pytest.raises(
        InputError, match=r'got (none|2.3.2|3.0.11|5.0.1). pip install "synthaug\[cellpose\]".*cellpose3'
    ):
        adapter.cellpose_data(stream_of())
