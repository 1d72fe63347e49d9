"""Fréchet distance of a network's features: torchmetrics' formula, safe weights, and names that cannot be mistaken."""

from __future__ import annotations

import pickle
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import linalg
from torch import Tensor, nn

from synthaug.errors import InputError
from synthaug.evaluation import frechet
from synthaug.evaluation.frechet import (
    INCEPTION,
    TEXTURE43,
    FrechetReport,
    InceptionFeatures,
    frechet_report,
    load_inception,
)
from synthaug.evaluation.realism import Distance
from synthaug.evaluation.texture_features import FEATURE_NAMES
from synthaug.evaluation.tiles import cut_tiles
from synthaug.randomness import SampleKey
from tests.shapes import ellipse_frame

needs_torchmetrics = pytest.mark.skipif(not find_spec("torchmetrics"), reason="torchmetrics is not installed")


class Moments(nn.Module):
    """Three features of a tile that can be computed by hand."""

    num_features = 3
    seen: Tensor

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[1:] == (1, 64, 64)
        self.seen = image
        flat = image.flatten(1)
        return torch.stack([flat.mean(1), flat.std(1), (image[..., 1:] - image[..., :-1]).abs().mean((1, 2, 3))], 1)


def frames(start: int, num: int = 12, noise: float = 0.0) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = []
    for i in range(start, start + num):
        image, labels = ellipse_frame(i, (64, 64))
        rng = SampleKey(i, ("frechet noise",)).numpy()
        pairs.append(((image + noise * rng.normal(0, 1, image.shape)).astype(np.float32), labels))
    return pairs


