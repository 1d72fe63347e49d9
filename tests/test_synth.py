"""The stream is a pure function of cascade, config and seed: workers, ranks, runs and resumes do not show."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
from monai.data import DataLoader as MonaiDataLoader
from monai.data import MetaTensor, ThreadDataLoader
from monai.utils import set_determinism
from torch.utils.data import DataLoader, IterableDataset

from synthaug.datasets.mixing import RealOrder
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError, ProducerError
from tests.fakes import FakeCascade

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZE = (32, 32)


def real_pairs(num: int = 7, size: tuple[int, int] = (40, 36)) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    return [
        {"image": rng.normal(100, 5, (1, *size)).astype(np.float32), "label": rng.integers(0, 5, (1, *size)) * 3}
        for _ in range(num)
    ]


REAL = real_pairs()


def dataset(**changes: Any) -> SynthDataset:
    settings: dict[str, Any] = {
        "size": SIZE,
        "batch_size": 4,
        "real": REAL,
        "synthetic_ratio": 0.6,
        "max_reuse": 4,
        "num_shards": 4,
    }
    return SynthDataset(changes.pop("cascade", None) or FakeCascade(), **settings | changes)


def digest(batches: Iterable[dict[str, Any]], num: int | None = None) -> str:
    sha, seen = hashlib.sha256(), 0
    for batch in itertools.islice(batches, num):
        assert sorted(batch) == ["image", "label", "synthetic"]
        for key in sorted(batch):
            sha.update(batch[key].numpy().tobytes())
        seen += 1
    assert num is None or seen == num
    return sha.hexdigest()


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """One hash a batch of the first 200 batches, made in this process."""
    return [digest([batch]) for batch in itertools.islice(dataset(), 200)]


def test_batches_are_what_they_say(untouched_random_state: None) -> None:
    stream = dataset()
    for number, batch in enumerate(itertools.islice(stream, 40)):
        image, label, synthetic = batch["image"], batch["label"], batch["synthetic"]
        assert image.shape == label.shape == (4, 1, *SIZE)
        assert (image.dtype, label.dtype, synthetic.dtype) == (torch.float32, torch.int32, torch.bool)
        assert abs(int(synthetic.sum()) - 0.6 * 4) < 1
        assert all(type(value) is torch.Tensor for value in batch.values())
        for sample in label:
            assert sample.unique().tolist() == list(range(int(sample.min()), int(sample.max()) + 1))
        assert stream.state_dict()["batch"] == number + 1
    weight = torch.ones(1, 1, 3, 3, requires_grad=True)
    torch.nn.functional.conv2d(image, weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
def test_workers_do_not_show(num_workers: int, expected: list[str]) -> None:
    loader = dataset().loader(num_workers=num_workers)
    assert [digest([batch]) for batch in itertools.islice(loader, 200)] == expected
    assert loader.stats().batches == 200
    assert loader.stats().fresh_cells == dataset_cost(200)


def dataset_cost(num: int) -> int:
    """Cells that the first batches need, from the plan alone."""
    from synthaug.datasets.stream import Stream

    stream = Stream(dataset().config, FakeCascade(), REAL, None, len(REAL), range(4))
    frames = [frame for batch in range(num) for frame in stream.plan.frames(batch, range(4))]
    return 4 * len({block for frame in frames for block, _ in frame.cells})


def test_plain_data_loaders_give_the_same(expected: list[str]) -> None:
    for loader in (
        DataLoader(dataset(), batch_size=None, num_workers=2),
        MonaiDataLoader(dataset(), batch_size=None, num_workers=2, collate_fn=None),
        MonaiDataLoader(dataset(), batch_size=None, collate_fn=None),
        ThreadDataLoader(dataset(), batch_size=None, num_workers=0, collate_fn=None),
    ):
        assert [digest([batch]) for batch in itertools.islice(loader, 30)] == expected[:30]


def test_monai_without_collate_fn_says_what_to_do() -> None:
    with pytest.raises(InputError, match="collate_fn=None"):
        next(iter(MonaiDataLoader(dataset(), batch_size=None)))
    with pytest.raises(KeyError):
        next(iter(dataset()))["mask"]


def test_awkward_worker_counts_are_right_and_warned_of_once(expected: list[str]) -> None:
    stream = dataset()
    with pytest.warns(UserWarning, match="num_workers=3 does not divide num_lanes=8"):
        loader = stream.loader(num_workers=3)
    assert [digest([batch]) for batch in itertools.islice(loader, 60)] == expected[:60]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not divide")
        stream.loader(num_workers=3)


@pytest.mark.parametrize(("offset", "before", "after"), [(5, 0, 2), (64, 2, 4), (131, 4, 0)])
def test_resume_with_another_worker_count(offset: int, before: int, after: int, expected: list[str]) -> None:
    first = dataset().loader(num_workers=before)
    for _ in itertools.islice(first, offset):
        pass
    state = json.loads(json.dumps(first.state_dict()))
    assert state["batch"] == offset
    second = dataset().loader(num_workers=after)
    second.load_state_dict(state)
    assert [digest([batch]) for batch in itertools.islice(second, 40)] == expected[offset : offset + 40]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_one_stream(world_size: int, expected: list[str]) -> None:
    ranks = [itertools.islice(dataset(rank=rank, world_size=world_size), 30) for rank in range(world_size)]
    for number, parts in enumerate(zip(*ranks)):
        assert all(len(part["image"]) == 4 // world_size for part in parts)
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        assert digest([whole]) == expected[number]


def test_ranks_do_not_make_each_others_cells() -> None:
    def cost(**rank: int) -> int:
        cascade = FakeCascade()
        stream = dataset(cascade=cascade, synthetic_ratio=1.0, **rank)
        for _ in itertools.islice(stream, 40):
            pass
        return stream.stats().fresh_cells

    assert sum(cost(rank=rank, world_size=4) for rank in range(4)) == cost()


def test_ranks_that_repeat_each_others_work_are_warned() -> None:
    with pytest.warns(UserWarning, match="pass num_shards=2"):
        halves = [dataset(num_shards=1, rank=rank, world_size=2) for rank in range(2)]
    whole = next(iter(dataset(num_shards=1)))
    parts = [next(iter(half)) for half in halves]
    assert digest([{key: torch.cat([part[key] for part in parts]) for key in whole}]) == digest([whole])


def test_another_process_and_other_settings(expected: list[str]) -> None:
    code = (
        "import torch; torch.set_num_threads(3)\n"
        "from tests.test_synth import *\n"
        "torch.set_default_dtype(torch.float32); torch.manual_seed(9)\n"
        "with torch.autocast('cpu', torch.bfloat16), torch.device('meta'):\n"
        "    print([digest([b]) for b in itertools.islice(dataset(), 20)][-1])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert out.stdout.strip() == expected[19], out.stderr
    assert digest(dataset(seed=1), 5) != digest(dataset(), 5)
    assert digest(dataset(max_reuse=5), 30) != digest(dataset(), 30)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1 / 3, 0.5, 0.75, 1.0])
def test_the_ratio_is_exact(ratio: float) -> None:
    stream = dataset(synthetic_ratio=ratio, batch_size=6, num_shards=1, size=(16, 16), num_cells=0)
    counts = [int(batch["synthetic"].sum()) for batch in itertools.islice(stream, 50)]
    assert all(abs(n - ratio * 6) < 1 for n in counts)
    assert abs(sum(counts) - ratio * 300) < 1
    assert (stream.stats().synthetic, stream.stats().real) == (sum(counts), 300 - sum(counts))
    assert stream.stats().uses == 0


def test_ratio_zero_is_the_users_own_loader_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.normal(0, 1, (1, *SIZE)).astype(np.float32)) for _ in range(5)]
    labels = [torch.arange(32 * 32, dtype=torch.int32).reshape(1, *SIZE) // (i + 200) for i in range(5)]
    real = [{"image": image, "label": label} for image, label in zip(images, labels)]
    own = DataLoader(real, batch_sampler=RealOrder(5, batch_size=4, seed=3, num_batches=30))
    stream = dataset(real=real, synthetic_ratio=0, seed=3, num_batches=30)
    for mine, theirs in zip(stream, own, strict=True):
        assert torch.equal(mine["image"], theirs["image"])
        assert torch.equal(mine["label"], theirs["label"])
        assert mine["image"].dtype == theirs["image"].dtype
        assert mine["label"].dtype == theirs["label"].dtype
    assert stream.cascade.num_calls == 0


def test_ratio_one_needs_no_real_data() -> None:
    batch = next(iter(SynthDataset(FakeCascade(), SIZE, 4)))
    assert batch["synthetic"].all()
    assert batch["label"].amax(dim=(1, 2, 3)).min() > 0


def test_reuse_is_bounded_and_reported() -> None:
    cascade = FakeCascade()
    stream = dataset(cascade=cascade, synthetic_ratio=1.0, max_reuse=3, num_cells=(4, 9))
    for _ in itertools.islice(stream, 300):
        pass
    uses = Counter(itertools.chain.from_iterable(cascade.dealt))
    stats = stream.stats()
    assert max(uses.values()) == stats.max_reuse == 3
    assert sum(uses.values()) == stats.uses == stats.requested
    assert stats.placed <= stats.requested
    assert all(len(set(frame)) == len(frame) for frame in cascade.dealt)
    assert stats.fresh_cells <= cascade.num_made, "the producer may be ahead"
    assert 2.3 < stats.mean_reuse <= 3
    assert stats.over_bound_uses == 0
    assert stats.rejects["empty"] == stats.fresh_cells / 4


def test_memory_stays_bounded() -> None:
    stream = dataset(synthetic_ratio=1.0, num_shards=1)
    held = []
    for batch in itertools.islice(stream, 700):
        del batch
        held.append(stream._stream.bank.num_blocks)
    assert max(held[350:]) <= 1.3 * max(held[:350])
    assert max(held) * 4 < stream.stats().fresh_cells / 3
    assert len(stream._stream.plan._periods) <= 3 * 8


def test_starving_with_reuse_is_counted() -> None:
    stream = dataset(cascade=FakeCascade(delay=0.05), synthetic_ratio=1.0, on_starve="reuse", max_reuse=2)
    batches = list(itertools.islice(stream, 40))
    stats = stream.stats()
    assert len(batches) == 40
    assert stats.starved_batches > 5
    assert stats.over_bound_uses > 0
    assert stats.max_reuse > 2


def test_starving_with_wait_changes_nothing() -> None:
    slow = dataset(cascade=FakeCascade(delay=0.03))
    assert digest(slow, 10) == digest(dataset(), 10)
    assert slow.stats().starved_batches > 0
    assert slow.stats().wait_seconds > 0
    assert slow.stats().over_bound_uses == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_producer_error_surfaces(num_workers: int) -> None:
    with pytest.raises(ProducerError, match="went up in smoke") as caught:
        for _ in itertools.islice(dataset(cascade=FakeCascade(fail_at=20)).loader(num_workers=num_workers), 100):
            pass
    if num_workers == 0:
        assert isinstance(caught.value.__cause__, ArithmeticError)


def test_after_an_error_the_stream_goes_on_where_it_was(expected: list[str]) -> None:
    cascade = FakeCascade(fail_at=20)
    stream = dataset(cascade=cascade)
    seen = []
    with pytest.raises(ProducerError):
        seen += [digest([batch]) for batch in stream]
    cascade.fail_at = None
    start = stream.state_dict()["batch"]
    assert [digest([batch]) for batch in itertools.islice(stream, 20)] == expected[start : start + 20]


def test_threads_end_with_the_stream() -> None:
    # By identity, not by number: threads of streams from earlier tests may end at any moment.
    def ours() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("synthaug")}

    def alive(threads: set[threading.Thread]) -> set[threading.Thread]:
        # What a thread is busy with when the stream is dropped keeps it from being collected until that is done.
        for thread in threads:
            thread.join(timeout=10)
        return {thread for thread in threads if thread.is_alive()}

    before = ours()
    stream = dataset()
    next(iter(stream))
    first = ours() - before
    assert len(first) == 2
    stream.close()
    assert not alive(first)
    next(iter(stream))
    second = ours() - before
    assert len(second) == 2
    del stream
    assert not alive(second)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_follow_one_another(num_workers: int, expected: list[str]) -> None:
    stream = dataset(num_batches=6)
    loader = stream.loader(num_workers=num_workers)
    assert len(loader) == len(stream) == 6
    seen = [digest([batch]) for _ in range(3) for batch in loader]
    assert seen == expected[:18]
    for _ in itertools.islice(loader, 2):
        pass
    assert [digest([batch]) for batch in loader] == expected[20:26], "an epoch left early is followed by a whole one"
    for _ in itertools.islice(loader, 2):
        pass
    later = dataset(num_batches=6).loader(num_workers=2 - num_workers)
    later.load_state_dict(loader.state_dict())
    assert [digest([batch]) for batch in later] == expected[28:32], "a resumed epoch is finished"
    assert [digest([batch]) for batch in later] == expected[32:38]


@pytest.mark.parametrize("persistent", [False, True])
def test_a_plain_loader_with_workers_brings_fresh_epochs_too(persistent: bool, expected: list[str]) -> None:
    loader = DataLoader(dataset(num_batches=5), batch_size=None, num_workers=2, persistent_workers=persistent)
    assert [digest([batch]) for _ in range(3) for batch in loader] == expected[:15]


def test_workers_begin_where_this_process_got_to(expected: list[str]) -> None:
    stream = dataset()
    for _ in itertools.islice(stream, 7):
        pass
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert [digest([batch]) for batch in itertools.islice(loader, 5)] == expected[7:12]
    assert [digest([batch]) for batch in itertools.islice(stream, 5)] == expected[7:12], "which it did not count"


def test_an_endless_plain_loader_that_starts_over_says_so() -> None:
    stream = dataset()
    stream._progress.begin_in_worker(0, 2)
    with pytest.warns(UserWarning, match=r"once more, again at batch 0.*loader\(num_workers"):
        stream._progress.begin_in_worker(0, 2)


def test_every_worker_can_restore_its_own_copy(expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchdata's StatefulDataLoader does."""
    from synthaug.datasets import progress, synth

    class Worker:
        id, num_workers = 1, 2

    for module in (progress, synth):
        monkeypatch.setattr(module, "get_worker_info", Worker)
    stream = dataset()
    assert [digest([batch]) for batch in itertools.islice(stream, 4)] == expected[1:8:2]
    other = dataset()
    other.load_state_dict(stream.state_dict())
    assert [digest([batch]) for batch in itertools.islice(other, 4)] == expected[9:16:2]


