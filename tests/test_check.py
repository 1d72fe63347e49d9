"""check_stream: what it shows, what it warns of, and that the stream does not notice."""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import synthaug
from synthaug.datasets.check import TITLE, check_stream, contact_sheet, next_samples
from synthaug.datasets.seen import SeenSample, find_faults
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError, ProducerError
from synthaug.types import UNLABELLED
from tests.fakes import FakeCascade, FakeCascade3D


def real_pairs(level: float = 100.0, size: tuple[int, ...] = (40, 40)) -> list[tuple[np.ndarray, np.ndarray]]:
    """Frames or volumes with three bright boxes, as bright as FakeCascade's discs."""
    rng = np.random.default_rng(3)
    label = np.zeros(size, np.int32)
    for number, corner in enumerate([(4, 4), (12, 26), (26, 14)], start=1):
        label[..., corner[0] : corner[0] + 8, corner[1] : corner[1] + 8] = number
    return [((level + rng.normal(0, 1, size) + 50 * (label > 0)).astype(np.float32), label) for _ in range(3)]


def stream(cascade: Any = None, **changes: Any) -> SynthDataset:
    settings: dict[str, Any] = {
        "size": (40, 40),
        "batch_size": 4,
        "real": real_pairs(),
        "synthetic_ratio": 0.5,
        "num_cells": 4,
    }
    return SynthDataset(cascade or FakeCascade(), **settings | changes)


def faults(**changes: Any) -> list[str]:
    return list(check_stream(stream(**changes), 8, None).warnings)


def test_it_is_public() -> None:
    assert synthaug.check_stream is check_stream


def test_a_good_stream_has_no_warnings(tmp_path: Path, untouched_random_state: None) -> None:
    found = check_stream(stream(), 8, tmp_path / "new" / "look.png")
    assert found.warnings == ()
    assert (found.num_synthetic, found.num_real) == (4, 4)
    assert (found.image, found.label) == ("float32 (1, 40, 40)", "int32 (1, 40, 40)")
    assert found.cells["real"] == 3
    assert 2 <= found.cells["synthetic"] <= 4
    assert found.ranges["real"] == pytest.approx((97.8, 151.5), abs=1)
    assert str(found).splitlines()[0].startswith("4 synthetic and 4 real samples")
    assert "nothing wrong was found" in str(found)
    assert iio.imread(tmp_path / "new" / "look.png").shape[0] > 200


@pytest.mark.parametrize("num_batches", [None, 3])
def test_the_stream_stays_where_it_is(num_batches: int | None) -> None:
    def batches(data: SynthDataset, num: int) -> list[torch.Tensor]:
        return [batch["image"] for batch in itertools.islice(data, num)]

    expected = batches(stream(num_batches=num_batches), 3)
    looked_at = stream(num_batches=num_batches)
    check_stream(looked_at, 20, None)
    assert looked_at.stats().batches == 0
    running = iter(looked_at)
    first = next(running)["image"]
    before = looked_at.state_dict(), looked_at.stats()
    check_stream(looked_at, 20, None)
    assert (looked_at.state_dict(), looked_at.stats()) == before
    rest = [batch["image"] for batch in itertools.islice(running, 2)]
    assert all(torch.equal(a, b) for a, b in zip([first, *rest], expected, strict=True))


def test_it_shows_the_next_samples_of_a_loader() -> None:
    data = stream()
    next(iter(data))
    following = next_samples(data, 6)
    batches = list(itertools.islice(data, 2))
    images = torch.cat([batch["image"] for batch in batches])[:6]
    assert np.array_equal(np.stack([sample.image for sample in following]), images.numpy())
    assert [s.synthetic for s in following] == torch.cat([b["synthetic"] for b in batches])[:6].tolist()
    assert check_stream(stream().loader(num_workers=2), 5, None).num_real in (2, 3)


def test_a_transform_of_its_own_state_is_not_disturbed() -> None:
    class Counting:
        calls = 0

        def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
            self.calls += 1
            return sample

    transform = Counting()
    check_stream(stream(transform=transform), 8, None)
    assert transform.calls == 0


