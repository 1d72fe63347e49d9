"""CPnet as the segmenter that judges training data: built, trained and asked for instances, with Cellpose 3."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import save_file

if "CELLPOSE" not in os.environ:
    pytest.importorskip(
        "cellpose", reason="Cellpose is not installed here; make test runs this in environments of their own"
    )

from synthaug.datasets.synth import SynthDataset
from synthaug.errors import CheckpointError, InputError, ProducerError
from synthaug.evaluation import cellpose_segmenter
from synthaug.evaluation.cellpose_segmenter import build_cpnet, predict_cellpose, train_cellpose
from synthaug.evaluation.experiment import ExperimentConfig, run_experiment
from synthaug.evaluation.metrics import segmentation_scores
from synthaug.randomness import SampleKey
from tests.cellpose_nets import MAJOR
from tests.fakes import FakeCascade

TINY = (2, 8, 16)  # for a few steps; cells of 30 pixels are beyond its field of view
needs_cellpose_3 = pytest.mark.skipif(MAJOR != 3, reason="CPnet belongs to Cellpose 3")


def discs(seed: int, size: int = 96, num: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """A noisy frame of bright discs that do not touch."""
    rng = SampleKey(seed, ("segmenter discs",)).numpy()
    y, x = np.mgrid[:size, :size]
    label = np.zeros((size, size), np.int32)
    places = rng.permutation(9)[:num]
    for number, place in enumerate(places, 1):
        centre = np.array(divmod(place, 3)) * 30 + 18 + rng.uniform(-4, 4, 2)
        label[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < rng.uniform(7, 10) ** 2] = number
    return (200 + 300 * (label > 0) + rng.normal(0, 20, label.shape)).astype(np.float32), label


@pytest.mark.skipif(MAJOR != 4, reason="what Cellpose 4 says")
def test_cellpose_4_is_told_that_cpnet_needs_3() -> None:
    with pytest.raises(InputError, match=r"got version 4\. .*synthaug\[cellpose3\]"):
        build_cpnet(TINY)


@needs_cellpose_3
@pytest.mark.usefixtures("untouched_random_state")
def test_the_seed_decides_the_weights() -> None:
    one, same, other = build_cpnet(TINY, seed=1), build_cpnet(TINY, seed=1), build_cpnet(TINY, seed=2)
    x = torch.linspace(0, 1, 2 * 32 * 32).reshape(1, 2, 32, 32)
    assert one(x)[0].shape == (1, 3, 32, 32)
    assert torch.equal(one(x)[0], same(x)[0])
    assert not torch.allclose(one(x)[0], other(x)[0])


@needs_cellpose_3
def test_weights_are_drawn_from_pytorchs_default_distribution() -> None:
    from cellpose.resnet_torch import CPnet

    with torch.random.fork_rng(devices=[]):
        theirs = dict(CPnet([2, 16, 32], 3, sz=3).named_parameters())
    ours = dict(build_cpnet((2, 16, 32)).named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.shape == theirs[name].shape
        if parameter.numel() > 500:
            assert float(parameter.std()) == pytest.approx(float(theirs[name].std()), rel=0.15)
            assert float(parameter.abs().max()) == pytest.approx(float(theirs[name].abs().max()), rel=0.05)


@needs_cellpose_3
def test_a_trained_network_finds_the_cells_of_new_images() -> None:
    lines: list[str] = []
    pairs = [discs(seed) for seed in range(6)]
    model, report = train_cellpose(pairs, 60, batch_size=4, nbase=(2, 8, 16, 32), bsize=112, log=lines.append)
    assert (report.steps, report.samples, len(report.losses)) == (60, 240, 60)
    assert report.wait_seconds == 0 < report.seconds
    assert np.mean(report.losses[-10:]) < 0.5 * np.mean(report.losses[:10])
    assert lines[0].startswith("step 1 of 60, loss ")
    assert len(lines) == 6, "Cellpose has a line for every tenth epoch"
    truth = [discs(seed) for seed in (100, 101)]
    found = [predict_cellpose(model, image) for image, _ in truth]
    assert all(labels.dtype == np.int32 and labels.max() == len(np.unique(labels)) - 1 for labels in found)
    assert segmentation_scores(found, [label for _, label in truth]).ap[0] > 0.8


@needs_cellpose_3
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_training_on_a_stream_takes_its_frames_in_order_and_repeats_itself(ratio: float) -> None:
    def stream() -> SynthDataset:
        settings: dict[str, Any] = {"size": (48, 48), "batch_size": 4, "num_cells": (5, 7), "synthetic_ratio": ratio}
        return SynthDataset(FakeCascade(), real=[discs(0), discs(1)], **settings)

    runs = [train_cellpose(stream(), 12, batch_size=4, nbase=TINY, bsize=64)[1] for _ in range(2)]
    assert runs[0].losses == runs[1].losses
    assert len(set(runs[0].losses)) == 12
    assert 0 < runs[0].first_wait_seconds <= runs[0].seconds
    assert 0 < runs[0].wait_seconds <= runs[0].seconds


@needs_cellpose_3
def test_a_stream_without_synthetic_samples_trains_as_its_pairs_do() -> None:
    pairs = [discs(seed, num=3) for seed in range(3)]  # fewer cells than Cellpose keeps by default
    stream = SynthDataset(FakeCascade(), size=(48, 48), batch_size=2, real=pairs, synthetic_ratio=0)
    settings: dict[str, Any] = {"batch_size": 2, "nbase": TINY, "bsize": 64}
    assert train_cellpose(stream, 4, **settings)[1].losses == train_cellpose(pairs, 4, **settings)[1].losses


@needs_cellpose_3
def test_the_experiment_trains_cellpose_as_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, seeds in (("real", (0, 1)), ("held-out", (7,))):
        for kind, i in (("images", 0), ("labels", 1)):
            (tmp_path / part / kind).mkdir(parents=True)
            for seed in seeds:
                tifffile.imwrite(tmp_path / part / kind / f"{seed}.tif", discs(seed)[i].astype(np.uint16))
    told: list[dict[str, Any]] = []
    train = cellpose_segmenter.train_cellpose
    monkeypatch.setattr(
        cellpose_segmenter, "train_cellpose", lambda *a, **settings: told.append(settings) or train(*a, **settings)
    )
    config = ExperimentConfig(
        arms=("real",),
        num_patches=(None,),
        seeds=1,
        segmenter="cellpose",
        nbase=TINY,
        steps=3,
        batch_size=2,
        size=(96, 96),
        crop=(64, 56),
    )
    (result,) = run_experiment(
        tmp_path / "real", tmp_path / "held-out", tmp_path / "out", config, log=lambda line: None
    )
    assert [(told[0]["nbase"], told[0]["batch_size"], told[0]["bsize"])] == [(TINY, 2, 64)]
    assert len(result["loss"]) == 3
    assert (result["num_truth"], result["num_cells"]) == (9, 18)
    assert 0 <= result["seg"] <= 1


@needs_cellpose_3
@pytest.mark.parametrize("kind", ["cellpose", "safetensors"])
def test_weights_of_a_file_are_the_start(tmp_path: Path, kind: str) -> None:
    pairs = [discs(0)]
    model, _ = train_cellpose(pairs, 12, batch_size=2, nbase=TINY, bsize=64, seed=3)
    file = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights")
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    else:
        model.save_model(file)  # type: ignore[operator]
    again = build_cpnet(TINY, pretrained=file)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    diameters = 2 * np.sqrt(np.bincount(pairs[0][1].ravel())[1:] / np.pi)
    assert float(again.diam_labels) == pytest.approx(np.median(diameters), rel=1e-5)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"weights of a CPnet \(2, 8\).*Pass the nbase"):
        build_cpnet((2, 8), pretrained=file)
    with pytest.raises(CheckpointError, match="nothing there"):
        build_cpnet(TINY, pretrained=tmp_path / "absent.pth")


@needs_cellpose_3
def test_a_fault_of_the_stream_ends_the_training() -> None:
    stream = SynthDataset(FakeCascade(fail_at=40), size=(48, 48), batch_size=4, num_cells=5, max_reuse=1, num_lanes=1)
    with pytest.raises(ProducerError):
        train_cellpose(stream, 100, batch_size=4, nbase=TINY, bsize=48)


@needs_cellpose_3
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number >= 1"),
        ({"batch_size": 0}, "batch_size: expected a whole number >= 1"),
        ({"nbase": (16, 32)}, "nbase: expected the input's 2 channels"),
        ({"data": []}, "data: expected a stream, or at least one pair"),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_cellpose(**({"data": [discs(0)], "steps": 1, "nbase": TINY} | arguments))


@needs_cellpose_3
def test_only_an_image_is_segmented() -> None:
    for image in (np.zeros((3, 9, 9)), np.full((9, 9), np.nan)):
        with pytest.raises(InputError, match=r"image: expected finite grey values \[Y, X\]"):
            predict_cellpose(build_cpnet(TINY), image)
