"""The bundled images, and the demo in miniature on discs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import torch

from synthaug.datasets.readers import open_pairs
from synthaug.errors import InputError, SynthAugError
from synthaug.evaluation import demo
from synthaug.evaluation.demo import ARMS, BATCH_SIZE, CAVEAT, DEMO_IMAGES, SIZE, draw_predictions, run_demo
from synthaug.randomness import SampleKey
from tests.fakes import FakeCascade

TIMES = {
    "pairs_per_second",
    "first_batch_seconds",
    "training_seconds",
    "stall_share",
    "stall_share_after_first_batch",
    "starved_batches",  # whether cells were ready when asked for is a matter of the clock
}
"""What differs from run to run."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small discs like those of FakeCascade: two images to train on, two to score on."""
    root = tmp_path_factory.mktemp("images")
    for split, size in (("train", (128, 140)), ("val", (100, 90))):
        for i in range(2):
            rng = SampleKey(i, (split,)).numpy()
            labels = np.zeros(size, np.uint16)
            y, x = np.mgrid[: size[0], : size[1]]
            for centre in rng.uniform(8, np.array(size) - 8, (12, 2)):
                disc = np.hypot(y - centre[0], x - centre[1]) < 5
                if not labels[disc].any():
                    labels[disc] = labels.max() + 1
            image = 100 + 60 * (labels > 0) + rng.normal(0, 2, size)
            for folder, array in (("images", image.round().astype(np.uint16)), ("labels", labels)):
                (root / split / folder).mkdir(parents=True, exist_ok=True)
                tifffile.imwrite(root / split / folder / f"{i}.tif", array)
    return root