def test_what_it_warns_of() -> None:
    def change(**changes: Any) -> Any:
        return lambda sample: {**sample, **{key: make(sample[key]) for key, make in changes.items()}}

    assert faults(transform=change(image=torch.zeros_like))[0].startswith(
        "4 real and 4 synthetic of 8 samples have a const"
    )
    assert "NaN or infinity" in faults(transform=change(image=lambda image: image / 0 * 0))[0]
    assert "labels that are no integers" in faults(transform=change(label=lambda label: label.float()))[0]
    assert "not contiguous" in faults(transform=change(label=lambda label: label * 2))[0]
    assert "negative labels" in faults(transform=change(label=lambda label: label - 1))[0]
    assert "another shape" in faults(transform=change(label=lambda label: label[:, :20]))[0]
    (empty,) = faults(num_cells=0, synthetic_ratio=1.0, real=None)[:1]
    assert empty.startswith("8 synthetic of 8 samples have no cells. There is nothing to learn")
    (apart,) = faults(real=real_pairs(level=5000))
    assert "far apart (real 4998 to 505" in apart
    assert faults(real=real_pairs(level=110)) == []
    label = np.zeros((40, 40), np.int32)
    label[4:24, 4:24], label[28:38, 28:38] = 1, 2
    (sizes,) = faults(real=[((100 + 50 * (label > 0)).astype(np.float32), label)] * 3)
    assert sizes.startswith(
        "Cells of real and synthetic samples differ in size (90th percentile of areas: real 400 px, syn"
    )
    assert find_faults(next_samples(stream(real=None, synthetic_ratio=1.0), 2)) == []


def test_planes_that_nobody_annotated_are_no_fault(tmp_path: Path) -> None:
    pairs = real_pairs(size=(12, 40, 40))
    for _, label in pairs:
        label[::2] = UNLABELLED
    data = stream(FakeCascade3D(), size=(12, 40, 40), real=pairs, num_cells=8)
    found = check_stream(data, 4, tmp_path / "look.png")
    assert found.warnings == ()
    assert found.image == "float32 (1, 12, 40, 40)"
    assert (tmp_path / "look.png").stat().st_size > 1000


def test_the_area_of_a_cell_is_that_of_its_largest_section() -> None:
    label = np.full((1, 4, 9, 9), UNLABELLED, np.int32)
    label[:, [0, 2]] = 0
    label[0, 0, 1:3, 1:3], label[0, 2, 1:5, 1:5], label[0, 2, 6, 6] = 7, 7, 9
    image = label.astype(np.float32)
    assert SeenSample(image, label, False).areas.tolist() == [16, 1]
    assert SeenSample(image[:, 0], label[:, 0], False).areas.tolist() == [4]
    assert len(SeenSample(image, np.zeros_like(label), False).areas) == 0
    assert len(SeenSample(image, image, False).areas) == 0, "no labels"


def test_the_picture_shows_outlines_and_labels() -> None:
    image, label = np.full((1, 60, 60), 100, np.float32), np.zeros((1, 60, 60), np.int32)
    label[0, 10:30, 10:30], label[0, 35:50, 35:50] = 1, 2
    image[label > 0] = 200
    page = iio.imread(io.BytesIO(contact_sheet([SeenSample(image, label, True)])))[..., :3]
    zoom = 4
    left, right = (page[TITLE:, 12 + start :][: 60 * zoom, : 60 * zoom] for start in (0, 62 * zoom))
    at = zoom // 2
    assert right[5 * zoom, 5 * zoom].tolist() == [0, 0, 0], "no colour on the background"
    colours = {tuple(right[y * zoom + at, y * zoom + at].tolist()) for y in (20, 40)}
    assert len(colours) == 2, "every cell has its own colour"
    assert np.ptp(left[20 * zoom, 20 * zoom].astype(int)) == 0, "the cell itself is grey"
    assert tuple(left[10 * zoom + at, 20 * zoom].tolist()) in colours, "its border has the colour of its label"
    nothing = SeenSample(np.full_like(image, np.nan), label, False)
    assert iio.imread(io.BytesIO(contact_sheet([nothing]))).shape == (*page.shape[:2], 4)


def test_napari_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layers: dict[str, Any] = {}

    class Viewer:
        def __init__(self, title: str) -> None:
            assert title.count("real") == title.count("synthetic") == 2

        def add_image(self, data: np.ndarray, **settings: Any) -> None:
            layers[settings["name"]] = data, settings["scale"]

        add_labels = add_image

    monkeypatch.setitem(sys.modules, "napari", SimpleNamespace(Viewer=Viewer))
    data = stream(FakeCascade3D(voxel_size_um=(2, 1, 1)), size=(12, 40, 40), real=real_pairs(size=(12, 40, 40)))
    check_stream(data, 4, None, viewer=True)
    assert {name: layer[0].shape for name, layer in layers.items()} == dict.fromkeys(
        ("image", "label"), (4, 12, 40, 40)
    )
    assert layers["label"][0].dtype == np.int32
    assert layers["image"][1] == (1, 2, 1, 1)
    monkeypatch.setitem(sys.modules, "napari", None)
    with pytest.raises(InputError, match="pip install 'napari"):
        check_stream(data, 4, None, viewer=True)


def test_bad_arguments_and_streams_that_fail() -> None:
    with pytest.raises(InputError, match="a SynthDataset or its loader"):
        check_stream([1, 2])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="n: expected"):
        check_stream(stream(), 0)
    with pytest.raises(ProducerError, match="went up in smoke"):
        check_stream(stream(FakeCascade(fail_at=0)), 4, None)