def test_a_state_of_another_stream_is_refused() -> None:
    state = dataset().state_dict()
    with pytest.raises(InputError, match=r"max_reuse 4 \(here 9\)"):
        dataset(max_reuse=9).load_state_dict(state)
    with pytest.raises(InputError, match="num_real 7"):
        dataset(real=REAL[:3]).load_state_dict(state)
    other = FakeCascade()
    other.fingerprint = lambda: "other"  # type: ignore[method-assign]
    with pytest.raises(InputError, match="cascade 'fake'"):
        dataset(cascade=other).load_state_dict(state)
    with pytest.raises(InputError, match="state_dict"):
        dataset().load_state_dict({"epoch": 3})
    dataset(on_starve="reuse", transform=lambda sample: sample).load_state_dict(state)


def test_monai_cannot_reseed_it(expected: list[str]) -> None:
    stream = dataset()
    assert stream.set_random_state(seed=99) is stream
    assert digest([next(iter(stream))]) == expected[0]


class Nothing(IterableDataset):
    """An endless data set that draws no random numbers."""

    def __iter__(self) -> Iterable[dict[str, Any]]:
        return itertools.repeat({})


@pytest.mark.parametrize("kind", [MonaiDataLoader, ThreadDataLoader])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_set_determinism_changes_nothing_here_and_nothing_there(
    kind: type, num_workers: int, expected: list[str]
) -> None:
    def loader(data: Any) -> Any:
        return kind(data, batch_size=None, num_workers=num_workers, collate_fn=None)

    def draws() -> tuple[list[float], list[float]]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist()  # noqa: NPY002

    try:
        for seed in (7, 8):
            set_determinism(seed)
            for _ in itertools.islice(loader(Nothing()), 12):
                pass
            after_nothing = draws()  # MONAI's loaders draw seeds of their own
            set_determinism(seed)
            assert [digest([batch]) for batch in itertools.islice(loader(dataset()), 12)] == expected[:12]
            assert draws() == after_nothing
    finally:
        set_determinism(None)