class Run:
    """A demo run, with all it left."""

    def __init__(self, out: Path, images: Path, seed: int = 0, steps: int = 3, num_workers: int = 0) -> None:
        self.out, self.lines, self.cascade = out, list[str](), FakeCascade()
        self.results = run_demo(
            out,
            seed=seed,
            steps=steps,
            log=self.lines.append,
            cascade=self.cascade,
            images=images,
            num_workers=num_workers,
        )

    def without_times(self) -> dict[str, Any]:
        return {name: {k: v for k, v in arm.items() if k not in TIMES} for name, arm in self.results["arms"].items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Run:
    return Run(tmp_path_factory.mktemp("demo") / "new" / "folder", images)


def test_bundled_images_are_what_their_readme_says() -> None:
    readme = (DEMO_IMAGES / "README.md").read_text(encoding="utf-8")
    for words in ("BBBC039", "CC0 1.0", "Ljosa", "9:637", "Caicedo", "95:952"):
        assert words in readme
    assert sum(f.stat().st_size for f in DEMO_IMAGES.rglob("*") if f.is_file()) < 3e6
    rows = []
    for split, number, side, nuclei in (("train", 4, 256, 105), ("val", 9, 320, 352)):
        pairs = open_pairs(DEMO_IMAGES / split)
        read = [pairs.read(i) for i in range(len(pairs))]
        assert len(read) == number
        assert {image.shape for image, _ in read} == {(side, side)}
        assert sum(int(labels.max()) for _, labels in read) == nuclei
        assert min(np.bincount(labels.ravel())[1:].min() for _, labels in read) >= 20
        assert f"{side} x {side}" in readme
        assert f"{nuclei} nuclei" in readme
        assert not pairs.warnings
        rows.append({pairs.name(i)[0] for i in range(len(pairs))})
    assert not rows[0] & rows[1], "images of one well row on both sides"


def test_a_run_leaves_numbers_a_sheet_and_a_picture(run: Run) -> None:
    assert json.loads((run.out / "results.json").read_text()) == run.results
    assert list(run.results["arms"]) == list(ARMS)
    for arm in run.results["arms"].values():
        assert 0 <= arm["seg"] <= 1
        assert 0 <= arm["ap75"] <= arm["ap50"] <= 1
        assert 0 < arm["stall_share"] < 1
        assert arm["pairs_per_second"] > 0
        assert arm["num_truth"] > 0
    picture = iio.imread(run.out / "predictions.png")
    assert picture.shape[1] > 1.5 * picture.shape[0]  # two rows of four panels
    page = (run.out / "sheet.html").read_text()
    assert CAVEAT.split(",")[0] in page
    assert "AP@0.5" in page


def test_the_arms_differ_in_what_is_in_the_batches_alone(run: Run) -> None:
    samples = 3 * BATCH_SIZE
    real, mix = run.results["arms"]["real only"], run.results["arms"]["50:50 mix"]
    assert (real["synthetic"], real["real"], real["fresh_cells"]) == (0, samples, 0)
    assert (mix["synthetic"], mix["real"]) == (samples // 2, samples // 2)
    assert mix["fresh_cells"] > 0
    assert mix["mean_reuse"] > 0


def test_a_run_says_what_it_found_and_what_that_does_not_show(run: Run) -> None:
    text = "\n".join(run.lines)
    for words in ("SEG", "AP@0.5", "pairs/s", "stall share", "mean reuse", CAVEAT, "predictions.png", "2 real images"):
        assert words in text
    for arm in run.results["arms"].values():
        assert f"{arm['seg']:.3f}" in text


@pytest.mark.usefixtures("untouched_random_state")
def test_the_seed_decides_the_results(run: Run, images: Path, tmp_path: Path) -> None:
    again, other = Run(tmp_path / "again", images), Run(tmp_path / "other", images, seed=1)
    assert again.without_times() == run.without_times()
    losses = [r.results["arms"]["50:50 mix"]["final_loss"] for r in (run, other)]
    assert losses[0] != losses[1]


def test_a_worker_makes_the_same_batches(run: Run, images: Path, tmp_path: Path) -> None:
    worker = Run(tmp_path, images, num_workers=1)
    for name, arm in worker.results["arms"].items():
        mine = run.results["arms"][name]
        assert arm["final_loss"] == pytest.approx(mine["final_loss"], rel=1e-3)  # the number of threads may differ
        assert (arm["synthetic"], arm["real"]) == (mine["synthetic"], mine["real"])
    assert worker.results["arms"]["50:50 mix"]["fresh_cells"] > 0
    assert worker.cascade.num_made > 0  # for the sheet; those of the batches were made in the worker
    assert worker.cascade.num_made < run.cascade.num_made


def test_minutes_stand_for_a_number_of_steps(images: Path, tmp_path: Path) -> None:
    results = run_demo(
        tmp_path, minutes=0.005, log=lambda line: None, cascade=FakeCascade(), images=images, num_workers=0
    )
    assert results["steps"] == round(0.005 * demo.STEPS_PER_MINUTE) == 1


def test_threads_are_given_back(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.os, "cpu_count", lambda: 4)
    seen = []

    def fail(*args: Any, **kwargs: Any) -> None:
        seen.append(torch.get_num_threads())
        raise ArithmeticError

    monkeypatch.setattr(demo, "train_segmenter", fail)
    before = torch.get_num_threads()
    with pytest.raises(ArithmeticError):
        run_demo(tmp_path, steps=1, log=lambda line: None, cascade=FakeCascade(), images=images, num_workers=1)
    assert (seen, torch.get_num_threads()) == ([3], before)


def test_what_a_user_can_get_wrong(images: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="minutes"):
        run_demo(tmp_path, minutes=0)
    with pytest.raises(SynthAugError, match="no_such_cascade"):
        run_demo(tmp_path, cascade="no_such_cascade", images=images)
    with pytest.raises((SynthAugError, FileNotFoundError)):
        run_demo(tmp_path, cascade=FakeCascade(), images=tmp_path / "nothing")
    assert max(SIZE) <= 256, "the bundled training images are smaller than the stream's frames"


def test_predictions_are_drawn_over_the_image(tmp_path: Path) -> None:
    labels = np.zeros((64, 64), np.int32)
    labels[16:48, 16:48] = 1
    image = (100 + 50 * (labels > 0)).astype(np.float32)
    coloured = []
    for i, prediction in enumerate((labels, np.zeros_like(labels))):
        path = tmp_path / f"{i}.png"
        draw_predictions(path, [(image, labels)], {"mine": [prediction]})
        pixels = iio.imread(path)[..., :3].astype(int)
        coloured.append(((pixels[..., 2] - pixels[..., 0]) > 100).sum())  # cyan, the colour of predictions
    assert coloured[0] > 100 > 10 > coloured[1]
