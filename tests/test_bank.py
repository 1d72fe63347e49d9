"""Who gets which cell: the bounds on reuse, the plan, the store, and both ways to starve."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from synthaug.datasets.bank import PERIOD, Bank, Dealer, Plan, StreamStats, deal
from synthaug.datasets.mixing import Mix
from synthaug.datasets.producer import SerialThread
from synthaug.errors import ProducerError
from synthaug.randomness import SampleKey
from tests.fakes import FakeCascade


@pytest.mark.parametrize("max_reuse", [1, 3, 16])
@pytest.mark.parametrize("counts", [[20] * 64, [0, 0, 0], [], [1], [0, 31, 2] * 9, list(range(30)), [70, 1, 1, 1]])
def test_deal_keeps_both_bounds_and_wastes_little(counts: list[int], max_reuse: int) -> None:
    block = 8
    hands = deal(counts, block, max_reuse, np.random.default_rng(0))
    assert [len(hand) for hand in hands] == counts
    assert all(len(set(hand.tolist())) == len(hand) for hand in hands), "a cell twice in one frame"
    uses = Counter(itertools.chain.from_iterable(hand.tolist() for hand in hands))
    assert max(uses.values(), default=0) <= max_reuse
    needed = max(-(-sum(counts) // (block * max_reuse)), -(-max(counts, default=0) // block))
    blocks = 1 + max(uses, default=-1) // block
    assert needed <= blocks <= needed + 1


def test_early_frames_need_few_blocks_and_later_ones_mix() -> None:
    hands = deal([20] * 128, 8, 16, np.random.default_rng(0))
    opened = np.maximum.accumulate([hand.max() // 8 + 1 for hand in hands])
    assert opened[0] == 3, "20 different cells are 3 blocks of 8"
    assert np.diff(opened).max() <= 2, "the producer's load is steady"
    later = [len(set((hand // 8).tolist())) for hand in hands[30:100]]
    assert np.mean(later) > 4
    overlap = [len(set(a.tolist()) & set(b.tolist())) for a, b in itertools.pairwise(hands[30:100])]
    assert np.mean(overlap) < 14


def test_an_endless_dealer_forgets_what_is_used_up() -> None:
    dealer, rng, uses = Dealer(4, 5), np.random.default_rng(0), Counter()
    for _ in range(400):
        hand = dealer.deal(6, rng).tolist()
        assert len(set(hand)) == 6
        uses.update(hand)
    assert max(uses.values()) == 5
    assert len(dealer.left) < 80
    assert dealer.is_used_up(0)
    assert not dealer.is_used_up(dealer.num_blocks - 1)
    assert 2400 / (4 * dealer.num_blocks) > 4.5, "mean reuse is near the bound"


def count(keys: list[SampleKey]) -> list[int]:
    return FakeCascade().num_cells(keys, (32, 32))


def make_plan(batch_size: int = 8, ratio: float = 1.0, max_reuse: int = 4, num_shards: int = 2) -> Plan:
    return Plan(Mix(batch_size, ratio, 7, num_real=5), 7, 8, num_shards, 4, max_reuse, count)


def test_a_plan_does_not_depend_on_where_it_is_entered() -> None:
    straight = make_plan(ratio=0.6)
    frames = {b: straight.frames(b, range(8)) for b in range(0, 3 * 8 * PERIOD, 37)}
    for batch in sorted(frames, reverse=True):
        assert make_plan(ratio=0.6).frames(batch, range(8)) == frames[batch]


@pytest.mark.parametrize(("batch_size", "num_shards"), [(8, 4), (6, 2), (5, 1)])
def test_shards_and_periods_share_no_cell(batch_size: int, num_shards: int) -> None:
    plan = make_plan(batch_size, num_shards=num_shards)
    where: dict = {}
    for batch in range(8 * PERIOD + 40):
        for frame in plan.frames(batch, range(batch_size)):
            for block, _ in frame.cells:
                assert block.lane == batch % 8
                assert block.shard == frame.slot * num_shards // batch_size
                assert plan.last_batch(block) >= batch
                where.setdefault(block, set()).add(batch)
    keys = [key for block in where for key in plan.cell_keys(block)]
    assert len(set(keys)) == len(keys)
    assert {len({b.period for b in where if (b.lane, b.shard) == (1, s)}) for s in range(num_shards)} == {2}
    assert all(max(batches) == plan.last_batch(b) for b, batches in where.items() if b.period == 0)


def test_no_cell_is_dealt_more_than_max_reuse_times() -> None:
    plan, uses = make_plan(max_reuse=3), Counter()
    for batch in range(600):
        for frame in plan.frames(batch, range(8)):
            assert len(set(frame.cells)) == len(frame.cells)
            uses.update(frame.cells)
    assert max(uses.values()) == 3
    assert np.mean(list(uses.values())) > 2.2


@pytest.fixture
def producer() -> Iterator[SerialThread]:
    thread = SerialThread("test")
    yield thread
    thread.close()


def run(bank: Bank, plan: Plan, batches: range, wait: bool = True) -> tuple[list, int]:
    taken, most = [], 0
    for batch in batches:
        frames = plan.frames(batch, range(8))
        bank.order(frames)
        if wait:
            bank.producer.submit(int).result()
        taken += [bank.take(frame) for frame in frames]
        bank.retire(batch, batch % 8)
        most = max(most, bank.num_blocks)
    return taken, most


def test_the_bank_hands_out_what_was_dealt_and_stays_small(producer: SerialThread) -> None:
    plan, cascade = make_plan(), FakeCascade()
    bank = Bank(cascade, plan, "wait", producer)
    taken, most = run(bank, plan, range(500))
    frames = [frame for batch in range(500) for frame in plan.frames(batch, range(8))]
    for frame, (cells, starved) in list(zip(frames, taken))[::97]:
        keys = [plan.cell_keys(block)[row] for block, row in frame.cells]
        assert cells is not None
        assert torch.equal(cells.image, FakeCascade().cells(keys).image)
        assert not starved
    assert bank.stats.fresh_cells == cascade.num_made
    assert bank.stats.uses == sum(len(frame.cells) for frame in frames)
    assert bank.stats.max_reuse == 4
    assert bank.stats.over_bound_uses == 0
    assert bank.stats.rejects["empty"] == cascade.num_calls
    a_block = 4 * 2 * 16 * 16 * 4  # cells, image and mask, pixels, bytes
    assert 0 < bank.num_bytes <= bank.stats.bank_bytes < a_block * cascade.num_calls / 4
    assert bank.num_bytes % a_block == 0
    assert 3.0 < bank.stats.mean_reuse <= 4
    # 32 lane-shards, each with the blocks of a few frames in play.
    assert most < 32 * 7
    assert most < cascade.num_calls / 4


def test_reuse_counts_what_it_does_and_never_repeats_within_a_frame(producer: SerialThread) -> None:
    class Stalled(FakeCascade):
        gate = threading.Event()

        def cells(self, keys):
            if self.num_calls >= 6:
                self.gate.wait()
            return super().cells(keys)

    cascade = Stalled()
    plan = make_plan(max_reuse=2)
    bank = Bank(cascade, plan, "reuse", producer)
    taken, _ = run(bank, plan, range(30), wait=False)
    cascade.gate.set()
    assert bank.stats.fresh_cells <= 24
    assert sum(starved for _, starved in taken) > 200
    assert bank.stats.max_reuse > 2
    assert bank.stats.over_bound_uses >= bank.stats.uses - 2 * bank.stats.fresh_cells > 0
    for cells, _ in taken:
        assert cells is not None
        assert len(set(cells.brightness.tolist())) == len(cells)
    # Spread evenly over what is there.
    uses = Counter(value for cells, _ in taken if cells for value in cells.brightness.tolist())
    assert max(uses.values()) <= 3 * np.mean(list(uses.values()))


def test_reuse_without_a_lag_is_the_same_as_wait(producer: SerialThread) -> None:
    plan = make_plan()
    bank = Bank(FakeCascade(), plan, "reuse", producer, reserve=3)
    other = Bank(FakeCascade(), plan, "wait", producer)
    for (a, _), (b, _) in zip(run(bank, plan, range(40))[0], run(other, plan, range(40))[0]):
        assert a is not None
        assert b is not None
        assert torch.equal(a.brightness, b.brightness)
    assert bank.stats.over_bound_uses == 0
    assert bank.num_blocks <= other.num_blocks + 3


def test_a_producer_error_reaches_whoever_takes(producer: SerialThread) -> None:
    plan = make_plan()
    for mode in ("wait", "reuse"):
        bank = Bank(FakeCascade(fail_at=2), plan, mode, producer)
        with pytest.raises(ProducerError, match="went up in smoke") as caught:
            run(bank, plan, range(9))
        assert isinstance(caught.value.__cause__, ArithmeticError)


def test_stats_add_up() -> None:
    a = StreamStats(batches=1, uses=6, fresh_cells=4, max_reuse=3, rejects=Counter(empty=1))
    a.add(StreamStats(batches=2, uses=2, fresh_cells=0, max_reuse=2, rejects=Counter(empty=1, split=2)))
    assert (a.batches, a.uses, a.max_reuse, a.mean_reuse) == (3, 8, 3, 2.0)
    a.bank_bytes = 5
    a.add(StreamStats(bank_bytes=7))
    assert a.bank_bytes == 7, "of one process, so the largest"
    assert a.rejects == {"empty": 2, "split": 2}
    assert StreamStats().mean_reuse == 0


def test_the_thread_works_alone_and_leaves_others_their_threads() -> None:
    before = torch.get_num_threads()
    thread = SerialThread("test")
    try:
        assert thread.submit(torch.get_num_threads).result() == 1
        assert thread.submit(torch.is_grad_enabled).result() is False
        assert torch.get_num_threads() == before
        seen: list[int] = []
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert seen == [before]
        torch.set_num_threads(before + 1)
        assert thread.submit(torch.get_num_threads).result() == 1, "also when the training changes its own number"
    finally:
        torch.set_num_threads(before)
        thread.close()


def test_closing_drops_the_queue_but_finishes_the_task_at_hand() -> None:
    thread, started, gate = SerialThread("test"), threading.Event(), threading.Event()

    def block() -> str:
        started.set()
        gate.wait()
        return "done"

    first, second = thread.submit(block), thread.submit(int)
    started.wait()
    threading.Timer(0.05, gate.set).start()
    thread.close()
    assert first.result() == "done"
    assert second.cancelled()
    thread.close()
    SerialThread("never started").close()


def test_what_is_queued_does_not_keep_its_object_alive() -> None:
    class Worker:
        def __init__(self, gate: threading.Event) -> None:
            self.thread, self.gate, self.done = SerialThread("test"), gate, done

        def work(self, number: int) -> None:
            self.gate.wait()
            self.done.append(number)

    done: list[int] = []
    gate = threading.Event()
    worker = Worker(gate)
    futures = [worker.thread.submit(worker.work, number) for number in range(3)]
    thread = worker.thread._thread
    del worker
    gate.set()
    thread.join(timeout=30)
    assert not thread.is_alive(), "it ends with its object, and needs no garbage collection for that"
    assert done in ([], [0]), "the first may have been at hand"
    assert [future.cancelled() for future in futures[1:]] == [True, True]


AT_EXIT = """
import threading, time
import torch
from synthaug.datasets.producer import SerialThread

thread, begun = SerialThread("test"), threading.Event()

def task():
    @torch.library.custom_op("synthaug_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    end, x = time.monotonic() + 1, torch.ones(3)
    begun.set()
    while time.monotonic() < end:
        assert float(twice(x).sum()) == 6
    print("finished", flush=True)

thread.submit(task)
begun.wait()
"""


def test_a_program_that_ends_waits_for_the_task_at_hand() -> None:
    """Also where the task uses an operator that was registered after its thread had started."""
    ended = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "finished\n"), ended.stderr
