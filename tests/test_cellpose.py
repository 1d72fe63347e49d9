"""`cellpose_data` in Cellpose's own `train_seg`. `make test` runs this in an environment of each major version.

In an environment without Cellpose all of it is skipped. Where CELLPOSE names a version, that one has to be there.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if "CELLPOSE" not in os.environ:
    pytest.importorskip(
        "cellpose", reason="Cellpose is not installed here; make test runs this in environments of their own"
    )

from synthaug.datasets.cellpose import NUM_CHANNELS, cellpose_data, flows, normalise
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError, ProducerError
from synthaug.randomness import SampleKey
from tests.cellpose_nets import MAJOR, tiny_net, train
from tests.fakes import FakeCascade

SIZE = (64, 72)


def discs(seed: int, size: tuple[int, int], num: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """A noisy frame of discs with gaps between their numbers, uint16 and int64."""
    rng = SampleKey(seed, ("discs",)).numpy()
    y, x = np.mgrid[: size[0], : size[1]]
    label = np.zeros(size, np.int64)
    for number in range(1, num + 1):
        centre, radius = rng.uniform((8, 8), np.array(size) - 8), rng.uniform(4, 8)
        label[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = 3 * number
    return (200 + 300 * (label > 0) + rng.normal(0, 20, size)).astype(np.uint16), label


def show_cells(sample: dict[str, Any]) -> dict[str, Any]:
    """An image that says which pixels are cells, and a pixel that tells frames apart."""
    label = sample["label"]
    image = (label > 0).float()
    image[0, 0, 0] = 10 + sample["image"].mean()
    return {"image": image, "label": label}


def stream_of(cascade: Any = None, **settings: Any) -> SynthDataset:
    return SynthDataset(cascade or FakeCascade(), **({"size": SIZE, "batch_size": 4, "num_cells": (5, 8)} | settings))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (image, target) that train_seg has trained on so far, behind its own selection of a batch."""
    import cellpose.train

    seen: list[tuple[np.ndarray, np.ndarray]] = []
    original = cellpose.train._get_batch

    def get_batch(*args: Any, **kwargs: Any) -> Any:
        images, targets = original(*args, **kwargs)
        seen.extend(zip(copy.deepcopy(images), copy.deepcopy(targets)))
        return images, targets

    monkeypatch.setattr(cellpose.train, "_get_batch", get_batch)
    return seen


