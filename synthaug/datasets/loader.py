"""`SynthLoader`: a DataLoader that knows how far the training got, which its workers, reading ahead, do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from synthaug.datasets.bank import StreamStats
from synthaug.datasets.progress import MAX_WORKERS, launch_board
from synthaug.errors import InputError, ProducerError
from synthaug.randomness import SampleKey

if TYPE_CHECKING:
    from synthaug.datasets.synth import SynthDataset

STATS_KEY = "_synthaug_stats"


class SynthLoader(DataLoader):
    """A `torch.utils.data.DataLoader` for a `SynthDataset`.

    It counts the batches in the main process as the training takes them, so `state_dict()` resumes exactly, with any
    other number of workers. Workers stay alive between epochs unless told otherwise, as they hold the cells in play.

    Args:
        dataset: The stream.
        num_workers: Processes; 0 for a cascade on CUDA.
        **settings: DataLoader's own, but for `batch_size`, which belongs to the stream.

    Raises:
        InputError: Workers for a cascade on CUDA, or settings that would batch or shuffle the stream once more.
        ProducerError: While iterating: making cells failed, or a worker died.
    """

    dataset: SynthDataset

    _is_accelerate_prepared = True
    """accelerate's `prepare` leaves such loaders as they are. It would let rank 0 make the batches of all ranks, or cut up once
    more what the stream has shared out already."""

    use_stateful_dataloader = True
    """`Accelerator.save_state` and `load_state` take `state_dict` and `load_state_dict` of such loaders."""

    def __init__(self, dataset: SynthDataset, num_workers: int = 0, **settings: Any) -> None:
        for name in ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"):
            value = settings.pop(name, None)
            if value:
                raise InputError(
                    name,
                    expected="nothing, as SynthDataset yields whole batches in an order of its own",
                    got=repr(value),
                    remedy="Set batch_size on SynthDataset.",
                )
        if num_workers:
            check_workers(dataset.cascade.device, num_workers)
            dataset.warn_of_lanes(num_workers)
            settings.setdefault("persistent_workers", True)
        # A DataLoader draws a seed for its workers at every start; not from the global state, whose order it would change.
        settings.setdefault("generator", SampleKey(dataset.config.seed, ("loader",)).generator())
        super().__init__(dataset, batch_size=None, num_workers=num_workers, **settings)

    def __iter__(self) -> Any:
        if self.num_workers == 0:
            return super().__iter__()
        if self._iterator is None or not self.persistent_workers:
            # One that outlived the death of another may be slow to begin; it must not count as the new one in its place.
            self._board = launch_board()
        with self._worker_deaths():
            batches = self.dataset.launch(super().__iter__, self._board)
        return self._counted(batches)

    def _counted(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        while True:
            with self._worker_deaths():
                batch = next(batches, None)
            if batch is None:
                return
            stats = batch.pop(STATS_KEY)
            self.dataset.count(StreamStats(**{**stats, "rejects": Counter(stats["rejects"])}))
            yield batch

    @contextmanager
    def _worker_deaths(self) -> Iterator[None]:
        """What torch says of a worker that died names neither a reason nor a remedy."""
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):  # what it says of one that raised begins otherwise
                raise
            self._iterator = None  # of workers of which one is missing; the next iter() starts others
            raise ProducerError(
                f"A worker of the loader died: {str(error).strip()} The system kills a process when memory runs out: use "
                "fewer num_workers, a smaller size or batch_size. With num_workers=0 an error shows where it happens. iter() "
                "of this loader, or of another one after load_state_dict(), goes on behind the last batch taken."
            ) from error

    def stats(self) -> StreamStats:
        """What went into the batches taken so far, over all workers."""
        return self.dataset.stats()

    def state_dict(self) -> dict[str, Any]:
        """Where the training is in the stream, see `SynthDataset.state_dict`."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there with the next `iter()`."""
        self.dataset.load_state_dict(state)


def check_workers(device: torch.device | str, num_workers: int) -> None:
    """Refuse DataLoader workers where they cannot work.

    Raises:
        InputError: The cascade is on CUDA, or there are more workers than the stream can tell apart.
    """
    if torch.device(device).type == "cuda":
        raise InputError(
            "num_workers",
            expected="0 with a cascade on CUDA",
            got=num_workers,
            remedy="CUDA lives in one process: with num_workers=0 a thread of its own makes the cells while you train; "
            "or move the cascade to the CPU.",
        )
    if num_workers > MAX_WORKERS:
        raise InputError("num_workers", expected=f"at most {MAX_WORKERS}", got=num_workers)