def by_hand(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), Heusel et al. 2017, equation 6."""
    cov_1, cov_2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = linalg.sqrtm(cov_1 @ cov_2)
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root.real))


@needs_torchmetrics
def test_the_formula() -> None:
    sets = [frames(0), frames(100), frames(200, noise=60)]
    report = frechet_report(*sets, Moments(), name="moments")
    low, high = np.percentile(np.stack([image for image, _ in sets[0]]), (1.0, 99.8))
    features = [
        Moments()(torch.from_numpy(np.stack([np.clip((i - low) / (high - low), 0, 1) for i, _ in pairs]))[:, None])
        for pairs in sets
    ]
    train, val, synthetic = (f.double().numpy() for f in features)
    assert report.distance.r2r == pytest.approx(by_hand(train, val), rel=1e-3)
    assert report.distance.r2s == pytest.approx(by_hand(synthetic, val), rel=1e-3)
    assert report.distance.ratio > 5, "noise is far away"
    assert (report.num_tiles, report.tile, report.name) == (12, 64, "moments")


@needs_torchmetrics
def test_the_same_number_of_tiles_on_each_side_and_one_scale() -> None:
    extractor = Moments()
    report = frechet_report(frames(0, 20), frames(100, 9), frames(200, 30), extractor)
    assert report.num_tiles == 9
    assert frechet_report(frames(0, 20), frames(100, 9), frames(200, 30), Moments()) == report, "the draw is repeatable"
    brighter = [[(3 * image + 500, labels) for image, labels in frames(i)] for i in (0, 100, 200)]
    same = frechet_report(frames(0), frames(100), frames(200), extractor).distance
    assert frechet_report(*brighter, extractor).distance.r2s == pytest.approx(same.r2s, rel=1e-2)
    assert float(extractor.seen.min()) >= 0
    assert float(extractor.seen.max()) <= 1
    same_set = frechet_report(frames(0), frames(0), frames(0), extractor).distance
    assert same_set.r2r == pytest.approx(0, abs=1e-4)


@needs_torchmetrics
def test_volumes_are_compared_in_xy_planes() -> None:

    def stack(start: int) -> list[tuple[np.ndarray, np.ndarray]]:
        pairs = frames(start, 8)
        return [tuple(np.stack(part) for part in zip(*pairs[i : i + 4])) for i in (0, 4)]  # type: ignore[misc]

    flat = [[plane for volume in stack(i) for plane in zip(*volume)] for i in (0, 100, 200)]
    report = frechet_report(stack(0), stack(100), stack(200), Moments())
    assert report.num_tiles == 8
    assert report.distance.r2s == pytest.approx(frechet_report(*flat, Moments()).distance.r2s, rel=1e-4)


def test_too_few_or_too_small() -> None:
    with pytest.raises(InputError, match=r"4 tiles of 64 px each, got \[12, 3, 12\]"):
        frechet_report(frames(0), frames(100, 3), frames(200), Moments())
    small = [(image[:40], labels[:40]) for image, labels in frames(0)]
    with pytest.raises(InputError, match="sides of 64 px or more, got 40 px"):
        frechet_report(small, small, small, Moments())
    assert len(cut_tiles(frames(0, 1), 64)) == 1


def test_no_name_can_be_mistaken_for_the_other_or_for_fid() -> None:
    assert f"frechet_texture{len(FEATURE_NAMES)}" == TEXTURE43
    report = FrechetReport(INCEPTION, Distance(2.0, 3.0), 40, 128)
    assert str(report).startswith("frechet_inception_v3_torchvision: r2r 2.0, r2s 3.0, r2s/r2r 1.50")
    assert "Not FID" in str(report)
    assert report.as_dict() == {INCEPTION: {"r2r": 2.0, "r2s": 3.0, "num_tiles": 40, "tile": 128}}
    assert TEXTURE43 not in report.as_dict()


# Weights ------------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code was run",)


def test_weights_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"expected a file, got nothing there.*IMAGENET1K_V1"):
        load_inception(tmp_path / "absent.pth")
    for name, content in {
        "evil.pth": pickle.dumps(Evil(), protocol=2),
        "text.pth": b"no",
        "text.safetensors": b"no",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="expected a state dict of tensors, got a file that cannot be read"):
            load_inception(tmp_path / name)
    torch.save({"fc.weight": Evil()}, tmp_path / "evil_zip.pth")
    with pytest.raises(InputError, match="cannot be read"):
        load_inception(tmp_path / "evil_zip.pth")
    assert capsys.readouterr().out == "", "nothing a file says is run"
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(InputError, match="state dict of tensors, got list"):
        load_inception(tmp_path / "list.pth")


def test_the_network_of_fid_is_told_apart(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(1008, 8)}, tmp_path / "pt_inception.safetensors")
    with pytest.raises(InputError, match=r"1000 classes, got 1008 classes, the network of FID\. That one pools"):
        load_inception(tmp_path / "pt_inception.safetensors")


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"fc.weight": torch.zeros(1000, 8)}, tmp_path / "weights.safetensors")
    missing = r'expected to be installed.*pip install "synthaug\[inception\]"'
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(InputError, match=f"torchvision: {missing}"):
        InceptionFeatures({})
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(InputError, match=f"torchmetrics: {missing}"):
        load_inception(tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=f"torchmetrics: {missing}"):
        frechet_report(frames(0), frames(100), frames(200), Moments())


def test_torchvisions_network(tmp_path: Path, untouched_random_state: None) -> None:
    try:
        inception_v3 = frechet._inception_v3()
    except InputError:
        pytest.skip("torchvision is not installed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        original = inception_v3(weights=None, init_weights=False, aux_logits=True).eval()
    for layer in original.modules():  # untrained statistics would hide whether they are used
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.fill_(0.01)
            layer.running_var.fill_(0.5)
    caught: list[Tensor] = []
    original.avgpool.register_forward_hook(lambda module, given, made: caught.append(made.flatten(1)))
    state = {name: value.contiguous() for name, value in original.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "weights.pth")
    image = torch.rand(2, 1, 128, 128, generator=SampleKey(1).generator())
    with torch.no_grad():
        large = nn.functional.interpolate(image, (299, 299), mode="bilinear", antialias=True)
        original(large.repeat(1, 3, 1, 1) * 2 - 1)
        for file in ("weights.safetensors", "weights.pth"):
            extractor = load_inception(tmp_path / file)
            features = extractor.train()(image)
            assert features.shape == (2, 2048)
            torch.testing.assert_close(features, caught[0])
    del state["Mixed_5b.branch1x1.conv.weight"]
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(InputError, match=r"torchvision's inception_v3, got Missing key.*Mixed_5b.branch1x1"):
        load_inception(tmp_path / "broken.safetensors")