def check_aligned_and_distinct(drawn: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for image, target in drawn:
        assert (image.shape, target.shape) == ((NUM_CHANNELS[MAJOR], *SIZE), (3, *SIZE))
        assert image.dtype == target.dtype == np.float32
        assert not image[1:].any()
        cells = image[0] > image[0].min()
        cells[0, 0] = target[0, 0, 0]
        assert np.array_equal(cells, target[0] == 1), "image and label are of two pairs"
        assert not target[1:, target[0] == 0].any(), "flows outside of cells"
        assert np.linalg.norm(target[1:], axis=0)[target[0] == 1].mean() > 0.9
    assert len({image.tobytes() for image, _ in drawn}) == len(drawn), "a pair came twice"


def test_the_version_is_the_one_this_environment_is_made_for() -> None:
    version = importlib.metadata.version("cellpose")
    assert version == os.environ.get("CELLPOSE", version)


@pytest.mark.parametrize(
    ("num_slots", "nimg_per_epoch", "expected"),
    [(8, None, 104), (4, 12, 108), (30, 12, 108)],
    ids=["each slot once an epoch", "slots repeated in a batch", "some slots"],
)
def test_every_draw_of_train_seg_is_a_fresh_pair(
    drawn: list[Any], tmp_path: Path, num_slots: int, nimg_per_epoch: int | None, expected: int
) -> None:
    images, labels = cellpose_data(stream_of(transform=show_cells), num_slots=num_slots)
    losses = train(
        tiny_net(), images, labels, tmp_path, n_epochs=expected // (nimg_per_epoch or 8), nimg_per_epoch=nimg_per_epoch
    )
    assert len(drawn) == expected
    check_aligned_and_distinct(drawn)
    assert losses[-1] < 0.9 * losses[0]


def test_steps_have_the_streams_mix_and_order_whatever_numpys_global_state(drawn: list[Any], tmp_path: Path) -> None:
    real = [discs(seed, (80, 90)) for seed in range(3)]
    settings: dict[str, Any] = {"real": real, "synthetic_ratio": 0.5}
    images, labels = cellpose_data(stream_of(**settings))
    assert len(images) == len(labels) == 8 * 4
    np.random.seed(7)  # noqa: NPY002
    train(tiny_net(), images, labels, tmp_path, n_epochs=2)
    expected = [batch for batch, _ in zip(stream_of(**settings), range(16))]
    assert all(batch["synthetic"].sum() == 2 for batch in expected)
    frames = [image.numpy() for batch in expected for image in batch["image"]]
    assert len(drawn) == len(frames)
    for (image, _), frame in zip(drawn, frames):
        assert np.array_equal(image[:1], normalise(frame))


@pytest.mark.usefixtures("untouched_random_state")
def test_drawing_leaves_the_global_random_state_alone() -> None:
    images, labels = cellpose_data(stream_of())
    kept = [labels[n].astype(np.float32) for n in range(2)]
    assert images[1].shape[1:] == kept[1][1:].shape[1:] == SIZE


@pytest.mark.parametrize("nimg_per_epoch", [None, 9])
def test_ratio_0_trains_as_plain_lists_do(tmp_path: Path, nimg_per_epoch: int | None) -> None:
    pairs = [discs(seed, (70 + seed, 80)) for seed in range(5)] + [discs(9, (70, 80), num=2)]
    plain = [image for image, _ in pairs], [label.copy() for _, label in pairs]
    settings: dict[str, Any] = {"n_epochs": 6, "batch_size": 2, "nimg_per_epoch": nimg_per_epoch}
    habits = {"channels": [0, 0]} if MAJOR == 3 else {}
    expected = train(tiny_net(), *plain, tmp_path, normalize=True, **habits, **settings)
    stream = stream_of(real=pairs, synthetic_ratio=0, batch_size=2)
    assert train(tiny_net(), *cellpose_data(stream), tmp_path, **settings) == expected
    assert len(set(expected)) == 6


def test_ratio_0_has_a_slot_for_every_real_sample() -> None:
    pairs = [
        {"image": torch.tensor(image.astype(float))[None], "label": label} for image, label in [discs(0, SIZE)] * 2
    ]
    stream = stream_of(real=pairs, synthetic_ratio=0)
    images, labels = cellpose_data(stream, num_slots=2)
    assert isinstance(images, list)
    assert len(images) == len(labels) == 2
    assert np.unique(labels[0][0]).tolist() == list(range(len(np.unique(pairs[0]["label"]))))
    with pytest.raises(InputError, match=r"num_slots: expected 2 or None at synthetic_ratio=0, .*nimg_per_epoch"):
        cellpose_data(stream, num_slots=3)


def test_flows_are_cellposes_and_the_label_stays_as_it_was() -> None:
    from cellpose.dynamics import labels_to_flows

    label = np.unique(discs(3, SIZE)[1], return_inverse=True)[1].reshape(SIZE).astype(np.int32)
    label[0, :2] = (label.max() + 1, label.max() + 2)  # cells of one pixel
    for frame in (label, np.ones((9, 12), np.int32)):
        before = frame.copy()
        expected = labels_to_flows([frame.copy()], device=torch.device("cpu"))[0]
        assert np.array_equal(flows(frame), expected[2:])
        assert np.array_equal(frame, before)
    for pixels in (0, 1):  # Cellpose 4.0 fails on a single pixel
        few = np.zeros(SIZE, np.int32)
        few[3, 3] = pixels
        assert not flows(few).any()


def test_normalisation_is_cellposes() -> None:
    from cellpose.transforms import normalize_img

    image = np.stack([discs(0, SIZE)[0], np.zeros(SIZE, np.uint16)]).astype(np.float32)
    assert np.array_equal(normalise(image), normalize_img(image.copy(), axis=0))


def test_training_from_a_weights_file_goes_on_where_the_file_was_left(drawn: list[Any], tmp_path: Path) -> None:
    net = tiny_net()
    train(net, *cellpose_data(stream_of(), num_slots=4), tmp_path, n_epochs=12)
    file = tmp_path / "models" / "model"
    if MAJOR == 3:
        again = tiny_net(seed=1)
        again.load_model(file, device=torch.device("cpu"))
    else:
        again = tiny_net(seed=1)
        again.load_state_dict(torch.load(file, weights_only=True))
    same = [torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters())]
    assert all(same)
    before = len(drawn)
    first, *_ = train(again, *cellpose_data(stream_of(seed=1), num_slots=4), tmp_path, n_epochs=2)
    fresh, *_ = train(tiny_net(seed=1), *cellpose_data(stream_of(seed=1), num_slots=4), tmp_path, n_epochs=2)
    assert len(drawn) == before + 16
    assert first < fresh, "the rate of the first epoch is 0, so these are the losses of the weights as loaded"


