"""Every dataclass between the stages refuses what it must not hold, and keeps its samples together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from synthaug.errors import InputError, SynthAugError
from synthaug.types import Batch, CellMasks, Cells, FrameStyles, Population, Scenes


def masks(**changes: Any) -> CellMasks:
    values = {
        "sdf": torch.linspace(-2, 2, 3 * 4 * 4).reshape(3, 4, 4),
        "brightness": torch.ones(3),
        "scale": torch.ones(3),
    }
    return CellMasks(**{**values, **changes})


def cells(**changes: Any) -> Cells:
    sdf = torch.linspace(-2, 2, 3 * 4 * 4).reshape(3, 1, 4, 4)
    values = {"image": sdf.abs(), "sdf": sdf, "brightness": torch.tensor([0.5, 1.0, 2.0]), "scale": torch.ones(3)}
    return Cells(**{**values, **changes})


def styles(**changes: Any) -> FrameStyles:
    values = {"values": torch.arange(12.0).reshape(3, 4), "names": ("level", "brightness", "density", "haze")}
    return FrameStyles(**{**values, **changes})


def scenes(**changes: Any) -> Scenes:
    counts = torch.tensor([1, 2, 3])
    values = {"light": torch.zeros(3, 1, 5, 6), "labels": torch.zeros(3, 1, 5, 6, dtype=torch.int32)}
    return Scenes(**{**values, "num_requested": counts, "num_placed": counts, **changes})


def population(**changes: Any) -> Population:
    counts = torch.tensor([1, 2, 3])
    values = {"image": torch.rand(3, 2, 5, 6, generator=torch.Generator()), "labels": torch.zeros(3, 1, 5, 6).int()}
    return Population(**{**values, "num_requested": counts, "num_placed": counts, **changes})


MAKERS = [masks, cells, styles, scenes, population]
NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (masks, {"sdf": [[0.0]]}, r"CellMasks\.sdf: expected a torch\.Tensor, got list"),
        (masks, {"sdf": torch.zeros(3, 4)}, r"CellMasks\.sdf: expected 3 axes .* got shape \(3, 4\)"),
        (masks, {"sdf": torch.zeros(3, 4, 4).double()}, r"CellMasks\.sdf: expected .*float32.*float64"),
        (masks, {"sdf": torch.full((3, 4, 4), NAN)}, r"CellMasks\.sdf: expected finite values, got NaN or infinity"),
        (masks, {"brightness": torch.tensor([1.0, 0.0, 1.0])}, "expected brightness > 0"),
        (masks, {"brightness": torch.tensor([1.0, torch.inf, 1.0])}, r"brightness: expected finite values"),
        (masks, {"scale": torch.tensor([1.0, 0.0, 1.0])}, "scale > 0, got brightness from 1, scale from 0"),
        (masks, {"scale": torch.ones(2)}, "the same number of samples in every tensor, got .*'scale': 2"),
        (cells, {"image": torch.zeros(3, 4, 4)}, r"Cells\.image: expected 4 axes"),
        (cells, {"image": torch.zeros(3, 2, 4, 4)}, r"Cells: expected image and sdf of one shape"),
        (cells, {"image": torch.full((3, 1, 4, 4), -torch.inf)}, r"Cells\.image: expected finite"),
        (cells, {"brightness": torch.ones(3, 1)}, r"Cells\.brightness: expected 1 axes"),
        (styles, {"values": torch.zeros(3)}, r"FrameStyles\.values: expected 2 axes"),
        (styles, {"names": ("level", "brightness", "density")}, "got 4 columns named"),
        (styles, {"names": ("level", "brightness", "dust", "haze")}, "expected one name a column"),
        (scenes, {"light": torch.zeros(3, 5, 6)}, r"Scenes\.light: expected 4 axes"),
        (scenes, {"labels": torch.zeros(3, 1, 5, 6)}, r"Scenes\.labels: expected .*int32"),
        (scenes, {"labels": torch.zeros(3, 1, 2, 5, 6).int()}, r"Scenes\.labels: expected 4 axes"),
        (scenes, {"num_placed": torch.tensor([1])}, "the same number of samples .*'num_placed': 1"),
        (population, {"labels": torch.zeros(3, 1, 5, 7).int()}, "Population: expected image and labels of one size"),
        (population, {"labels": torch.zeros(3, 1, 5, 6).long()}, r"Population\.labels: expected .*int32.*int64"),
        (population, {"image": torch.zeros(3, 2, 5, 6).half()}, r"Population\.image: expected .*float32.*float16"),
        (population, {"image": torch.full((3, 2, 5, 6), NAN)}, r"Population\.image: expected finite"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[..., Batch], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_tensors_of_two_devices_are_refused() -> None:
    with pytest.raises(InputError, match=r"all tensors on one device, got \['cpu', 'meta'\]"):
        population(labels=torch.zeros(3, 1, 5, 6, dtype=torch.int32, device="meta"))


def test_a_user_may_catch_value_error() -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        masks(scale=torch.zeros(3))
    assert isinstance(caught.value, SynthAugError)


@pytest.mark.parametrize("make", MAKERS)
def test_the_first_axis_counts_the_samples(make: Callable[..., Batch]) -> None:
    assert len(make()) == 3
    assert len(make().select(slice(0, 0))) == 0


@pytest.mark.parametrize("make", MAKERS)
def test_batches_are_frozen(make: Callable[..., Batch]) -> None:
    batch = make()
    with pytest.raises(FrozenInstanceError):
        batch.extra = 1  # type: ignore[attr-defined]


def test_select_takes_the_same_samples_of_every_tensor() -> None:
    picked = cells().select(torch.tensor([2, 0, 2]))
    assert picked.brightness.tolist() == [2.0, 0.5, 2.0]
    assert torch.equal(picked.sdf, cells().sdf[[2, 0, 2]])
    assert torch.equal(picked.image, cells().image[[2, 0, 2]])
    assert cells().select(slice(1, None)).brightness.tolist() == [1.0, 2.0]


def test_what_is_no_tensor_survives_select_to_and_cat() -> None:
    sized = population(voxel_size_um=(2.0, 0.5, 0.5))
    for batch in (sized.select(torch.tensor([1])), sized.to("cpu"), Population.cat([sized, sized])):
        assert batch.voxel_size_um == (2.0, 0.5, 0.5)
    assert styles().select(torch.tensor([1])).names == styles().names


def test_cat_keeps_the_order() -> None:
    first, second = cells().select(slice(0, 1)), cells().select(slice(1, 3))
    whole = Cells.cat([first, second])
    assert torch.equal(whole.sdf, cells().sdf)
    assert whole.brightness.tolist() == [0.5, 1.0, 2.0]
    with pytest.raises(InputError, match=r"Cells\.cat: expected at least one batch, got none"):
        Cells.cat([])


def test_to_moves_every_tensor() -> None:
    labels = torch.zeros(2, 1, 4, 4, dtype=torch.int32)
    counts = torch.zeros(2, dtype=torch.int64)
    scene = Scenes(torch.zeros(2, 1, 4, 4), labels, counts, counts)
    assert torch.equal(scene.to("cpu").labels, labels)


@pytest.mark.gpu
def test_to_reaches_the_gpu() -> None:
    moved = population().to("cuda")
    assert {moved.image.device.type, moved.labels.device.type, moved.num_placed.device.type} == {"cuda"}


def test_the_mask_is_where_the_distance_is_negative() -> None:
    sdf = torch.tensor([[[-1.0, 0.0], [0.5, -1e-6]]])
    inside = [[[True, False], [False, True]]]
    assert CellMasks(sdf, torch.ones(1), torch.ones(1)).mask.tolist() == inside
    assert Cells(sdf[None], sdf[None], torch.ones(1), torch.ones(1)).mask.tolist() == [inside]


def test_styles_are_read_by_name() -> None:
    assert styles()["density"].tolist() == [2.0, 6.0, 10.0]
    assert styles()["haze"].tolist() == [3.0, 7.0, 11.0]
    with pytest.raises(ValueError, match="tuple"):
        styles()["dust"]


def test_scenes_and_populations_may_be_3d() -> None:
    labels = torch.zeros(2, 1, 3, 4, 5, dtype=torch.int32)
    counts = torch.zeros(2, dtype=torch.int64)
    assert Scenes(torch.zeros(2, 1, 3, 4, 5), labels, counts, counts).light.ndim == 5
    assert Population(torch.zeros(2, 2, 3, 4, 5), labels, counts, counts, (2.0, 1.0, 1.0)).labels.ndim == 5
