"""A stream as one pair after the other, made ready for Cellpose while it trains."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthaug.datasets.cellpose_draws import Pair
from synthaug.datasets.producer import SerialThread
from synthaug.errors import InputError

MIN_FRAMES_LOOKED_AT = 8
"""Frames whose cells give the diameter that Cellpose is told."""

MIN_CELLS_SHOWN = 1000
"""Cells that Cellpose counts in every slot, far above any `min_train_masks`: see `areas_as_label`."""

MOST_EMPTY_FRAMES = 32
"""Synthetic, or real, frames in a row that may be without cells. Some belong to sparse data; so many hint at a fault."""

_Made = list[tuple[Pair, NDArray[np.int64]]]  # the pairs of a batch, each with the areas of its cells


class StreamSource:
    """The pairs of a stream, in its order. A thread of its own makes the batch after the one being dealt.

    Args:
        stream: SynthDataset or its loader.
        make_pair: Pair of an image [<= C, Y, X] and a label [Y, X], contiguous from 1.
        num_channels: C.
        min_masks: Fewest cells of a frame; 0 lets frames without cells pass, up to `MOST_EMPTY_FRAMES` in a row.
        device: Where `make_pair` computes.

    Attributes:
        batch_size: Pairs of a batch.
        shape: (C, Y, X) of the images of the first one.
        areas: int32 [1, N], see `areas_as_label`.
        wait_seconds: Wall time spent in waiting for batches so far.

    Raises:
        InputError: The first batches (here) or later ones (in `pair`) hold what Cellpose cannot be trained on.
        ProducerError: Making cells failed.
    """

    def __init__(
        self,
        stream: Any,
        make_pair: Callable[[NDArray[Any], NDArray[Any]], Pair],
        num_channels: int,
        min_masks: int,
        device: torch.device,
    ) -> None:
        self._stream, self._make_pair = stream, make_pair
        self._num_channels, self._min_masks = num_channels, min_masks
        self._thread = SerialThread("synthaug-cellpose", device)
        self._batches: Iterator[Any] = iter(stream)  # here, so that workers are not forked from a thread
        self._num_batches = 0
        self._next: Future | None = None
        self._closed = False
        self._empty_in_a_row = {"synthetic": 0, "real": 0}
        self.wait_seconds = 0.0
        made = self._wait()
        self.batch_size = len(made)
        while len(made) < MIN_FRAMES_LOOKED_AT or not any(len(cells) for _, cells in made):
            made += self._wait()
        self._ready = deque(pair for pair, _ in made)
        self.shape = self._ready[0].image.shape
        self.areas = areas_as_label(np.concatenate([cells for _, cells in made]))

    def pair(self) -> Pair:
        """The next one.

        Raises:
            InputError: The sample is not what it has to be, or the source is closed.
            ProducerError: Making cells failed.
        """
        if not self._ready:
            self._ready.extend(pair for pair, _ in self._wait())
        return self._ready.popleft()

    def close(self) -> None:
        """Stop the thread, after the batch it is at; no pair can be had any more."""
        self._closed = True
        self._thread.close()

    def _wait(self) -> _Made:
        if self._closed:
            raise InputError(
                "cellpose_data", expected="a stream in use", got="one closed", remedy="Call cellpose_data once more."
            )
        begun = time.perf_counter()
        future, self._next = self._next or self._thread.submit(self._make), None
        try:
            made: _Made = future.result()
        finally:
            self.wait_seconds += time.perf_counter() - begun
        self._next = self._thread.submit(self._make)
        return made

    def _make(self) -> _Made:
        batch = next(self._batches, None)
        if batch is None:  # the end of an epoch; the next one goes on with the stream
            self._batches = iter(self._stream)
            batch = next(self._batches)
        number, self._num_batches = self._num_batches, self._num_batches + 1
        image, label = _array(batch["image"]), _array(batch["label"])
        if image.ndim != 4 or label.ndim != 4:
            raise InputError(
                "cellpose_data",
                expected="a stream of frames [B, C, Y, X], as Cellpose's networks are 2D",
                got=f"images {image.shape} and labels {label.shape}",
                remedy="Pass a 2D cascade, or let the stream's transform take a plane of every volume.",
            )
        if label.shape[1] != 1 or image.shape[2:] != label.shape[2:] or image.shape[1] > self._num_channels:
            raise InputError(
                "cellpose_data",
                expected=f"images of at most {self._num_channels} channels and labels of one, of one size",
                got=f"{image.shape[1:]} and {label.shape[1:]}",
                remedy="Mend the stream's transform, or pass num_channels.",
            )
        kinds = ["synthetic" if synthetic else "real" for synthetic in batch["synthetic"].tolist()]
        return [self._ready_pair(*args, number, i) for i, args in enumerate(zip(image, label[:, 0], kinds))]

    def _ready_pair(
        self, image: NDArray[Any], label: NDArray[Any], kind: str, batch: int, sample: int
    ) -> tuple[Pair, NDArray[np.int64]]:
        name = f"{kind} sample {sample} of batch {batch}"
        if not np.isfinite(image).all() or label.min() < 0 or (label != np.floor(label)).any():
            raise InputError(
                name,
                expected="finite grey values, and labels that are whole numbers >= 0",
                got=f"values from {image.min():g} to {image.max():g} and labels from {label.min():g}",
                remedy="Mend the stream's transform; planes that nobody annotated have no place in 2D training.",
            )
        values, numbers, areas = np.unique(label, return_inverse=True, return_counts=True)
        numbers = numbers.reshape(label.shape) + int(values[0] > 0)
        cells = areas[values > 0]
        remedy = "Raise num_cells=(low, high), density or size of the SynthDataset"
        if len(cells) < self._min_masks:
            bound = f"at least min_masks={self._min_masks} cells"
            raise InputError(name, expected=bound, got=len(cells), remedy=f"{remedy}, or pass a smaller min_masks.")
        row = self._empty_in_a_row[kind] = 0 if len(cells) else self._empty_in_a_row[kind] + 1
        if row > MOST_EMPTY_FRAMES:
            raise InputError(
                f"{kind} samples up to batch {batch}",
                expected="cells in some of them",
                got=f"{row} in a row without any",
                remedy=f"{remedy}, and look at what its transform returns.",
            )
        return self._make_pair(image, numbers), cells


def areas_as_label(cells: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    """A label [1, N] of cells with these areas, for Cellpose to find diameters and the number of cells.

    It computes a slot's diameter once, and drops slots of fewer than `min_train_masks` cells by copying all others, which
    would freeze the stream. So each slot shows the cells of several frames, over and over: their median is what it was,
    and no slot is dropped.

    Args:
        cells: Areas in pixels, >= 1.

    >>> areas_as_label(np.array([2, 3])).shape, areas_as_label(np.array([2, 3])).max()
    ((1, 2501), np.int32(1000))
    """
    if len(cells) == 0:
        return np.zeros((1, 1), np.int32)
    many = np.tile(cells, -(-MIN_CELLS_SHOWN // len(cells)))
    label: NDArray[np.int32] = np.repeat(np.arange(1, len(many) + 1, dtype=np.int32), many)
    return np.concatenate((np.zeros(1, np.int32), label))[None]


def _array(value: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = value.as_subclass(Tensor).numpy()  # may be a MetaTensor
    return array
