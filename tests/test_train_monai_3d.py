"""The example training in 3D: targets, what unlabelled planes weigh, scores, and a short run from end to end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from synthaug.errors import InputError
from synthaug.evaluation import monai_training, train_monai_3d
from synthaug.evaluation.monai_training import WithTargets
from synthaug.evaluation.targets import BACKGROUND
from synthaug.evaluation.train_monai_3d import main, train, training_transform, validate
from synthaug.types import UNLABELLED
from tests.fakes import FakeCascade3D

SIZE = (16, 16, 16)


def volumes(num: int = 3, size: tuple[int, ...] = (20, 24, 22)) -> list[tuple[np.ndarray, np.ndarray]]:
    """Bright balls like those of FakeCascade3D; odd volumes are annotated in every third plane."""
    rng = np.random.default_rng(2)
    made = []
    for i in range(num):
        label = np.zeros(size, np.int32)
        zyx = np.indices(size)
        for number, centre in enumerate([(6, 6, 6), (14, 16, 15), (6, 17, 7)], start=1):
            label[sum((a - c) ** 2 for a, c in zip(zyx, centre)) < 3.4**2] = number
        image = 100 + rng.normal(0, 1, size) + 50 * (label > 0)
        if i % 2:
            label[[z for z in range(size[0]) if z % 3]] = UNLABELLED
        made.append((image.astype(np.float32), label))
    return made


def test_what_nobody_annotated_weighs_nothing() -> None:
    label = volumes(2)[1][1]
    sample = WithTargets()({"image": torch.zeros(1, *label.shape), "label": MetaTensor(label[None])})
    weight = sample["weight"].numpy()
    assert np.array_equal(weight == 0, label == UNLABELLED)
    assert weight.min() == 0
    assert weight.max() >= 1
    assert sample["target"].shape == weight.shape


def test_the_transform_keeps_image_and_targets_together() -> None:
    image, label = volumes(1, (16, 22, 22))[0]
    seen = set()
    for seed in range(6):
        transform = training_transform(image.shape).set_random_state(seed=seed)
        out = transform({"image": torch.from_numpy(image)[None], "label": torch.from_numpy(label)[None]})
        picture, target = np.asarray(out["image"])[0], out["target"].numpy()
        assert picture.dtype == np.float32
        assert picture[target != BACKGROUND].min() > 0.5 > picture[target == BACKGROUND].max()
        assert np.array_equal(target > 0, np.asarray(out["label"])[0] > 0)
        seen.add(target.tobytes())
    assert len(seen) > 3


class Threshold(nn.Module):
    """Says interior where it is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))  # tells where it lies

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([0.5 - image, image - 0.5, torch.full_like(image, -9)], 1) * 20


def test_validation_knows_right_from_wrong() -> None:
    pairs = volumes(2)
    result = validate(Threshold(), pairs, SIZE, min_voxels=10)
    assert result.dice == result.scores.seg == 1
    for z in (1, 2, 7, 8):
        pairs[1][0][z, 1:4, 14:] = 150  # what may be there in planes nobody annotated does not count
    result = validate(Threshold(), pairs, SIZE, min_voxels=10)
    assert result.dice == result.scores.seg == result.scores.at(0.95)[0] == 1
    pairs[0][1][pairs[0][1] == 2] = 0
    result = validate(Threshold(), pairs[:1], SIZE, min_voxels=10)
    assert result.dice == pytest.approx(0.8, abs=0.01), "2 of 3 balls"
    assert result.scores.at(0.5)[0] == pytest.approx(2 / 3)


def test_a_short_training(untouched_random_state: None) -> None:
    lines: list[str] = []
    pairs = volumes()

    def run() -> Any:
        settings: dict[str, Any] = {"steps": 14, "size": SIZE, "log": lines.append, "min_voxels": 10}
        return train(FakeCascade3D(), pairs[:2], pairs[2:], **settings)

    network, report, result = run()
    assert np.mean(report.losses[-4:]) < 0.8 * np.mean(report.losses[:2])
    assert report.losses == run()[1].losses, "another run is the same"
    assert not network.training
    assert 0 <= result.dice <= 1
    assert any(line.startswith("14 synthetic and 14 real volumes") for line in lines)
    assert lines[-1].startswith("SEG 0.")
    with pytest.raises(InputError, match="multiples of 8"):
        train(FakeCascade3D(), pairs, pairs, size=(16, 20, 16))


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Folder:
        def __init__(self, path: str, min_area: int) -> None:
            self.pairs = volumes({"many": 6, "one": 1}[path])

        def read_all(self) -> list:
            return self.pairs

    monkeypatch.setattr(monai_training, "open_pairs", Folder)
    monkeypatch.setattr(train_monai_3d.Cascade, "from_pretrained", lambda name: FakeCascade3D())
    short = ["--steps", "2", "--size", "16", "16", "16", "--num-workers", "0"]
    main(["--real", "many", *short])
    out = capsys.readouterr().out
    assert "2 synthetic and 2 real volumes" in out
    assert "on 1 volumes" in out, "a fifth is held out"
    main(["--real", "one", "--val", "many", "--ratio", "0", *short])
    assert "on 6 volumes" in capsys.readouterr().out
    with pytest.raises(InputError, match="two volumes or more"):
        main(["--real", "one", *short])