def test_copies_are_independent(expected: list[str]) -> None:
    stream = dataset()
    next(iter(stream))
    twin = copy.deepcopy(stream)
    assert [digest([batch]) for batch in itertools.islice(twin, 3)] == expected[1:4]
    assert [digest([batch]) for batch in itertools.islice(stream, 3)] == expected[1:4]
    spawned = dataset().loader(num_workers=1, multiprocessing_context="spawn")
    assert [digest([batch]) for batch in itertools.islice(spawned, 3)] == expected[:3]


# Transforms ---------------------------------------------------------------------------------------------------------


def test_monai_transforms_keep_the_stream_pure(untouched_random_state: None) -> None:
    def pipeline() -> mt.Compose:
        return mt.Compose(
            [
                mt.ScaleIntensityd("image"),
                mt.RandFlipd(["image", "label"], prob=0.5, spatial_axis=0),
                mt.RandGaussianNoised("image", prob=0.7),
                mt.RandSpatialCropd(["image", "label"], roi_size=(24, 24), random_size=False),
            ]
        )

    hashes = {digest(dataset(transform=pipeline()).loader(num_workers=n), 20) for n in (0, 2)}
    stream = dataset(transform=pipeline())
    resumed = dataset(transform=pipeline())
    state_after_8 = None
    parts = []
    for batch in itertools.islice(stream, 8):
        parts.append(batch)
        state_after_8 = stream.state_dict()
    assert state_after_8 is not None
    resumed.load_state_dict(state_after_8)
    hashes.add(digest([*parts, *itertools.islice(resumed, 12)]))
    assert len(hashes) == 1
    assert parts[0]["image"].shape == (4, 1, 24, 24)
    assert type(parts[0]["image"]) is torch.Tensor
    assert hashes != {digest(dataset(transform=pipeline(), seed=1), 20)}


