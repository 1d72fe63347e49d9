"""The bounded bargain on freshness: which cell goes into which frame, and the store that holds the cells meanwhile.

A fresh cell costs far more than placing one, so each is dealt up to `max_reuse` times (DESIGN.md, contract 3). To keep
the stream a pure function that can be entered anywhere, a lane's timeline is cut into periods: every period has cells
of its own, and who gets which follows from the counts of its frames alone, which cost nothing to know. Entering the
stream in the middle of a period therefore costs a little arithmetic and the few blocks of cells that are in play at
that point.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from synthaug.datasets.mixing import Mix
from synthaug.datasets.producer import SerialThread
from synthaug.datasets.real_cells import RealCells
from synthaug.errors import ProducerError
from synthaug.randomness import SampleKey
from synthaug.types import Cells

PERIOD = 64
"""Batches of one lane that share a supply of cells."""

SPREAD = 4
"""Blocks in play beyond those a frame needs, so that the frames of a batch share few cells."""


@dataclass
class StreamStats:
    """What a stream has done so far.

    Attributes:
        batches: Batches handed out.
        synthetic: Synthetic samples among theirs.
        real: Real ones.
        fresh_cells: Cells made.
        real_cells: Cells cut out of real frames that were dealt beside them.
        uses: Cells dealt to frames.
        max_reuse: How often the most used cell was dealt.
        starved_batches: Batches whose cells were not ready when asked for: they waited, or made do with other cells.
        over_bound_uses: Uses beyond the stream's `max_reuse`; 0 unless `on_starve="reuse"`.
        wait_seconds: Time spent waiting for the producer.
        bank_bytes: Memory of the cells in play, at its peak, of the process that held most.
        requested: Cells the frames asked for.
        placed: Cells that found a place.
        rejects: The cascade's own counts: masks drawn, and rejected by reason.
    """

    batches: int = 0
    synthetic: int = 0
    real: int = 0
    fresh_cells: int = 0
    real_cells: int = 0
    uses: int = 0
    max_reuse: int = 0
    starved_batches: int = 0
    over_bound_uses: int = 0
    wait_seconds: float = 0.0
    bank_bytes: int = 0
    requested: int = 0
    placed: int = 0
    rejects: Counter = field(default_factory=Counter)

    @property
    def mean_reuse(self) -> float:
        """Uses per cell made or cut out; cells still in play count with the uses they have had."""
        cells = self.fresh_cells + self.real_cells
        return self.uses / cells if cells else 0.0

    def add(self, other: StreamStats) -> None:
        """Take in what another part of the stream did."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, max(mine, theirs) if f.name in ("max_reuse", "bank_bytes") else mine + theirs)


