"""The command line as a user meets it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import tifffile
import torch

from synthaug import cli
from synthaug.datasets.readers import open_pairs
from synthaug.evaluation import preview
from tests.shapes import ellipse_frame


def run(monkeypatch, *arguments: str) -> int:
    """Exit code of `synthaug ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["synthaug", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def data(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for i in range(8):
        image, labels = ellipse_frame(i, (128, 128))
        tifffile.imwrite(tmp_path / "data" / "images" / f"{i}.tif", image.astype(np.uint16))
        tifffile.imwrite(tmp_path / "data" / "labels" / f"{i}.tif", labels.astype(np.uint16))
    return tmp_path / "data"


def test_generate_writes_pairs_and_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ["generate", "nuclei-2d", "--size", "64", "--num-cells", "3", "--format", "cellpose"]
    assert run(monkeypatch, *common, "--out", str(whole), "--num", "6") == 0
    assert run(monkeypatch, *common, "--out", str(parts), "--num", "2") == 0
    assert run(monkeypatch, *common, "--out", str(parts), "--num", "6") == 0
    a, b = open_pairs(whole), open_pairs(parts)
    assert len(a) == len(b) == 6
    for i in range(6):
        for x, y in zip(a.read(i), b.read(i)):
            np.testing.assert_array_equal(x, y)
    assert run(monkeypatch, *common, "--out", str(parts), "--num", "6", "--seed", "9") == 2
    assert "begun with the same settings" in capsys.readouterr().err


def test_progress_is_said(monkeypatch, capsys):
    monkeypatch.setattr(cli, "PROGRESS_S", -1.0)
    pairs = [(np.zeros((2, 2)), np.zeros((2, 2)))] * 3
    assert len(list(cli.counted(iter(pairs), 5, 8))) == 3
    assert "7 of 8 pairs, about 0.0 min left" in capsys.readouterr().err


def test_bench_times_the_stream_beside_the_real_images(monkeypatch, tmp_path, data, capsys):
    common = ["bench", "nuclei-2d", "--size", "64", "--batch-size", "2", "--seconds", "0.1", "--workers", "0"]
    report = tmp_path / "bench.json"
    assert run(monkeypatch, *common, "--real", str(data), "--step-ms", "1", "--out", str(report)) == 0
    mixed, plain = json.loads(report.read_text())["measured"]
    assert (mixed["synthetic_ratio"], plain["synthetic_ratio"]) == (0.5, 0.0)
    assert mixed["fresh_cells"] > 0 == plain["fresh_cells"]
    assert plain["samples_per_s"] > 0 < mixed["samples_per_s"]
    said = capsys.readouterr().out
    assert "50% synthetic, 0 workers" in said
    assert "at 1 ms a step" in said
    assert run(monkeypatch, *common[:-1], "two") == 2
    assert "--workers" in capsys.readouterr().err


def test_preview_writes_page_picture_and_numbers(monkeypatch, tmp_path, data):
    monkeypatch.setattr(preview, "PREVIEW_FRAMES", {2: 8})
    assert run(monkeypatch, "preview", "nuclei-2d", "--real", str(data), "--out", str(tmp_path / "look")) == 0
    page = (tmp_path / "look" / "sheet.html").read_text()
    assert "data:image/png;base64," in page
    assert (tmp_path / "look" / "sheet.png").stat().st_size > 10_000
    assert "r2r" in (tmp_path / "look" / "realism.json").read_text()


def test_preview_of_two_images_has_pictures_but_no_numbers(monkeypatch, tmp_path, data, capsys):
    monkeypatch.setattr(preview, "PREVIEW_FRAMES", {2: 4})
    for folder in ("images", "labels"):
        for path in sorted((data / folder).iterdir())[2:]:
            path.unlink()
    assert run(monkeypatch, "preview", "nuclei-2d", "--real", str(data), "--out", str(tmp_path / "look")) == 0
    assert "no realism numbers" in capsys.readouterr().err
    assert (tmp_path / "look" / "sheet.png").is_file()
    assert not (tmp_path / "look" / "realism.json").exists()


def test_realism_says_which_frechet_distance_is_which(monkeypatch, tmp_path, data, capsys):
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

    class Brightness(torch.nn.Module):
        num_features = 2

        def forward(self, image):
            return torch.stack([image.mean((1, 2, 3)), image.amax((1, 2, 3))], 1)

    asked = []
    monkeypatch.setattr("synthaug.evaluation.frechet.load_inception", lambda path: asked.append(path) or Brightness())
    out = tmp_path / "numbers.json"
    sets = ["--train", str(data), "--val", str(data), "--num", "8", "--out", str(out)]
    command = ["evaluate", "realism", "nuclei-2d", *sets]
    assert run(monkeypatch, *command, "--inception-weights", "weights.pth") == 0
    assert [path.name for path in asked] == ["weights.pth"]
    said, numbers = capsys.readouterr().out, json.loads(out.read_text())
    assert "Fréchet texture distance" in said
    assert "frechet_inception_v3_torchvision: r2r " in said
    learned = numbers["frechet_inception_v3_torchvision"]
    assert (learned["num_tiles"], learned["tile"]) == (8, 128)
    assert learned["r2r"] == pytest.approx(0, abs=1e-4)
    assert learned["r2s"] > 0
    assert numbers["frechet"]["r2s"] != learned["r2s"]


def test_wrong_inception_weights_are_told_before_any_work(monkeypatch, tmp_path, data, capsys):
    monkeypatch.setattr("synthaug.cascade.Cascade.from_pretrained", lambda name: pytest.fail("work was begun"))
    sets = ["--train", str(data), "--val", str(data)]
    assert run(monkeypatch, "evaluate", "realism", "nuclei-2d", *sets, "--inception-weights", "absent.pth") == 2
    assert "weights absent.pth: expected a file" in capsys.readouterr().err


def test_info_names_the_embedded_and_describes_one(monkeypatch, capsys):
    assert run(monkeypatch, "info") == 0
    assert "nuclei-2d-u2os" in capsys.readouterr().out
    assert run(monkeypatch, "info", "nuclei-2d") == 0
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "no-such-cascade"], "no such folder or name"),
        (["generate", "nuclei-2d", "--out", "x", "--size", "big"], "height x width"),
        (["fit", "nowhere", "--out", "x"], "nowhere"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["synthaug", "info", "no-such-cascade", "--debug"])
    with pytest.raises(Exception, match="no such folder or name"):
        cli.main()
