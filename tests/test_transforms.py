"""The MONAI transforms: MONAI's conventions, both modes, bounded reuse, and random numbers from `R` alone."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor, set_track_meta
from monai.utils import set_determinism

from synthaug.datasets import transforms
from synthaug.datasets.transforms import CellPool, RandSynthPopulation, RandSynthPopulationd
from synthaug.errors import InputError
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED
from tests.fakes import FakeCascade, FakeCascade3D

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

KEYS = ["image", "label"]


def sample(size: tuple[int, int] = (40, 30)) -> dict[str, Any]:
    image = np.full((1, *size), 100, np.float64)
    label = np.zeros((1, *size), np.uint16)
    label[:, 3:9, 3:9], label[:, 20:26, 20:26] = 7, 3
    image[label > 0] += 40
    return {"image": image, "label": label, "name": "a"}


def transform(**changes: Any) -> RandSynthPopulationd:
    settings: dict[str, Any] = {"cascade": FakeCascade(), "prob": 1.0}
    return RandSynthPopulationd(KEYS, **settings | changes)


def test_replace_swaps_the_sample(untouched_random_state: None) -> None:
    data = sample()
    out = transform().set_random_state(0)(data)
    assert out["name"] == "a"
    for key, dtype in (("image", torch.float32), ("label", torch.int32)):
        assert isinstance(out[key], MetaTensor)
        assert out[key].shape == (1, 40, 30)
        assert out[key].dtype == dtype
    assert out["label"].unique().tolist() == list(range(int(out["label"].max()) + 1))
    assert (out["image"][out["label"] > 0].mean() - out["image"][out["label"] == 0].mean()) > 20
    assert isinstance(data["image"], np.ndarray), "the sample given is left alone"


def test_paste_adds_cells_in_the_free_space() -> None:
    data = sample()
    out = transform(mode="paste", num_cells=5).set_random_state(1)(data)
    old, new = np.asarray(data["label"]), out["label"].numpy()
    assert np.array_equal(new == 1, old == 3), "labels become contiguous, in the order of the old numbers"
    assert np.array_equal(new == 2, old == 7)
    assert new.max() > 2
    assert np.unique(new).tolist() == list(range(new.max() + 1))
    untouched = new <= 2
    np.testing.assert_array_equal(out["image"].numpy()[untouched], data["image"][untouched])
    assert (out["image"].numpy()[~untouched] > 100).all()


def test_paste_adds_as_many_as_there_are_unless_told() -> None:
    cascade = FakeCascade()
    asked: list[int] = []
    cascade.paste = lambda cells, image, labels, key, **_: (asked.append(len(cells)), (image, labels))[1]  # type: ignore[method-assign]
    empty = {**sample(), "label": np.zeros((1, 40, 30), np.uint8)}
    for data, settings in ((sample(), {}), (empty, {}), (sample(), {"num_cells": 0}), (sample(), {"density": 0.01})):
        transform(cascade=cascade, mode="paste", **settings)(data)
    assert asked == [2, 1, 12]


def test_skipped_samples_are_tensors_too() -> None:
    out = transform(prob=0.0)(sample())
    assert isinstance(out["image"], MetaTensor)
    assert (out["image"].dtype, out["label"].dtype) == (torch.float32, torch.int32)
    np.testing.assert_array_equal(out["label"].numpy(), sample()["label"])
    image, label = RandSynthPopulation(FakeCascade(), prob=0.0)(sample()["image"], sample()["label"])
    assert isinstance(image, torch.Tensor)
    assert isinstance(label, torch.Tensor)


def test_the_probability_holds() -> None:
    apply = transform(prob=0.3, num_cells=1).set_random_state(0)
    changed = [not np.array_equal(apply(sample())["label"].numpy(), sample()["label"]) for _ in range(300)]
    assert 60 < sum(changed) < 120


def test_missing_keys() -> None:
    only_image = {"image": sample()["image"]}
    with pytest.raises(KeyError, match="label"):
        transform()(only_image)
    out = transform(allow_missing_keys=True)(only_image)
    np.testing.assert_array_equal(out["image"].numpy(), only_image["image"])
    assert list(out) == ["image"]
    assert transform(allow_missing_keys=True)({"x": 1}) == {"x": 1}


def test_other_keys() -> None:
    data = {"img": sample()["image"], "seg": sample()["label"]}
    out = RandSynthPopulationd(["seg", "img"], FakeCascade(), prob=1.0, label_key="seg")(data)
    assert (out["img"].dtype, out["seg"].dtype) == (torch.float32, torch.int32)


def run(apply: Any, num: int = 12) -> list[torch.Tensor]:
    return [torch.cat([out["image"], out["label"]]) for out in (apply(sample()) for _ in range(num))]


@pytest.mark.parametrize("mode", ["replace", "paste"])
def test_the_same_seed_gives_the_same_samples(mode: str) -> None:
    apply = transform(mode=mode, prob=0.7).set_random_state(seed=4)
    first = run(apply)
    assert all(torch.equal(a, b) for a, b in zip(first, run(apply.set_random_state(seed=4))))
    state = np.random.RandomState(4)
    assert all(torch.equal(a, b) for a, b in zip(first, run(transform(mode=mode, prob=0.7).set_random_state(4))))
    assert not all(torch.equal(a, b) for a, b in zip(first, run(apply.set_random_state(state=state), 12)[::-1]))
    assert not all(torch.equal(a, b) for a, b in zip(first, run(apply.set_random_state(seed=5))))


def test_compose_and_set_determinism() -> None:
    def pipeline() -> mt.Compose:
        return mt.Compose([transform(prob=0.5), mt.RandFlipd(KEYS, prob=0.5), mt.NormalizeIntensityd("image")])

    try:
        set_determinism(3)
        first = run(pipeline())
        set_determinism(3)
        assert all(torch.equal(a, b) for a, b in zip(first, run(pipeline())))
    finally:
        set_determinism(None)
    one, two = pipeline().set_random_state(9), pipeline().set_random_state(9)
    assert all(torch.equal(a, b) for a, b in zip(run(one), run(two)))


@pytest.mark.parametrize("mode", ["replace", "paste"])
def test_in_a_cache_dataset_every_epoch_is_fresh_and_reproducible(mode: str, untouched_random_state: None) -> None:
    loaded = []

    def load(item: dict[str, Any]) -> dict[str, Any]:
        loaded.append(item["name"])
        return item

    def epochs(seed: int, num: int = 3) -> list[torch.Tensor]:
        pipeline = mt.Compose([mt.Lambda(load), transform(mode=mode), mt.RandFlipd(KEYS, prob=0.5)])
        data = CacheDataset([sample() for _ in range(4)], pipeline, num_workers=None, progress=False)
        pipeline.set_random_state(seed)
        return [torch.cat([item["image"], item["label"]]) for _ in range(num) for item in data]

    seen = epochs(seed=3)
    assert len(seen) == 12
    assert len(loaded) == 4, "what comes before it is cached"
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2)), "it is not"
    assert all(torch.equal(a, b) for a, b in zip(seen, epochs(seed=3)))
    assert not any(torch.equal(a, b) for a, b in zip(seen, epochs(seed=4)))


def test_workers_get_it_and_differ() -> None:
    data = Dataset([sample() for _ in range(8)], transform(num_cells=(2, 6)))
    seen = []
    for num_workers in (0, 2):
        loader = DataLoader(data, batch_size=2, num_workers=num_workers)
        batches = list(loader)
        assert [batch["image"].shape for batch in batches] == [(2, 1, 40, 30)] * 4
        assert isinstance(batches[0]["image"], MetaTensor)
        seen += [image.as_tensor() for batch in batches for image in batch["image"]]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_it_can_be_pickled_in_use() -> None:
    apply = transform().set_random_state(0)
    apply(sample())
    twin = pickle.loads(pickle.dumps(apply))
    assert torch.equal(apply(sample())["image"], twin(sample())["image"])


def test_reuse_is_bounded() -> None:
    cascade = FakeCascade()
    apply = transform(cascade=cascade, max_reuse=3, num_cells=(3, 7)).set_random_state(0)
    run(apply, 60)
    uses = Counter(itertools.chain.from_iterable(cascade.dealt))
    assert max(uses.values()) == 3
    assert sum(uses.values()) / cascade.num_made > 2.4
    assert all(len(set(frame)) == len(frame) for frame in cascade.dealt)


def test_the_pool_lets_go_of_used_cells() -> None:
    pool = CellPool(FakeCascade(), 2, SampleKey(0))
    held = []
    for i in range(200):
        assert len(pool.take(5, SampleKey(1, (i,)))) == 5
        held.append(pool.num_blocks)
    assert max(held) < 20
    assert len(pool.take(0, SampleKey(2))) == 0


def test_metadata_and_voxel_size() -> None:
    data = {
        "image": MetaTensor(sample()["image"], affine=torch.diag(torch.tensor([2.0, 2, 1, 1])), meta={"file": "a.tif"}),
        "label": MetaTensor(sample()["label"].astype(np.int64)),
    }
    out = transform()(data)
    assert out["image"].meta["file"] == "a.tif"
    assert out["image"].affine.diag().tolist() == [2, 2, 1, 1], "unknown to the cascade, so the sample's own"
    out = transform(cascade=FakeCascade(voxel_size_um=(1.0, 0.5, 0.25)))(data)
    for key in KEYS:
        assert out[key].affine.diag().tolist() == [0.5, 0.25, 1, 1]
    assert data["image"].affine.diag().tolist() == [2, 2, 1, 1]
    out = transform(cascade=FakeCascade(voxel_size_um=(1.0, 0.5, 0.25)), mode="paste")(data)
    assert out["image"].affine.diag().tolist() == [2, 2, 1, 1]
    try:
        set_track_meta(False)
        assert type(transform()(data)["image"]) is torch.Tensor
    finally:
        set_track_meta(True)


def volume() -> dict[str, Any]:
    image = np.full((1, 20, 22, 18), 100, np.float32)
    label = np.zeros(image.shape, np.uint16)
    label[:, 2:5, 3:9, 3:9], label[:, 12:17, 12:17, 10:15] = 7, 3
    image[label > 0] += 40
    affine = torch.diag(torch.tensor([3.0, 2, 2, 1]))
    return {
        "image": MetaTensor(image, affine=affine, meta={"file": "a.tif"}),
        "label": MetaTensor(label.astype(np.int64)),
    }


def test_volumes(untouched_random_state: None) -> None:
    cascade = FakeCascade3D(voxel_size_um=(2.0, 0.8, 0.75))
    out = transform(cascade=cascade).set_random_state(0)(volume())
    for key, dtype in (("image", torch.float32), ("label", torch.int32)):
        assert isinstance(out[key], MetaTensor)
        assert out[key].shape == (1, 20, 22, 18)
        assert out[key].dtype == dtype
        assert out[key].affine.diag().tolist() == [2.0, 0.8, 0.75, 1], "in the order of the tensor's axes"
    assert out["image"].meta["file"] == "a.tif"
    assert out["label"].unique().tolist() == list(range(int(out["label"].max()) + 1))
    assert (out["image"][out["label"] > 0].mean() - out["image"][out["label"] == 0].mean()) > 20
    data = volume()
    out = transform(cascade=cascade, mode="paste", num_cells=6).set_random_state(1)(data)
    assert out["image"].affine.diag().tolist() == [3, 2, 2, 1], "still the sample's own"
    new, old = out["label"].numpy(), data["label"].numpy()
    assert np.array_equal(new == 1, old == 3)
    assert np.array_equal(new == 2, old == 7)
    assert new.max() > 2
    np.testing.assert_array_equal(out["image"].numpy()[new <= 2], data["image"].numpy()[new <= 2])
    assert (out["image"].numpy()[new > 2] > 110).all()


def test_planes_nobody_annotated() -> None:
    data = volume()
    data["label"][:, 8] = UNLABELLED
    out = transform(cascade=FakeCascade3D())(data)
    assert int(out["label"].min()) == 0, "a synthetic volume is labelled throughout"
    assert torch.equal(transform(cascade=FakeCascade3D(), prob=0.0)(data)["label"].long(), data["label"])
    with pytest.raises(InputError, match=r'planes nobody annotated.*mode="replace"'):
        transform(cascade=FakeCascade3D(), mode="paste")(data)


def test_frames_and_volumes_are_not_mixed_up() -> None:
    with pytest.raises(InputError, match=r"\[1, Z, Y, X\] for a 3D cascade, got shape \(1, 40, 30\)"):
        transform(cascade=FakeCascade3D())(sample())
    with pytest.raises(InputError, match=r"\[1, Y, X\] for a 2D cascade, got shape \(1, 20, 22, 18\)"):
        transform(mode="paste")(volume())
    assert CellPool(FakeCascade3D(), 2, SampleKey(0)).take(0, SampleKey(1)).image.shape == (0, 8, 8, 8)


def test_aliases() -> None:
    assert transforms.RandSynthPopulationD is transforms.RandSynthPopulationDict is RandSynthPopulationd


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "add"}, "mode"),
        ({"max_reuse": 0}, "max_reuse"),
        ({"num_cells": "many"}, "num_cells"),
        ({"background": "x"}, "background"),
        ({"label_key": "seg"}, "two keys"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        transform(**changes)
    with pytest.raises(InputError, match="two keys"):
        RandSynthPopulationd(["label"], FakeCascade())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((40, 30))}, "EnsureChannelFirst"),
        ({"image": np.zeros((3, 40, 30))}, r"\(3, 40, 30\) and \(1, 40, 30\)"),
        ({"label": np.zeros((1, 40, 31), int)}, "one shape"),
        ({"label": np.zeros((1, 40, 30))}, "integer type"),
    ],
)
def test_bad_samples(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        transform(mode="paste")(sample() | changes)


def test_cuda_is_refused_in_workers() -> None:
    class OnCuda(FakeCascade):
        device = torch.device("cuda")

    data = Dataset([sample()], transform(cascade=OnCuda()))
    with pytest.raises((InputError, RuntimeError)) as caught:
        next(iter(DataLoader(data, batch_size=1, num_workers=1)))
    chain = f"{caught.value} {caught.value.__cause__}"
    assert "with a cascade on CUDA" in chain
