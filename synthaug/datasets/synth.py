"""`SynthDataset`: a stream of batches, synthetic and real mixed exactly, the same for any number of workers."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch.utils.data import IterableDataset, get_worker_info

from synthaug.datasets.bank import StreamStats
from synthaug.datasets.failed import FailedBatch, swallows_errors
from synthaug.datasets.loader import STATS_KEY, SynthLoader, check_workers
from synthaug.datasets.mixing import check_real
from synthaug.datasets.progress import Progress
from synthaug.datasets.real_cells import RealCells
from synthaug.datasets.stream import DEFAULT_SIZES, Stream, StreamConfig, fitting_cascade, warn_of_voxel_size
from synthaug.errors import InputError


class StreamBatch(dict):
    """A batch; a dict but for a better error where a loader takes it for a list of samples."""

    def __missing__(self, key: Any) -> Any:
        if key == 0:
            raise InputError(
                "collate_fn",
                expected="None, as SynthDataset yields whole batches",
                got="a function that collates samples",
                remedy="With monai.data.DataLoader pass batch_size=None, collate_fn=None.",
            )
        raise KeyError(key)


class SynthDataset(IterableDataset):
    """Streams batches of fresh synthetic populations, mixed with real samples at an exact ratio.

    Batch b is the same, bit for bit, for any number of workers and ranks, on every run, and after a resume. It yields
    whole batches (only a stride by batch keeps the order for every worker count), so use
    `dataset.loader(num_workers=...)` or `DataLoader(dataset, batch_size=None)`; with MONAI's DataLoader pass
    `batch_size=None, collate_fn=None`.

    Every `iter()` goes on with the stream, so every epoch brings fresh samples. Every rank's stream makes that rank's share:
    with accelerate prepare `dataset.loader()`, which it leaves as it is, or no loader at all. MONAI's ThreadDataLoader loses
    errors of its worker processes: use it with num_workers=0.

    Each batch is a dict of CPU tensors: `image` float32 [B, 1, (Z,) Y, X] in camera counts, `label` int32 of the same
    shape, contiguous from 1 in every sample, 0 = background, and `synthetic` bool [B]. After a `transform` image and
    label are what it made of them.

    Args:
        cascade: Where the cells come from; a 3D cascade makes volumes, a 2D one frames. On CUDA use num_workers=0: a
            thread with a stream of its own makes the cells.
        size: ((Z,) Y, X) of the samples in pixels; default (256, 256), or (32, 128, 128) for a 3D cascade.
        batch_size: B over all ranks; each rank gets its slice of B / world_size samples.
        real: Map-style data set of real samples, dicts with `image` and `label` or pairs, [(Z,) Y, X] or
            [1, (Z,) Y, X], labels of any integer type, at least `size` large; cut at random to `size`. Needed if
            synthetic_ratio < 1. Volumes may be somewhat smaller, see `read_real`, and planes of theirs may be
            unlabelled: -1 in every pixel of the plane, in the batch as well, to be left out of the loss.
        synthetic_ratio: r; every batch holds floor(r B) or ceil(r B) synthetic samples, and the stream r in all.
        seed: Another seed is another stream.
        max_reuse: A cell appears in at most so many frames, rotated and rescaled in brightness each time.
        num_cells: Cells of a frame, or (low, high) to draw it from; None draws the density as in the cascade's data.
        density: Cells per pixel (3D: per voxel), instead of num_cells.
        clustering: Probability that a cell is placed next to another one; None takes the one fitted to the data.
        background: "model", or "real" for the free regions of real frames.
        transform: Gets {"image": [1, (Z,) Y, X], "label": same} of real and synthetic samples alike and returns such a
            dict. One with `set_random_state` (MONAI's Randomizable, Compose) is seeded before every sample, so that the
            stream stays reproducible; global random state is not touched. Runs in a thread of the stream.
        on_starve: What to do if the producer lags behind. "wait" keeps the stream reproducible; "reuse" takes cells
            already there instead, counted in `stats()`.
        num_lanes: Parts of the stream with cells of their own. Worker counts that divide it cost no extra generation.
        num_shards: Parts of a batch with cells of their own. With num_shards = world_size (or a multiple) no rank makes the
            cells of another; more shards than ranks cost more cells at the start.
        num_batches: Batches in an epoch; endless if None.
        rank: Of a distributed run; by default torch.distributed's.
        world_size: By default torch.distributed's.
        voxel_size_um: (Z, Y, X) of the synthetic samples in micrometres, Z of no meaning in 2D; None takes the
            cascade's own. Real samples are not resampled: give theirs.
        as_meta_tensor: Samples and batches as MONAI's MetaTensors, also for the transform. Their affine carries the
            voxel size in the order of the tensor's axes: diag(Z, Y, X, 1), or diag(Y, X, 1, 1) in 2D, [B, 4, 4] of a
            batch. MONAI's readers of medical formats put X first: transforms that name directions in the body
            (Orientation) mean nothing here.
        real_cells: Share of the cells of synthetic samples that are real ones, cut out of `real` (2D only; of more than 64
            frames that many are cut up when the stream is built). They come in blocks as the fresh ones, but cost
            nothing. 1 makes it copy-paste by our placement and camera. Good where few frames are annotated.

    Attributes:
        voxel_size_um: (Z, Y, X) of the synthetic samples, or None where the cascade does not know it.

    Raises:
        InputError: An argument (here), a real sample or the transform's result (later) is not what it has to be.
        ProducerError: Making cells failed; `__cause__` says why.
    """

    def __init__(
        self,
        cascade: Any,
        size: Sequence[int] | None = None,
        batch_size: int = 8,
        real: Any = None,
        synthetic_ratio: float = 1.0,
        seed: int = 0,
        max_reuse: int = 16,
        num_cells: int | tuple[int, int] | None = None,
        density: float | None = None,
        clustering: float | None = None,
        background: str = "model",
        transform: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
        on_starve: str = "wait",
        num_lanes: int = 8,
        num_shards: int = 1,
        num_batches: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        voxel_size_um: Sequence[float] | None = None,
        as_meta_tensor: bool = False,
        real_cells: float = 0.0,
    ) -> None:
        if size is None:
            size = DEFAULT_SIZES[cascade.ndim]
        self.config = StreamConfig(
            size=tuple(size) if isinstance(size, Sequence) else size,
            voxel_size_um=tuple(voxel_size_um) if isinstance(voxel_size_um, Sequence) else voxel_size_um,  # type: ignore[arg-type]  # checked there
            batch_size=batch_size,
            synthetic_ratio=synthetic_ratio,  # type: ignore[arg-type]  # made exact there
            seed=seed,
            max_reuse=max_reuse,
            num_cells=tuple(num_cells) if isinstance(num_cells, list) else num_cells,
            density=density,
            clustering=clustering,
            background=background,
            num_lanes=num_lanes,
            num_shards=num_shards,
            on_starve=on_starve,
            real_cells=real_cells,
        )
        cascade = fitting_cascade(cascade, self.config)
        self.voxel_size_um = cascade.voxel_size_um
        self._num_real = check_real(real, self.config.synthetic_ratio)
        warn_of_voxel_size(getattr(real, "voxel_size_um", None), self.voxel_size_um, cascade.ndim)
        if transform is not None and not callable(transform):
            raise InputError("transform", expected="a function of a sample dict", got=type(transform).__name__)
        if num_batches is not None and (not isinstance(num_batches, int) or num_batches < 1):
            raise InputError("num_batches", expected="a whole number >= 1, or None", got=repr(num_batches))
        if (rank is None) != (world_size is None):
            raise InputError("rank, world_size", expected="both or none", got=f"{rank}, {world_size}")
        self.cascade, self.real, self.transform, self.as_meta_tensor = cascade, real, transform, bool(as_meta_tensor)
        self._real_cells = self._cut_cells()
        self._rank = (rank, world_size) if rank is not None and world_size is not None else None
        self._check_shards(len(self._slots()))
        self._progress = Progress(num_batches)
        self._stats = StreamStats()
        self._ship_stats = False
        self._warned_of_lanes = False
        self._stream: Stream | None = None
        self._stream_next = 0  # the batch it expects to make next
        self._pid = os.getpid()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is None:
            return self._iterate(*self._progress.begin())
        check_workers(self.cascade.device, worker.num_workers)
        if worker.id == 0:
            self.warn_of_lanes(worker.num_workers)
        start, end = self._progress.begin_in_worker(worker.id, worker.num_workers)
        return self._iterate_in_worker(worker.id, worker.num_workers, start, end)

    def __len__(self) -> int:
        if self._progress.num_batches is None:
            raise TypeError("this SynthDataset is endless and has no length; num_batches=... gives it epochs")
        return self._progress.num_batches

    def loader(self, num_workers: int = 0, **settings: Any) -> SynthLoader:
        """A DataLoader of this stream, whose `state_dict` and `stats` are exact with any number of workers.

        Args:
            num_workers: Processes.
            **settings: `torch.utils.data.DataLoader`'s own.
        """
        return SynthLoader(self, num_workers=num_workers, **settings)

    def stats(self) -> StreamStats:
        """What the stream has done in this process, and in the workers of `loader()`."""
        return copy.deepcopy(self._stats)

    def fingerprint(self) -> str:
        """Names cascade and config; streams with the same fingerprint, real samples and transform are the same."""
        return hashlib.sha256(json.dumps(self._describe(), sort_keys=True).encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: after the batches handed out in this process, and in the main process by `loader()`.

        Behind a loader of another kind that reads ahead, count its batches yourself and set `batch`.
        """
        return {
            "batch": self._progress.batch,
            "epoch_start": self._progress.epoch_start,
            "fingerprint": self.fingerprint(),
            "config": self._describe(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, also with another number of workers; an epoch in progress is finished.

        Raises:
            InputError: The state belongs to a stream of another cascade or config; says what differs.
        """
        batch = state.get("batch")
        if not isinstance(batch, int) or batch < 0:
            raise InputError("state", expected="what state_dict() returned", got=dict(state))
        if "fingerprint" in state and state["fingerprint"] != self.fingerprint():
            theirs, mine = state.get("config", {}), self._describe()
            differ = [
                f"{k} {theirs.get(k)!r} (here {mine.get(k)!r})" for k in mine | theirs if theirs.get(k) != mine.get(k)
            ]
            raise InputError(
                "state",
                expected="a state of this stream",
                got=f"one with {', '.join(differ) or 'fingerprint ' + repr(state['fingerprint'])}",
                remedy="Build the SynthDataset with the arguments it was saved with.",
            )
        self._stop()
        self._progress.jump(batch, int(state.get("epoch_start", batch)))

    def set_random_state(self, seed: Any = None, state: Any = None) -> Self:
        """Does nothing: MONAI's DataLoader reseeds every data set it is given, and this one follows its own `seed`."""
        return self

    def warn_of_lanes(self, num_workers: int) -> None:
        """Warn, once, if some lanes are served by several workers."""
        if num_workers and self.config.num_lanes % num_workers and not self._warned_of_lanes:
            self._warned_of_lanes = True
            fits = [n for n in range(1, self.config.num_lanes + 1) if self.config.num_lanes % n == 0]
            warnings.warn(
                f"num_workers={num_workers} does not divide num_lanes={self.config.num_lanes}, so several workers make "
                f"the same cells. The batches are right, but cost more than they need to: use {fits} workers, or a "
                f"num_lanes that {num_workers} divides (which is another stream).",
                stacklevel=2,
            )

    def launch(self, start: Callable[[], Iterator[dict[str, Any]]], board: torch.Tensor) -> Iterator[dict[str, Any]]:
        """Start or wake the workers of that board at the next batch, who send their stats along; `loader()` calls it."""
        self._progress.begin(board)
        self._ship_stats = True  # workers that are forked or spawned in the next line take it with them
        try:
            return start()
        finally:
            self._ship_stats = False

    def count(self, stats: StreamStats) -> None:
        """Count one batch of a worker as handed out; `loader()` calls it."""
        self._stats.add(stats)
        self._progress.advance()

    def twin(self) -> Self:
        """A copy at the same place in the stream, with threads and counts of its own; weights and real samples are shared."""
        cascade = copy.copy(self.cascade)  # its weights are not copied
        cascade.rejects = Counter(cascade.rejects)
        shared = {id(self.cascade): cascade, id(self.real): self.real}
        try:
            twin = copy.deepcopy(self, dict(shared))
        except TypeError:  # a transform that holds what cannot be copied, an open file say
            twin = copy.deepcopy(self, {**shared, id(self.transform): self.transform})
        twin._stats = StreamStats()
        return twin

    def close(self) -> None:
        """Stop the threads; the next `iter()` starts them again."""
        self._stop()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stream": None}

    @functools.cached_property
    def _cascade_fingerprint(self) -> str:
        return self.cascade.fingerprint()  # goes over all weights

    def _describe(self) -> dict[str, Any]:
        known = {"num_real": self._num_real, "cascade": self._cascade_fingerprint}
        if self._real_cells is not None:
            known["cells"] = self._real_cells.fingerprint()
        return self.config.describe() | known

    def _cut_cells(self) -> RealCells | None:
        if not self.config.real_cells:
            return None
        if self.real is None:
            raise InputError(
                "real", expected=f"frames to cut {self.config.real_cells:g} of the cells out of", got="None"
            )
        return RealCells.cut(self.real, self.cascade)

    def _slots(self) -> range:
        """The slots of every batch that this rank makes."""
        distributed = torch.distributed
        rank, world = self._rank or (0, 1)
        if self._rank is None and distributed.is_available() and distributed.is_initialized():
            rank, world = distributed.get_rank(), distributed.get_world_size()
        if world < 1 or not 0 <= rank < world:
            raise InputError("rank", expected=f"0 <= rank < world_size = {world}", got=rank)
        if self.config.batch_size % world:
            raise InputError(
                "batch_size",
                expected=f"a multiple of world_size = {world} (batch_size counts the samples of all ranks)",
                got=self.config.batch_size,
            )
        share = self.config.batch_size // world
        return range(rank * share, (rank + 1) * share)

    def _check_shards(self, share: int) -> None:
        size = self.config.batch_size // self.config.num_shards
        if share % size and self.config.synthetic_ratio:
            world = self.config.batch_size // share
            warnings.warn(
                f"{world} ranks share num_shards={self.config.num_shards}, so several ranks make the same cells. The batches "
                f"are right, but cost more than they need to: pass num_shards={world} (which is another stream).",
                stacklevel=3,
            )

    def _iterate(self, start: int, end: int | None) -> Iterator[dict[str, Any]]:
        # Where we are is asked anew each time: several iterators go through one stream together.
        while end is None or self._progress.batch < end:
            batch = self._progress.batch
            try:
                made, stats = self._make(batch, [batch + i + 1 for i in range(self.config.num_lanes)])
            except Exception as error:
                if not swallows_errors():
                    raise
                yield FailedBatch(error)
                return
            self._stats.add(stats)
            self._progress.advance()
            self._progress.settle()
            yield StreamBatch(made)

    def _iterate_in_worker(
        self, worker: int, num_workers: int, start: int, end: int | None
    ) -> Iterator[dict[str, Any]]:
        batch = start + worker
        while end is None or batch < end:
            made, stats = self._make(batch, self._upcoming(batch, worker, num_workers, end))
            self._progress.advance(num_workers)
            if self._ship_stats:
                made[STATS_KEY] = vars(stats) | {"rejects": dict(stats.rejects)}
            yield StreamBatch(made)
            batch += num_workers

    def _upcoming(self, batch: int, worker: int, num_workers: int, end: int | None) -> list[int]:
        """The next batches of this worker, one of each lane it serves; at the end of an epoch those of the next."""
        ahead = []
        for _ in range(-(-self.config.num_lanes // num_workers)):
            batch += num_workers
            if end is not None and batch >= end:
                batch, end = end + worker, end + len(self)
            ahead.append(batch)
        return ahead

    def _make(self, batch: int, upcoming: list[int]) -> tuple[dict[str, Any], StreamStats]:
        if self._pid != os.getpid():  # forked: the threads stayed behind
            self._stream, self._pid = None, os.getpid()
        if self._stream is not None and batch != self._stream_next:
            self._stop()
        if self._stream is None:
            self._stream = Stream(
                self.config,
                self.cascade,
                self.real,
                self.transform,
                self._num_real,
                self._slots(),
                self.as_meta_tensor,
                self._real_cells,
            )
        self._stream_next = upcoming[0]
        try:
            return self._stream.batch(batch, upcoming)
        except BaseException:
            self._stop()  # half a batch was dealt
            raise

    def _stop(self) -> None:
        if self._stream is not None and self._pid == os.getpid():
            self._stream.close()
        self._stream = None


def dataset_of(stream: SynthDataset | SynthLoader) -> SynthDataset:
    """The stream itself, of it or its loader.

    Raises:
        InputError: It is neither.
    """
    dataset = stream.dataset if isinstance(stream, SynthLoader) else stream
    if not isinstance(dataset, SynthDataset):
        raise InputError("stream", expected="a SynthDataset or its loader()", got=type(stream).__name__)
    return dataset