class Dealer:
    """Deals cells to frames: no cell more than `max_reuse` times, none twice in one frame.

    Blocks of cells come into play bit by bit: as few as the first frame needs, then one more for every block's worth of
    uses dealt, and one on top until `SPREAD` more are in play. So the first batch comes soon, cells of several ages mix,
    and the producer has a steady load.

    Args:
        block_size: Cells in a block.
        max_reuse: Uses of a cell.
        supply: Blocks there should be in all; None if the number of frames is not known. When all are in play, the
            least used cells are dealt first, the only order that never runs short of distinct cells (Gale 1957, Ryser
            1957).
    """

    def __init__(self, block_size: int, max_reuse: int, supply: int | None = None) -> None:
        self.block_size, self.max_reuse, self.supply = block_size, max_reuse, supply
        self.left = np.zeros(0, np.int64)  # uses left of every cell in play
        self._gone = 0  # blocks used up and forgotten
        self._dealt = 0
        self._largest = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that have come into play."""
        return self._gone + len(self.left) // self.block_size

    def is_used_up(self, block: int) -> bool:
        """Whether no cell of the block can be dealt again."""
        start = (block - self._gone) * self.block_size
        return start < 0 or not self.left[start : start + self.block_size].any()

    def deal(self, num: int, rng: np.random.Generator) -> np.ndarray:
        """int64 [num], the cells of the next frame; cell i is number i % block_size of block i // block_size."""
        self._largest = max(self._largest, num)
        spent = self._dealt // (self.block_size * self.max_reuse)
        wanted = -(-self._largest // self.block_size) + spent + min(spent, SPREAD)
        wanted = wanted if self.supply is None else min(wanted, self.supply)
        while self.num_blocks < wanted or np.count_nonzero(self.left) < num:
            self.left = np.concatenate([self.left, np.full(self.block_size, self.max_reuse)])
        alive = np.flatnonzero(self.left)
        rank = rng.random(len(alive))
        if self.supply is not None and self.num_blocks >= self.supply:
            rank += self.left[alive]
        hand = alive[np.argsort(-rank, kind="stable")[:num]]
        self.left[hand] -= 1
        self._dealt += num
        hand += self._gone * self.block_size
        while len(self.left) and not self.left[: self.block_size].any():
            self.left, self._gone = self.left[self.block_size :], self._gone + 1
        return hand


def deal(counts: Sequence[int], block_size: int, max_reuse: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The cells of every frame of a period, out of hardly more blocks than needed: ceil(sum(counts) / uses of a block).

    Args:
        counts: Cells of each frame.
        block_size: Cells in a block.
        max_reuse: Uses of a cell.
        rng: Decides who gets what.

    Returns:
        One int64 array a frame, see `Dealer.deal`.
    """
    supply = max(-(-sum(counts) // (block_size * max_reuse)), -(-max(counts, default=0) // block_size))
    dealer = Dealer(block_size, max_reuse, supply)
    return [dealer.deal(num, rng) for num in counts]


class Block(NamedTuple):
    """The name of one block of cells."""

    lane: int
    shard: int
    period: int
    number: int


@dataclass(frozen=True)
class Frame:
    """One synthetic frame of a batch: its place in the batch, its key, and its cells as (block, row) pairs."""

    slot: int
    key: SampleKey
    cells: tuple[tuple[Block, int], ...]


@dataclass(frozen=True)
class Period:
    """What was dealt in one period: cells of each (batch, slot), and the last batch that needs each block."""

    hands: dict[tuple[int, int], np.ndarray]
    last: list[int]


class Plan:
    """Which cells every synthetic frame of the stream gets; pure arithmetic on keys, no cell is made here.

    Batch b belongs to lane b mod `num_lanes`. Within a lane a batch can be cut into shards of equal size with supplies
    of their own, so that the ranks of a distributed run, each of which makes a slice of every batch, need not make all
    cells.

    Args:
        mix: Which slots of a batch are synthetic.
        seed: The stream's seed.
        num_lanes: Lanes.
        num_shards: Shards; divides the batch size.
        block_size: Cells in a block.
        max_reuse: Uses of a cell.
        count: Cells that the frames of the given keys ask for.
        real_share: Share of the blocks that real cells make up.
    """

    def __init__(
        self,
        mix: Mix,
        seed: int,
        num_lanes: int,
        num_shards: int,
        block_size: int,
        max_reuse: int,
        count: Callable[[list[SampleKey]], Sequence[int]],
        real_share: float = 0.0,
    ) -> None:
        self.mix, self.num_lanes, self.block_size, self.max_reuse = mix, num_lanes, block_size, max_reuse
        self.num_shards = num_shards
        self._key = SampleKey(seed)
        self._count = count
        self._real_share = real_share
        self._periods: dict[tuple[int, int, int], Period] = {}

    def frames(self, batch: int, slots: range) -> list[Frame]:
        """The synthetic frames of a batch whose slots are among `slots`."""
        frames = []
        for slot in self.mix.synthetic_slots(batch):
            if slot in slots:
                lane, shard = batch % self.num_lanes, slot * self.num_shards // self.mix.batch_size
                number = self._period_of(batch, lane, shard)
                hand = self._period(lane, shard, number).hands[batch, slot].tolist()
                cells = tuple((Block(lane, shard, number, i // self.block_size), i % self.block_size) for i in hand)
                frames.append(Frame(slot, self._key.child("frame", batch, slot), cells))
        return frames

    def last_batch(self, block: Block) -> int:
        """The last batch that needs the block."""
        return self._period(block.lane, block.shard, block.period).last[block.number]

    def cell_keys(self, block: Block) -> list[SampleKey]:
        """The keys of the block's cells."""
        return [self._key.child("cell", *block, i) for i in range(self.block_size)]

    def is_real(self, block: Block) -> bool:
        """Whether the block holds real cells: whole blocks do, spread evenly, as fresh ones are made in whole blocks."""
        if not self._real_share:
            return False
        start = self._key.child("real", block.lane, block.shard, block.period).numpy().random()
        before, after = (math.floor(start + (block.number + i) * self._real_share) for i in range(2))
        return after > before

    def _stagger(self, lane: int, shard: int) -> int:
        # Periods start with new cells; were they to start together, the producer would face all of them at once.
        return (shard * self.num_lanes + lane) * PERIOD // (self.num_lanes * self.num_shards)

    def _period_of(self, batch: int, lane: int, shard: int) -> int:
        return (batch // self.num_lanes + self._stagger(lane, shard)) // PERIOD

    def _period(self, lane: int, shard: int, number: int) -> Period:
        name = (lane, shard, number)
        if name not in self._periods:
            for old in [n for n in self._periods if n[:2] == (lane, shard) and n[2] < number - 1]:
                del self._periods[old]
            self._periods[name] = self._make_period(lane, shard, number)
        return self._periods[name]

    def _make_period(self, lane: int, shard: int, number: int) -> Period:
        start = number * PERIOD - self._stagger(lane, shard)
        batches = [turn * self.num_lanes + lane for turn in range(max(start, 0), start + PERIOD)]
        size = self.mix.batch_size // self.num_shards
        own = range(shard * size, (shard + 1) * size)
        frames = [(batch, slot) for batch in batches for slot in self.mix.synthetic_slots(batch) if slot in own]
        counts = self._count([self._key.child("frame", *frame) for frame in frames]) if frames else []
        rng = self._key.child("deal", lane, shard, number).numpy()
        hands = deal(list(counts), self.block_size, self.max_reuse, rng)
        last: dict[int, int] = {}
        for (batch, _), hand in zip(frames, hands):
            last.update(dict.fromkeys((hand // self.block_size).tolist(), batch))
        # A block nobody is dealt from can only stand between others; it is never ordered.
        return Period(dict(zip(frames, hands)), [last.get(i, -1) for i in range(max(last, default=-1) + 1)])


class Bank:
    """The cells of one process: orders blocks from the producer, hands out cells, lets go of what is used up.

    Args:
        cascade: Makes the cells.
        plan: Says what is needed.
        on_starve: "wait" waits for the cells that were dealt; "reuse" takes the least used ones already there instead.
        producer: The thread that makes them.
        real_cells: Makes those of the blocks that the plan says are real.
        reserve: With "reuse", so many used-up blocks are kept to fall back on.
    """

    def __init__(
        self,
        cascade: Any,
        plan: Plan,
        on_starve: str,
        producer: SerialThread,
        *,
        real_cells: RealCells | None = None,
        reserve: int = 32,
    ) -> None:
        self.cascade, self.plan, self.on_starve, self.producer = cascade, plan, on_starve, producer
        self.real_cells = real_cells
        self.stats = StreamStats()
        self._last: dict[Block, int] = {}  # of every block held or on order: the last batch that needs it
        self._orders: dict[Block, Future] = {}
        self._cells: dict[Block, Cells] = {}
        self._uses: dict[Block, np.ndarray] = {}
        self._reserve: deque[Block] = deque()
        self._num_reserve = reserve if on_starve == "reuse" else 0

    @property
    def num_blocks(self) -> int:
        """Blocks held or on order."""
        return len(self._last)

    @property
    def num_bytes(self) -> int:
        """Memory of the cells held."""
        tensors = (t for cells in self._cells.values() for t in (cells.image, cells.sdf))
        return sum(t.numel() * t.element_size() for t in tensors)

    def order(self, frames: Sequence[Frame]) -> None:
        """Have the producer make what the frames need, in that order."""
        for frame in frames:
            for block in sorted({block for block, _ in frame.cells}):
                if block not in self._last:
                    self._last[block] = self.plan.last_batch(block)
                    self._orders[block] = self.producer.submit(self._make, block)

    def take(self, frame: Frame) -> tuple[Cells | None, bool]:
        """The cells of a frame, in the order dealt (None if it has none), and whether they were not ready in time."""
        starved = not all(self._is_ready(block) for block, _ in frame.cells)
        picks = self._stand_in(frame.cells) if starved and self.on_starve == "reuse" else frame.cells
        if not picks:
            return None, False
        blocks = list(dict.fromkeys(block for block, _ in picks))
        cells = Cells.cat([self._get(block) for block in blocks])
        for block, row in picks:
            self._uses[block][row] += 1
            uses = int(self._uses[block][row])
            assert uses <= self.plan.max_reuse or self.on_starve == "reuse"
            self.stats.uses += 1
            self.stats.over_bound_uses += uses > self.plan.max_reuse
            self.stats.max_reuse = max(self.stats.max_reuse, uses)
        rows = [blocks.index(block) * self.plan.block_size + row for block, row in picks]
        return cells.select(torch.tensor(rows, device=cells.image.device)), starved

    def retire(self, batch: int, lane: int) -> None:
        """Let go of the lane's blocks that no batch after this one needs."""
        for block in [b for b, last in self._last.items() if b.lane == lane and last <= batch]:
            if block in self._orders:  # only with "reuse": the batches did without it
                if self._orders[block].cancel():
                    del self._orders[block], self._last[block]
                    continue
                if not self._is_ready(block):
                    continue
            if block not in self._reserve:
                self._reserve.append(block)
        while len(self._reserve) > self._num_reserve:
            block = self._reserve.popleft()
            del self._cells[block], self._uses[block], self._last[block]

    def _make(self, block: Block) -> tuple[Cells, Counter]:
        """The cells of a block, and what was rejected on the way; runs in the producer's thread."""
        keys = self.plan.cell_keys(block)
        if self.plan.is_real(block):
            assert self.real_cells is not None
            return self.real_cells.cells(keys).to(self.cascade.background.device), Counter()
        return make_block(self.cascade, keys)

    def _is_ready(self, block: Block) -> bool:
        if block in self._orders and self._orders[block].done():
            self._get(block)
        return block in self._cells

    def _get(self, block: Block) -> Cells:
        if block not in self._cells:
            start = time.perf_counter()
            future = self._orders.pop(block)
            try:
                cells, rejects = future.result()
            except Exception as error:
                raise ProducerError(f"making fresh cells ({block}) failed: {type(error).__name__}: {error}") from error
            self.stats.wait_seconds += time.perf_counter() - start
            if self.plan.is_real(block):
                self.stats.real_cells += len(cells)
            else:
                self.stats.fresh_cells += len(cells)
            self.stats.rejects += rejects
            self._cells[block], self._uses[block] = cells, np.zeros(len(cells), np.int64)
            self.stats.bank_bytes = max(self.stats.bank_bytes, self.num_bytes)
        return self._cells[block]

    def _stand_in(self, dealt: Sequence[tuple[Block, int]]) -> list[tuple[Block, int]]:
        """The dealt cells as far as they are there, and for each of the others the least used one that is."""
        for block in [None, *dict.fromkeys(block for block, _ in dealt)]:
            if block is not None:  # too few distinct cells for this frame, so wait for one more block of its own
                self._get(block)
            own = {pick for pick in dealt if self._is_ready(pick[0])}
            others = [(int(n), block, row) for block, uses in self._uses.items() for row, n in enumerate(uses)]
            spare = iter(sorted(other for other in others if other[1:] not in own))
            if len(others) >= len(dealt):
                break
        return [pick if pick in own else next(spare)[1:] for pick in dealt]


def make_block(cascade: Any, keys: Sequence[SampleKey]) -> tuple[Cells, Counter]:
    """Fresh cells of the keys, and what was rejected on the way."""
    before = Counter(cascade.rejects)
    cells = cascade.cells(keys)
    assert len(cells) == len(keys), "a cascade gives one cell a key"
    return cells, Counter(cascade.rejects) - before


def no_cells(cascade: Any) -> Cells:
    """Cells of an empty frame of that cascade."""
    side, device = cascade.crop_size, cascade.device
    crop, row = torch.zeros(0, cascade.num_slices, side, side, device=device), torch.zeros(0, device=device)
    return Cells(image=crop, sdf=crop.clone(), brightness=row, scale=row.clone())
