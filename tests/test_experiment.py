"""The experiment in miniature: arms, budgets, resumption, refusals, and that nothing more is seen than was granted."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from matplotlib.figure import Figure

from synthaug import cli
from synthaug.errors import CheckpointError, InputError
from synthaug.evaluation import experiment_run as module
from synthaug.evaluation.annotations import choose_patches
from synthaug.evaluation.experiment import ExperimentConfig, run_experiment
from synthaug.evaluation.experiment_config import ARMS
from synthaug.evaluation.experiment_report import LOOKS, draw_scores, gain, markdown, summary
from synthaug.hub import find_cascade
from tests.shapes import ellipse_frame, ellipsoid_volume

SMALL: dict[str, Any] = {"size": (96, 96), "crop": (64, 64), "steps": 2, "batch_size": 2, "seeds": 1, "max_reuse": 500}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(folder: Path, pairs: list[Any]) -> Path:
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i, (image, labels) in enumerate(pairs):
        tifffile.imwrite(folder / "images" / f"{i}.tif", image.astype(np.uint16))
        tifffile.imwrite(folder / "labels" / f"{i}.tif", labels.astype(np.uint16))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frames")
    write(root / "real", [ellipse_frame(seed, (128, 128)) for seed in range(4)])
    write(root / "test", [ellipse_frame(seed, (100, 110)) for seed in range(8, 11)])
    return root


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("volumes")
    write(root / "real", [ellipsoid_volume(seed) for seed in range(2)])
    write(root / "test", [ellipsoid_volume(5)])
    return root


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Fits are replaced by copies of embedded cascades; what they were asked for is returned."""
    asked: list[dict[str, Any]] = []

    def fit(pairs: Any, out: Path, **settings: Any) -> None:
        asked.append({"pairs": pairs, "out": out, **settings})
        shutil.copytree(find_cascade("nuclei-2d" if pairs[0][0].ndim == 2 else "nuclei-3d"), out)

    monkeypatch.setattr(module.training, "fit", fit)
    return asked


def test_all_arms_of_frames(data: Path, tmp_path: Path, fits: list[dict[str, Any]]) -> None:
    arms = ("real", "real+copy-paste", "synthetic", "both")
    config = ExperimentConfig(arms=arms, num_patches=(1,), **SMALL)
    results = run_experiment(data / "real", data / "test", tmp_path / "out", config, log=lambda line: None)
    assert [r["arm"] for r in results] == list(arms)
    granted = choose_patches(
        module.Task(str(data / "real"), "", "", config, "cpu").pairs(str(data / "real")), 1, (96, 96), 0
    )
    assert len(fits) == 1, "one cascade serves the arms of a budget and seed"
    for one, two in zip(fits[0]["pairs"], granted, strict=True):
        assert np.array_equal(one[0], two[0]), "the cascade sees the annotations of the real arm"
        assert np.array_equal(one[1], two[1])
    shares = {r["arm"]: r["synthetic"] / (r["synthetic"] + r["real"]) for r in results}
    mixed = 0.75  # floor(4 * 15 / 16) samples
    assert shares == {"real": 0, "real+copy-paste": mixed, "synthetic": 1, "both": mixed}
    for r in results:
        assert r["synthetic"] + r["real"] == 4, "two steps of two samples for every arm"
        assert 0 <= r["seg"] <= 1
        assert r["num_truth"] == sum(int(ellipse_frame(seed, (100, 110))[1].max()) for seed in range(8, 11))
        assert len(r["loss"]) == 2
        assert (tmp_path / "out" / "runs" / f"{r['arm']}-1-0.safetensors").is_file()


def test_the_share_of_synthetic_samples() -> None:
    assert [ExperimentConfig().ratio_of(num) for num in (2, 8, 64, None)] == [0.9375, 0.875, 0.5, 0.125]
    assert {ExperimentConfig(ratio=0.3).ratio_of(num) for num in (1, 4, None)} == {0.3}


