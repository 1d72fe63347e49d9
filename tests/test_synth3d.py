"""The contracts of the stream on volumes: workers, resumes and ranks do not show, labels hold, voxel sizes are carried."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterable
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
from monai.data import DataLoader as MonaiDataLoader
from monai.data import MetaTensor, decollate_batch
from torch.utils.data import DataLoader

from synthaug.datasets.mixing import RealOrder
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError
from synthaug.types import UNLABELLED
from tests.fakes import FakeCascade, FakeCascade3D
from tests.test_synth import digest

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZE = (10, 20, 18)
VOXEL = (2.0, 0.8, 0.8)


def real_volumes(num: int = 5, size: tuple[int, ...] = (14, 24, 22)) -> list[dict[str, Any]]:
    """Volumes with cells in every plane, or (odd ones) in every fourth, the others nobody looked at."""
    rng = np.random.default_rng(5)
    volumes = []
    for i in range(num):
        label = rng.integers(0, 5, (1, *size)) * 3
        if i % 2:
            label[0, [z for z in range(size[0]) if z % 4 != 2]] = UNLABELLED
        volumes.append({"image": rng.normal(100, 5, (1, *size)).astype(np.float32), "label": label})
    return volumes


REAL = real_volumes()


def dataset(**changes: Any) -> SynthDataset:
    settings: dict[str, Any] = {
        "size": SIZE,
        "batch_size": 4,
        "real": REAL,
        "synthetic_ratio": 0.6,
        "max_reuse": 4,
        "num_shards": 4,
    }
    return SynthDataset(changes.pop("cascade", None) or FakeCascade3D(), **settings | changes)


def violations(batch: dict[str, Any]) -> list[str]:
    """What of the label contract a batch breaks."""
    found = []
    image, label = batch["image"], batch["label"]
    if image.dtype != torch.float32 or label.dtype != torch.int32 or image.shape != label.shape:
        found.append("types")
    for sample, picture, synthetic in zip(label, image, batch["synthetic"]):
        ids = sample.unique().tolist()
        if ids != list(range(ids[0], len(ids) + ids[0])) or ids[0] not in ((0,) if synthetic else (UNLABELLED, 0, 1)):
            found.append("not contiguous")
        flat = sample.flatten(2)
        if ((flat == UNLABELLED).any(2) != (flat == UNLABELLED).all(2)).any():
            found.append("a plane annotated in part")
        if (sample == UNLABELLED).all():
            found.append("nothing annotated")
        if synthetic and (picture[sample > 0].mean() < picture[sample == 0].mean() + 20):
            found.append("image and label apart")
    return found


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """One hash a batch of the first 80 batches, made in this process."""
    return [digest([batch]) for batch in itertools.islice(dataset(), 80)]


def test_batches_are_what_they_say(untouched_random_state: None) -> None:
    stream = dataset()
    sparse = 0
    for batch in itertools.islice(stream, 30):
        assert batch["image"].shape == batch["label"].shape == (4, 1, *SIZE)
        assert batch["synthetic"].shape == (4,)
        assert abs(int(batch["synthetic"].sum()) - 0.6 * 4) < 1
        assert all(type(value) is torch.Tensor for value in batch.values())
        sparse += sum(bool((sample == UNLABELLED).any()) for sample in batch["label"])
    assert sparse > 5
    weight = torch.ones(1, 1, 3, 3, 3, requires_grad=True)
    torch.nn.functional.conv3d(batch["image"], weight).sum().backward()
    assert weight.grad is not None


def test_five_hundred_volumes_without_a_violation() -> None:
    stream = dataset()
    synthetic, total, batches = 0, 0, 0
    while total < 500:
        batch = next(iter(stream))
        assert violations(batch) == []
        synthetic, total, batches = synthetic + int(batch["synthetic"].sum()), total + 4, batches + 1
        assert abs(synthetic - 0.6 * total) < 1, "the ratio drifts"
    stats = stream.stats()
    assert (stats.synthetic, stats.real) == (synthetic, total - synthetic)
    assert stats.max_reuse <= 4
    assert stats.over_bound_uses == 0
    assert 0 < stats.placed <= stats.requested == stats.uses


def test_every_violation_would_be_seen() -> None:
    def broken(synthetic: bool, change: Any) -> list[str]:
        batches = iter(dataset(synthetic_ratio=float(synthetic), num_cells=3))
        batch = next(b for b in batches if synthetic or (b["label"][0] == UNLABELLED).any())
        assert violations(batch) == []
        change(batch["label"][0], batch)
        return violations(batch)

    assert "not contiguous" in broken(
        True, lambda label, _: label[label == 1].fill_(0) is None or label.add_(label > 0)
    )
    assert "not contiguous" in broken(True, lambda label, _: label[0, 0].fill_(UNLABELLED))
    assert "image and label apart" in broken(True, lambda label, _: label.copy_(label.roll((5, 9), (1, 2))))
    assert "types" in broken(True, lambda label, batch: batch.update(label=batch["label"].long()))
    assert "nothing annotated" in broken(False, lambda label, _: label.fill_(UNLABELLED))
    assert "a plane annotated in part" in broken(False, lambda label, _: label[0, :, 3].fill_(UNLABELLED))


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
def test_workers_do_not_show(num_workers: int, expected: list[str]) -> None:
    loader = dataset().loader(num_workers=num_workers)
    assert [digest([batch]) for batch in itertools.islice(loader, 80)] == expected
    assert loader.stats().batches == 80


def test_another_run_and_other_seeds(expected: list[str]) -> None:
    assert digest(dataset(), 10) == digest(dataset(), 10)
    assert digest([next(iter(dataset(seed=1)))]) != expected[0]
    assert digest([next(iter(dataset(num_cells=3)))]) != expected[0]


def test_plain_data_loaders_give_the_same(expected: list[str]) -> None:
    for loader in (
        DataLoader(dataset(), batch_size=None, num_workers=2),
        MonaiDataLoader(dataset(), batch_size=None, num_workers=2, collate_fn=None),
    ):
        assert [digest([batch]) for batch in itertools.islice(loader, 12)] == expected[:12]


@pytest.mark.parametrize(("offset", "before", "after"), [(5, 0, 2), (33, 2, 4), (61, 4, 0)])
def test_resume_with_another_worker_count(offset: int, before: int, after: int, expected: list[str]) -> None:
    first = dataset().loader(num_workers=before)
    for _ in itertools.islice(first, offset):
        pass
    state = json.loads(json.dumps(first.state_dict()))
    assert state["batch"] == offset
    second = dataset().loader(num_workers=after)
    second.load_state_dict(state)
    assert [digest([batch]) for batch in itertools.islice(second, 15)] == expected[offset : offset + 15]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_one_stream(world_size: int, expected: list[str]) -> None:
    ranks = [itertools.islice(dataset(rank=rank, world_size=world_size), 12) for rank in range(world_size)]
    for number, parts in enumerate(zip(*ranks)):
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        assert digest([whole]) == expected[number]


def test_ratio_zero_is_the_users_own_loader_bit_for_bit() -> None:
    real = real_volumes(size=SIZE)
    for volume in real:
        ids, volume["label"] = np.unique(volume["label"], return_inverse=True)
        volume["label"] = (volume["label"] + (UNLABELLED if ids[0] < 0 else 0)).astype(np.int32)
    own = DataLoader(real, batch_sampler=RealOrder(5, batch_size=4, seed=3, num_batches=12))
    stream = dataset(real=real, synthetic_ratio=0, seed=3, num_batches=12)
    for mine, theirs in zip(stream, own, strict=True):
        assert torch.equal(mine["image"], theirs["image"])
        assert torch.equal(mine["label"], theirs["label"])
    assert stream.cascade.num_calls == 0


def test_empty_volumes() -> None:
    batch = next(iter(dataset(synthetic_ratio=1.0, num_cells=0)))
    assert batch["image"].shape == (4, 1, *SIZE)
    assert not batch["label"].any()


def test_memory_stays_bounded_and_is_reported() -> None:
    stream = dataset(synthetic_ratio=1.0, num_shards=1)
    a_block = 2 * 4 * FakeCascade3D.block_size * FakeCascade3D.num_slices * FakeCascade3D.crop_size**2
    held = []
    for batch in itertools.islice(stream, 500):
        del batch
        held.append(stream._stream.bank.num_bytes)  # type: ignore[union-attr]
    assert max(held[250:]) <= 1.3 * max(held[:250])
    assert all(n % a_block == 0 for n in held)
    assert max(held) <= stream.stats().bank_bytes <= max(held) + 4 * 8 * a_block
    assert stream.stats().bank_bytes < a_block * stream.stats().fresh_cells / 4 / 3, "far from all that was made"
    loader = dataset(synthetic_ratio=1.0).loader(num_workers=2)
    for _ in itertools.islice(loader, 20):
        pass
    assert 0 < loader.stats().bank_bytes < stream.stats().bank_bytes * 4


# Sizes and voxels ---------------------------------------------------------------------------------------------------


def test_frames_and_volumes_are_not_mixed_up() -> None:
    with pytest.raises(InputError, match=r"size: expected \(Z, Y, X\) for a 3D cascade.*got \(64, 64\).*2D cascade"):
        dataset(size=(64, 64))
    with pytest.raises(InputError, match=r"size: expected \(Y, X\) for a 2D cascade.*got \(8, 64, 64\).*3D cascade"):
        dataset(cascade=FakeCascade(), size=(8, 64, 64))
    assert SynthDataset(FakeCascade3D()).config.size == (32, 128, 128)
    assert SynthDataset(FakeCascade()).config.size == (256, 256)
    with pytest.raises(InputError, match=r"density.*per voxel"):
        dataset(density=-1.0)


def test_the_voxel_size_is_the_cascades_own_unless_asked_for() -> None:
    own = FakeCascade3D(voxel_size_um=VOXEL)
    assert dataset(cascade=own).voxel_size_um == VOXEL
    assert dataset().voxel_size_um is None
    close = dataset(cascade=own, voxel_size_um=(2.01, 0.8, 0.803))
    assert close.cascade is own
    other = dataset(cascade=own, voxel_size_um=[2.5, 0.8, 0.8])
    assert other.cascade.voxel_size_um == other.voxel_size_um == (2.5, 0.8, 0.8)
    assert own.voxel_size_um == VOXEL
    prints = {stream.fingerprint() for stream in (dataset(cascade=own), close, other)}
    assert len(prints) == 3
    with pytest.raises(InputError, match=r"voxel_size_um \[2\.5, 0\.8, 0\.8\] \(here None\)"):
        dataset(cascade=own).load_state_dict(other.state_dict())
    flat = FakeCascade(voxel_size_um=(1.0, 0.5, 0.5))
    assert (
        dataset(cascade=flat, size=(32, 32), real=None, synthetic_ratio=1, voxel_size_um=(9, 0.5, 0.5)).cascade is flat
    )


@pytest.mark.parametrize("voxel_size_um", [(2.0, 0.8), (2.0, 0.8, 0), (2.0, 0.8, "1"), 0.8, (2.0, float("inf"), 1.0)])
def test_bad_voxel_sizes(voxel_size_um: Any) -> None:
    with pytest.raises(InputError, match="voxel_size_um"):
        dataset(cascade=FakeCascade3D(voxel_size_um=VOXEL), voxel_size_um=voxel_size_um)
    with pytest.raises(InputError, match="does not know its own"):
        dataset(voxel_size_um=VOXEL)


def test_a_state_saved_before_there_were_voxel_sizes_is_good() -> None:
    assert "voxel_size_um" not in dataset().state_dict()["config"]


def test_real_samples_of_another_voxel_size_are_warned_of() -> None:
    class Volumes(list):
        voxel_size_um = (1.75, 0.8, 0.8)

    def build(**changes: Any) -> SynthDataset:
        return dataset(cascade=FakeCascade3D(voxel_size_um=VOXEL), real=Volumes(REAL), **changes)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build()
        build(voxel_size_um=(1.75, 0.8, 0.8))
    with pytest.warns(UserWarning, match=r"voxels of \(1\.75, 0\.8, 0\.8\).*Pass voxel_size_um="):
        build(voxel_size_um=(3.0, 0.8, 0.8))


# MONAI --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_meta_tensors_carry_the_voxel_size(num_workers: int, expected: list[str]) -> None:
    stream = dataset(cascade=FakeCascade3D(voxel_size_um=VOXEL), as_meta_tensor=True)
    for number, batch in enumerate(itertools.islice(stream.loader(num_workers=num_workers), 3)):
        assert digest([{key: value.as_subclass(torch.Tensor) for key, value in batch.items()}]) == expected[number]
        for key in ("image", "label"):
            assert isinstance(batch[key], MetaTensor)
            assert batch[key].affine.shape == (4, 4, 4), "one a sample"
            assert [part.affine.diag().tolist() for part in batch[key]] == [[*VOXEL, 1]] * 4
            assert batch[key][1].pixdim.tolist() == list(VOXEL)
        assert type(batch["synthetic"]) is torch.Tensor
    samples = decollate_batch({key: batch[key] for key in ("image", "label")})
    assert [tuple(s["image"].shape) for s in samples] == [(1, *SIZE)] * 4
    assert samples[2]["image"].affine.diag().tolist() == [*VOXEL, 1]


def test_meta_tensors_in_2d_and_without_a_voxel_size() -> None:
    settings: dict[str, Any] = {"size": (32, 32), "real": None, "synthetic_ratio": 1, "as_meta_tensor": True}
    batch = next(iter(dataset(cascade=FakeCascade(voxel_size_um=(1.0, 0.5, 0.25)), **settings)))
    assert batch["image"][0].affine.diag().tolist() == [0.5, 0.25, 1, 1]
    batch = next(iter(dataset(cascade=FakeCascade(), **settings)))
    assert batch["image"][0].affine.diag().tolist() == [1, 1, 1, 1]


def test_a_transform_sees_the_affine_and_changes_it() -> None:
    transform = mt.Compose(
        [
            mt.RandFlipd(["image", "label"], prob=0.5, spatial_axis=1),
            mt.Zoomd(["image", "label"], zoom=(1, 0.5, 0.5), mode=("area", "nearest"), keep_size=False),
        ]
    )
    settings: dict[str, Any] = {"cascade": FakeCascade3D(voxel_size_um=VOXEL), "transform": transform}
    batch = next(iter(dataset(as_meta_tensor=True, **settings)))
    assert batch["image"].shape == (4, 1, 10, 10, 9)
    np.testing.assert_allclose(batch["image"][0].pixdim, (2.0, 1.6, 1.6))
    plain = next(iter(dataset(**settings)))
    assert type(plain["image"]) is torch.Tensor
    assert torch.equal(plain["image"], batch["image"].as_tensor())


def test_monai_transforms_in_3d_keep_the_stream_pure() -> None:
    def pipeline() -> mt.Compose:
        return mt.Compose(
            [
                mt.NormalizeIntensityd("image"),
                mt.RandRotate90d(["image", "label"], prob=0.5, spatial_axes=(1, 2)),
                mt.RandSpatialCropd(["image", "label"], roi_size=(8, 16, 16), random_size=False),
                mt.RandGaussianNoised("image", prob=0.7),
            ]
        )

    def hashes(num_workers: int) -> Iterable[str]:
        return [digest([b]) for b in itertools.islice(dataset(transform=pipeline()).loader(num_workers), 12)]

    assert hashes(0) == hashes(2)
