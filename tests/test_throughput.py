"""`measure_throughput`: what it counts, and that it leaves the stream alone. How long anything takes is not tested."""

from __future__ import annotations

import pytest
import torch

from synthaug import Cascade, SynthDataset, measure_throughput
from synthaug.errors import InputError, SynthAugError


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return Cascade.from_pretrained("nuclei-2d")


def small(cascade: Cascade, **settings) -> SynthDataset:
    return SynthDataset(cascade, (64, 64), batch_size=2, num_cells=3, num_lanes=2, **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_it_counts_what_it_takes_and_the_stream_stays_where_it_is(cascade, num_workers):
    stream, other = small(cascade, num_batches=3), small(cascade)  # epochs shorter than the measurement
    first = next(iter(other))
    found = measure_throughput(stream, num_workers, seconds=0.5)
    assert found.num_workers == num_workers
    assert found.batch_size == 2
    assert found.num_batches >= 1
    assert 0 < found.first_batch_s <= found.warm_up_s
    assert found.samples_per_s > 0
    assert found.wait_ms <= found.longest_wait_ms
    # 3 cells each for 2 samples of every batch, taken or warm-up
    uses = found.fresh_cells * found.mean_reuse
    assert uses == pytest.approx(6 * (found.num_batches + 2), rel=1e-6)
    assert stream.state_dict()["batch"] == 0
    assert stream.stats().batches == 0
    assert torch.equal(next(iter(stream))["image"], first["image"])


def test_a_long_step_hides_the_wait(cascade):
    stream = small(cascade, max_reuse=1000)
    found = measure_throughput(stream.loader(), step_ms=200, seconds=0.6)
    assert found.step_ms == 200
    assert found.batch_ms == pytest.approx(found.wait_ms + 200)
    assert found.num_batches <= 3
    assert "at 200 ms a step" in str(found)
    assert "steps of" in str(measure_throughput(stream, seconds=0.01))
    assert found.as_dict()["wait_share"] == found.wait_share


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"step_ms": -1}, "step_ms"), ({"seconds": 0}, "seconds"), ({"seconds": float("nan")}, "seconds")],
)
def test_wrong_numbers_are_refused(cascade, settings, what):
    with pytest.raises(InputError, match=what):
        measure_throughput(small(cascade), **settings)


def test_what_is_no_stream_is_refused_and_a_fault_is_passed_on(cascade):
    with pytest.raises(InputError, match="SynthDataset"):
        measure_throughput([1, 2])  # type: ignore[arg-type]

    def broken(sample):
        raise ValueError("no")

    with pytest.raises(SynthAugError, match="transform"):
        measure_throughput(small(cascade, transform=broken), seconds=0.1)