def test_it_goes_on_where_it_was(data: Path, tmp_path: Path, fits: list[dict[str, Any]], monkeypatch: Any) -> None:
    config = ExperimentConfig(arms=("real",), num_patches=(1,), **SMALL)
    first = run_experiment(data / "real", data / "test", tmp_path / "out", config, log=lambda line: None)
    trained = []
    learn = module._learn
    monkeypatch.setattr(module, "_learn", lambda task, run, *rest: trained.append(run.name) or learn(task, run, *rest))
    more = ExperimentConfig(arms=("real", "synthetic"), num_patches=(1, 2), **SMALL)
    second = run_experiment(data / "real", data / "test", tmp_path / "out", more, log=lambda line: None)
    assert trained == ["real-2-0", "synthetic-1-0", "synthetic-2-0"]
    assert second[0] == first[0]
    assert len(second) == 4
    other = ExperimentConfig(arms=("real",), num_patches=(1,), **{**SMALL, "steps": 3})
    with pytest.raises(CheckpointError, match="steps 2"):
        run_experiment(data / "real", data / "test", tmp_path / "out", other, log=lambda line: None)


def test_another_data_set_is_mixed_in(data: Path, tmp_path: Path, fits: list[dict[str, Any]]) -> None:
    also = tmp_path / "also"
    write(also, [ellipse_frame(20 + seed, (120, 120)) for seed in range(4)])
    config = ExperimentConfig(arms=("real", "both"), num_patches=(2,), also=str(also), **SMALL)
    task = module.Task(str(data / "real"), str(data / "test"), "", config, "cpu")
    granted = task.annotated(2, 0)
    shapes = [image.shape for image, _ in task.trained_on(granted)]
    assert shapes == [(120, 120)] * 4 + [(96, 96)] * 4, "half of what is drawn are the annotations granted"
    results = run_experiment(data / "real", data / "test", tmp_path / "out", config, log=lambda line: None)
    assert [len(asked["pairs"]) for asked in fits] == [2], "the cascade sees the annotations granted alone"
    assert [r["num_cells"] for r in results] == [sum(int(labels.max()) for _, labels in granted)] * 2
    alone = ExperimentConfig(arms=("real",), num_patches=(2,), **SMALL)
    without = run_experiment(data / "real", data / "test", tmp_path / "alone", alone, log=lambda line: None)
    assert without[0]["loss"] != results[0]["loss"]
    with pytest.raises(InputError, match="frames"):
        ExperimentConfig(arms=("real",), also=str(also), size=(16, 48, 48), crop=(48, 48))


def test_the_same_run_twice_and_side_by_side(data: Path, tmp_path: Path) -> None:
    config = ExperimentConfig(arms=("real",), num_patches=(1, 2), **SMALL)
    runs = [
        run_experiment(data / "real", data / "test", tmp_path / f"jobs{jobs}", config, jobs=jobs, log=lambda line: None)
        for jobs in (1, 2)
    ]
    for one, two in zip(*runs, strict=True):
        for name in ("arm", "budget", "seg", "ap", "loss"):
            assert one[name] == two[name]


def test_arms_of_volumes(volumes: Path, tmp_path: Path, fits: list[dict[str, Any]]) -> None:
    settings = {**SMALL, "size": (16, 48, 48), "crop": (48, 48), "min_area": 50}
    config = ExperimentConfig(
        arms=("real", "real-2d", "real-dense", "synthetic"), num_patches=(1,), voxel_size_um=(1.9, 0.8, 0.8), **settings
    )
    results = run_experiment(volumes / "real", volumes / "test", tmp_path / "out", config, log=lambda line: None)
    assert [r["arm"] for r in results] == ["real", "real-2d", "real-dense", "synthetic"]
    (asked,) = fits
    ((_, labels),) = asked["pairs"]
    assert (labels >= 0).all((1, 2)).sum() == 1, "one annotated plane"
    assert asked["voxel_size_um"] == (1.9, 0.8, 0.8)
    assert [r["num_planes"] for r in results] == [1, 1, 24, 1]
    assert results[0]["num_cells"] == results[1]["num_cells"] <= results[2]["num_cells"]


