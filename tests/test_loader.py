"""SynthLoader: a worker that dies is an error that says what to do, and the loader goes on after it."""

from __future__ import annotations

import copy
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from synthaug.datasets.synth import SynthDataset
from synthaug.errors import ProducerError
from tests.fakes import FakeCascade

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

DEATHS: dict[str, Callable[[], Any]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda: os._exit(3),
}


class DieIf:
    """A transform that ends its process while the file is there."""

    def __init__(self, flag: Path, death: Callable[[], Any]) -> None:
        self.flag, self.death = flag, death

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        if self.flag.exists():
            self.death()
        return sample


def images(batches: Any, num: int) -> list[torch.Tensor]:
    return [batch["image"] for batch in itertools.islice(batches, num)]


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
def test_a_worker_that_dies(tmp_path: Path, death: Callable[[], Any]) -> None:
    settings: dict[str, Any] = {"size": (32, 32), "batch_size": 4, "num_lanes": 2, "num_batches": 3}
    expected = images(itertools.chain(*[SynthDataset(FakeCascade(), **settings)] * 2), 6)
    flag = tmp_path / "die"
    loader = SynthDataset(FakeCascade(), **settings, transform=DieIf(flag, death)).loader(num_workers=2, timeout=60)
    seen = images(loader, 3)
    flag.touch()
    for _ in range(2):
        with pytest.raises(ProducerError, match=r"worker of the loader died: .*pid.*fewer num_workers") as caught:
            images(loader, 3)
        assert isinstance(caught.value.__cause__, RuntimeError)
    flag.unlink()
    assert loader.stats().batches == 3
    seen += images(loader, 3)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True)), "it goes on where the training was"


def test_a_worker_left_over_does_not_mislead_those_started_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = SynthDataset(FakeCascade(), size=(32, 32), batch_size=4, num_lanes=2, num_batches=3)
    seen = images(dataset.loader(num_workers=2), 1)
    late = copy.copy(dataset._progress)  # what a worker of that loader has, which is slow to begin
    launch = dataset.launch

    def launch_after_it(start: Callable[[], Any], board: torch.Tensor) -> Any:
        return launch(lambda: (late.begin_in_worker(0, 2), late.begin_in_worker(1, 2), start())[-1], board)

    monkeypatch.setattr(dataset, "launch", launch_after_it)
    seen += images(dataset.loader(num_workers=2), 2)
    expected = images(SynthDataset(FakeCascade(), size=(32, 32), batch_size=4, num_lanes=2), 3)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_other_errors_stay_what_they_are() -> None:
    loader = SynthDataset(FakeCascade(), size=(32, 32), batch_size=2).loader()
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"), loader._worker_deaths():
        raise RuntimeError("CUDA out of memory")