def test_a_transform_may_add_keys_and_change_dtypes() -> None:
    def transform(sample: dict[str, Any]) -> dict[str, Any]:
        border = MetaTensor((sample["label"] > 0).to(torch.uint8))
        return {**sample, "label": border, "weight": 0.5, "name": "x"}

    batch = next(iter(dataset(transform=transform)))
    assert sorted(batch) == ["image", "label", "synthetic", "weight"]
    assert batch["label"].dtype == torch.uint8
    assert batch["weight"].tolist() == [0.5] * 4


def test_transform_errors_name_the_sample() -> None:
    def broken(sample: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError("oops")

    with pytest.raises(
        InputError, match=r"transform of real\[\d\], sample 0 of batch 0: .* got ZeroDivisionError: oops"
    ):
        next(iter(dataset(transform=broken, synthetic_ratio=0.0)))
    with pytest.raises(InputError, match="transform of synthetic sample 0 of batch 0: expected") as caught:
        next(iter(dataset(transform=broken, synthetic_ratio=1.0)))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def refuses(sample: dict[str, Any]) -> dict[str, Any]:
        raise InputError("label", expected="x", got="y")

    with pytest.raises(InputError, match=r"^label: expected x") as caught:
        next(iter(dataset(transform=refuses, synthetic_ratio=1.0)))
    assert "synthetic sample 0 of batch 0" in caught.value.__notes__[0]


def test_transforms_that_do_not_fit() -> None:
    shapes = iter(range(20, 40))
    with pytest.raises(InputError, match="one shape for all samples"):
        next(iter(dataset(transform=lambda s: {k: v[:, : next(shapes)] for k, v in s.items()})))
    with pytest.raises(InputError, match=r"keys \['image'\]"):
        next(iter(dataset(transform=lambda s: {"image": s["image"]})))
    with pytest.raises(InputError, match="got list"):
        next(iter(dataset(transform=lambda s: [s, s])))
    dtypes = itertools.cycle([torch.float32, torch.float64])
    with pytest.raises(InputError, match="one dtype"):
        next(iter(dataset(transform=lambda s: {**s, "image": s["image"].to(next(dtypes))})))


# Arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 256}, "size"),
        ({"size": (0, 4)}, "size"),
        ({"size": (4.0, 4)}, "size"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"max_reuse": 0}, "max_reuse"),
        ({"num_lanes": 0}, "num_lanes"),
        ({"synthetic_ratio": 1.5}, "synthetic_ratio"),
        ({"real": None}, "real"),
        ({"seed": "a"}, "seed"),
        ({"num_cells": -1}, "num_cells"),
        ({"num_cells": (5, 2)}, "num_cells"),
        ({"num_cells": 3, "density": 0.1}, "density"),
        ({"density": -1.0}, "density"),
        ({"clustering": 2}, "clustering"),
        ({"background": "white"}, "background"),
        ({"on_starve": "die"}, "on_starve"),
        ({"transform": 3}, "transform"),
        ({"num_batches": 0}, "num_batches"),
        ({"num_shards": 3}, "num_shards"),
        ({"rank": 1}, "rank"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"rank": 0, "world_size": 3}, "multiple of world_size = 3"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataset(**changes)


