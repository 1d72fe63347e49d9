"""MONAI in 2D: the example training from end to end, and the bundle that MONAI's own parser builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader as MonaiDataLoader
from monai.networks.nets import UNet
from monai.utils import set_determinism

import synthaug
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError
from synthaug.evaluation import monai_training, train_monai_2d
from synthaug.evaluation.monai_training import validate_instances
from synthaug.evaluation.targets import BACKGROUND
from synthaug.evaluation.train_monai_2d import main, train, training_transform
from tests.fakes import FakeCascade

BUNDLE = Path(__file__).resolve().parents[1] / "docs" / "monai_bundle.yaml"


def images(num: int = 3, size: tuple[int, int] = (36, 44)) -> list[tuple[np.ndarray, np.ndarray]]:
    """Bright discs like those of FakeCascade."""
    made = []
    for i in range(num):
        rng = np.random.default_rng(i)
        label, (y, x) = np.zeros(size, np.int32), np.indices(size)
        for number, centre in enumerate([(8, 9), (24, 30), (26, 10), (9, 32)], start=1):
            label[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < rng.uniform(2.5, 4) ** 2] = number
        made.append(((100 + rng.normal(0, 1, size) + 50 * (label > 0)).astype(np.float32), label))
    return made


def test_the_transform_keeps_image_and_targets_together() -> None:
    image, label = images(1)[0]
    seen = set()
    for seed in range(12):
        transform = training_transform(image.shape).set_random_state(seed=seed)
        out = transform({"image": torch.from_numpy(image)[None], "label": torch.from_numpy(label)[None]})
        picture, target = np.asarray(out["image"])[0], out["target"].numpy()
        assert picture.dtype == np.float32
        assert picture[target != BACKGROUND].min() > 0.5 > picture[target == BACKGROUND].max()
        assert np.array_equal(target > 0, np.asarray(out["label"])[0] > 0)
        assert out["weight"].min() == 1
        seen.add(target.tobytes())
    assert len(seen) == 4, "two flips"


def test_validation_knows_right_from_wrong() -> None:
    pairs = images(2)
    truth = {image.tobytes(): label for image, label in pairs}
    result = validate_instances(lambda image: truth[image.tobytes()], pairs)
    assert result.dice == result.scores.seg == 1
    result = validate_instances(lambda image: np.where(truth[image.tobytes()] == 1, 0, truth[image.tobytes()]), pairs)
    assert 0.75 <= result.scores.seg < 0.76, "3 of 4 discs"
    assert result.dice < 1


def test_a_short_training(untouched_random_state: None) -> None:
    lines: list[str] = []
    pairs = images(4)

    def run(**changes: Any) -> Any:
        settings: dict[str, Any] = {"steps": 30, "size": (32, 32), "batch_size": 4, "log": lines.append, "min_area": 8}
        return train(FakeCascade(), pairs[:2], pairs[2:], **settings | changes)

    network, report, result = run()
    assert np.mean(report.losses[-4:]) < 0.6 * np.mean(report.losses[:2])
    assert result.dice > 0.5
    assert not network.training
    assert any(line.startswith("60 synthetic and 60 real images") for line in lines)
    assert lines[-1].startswith("SEG 0.")
    assert run(steps=3)[1].losses == run(steps=3)[1].losses, "another run is the same"
    with pytest.raises(InputError, match="multiples of 8"):
        run(size=(32, 36))


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Folder:
        def __init__(self, path: str, min_area: int) -> None:
            self.pairs = images({"many": 6, "one": 1}[path])

        def read_all(self) -> list:
            return self.pairs

    monkeypatch.setattr(monai_training, "open_pairs", Folder)
    monkeypatch.setattr(train_monai_2d.Cascade, "from_pretrained", lambda name: FakeCascade())
    short = ["--steps", "2", "--size", "32", "32", "--batch-size", "2", "--num-workers", "0"]
    main(["--real", "many", *short])
    out = capsys.readouterr().out
    assert "2 synthetic and 2 real images" in out
    assert "on 1 images" in out, "a fifth is held out"
    main(["--real", "one", "--val", "many", "--ratio", "0", *short])
    assert "on 6 images" in capsys.readouterr().out
    with pytest.raises(InputError, match="two images or more"):
        main(["--real", "one", *short])


# The bundle ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ConfigParser:
    """The shipped configuration, on a small folder and a cascade without weights."""
    for part in ("images", "labels"):
        (tmp_path / "my_cells" / part).mkdir(parents=True)
    for i, (image, label) in enumerate(images(3, (48, 48))):
        tifffile.imwrite(tmp_path / "my_cells" / "images" / f"{i}.tif", image.astype(np.uint16))
        tifffile.imwrite(tmp_path / "my_cells" / "labels" / f"{i}.tif", label.astype(np.uint16))
    monkeypatch.setattr(synthaug.Cascade, "from_pretrained", lambda name: {"nuclei-2d": FakeCascade()}[name])
    parser = ConfigParser()
    parser.read_config(str(BUNDLE))
    small = {"size": [32, 32], "batch_size": 4, "steps": 2, "epochs": 1, "device": "cpu"}
    parser.update(small | {name: str(tmp_path / "my_cells") for name in ("real_dir", "val_dir")})
    return parser


def test_the_parser_builds_a_bundle_that_trains(bundle: ConfigParser) -> None:
    # `from a import b` finds no module b that nobody has imported yet, as in a fresh process.
    assert bundle.get("imports") == ["$import synthaug"]
    stream, loader, network = (bundle.get_parsed_content(name) for name in ("stream", "train_loader", "network"))
    assert isinstance(stream, SynthDataset)
    assert isinstance(loader, MonaiDataLoader)
    assert loader.dataset is stream
    assert isinstance(network, UNet)
    loss, optimizer = bundle.get_parsed_content("loss"), bundle.get_parsed_content("optimizer")
    before = [parameter.detach().clone() for parameter in network.parameters()]
    (batch, _) = list(loader)
    assert batch["synthetic"].sum() == 2
    assert batch["target"].unique().tolist() == [0, 1, 2]
    value = loss(network(batch["image"]), batch["target"][:, None])
    value.backward()
    optimizer.step()
    assert torch.isfinite(value)
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters()))


def test_monai_runs_the_bundle(bundle: ConfigParser, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ignite", reason="MONAI's trainer needs pytorch-ignite (pip install pytorch-ignite)")
    try:
        bundle.get_parsed_content("run")
    finally:
        set_determinism(None)
    trainer = bundle.get_parsed_content("trainer")
    assert (trainer.state.epoch, trainer.state.iteration) == (1, 2)
    assert np.isfinite(trainer.state.output[0]["loss"])
    assert "SegmentationScores(seg=" in capsys.readouterr().out