def test_min_train_masks_freezes_nothing(drawn: list[Any], tmp_path: Path) -> None:
    images, labels = cellpose_data(stream_of(transform=show_cells), num_slots=8)
    train(tiny_net(), images, labels, tmp_path, min_train_masks=20, n_epochs=4)
    assert len(drawn) == 32
    check_aligned_and_distinct(drawn)


@pytest.mark.parametrize(
    "setting",
    [{"normalize": True}, {"normalize": {"percentile": [1, 99]}}] + ([{"channels": [0, 0]}] if MAJOR == 3 else []),
    ids=str,
)
def test_whatever_would_freeze_the_images_is_refused_with_the_remedy(tmp_path: Path, setting: dict[str, Any]) -> None:
    images, labels = cellpose_data(stream_of(), num_slots=4)
    with pytest.raises(InputError, match="Pass normalize=False to train_seg, and no channels"):
        train(tiny_net(), images, labels, tmp_path, **setting)


def test_a_frozen_copy_of_the_images_is_noticed(tmp_path: Path) -> None:
    images, labels = cellpose_data(stream_of(), num_slots=4)
    with pytest.raises(InputError, match="copied into a list"):
        train(tiny_net(), [images[i] for i in range(4)], labels, tmp_path)


def test_a_fault_of_the_producer_comes_up_in_train_seg(drawn: list[Any], tmp_path: Path) -> None:
    stream = stream_of(FakeCascade(fail_at=60), max_reuse=1, num_lanes=1)
    images, labels = cellpose_data(stream, num_slots=8)
    with pytest.raises(ProducerError) as caught:
        train(tiny_net(), images, labels, tmp_path, n_epochs=100)
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert len(drawn) > 8


def test_an_empty_mask_comes_up_in_train_seg(drawn: list[Any], tmp_path: Path) -> None:
    calls = iter(range(1000))

    def empty_the_41st(sample: dict[str, Any]) -> dict[str, Any]:
        return sample if next(calls) != 40 else {**sample, "label": torch.zeros_like(sample["label"])}

    images, labels = cellpose_data(stream_of(transform=empty_the_41st), num_slots=8, min_masks=1)
    with pytest.raises(InputError, match="synthetic sample 0 of batch 10: expected at least min_masks=1 cells, got 0"):
        train(tiny_net(), images, labels, tmp_path, n_epochs=100)
    assert len(drawn) == 40


def test_masks_that_are_all_empty_come_up_in_train_seg(drawn: list[Any], tmp_path: Path) -> None:
    calls = iter(range(1000))

    def empty_from_the_41st(sample: dict[str, Any]) -> dict[str, Any]:
        return sample if next(calls) < 40 else {**sample, "label": torch.zeros_like(sample["label"])}

    images, labels = cellpose_data(stream_of(transform=empty_from_the_41st), num_slots=8)
    with pytest.raises(InputError, match=r"synthetic samples up to batch 18: .* got 33 in a row without any"):
        train(tiny_net(), images, labels, tmp_path, n_epochs=100)
    assert len(drawn) == 72


def test_empty_masks_among_others_are_trained_on(drawn: list[Any], tmp_path: Path) -> None:
    images, labels = cellpose_data(stream_of(num_cells=(0, 1)), num_slots=8)
    losses = train(tiny_net(), images, labels, tmp_path)
    assert {bool(target.any()) for _, target in drawn} == {True, False}
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_slots": 0}, "num_slots: expected a whole number >= 1, got 0"),
        ({"min_masks": -1}, "min_masks: expected a whole number >= 0"),
        ({"num_channels": 1.5}, "num_channels: expected a whole number"),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cellpose_data(stream_of(), **arguments)


def test_only_a_stream_is_taken() -> None:
    with pytest.raises(InputError, match="stream: expected a SynthDataset or its loader"):
        cellpose_data([discs(0, SIZE)])  # type: ignore[arg-type]


def test_images_have_as_many_channels_as_asked_for() -> None:
    images, _ = cellpose_data(stream_of(), num_channels=5)
    assert images[0].shape == (5, *SIZE)


def test_cellpose_and_the_networks_of_a_cascade_can_be_imported_after_the_adapter() -> None:
    """On a machine without CUDA the registry's torchvision, which both import, cannot without the declared operators."""
    code = "from synthaug import cellpose_data; import cellpose.train; from diffusers import UNet2DModel"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
