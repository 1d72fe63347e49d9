"""A fault in the stream reaches the training loop as an error that says what to do, with every loader; nothing hangs."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
from monai.data import DataLoader as MonaiDataLoader
from monai.data import ThreadDataLoader
from torch.utils.data import DataLoader

from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError, ProducerError
from tests.fakes import FakeCascade

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

PATIENCE = 60.0
"""Seconds after which a loader counts as hung."""

LOADERS: dict[str, Callable[[SynthDataset], Any]] = {
    "loader, no workers": lambda data: data.loader(),
    "loader, 2 workers": lambda data: data.loader(num_workers=2, timeout=PATIENCE),
    "DataLoader, no workers": lambda data: DataLoader(data, batch_size=None),
    "DataLoader, 2 workers": lambda data: DataLoader(data, batch_size=None, num_workers=2, timeout=PATIENCE),
    "MONAI's, 2 workers": lambda data: MonaiDataLoader(
        data, batch_size=None, collate_fn=None, num_workers=2, timeout=PATIENCE
    ),
    "ThreadDataLoader": lambda data: ThreadDataLoader(
        data, batch_size=None, collate_fn=None, num_workers=0, buffer_timeout=0.1
    ),
}
every_loader = pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)


@pytest.fixture(autouse=True)
def impatient_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error torch lets each worker sleep on for so many seconds, whatever the data set is; 5 by default."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)


def stream(cascade: Any = None, **changes: Any) -> SynthDataset:
    settings: dict[str, Any] = {"size": (32, 32), "batch_size": 4, "max_reuse": 2, "num_lanes": 2}
    return SynthDataset(cascade or FakeCascade(), **settings | changes)


def consume(batches: Any, num: int = 100) -> None:
    """Take batches as a training does; in a thread, so that a loader that hangs fails the test instead of stopping it."""
    outcome: queue.Queue[BaseException | None] = queue.Queue()

    def loop() -> None:
        try:
            for batch in itertools.islice(batches, num):
                assert batch["image"].shape[0] == 4
            outcome.put(None)
        except BaseException as error:
            outcome.put(error)

    threading.Thread(target=loop, daemon=True).start()
    try:
        error = outcome.get(timeout=PATIENCE + 10)
    except queue.Empty:
        pytest.fail("the loader hangs")
    if error is not None:
        raise error


@every_loader
def test_a_producer_that_fails(loader: Callable[[SynthDataset], Any]) -> None:
    with pytest.raises(ProducerError, match="went up in smoke"):
        consume(loader(stream(FakeCascade(fail_at=6))))


@every_loader
def test_a_transform_that_throws(loader: Callable[[SynthDataset], Any]) -> None:
    def broken(sample: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError("oops")

    message = r"transform of synthetic sample 0 of batch \d: (.|\n)*ZeroDivisionError: oops. Call it on"
    with pytest.raises(InputError, match=message):
        consume(loader(stream(transform=broken)))


@every_loader
def test_a_transform_of_monai_that_does_not_fit(loader: Callable[[SynthDataset], Any]) -> None:
    missing = mt.Compose([mt.ScaleIntensityd("picture")])
    with pytest.raises(InputError, match="because of KeyError: 'Key `picture`"):
        consume(loader(stream(transform=missing)))


@every_loader
def test_a_real_sample_that_does_not_fit(loader: Callable[[SynthDataset], Any]) -> None:
    real = [(np.zeros((40, 40), np.float32), np.zeros((40, 40), np.float32))] * 3
    with pytest.raises(InputError, match=r"real\[\d\] label: expected instance labels(.|\n)*number its cells with"):
        consume(loader(stream(real=real, synthetic_ratio=0.5)))


def test_a_batch_that_failed_raises_wherever_it_is_used() -> None:
    (batch,) = ThreadDataLoader(stream(FakeCascade(fail_at=0)), batch_size=None, collate_fn=None, num_workers=0)
    uses: list[Callable[[], Any]] = [
        lambda: batch["image"],
        lambda: batch.get("image"),
        lambda: batch.pop("image"),
        lambda: "image" in batch,
        lambda: dict(**batch),
        lambda: batch.items(),
        lambda: batch.values(),
    ]
    for use in uses:
        with pytest.raises(ProducerError, match="went up in smoke"):
            use()


@every_loader
def test_frames_without_cells_are_batches_like_others(loader: Callable[[SynthDataset], Any]) -> None:
    batches = list(itertools.islice(loader(stream(num_cells=(0, 1), num_batches=8)), 8))
    counts = torch.cat([batch["label"].flatten(1).amax(1) for batch in batches]).tolist()
    assert set(counts) == {0, 1}
    assert all(batch["image"].shape == batch["label"].shape == (4, 1, 32, 32) for batch in batches)
    assert all(torch.isfinite(batch["image"]).all() for batch in batches)