def test_bad_loaders() -> None:
    with pytest.raises(InputError, match="Set batch_size on SynthDataset"):
        dataset().loader(batch_size=4)
    with pytest.raises(InputError, match="shuffle"):
        dataset().loader(shuffle=True)
    with pytest.raises(InputError, match="at most 64"):
        dataset().loader(num_workers=65)
    with pytest.raises(TypeError, match="endless"):
        len(dataset())


def test_cuda_stays_in_one_process() -> None:
    class OnCuda(FakeCascade):
        device = torch.device("cuda")

    stream = dataset(cascade=OnCuda())
    with pytest.raises(InputError, match="num_workers=0"):
        stream.loader(num_workers=2)
    # InputError takes more than a message, so the DataLoader turns it into a RuntimeError with the same text.
    with pytest.raises((InputError, RuntimeError), match="expected 0 with a cascade on CUDA"):
        next(iter(DataLoader(stream, batch_size=None, num_workers=1)))


def test_real_images_that_are_too_small_are_named() -> None:
    with pytest.raises(InputError, match=r"real\[\d\].*at least \(64, 64\).*got \(40, 36\)"):
        next(iter(dataset(size=(64, 64))))


def test_torch_distributed_gives_the_rank(monkeypatch: pytest.MonkeyPatch, expected: list[str]) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    second = next(iter(dataset()))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    first = next(iter(dataset()))
    assert digest([{key: torch.cat([first[key], second[key]]) for key in first}]) == expected[0]
