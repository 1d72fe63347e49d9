"""How far a stream got, and how DataLoader workers come to agree on where to begin."""

from __future__ import annotations

import warnings

import torch
from torch.utils.data import get_worker_info

MAX_WORKERS = 64


def launch_board() -> torch.Tensor:
    """Memory to share with workers: first batch, end of the epoch (-1: endless), then for every (number of workers, worker)
    how often it began."""
    return torch.zeros(2 + MAX_WORKERS * (MAX_WORKERS + 1), dtype=torch.int64, device="cpu").share_memory_()


class Progress:
    """The next batch of a stream and the epoch it lies in.

    Epochs of `num_batches` follow one another without a gap. Workers learn where to begin from memory they share with
    the main process. Nothing in a plain DataLoader tells them which epoch it is (each is forked or woken anew), so
    every worker counts there how often it began; each for itself, so that a quick one cannot mislead a slow one.

    Args:
        num_batches: Batches in an epoch; endless if None.
    """

    def __init__(self, num_batches: int | None) -> None:
        self.num_batches = num_batches
        self.batch = 0
        self.epoch_start = 0
        self._mid_epoch = False  # whether the next iter() finishes the epoch that began at epoch_start
        self._launch = launch_board()
        self._publish(*self._next_epoch())

    def jump(self, batch: int, epoch_start: int) -> None:
        """Go on at that batch and finish the epoch that began at `epoch_start`."""
        self.batch, self.epoch_start, self._mid_epoch = batch, epoch_start, True
        if get_worker_info() is not None:  # a loader that restores every worker's own copy (torchdata's)
            self._launch = self._launch.clone()
        self._publish(*self._next_epoch())

    def advance(self, num: int = 1) -> None:
        """Count batches as handed out."""
        self.batch += num

    def begin(self, board: torch.Tensor | None = None) -> tuple[int, int | None]:
        """Begin or go on with an epoch in the main process, and tell workers that start now: (first batch, end).

        With a `launch_board` of their own those workers count apart from others that are left over from an earlier start.
        """
        if board is not None:
            self._launch = board
        start, end = self._next_epoch()
        if end is not None and self.num_batches is not None:
            self.epoch_start = end - self.num_batches
        self._mid_epoch = False
        self._publish(start, end)
        return start, end

    def begin_in_worker(self, worker: int, num_workers: int) -> tuple[int, int | None]:
        """The same in a worker: (first batch of all workers, end)."""
        place = 2 + num_workers * MAX_WORKERS + worker
        passes = int(self._launch[place])
        self._launch[place] += 1
        start, end = int(self._launch[0]), int(self._launch[1])
        if self.num_batches is None:
            if passes and worker == 0:
                warnings.warn(
                    f"A DataLoader begins this endless SynthDataset once more, again at batch {start}, because its "
                    "workers cannot know how far it got. Use dataset.loader(num_workers=...), or give the stream "
                    "epochs with num_batches=....",
                    stacklevel=2,
                )
            self.batch = start
            return start, None
        if passes:
            start, end = end + (passes - 1) * self.num_batches, end + passes * self.num_batches
        self.batch, self.epoch_start = start, end - self.num_batches
        return start, end

    def settle(self) -> None:
        """In the main process, after batches were handed out there: workers that start later begin behind them."""
        self._publish(*self._next_epoch())

    def _next_epoch(self) -> tuple[int, int | None]:
        if self.num_batches is None:
            return self.batch, None
        end = self.epoch_start + self.num_batches
        return self.batch, end if self._mid_epoch and self.batch < end else self.batch + self.num_batches

    def _publish(self, start: int, end: int | None) -> None:
        self._launch.zero_()
        self._launch[0], self._launch[1] = start, -1 if end is None else end

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if get_worker_info() is None and not self._launch.is_shared():  # a copy of the data set, not a worker's view
            self._launch = self._launch.clone().share_memory_()
