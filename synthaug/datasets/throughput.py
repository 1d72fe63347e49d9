"""`measure_throughput`: would the training wait for its data on this machine?"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from synthaug.datasets.loader import SynthLoader
from synthaug.datasets.synth import SynthDataset, dataset_of
from synthaug.errors import InputError


@dataclass(frozen=True)
class Throughput:
    """What `measure_throughput` found; `print` it.

    Attributes:
        num_workers: Worker processes of the loader.
        batch_size: Samples in a batch, of this rank.
        step_ms: Length of the training step that was stood in for, or 0.
        first_batch_s: From `iter()` to the first batch, seconds, the start of the workers included.
        warm_up_s: Until every lane had handed out a batch, seconds: then the first cells of all of them are there.
        num_batches: Batches timed after that.
        samples_per_s: Samples a second taken in that time.
        wait_ms: Mean wait for a batch, milliseconds.
        longest_wait_ms: The longest.
        wait_share: Share of the time spent waiting; near 1 with step_ms=0, when nothing but the loader takes time.
        fresh_cells: Cells made for the batches taken, warm-up included.
        mean_reuse: Uses of a cell in the mean; it grows towards `max_reuse` as the stream goes on.
        bank_mib: Memory of the cells in play, of the process that held most, MiB.
    """

    num_workers: int
    batch_size: int
    step_ms: float
    first_batch_s: float
    warm_up_s: float
    num_batches: int
    samples_per_s: float
    wait_ms: float
    longest_wait_ms: float
    wait_share: float
    fresh_cells: int
    mean_reuse: float
    bank_mib: float

    @property
    def batch_ms(self) -> float:
        """Milliseconds from one batch to the next. With step_ms=0, a training whose steps take longer does not wait."""
        return self.wait_ms + self.step_ms

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "batch_ms": self.batch_ms}

    def __str__(self) -> str:
        paced = f"waits {self.wait_share:.0%} of the time at {self.step_ms:g} ms a step"
        free = f"keeps up with steps of {self.batch_ms:.0f} ms and more"
        return (
            f"{self.num_workers} workers: {self.samples_per_s:.1f} samples a second, {paced if self.step_ms else free}; "
            f"first batch after {self.first_batch_s:.1f} s, longest wait {self.longest_wait_ms:.0f} ms; "
            f"{self.fresh_cells} fresh cells, each used {self.mean_reuse:.1f} times, {self.bank_mib:.0f} MiB"
        )


def measure_throughput(
    stream: SynthDataset | SynthLoader, num_workers: int = 0, step_ms: float = 0.0, seconds: float = 20.0
) -> Throughput:
    """Time a loader of a stream; the stream stays where it is.

    The training step is stood in for by a sleep: that is a training on a GPU, which leaves the cores to the loader. One that
    needs the cores itself waits more. Fresh cells come in blocks, so that short measurements vary: take some blocks' time.

    Args:
        stream: A `SynthDataset` or its loader. A copy of it is read.
        num_workers: Worker processes of the loader that is timed, whatever that of `stream` has.
        step_ms: Milliseconds of a training step; 0 takes the batches as fast as they come.
        seconds: How long batches are timed, after the warm-up.

    Returns:
        Rates and waits, see `Throughput`.

    Raises:
        InputError: An argument is not what it has to be, or workers were asked for a cascade on CUDA.
        ProducerError: The stream cannot make its samples.

    >>> from synthaug import Cascade, SynthDataset, measure_throughput
    >>> stream = SynthDataset(Cascade.from_pretrained("nuclei-2d"), (64, 64), batch_size=2, num_cells=2, num_lanes=1)
    >>> measure_throughput(stream, step_ms=1, seconds=0.1).samples_per_s > 0
    True
    """
    dataset = dataset_of(stream)
    for name, value, least in (("step_ms", step_ms, 0), ("seconds", seconds, 0.01)):
        if not isinstance(value, int | float) or not least <= value < math.inf:
            raise InputError(name, expected=f"a number >= {least}", got=repr(value))
    twin = dataset.twin()
    loader = twin.loader(num_workers=num_workers)
    waits: list[float] = []
    try:
        begun = time.perf_counter()
        batches = _endless(loader)
        batch_size = len(next(batches)["image"])
        first_batch_s = time.perf_counter() - begun
        for _ in range(dataset.config.num_lanes - 1):
            next(batches)
        warm = time.perf_counter()
        while not waits or time.perf_counter() - warm < seconds:
            asked = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - asked)
            if step_ms:
                time.sleep(step_ms / 1e3)
        spent = time.perf_counter() - warm
        stats = loader.stats()
    finally:
        twin.close()
    return Throughput(
        num_workers=num_workers,
        batch_size=batch_size,
        step_ms=float(step_ms),
        first_batch_s=first_batch_s,
        warm_up_s=warm - begun,
        num_batches=len(waits),
        samples_per_s=len(waits) * batch_size / spent,
        wait_ms=1e3 * sum(waits) / len(waits),
        longest_wait_ms=1e3 * max(waits),
        wait_share=sum(waits) / spent,
        fresh_cells=stats.fresh_cells,
        mean_reuse=stats.mean_reuse,
        bank_mib=stats.bank_bytes / 2**20,
    )


def _endless(loader: SynthLoader) -> Iterator[dict[str, Any]]:
    """One epoch after the other."""
    while True:
        yield from loader
