"""The two sequences that Cellpose's `train_seg` takes for lists: which accesses deal a pair, and which only look.

In 3.1 and 4.x alike it first looks around: `data[0].ndim`, `labels[n].astype(...)` kept in a list, `labels[n][0]` for
diameters, `for image in data` where it normalises or sorts channels. Then it draws, for every step: `[data[i] for i in
indices]`, after it `[labels[i][1:] for i in indices]`. So an image that is indexed is dealt from the stream, and
`labels[i][1:]` is the other half of what was dealt for i; looking around deals nothing. Whatever does not fit this order is
an error, never a label of another image.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from synthaug.errors import InputError


class Pair(NamedTuple):
    """What Cellpose trains on.

    Attributes:
        image: float32 [C, Y, X], 1st percentile 0, 99th percentile 1; grey values, then channels of 0.
        target: float32 [3, Y, X]: whether a cell is there (0 or 1), and its flows along Y and X, unit vectors or 0.
    """

    image: NDArray[np.float32]
    target: NDArray[np.float32]


class Source(Protocol):
    """Where pairs come from.

    Attributes:
        shape: (C, Y, X) of all images.
        areas: integer [1, N], a label for diameters and numbers of cells.
        wait_seconds: Wall time spent in `pair` so far.
    """

    shape: tuple[int, ...]
    areas: NDArray[np.int32]
    wait_seconds: float

    def pair(self) -> Pair:
        """The next one."""
        ...

    def close(self) -> None:
        """Make no more."""
        ...


class Draws:
    """Which pair was dealt for which slot: the images of one step first, then the other halves of all of them.

    Args:
        source: Where pairs come from.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._dealt: list[tuple[int, Pair]] = []  # whose target has not been asked for
        self._answered = False  # whether targets of the present step were
        self._returned: deque[Pair] = deque()

    def image(self, slot: int) -> NDArray[np.float32]:
        """float32 [C, Y, X], the image of the next pair."""
        if self._answered:
            self._check_complete(f"the image of slot {slot}")
            self._answered = False
        pair = self._returned.popleft() if self._returned else self.source.pair()
        self._dealt.append((slot, pair))
        return pair.image

    def target(self, slot: int) -> NDArray[np.float32]:
        """float32 [3, Y, X], the other half of the first pair dealt for the slot that has not been asked for."""
        for place, (dealt, pair) in enumerate(self._dealt):
            if dealt == slot:
                del self._dealt[place]
                self._answered = True
                return pair.target
        _out_of_step(f"the label of slot {slot} without an image drawn for it")

    def look(self) -> None:
        """Cellpose looks around: the images it was shown so far were no draws, so their pairs will be dealt again."""
        if self._answered:
            self._check_complete("labels as a whole")
        self._returned.extendleft(pair for _, pair in reversed(self._dealt))
        self._dealt.clear()

    def _check_complete(self, asked: str) -> None:
        if self._dealt:
            slots = [slot for slot, _ in self._dealt]
            _out_of_step(f"a request for {asked} before that for the labels of the images drawn for slots {slots}")


class Images:
    """`train_data`: indexing draws, iterating only shows shapes."""

    def __init__(self, draws: Draws, num_slots: int) -> None:
        self._draws, self._num_slots = draws, num_slots

    def __len__(self) -> int:
        return self._num_slots

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        return self._draws.image(_slot(index, self._num_slots))

    def __iter__(self) -> Iterator[_Shape]:
        for _ in range(self._num_slots):
            yield _Shape(self._draws.source.shape)

    @property
    def wait_seconds(self) -> float:
        """Wall time that the training has waited for the stream so far, that of the first batches included."""
        return self._draws.source.wait_seconds

    def close(self) -> None:
        """Stop making pairs ahead; both sequences are used up then."""
        self._draws.source.close()


class Labels:
    """`train_labels`: indexing gives what Cellpose keeps, and deals nothing."""

    def __init__(self, draws: Draws, num_slots: int) -> None:
        self._draws, self._num_slots = draws, num_slots

    def __len__(self) -> int:
        return self._num_slots

    def __getitem__(self, index: Any) -> SlotLabels:
        self._draws.look()
        return SlotLabels(self._draws, _slot(index, self._num_slots))

    def __iter__(self) -> Iterator[SlotLabels]:
        for index in range(self._num_slots):
            yield self[index]


class _Shape:
    """An image of which only shape and type are known: whoever wants its values wants to change or keep it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.ndim, self.dtype = shape, len(shape), np.dtype(np.float32)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self._refuse()

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse()

    def __getitem__(self, _: Any) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise InputError(
            "train_data",
            expected="images that Cellpose draws as they are",
            got="a request to normalise, convert or keep all of them, which would train on the same few for ever",
            remedy="Pass normalize=False to train_seg, and no channels: the images of cellpose_data are normalised and have "
            "the channels they need.",
        )


class SlotLabels:
    """`train_labels[i]`: looks like a label with flows, float32 [4, Y, X]; `[1:]` belongs to the image drawn last for i."""

    ndim = 3
    dtype = np.dtype(np.float32)

    def __init__(self, draws: Draws, slot: int) -> None:
        self._draws, self._slot = draws, slot
        self.shape = (4, *draws.source.shape[1:])

    def astype(self, *_: Any, **__: Any) -> SlotLabels:
        return self

    def __getitem__(self, key: Any) -> NDArray[Any]:
        if isinstance(key, slice) and key == slice(1, None):
            return self._draws.target(self._slot)
        if isinstance(key, int | np.integer) and key == 0:
            self._draws.look()
            return self._draws.source.areas
        _out_of_step(f"labels[{self._slot}][{key!r}]")

    def __iter__(self) -> NoReturn:
        _out_of_step(f"each channel of labels[{self._slot}]")

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        _out_of_step(f"labels[{self._slot}] as an array")


def _slot(index: Any, num_slots: int) -> int:
    slot = operator.index(index)
    if not -num_slots <= slot < num_slots:
        raise IndexError(f"slot {slot} of {num_slots}")
    return slot % num_slots


def _out_of_step(asked: str) -> NoReturn:
    raise InputError(
        "cellpose_data",
        expected="the images of a step to be drawn first, then their labels, as train_seg of Cellpose 3.1 to 4.2 does",
        got=asked,
        remedy="Images or labels were copied into a list, which a stream cannot be, or this version of Cellpose draws in "
        "another order: then install cellpose 3.1.1.3 or 4.2.1.1.",
    )