def test_pretrained_weights_are_scored_and_gone_on_with(data: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "steps": 1}
    config = ExperimentConfig(arms=("real",), num_patches=(1,), **settings)
    run_experiment(data / "real", data / "test", tmp_path / "first", config, log=lambda line: None)
    weights = tmp_path / "first" / "runs" / "real-1-0.safetensors"
    config = ExperimentConfig(arms=("none", "real"), num_patches=(1,), pretrained=str(weights), **settings)
    none, real = run_experiment(data / "real", data / "test", tmp_path / "second", config, log=lambda line: None)
    first = json.loads((tmp_path / "first" / "runs" / "real-1-0.json").read_text())
    assert none["seg"] == first["seg"], "not trained any further"
    assert none["loss"] == []
    assert real["loss"][0] != first["loss"][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": ("imaginary",)}, "some of none, real"),
        ({"segmenter": "stardist"}, "one of"),
        ({"real_cells": 1.5}, "a share in"),
        ({"prior": "cubes"}, "one of"),
        ({"without": ("luck",)}, "some of multiview"),
        ({"without": ("multiview",)}, "3D only"),
        ({"arms": ("real-2d",)}, "arms of frames"),
        ({"arms": ("none",)}, "pretrained"),
        ({"arms": ("real+copy-paste",), "size": (16, 64, 64), "crop": (64, 64)}, "Leave them out"),
        ({"crop": (60, 60)}, "multiples of 8"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExperimentConfig(**settings)


def test_synthetic_frames_hold_annotated_cells_unless_that_is_declined() -> None:
    assert ExperimentConfig(real_cells=0.0).share_of_real_cells == 0
    assert ExperimentConfig(arms=("both",), size=(16, 64, 64), crop=(64, 64)).share_of_real_cells == 0
    assert 0 < ExperimentConfig().share_of_real_cells < 1


def test_frames_where_volumes_are_asked_for(data: Path, tmp_path: Path) -> None:
    config = ExperimentConfig(arms=("real",), **{**SMALL, "size": (16, 48, 48), "crop": (48, 48)})
    with pytest.raises(InputError, match="2 numbers"):
        run_experiment(data / "real", data / "test", tmp_path / "out", config, log=lambda line: None)


def test_tables_and_differences() -> None:
    results = [
        {"arm": arm, "budget": budget, "seed": seed, "seg": value + 0.1 * seed}
        for arm, budget, value in (("real", "1", 0.5), ("both", "1", 0.6), ("real", "all", 0.7), ("real", "16", 0.65))
        for seed in range(2)
    ]
    mean, spread, number = summary(results)["both", "1"]
    assert (mean, number) == (pytest.approx(0.65), 2)
    assert spread == pytest.approx(0.1 / np.sqrt(2))
    ((budget, (difference, sd)),) = gain(results, "both", "real").items()
    assert (budget, difference, sd) == ("1", pytest.approx(0.1), pytest.approx(0))
    lines = markdown(results).splitlines()
    assert lines[0] == "| SEG | 1 | 16 | all |"
    assert lines[2] == "| real | 0.550 ± 0.071 | 0.700 ± 0.071 | 0.750 ± 0.071 |"
    assert lines[3] == "| both | 0.650 ± 0.071 |  |  |"
    axis = Figure().subplots()
    draw_scores(axis, results)
    drawn = {bars.get_label(): bars.lines[0].get_ydata().tolist() for bars in axis.containers}
    assert drawn == {"real": pytest.approx([0.55, 0.7, 0.75]), "both": pytest.approx([0.65])}
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "16", "all"]
    assert set(LOOKS) == set(ARMS)


def test_the_command_and_its_report(data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    out = tmp_path / "out"
    command = (
        f"synthaug evaluate experiment --real {data / 'real'} --test {data / 'test'} --out {out} --arms real --seeds 1"
    )
    settings = "--num-patches 1,all --steps 2 --batch-size 2 --size 96x96 --crop 64x64"
    monkeypatch.setattr(sys, "argv", [*command.split(), *settings.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "| SEG | 1 | all |" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page, "the page needs nothing but itself"
    stored = json.loads((out / "results.json").read_text())
    assert [r["budget"] for r in stored["runs"]] == ["1", "all"]
