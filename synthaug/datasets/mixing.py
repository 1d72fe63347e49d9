"""The exact mix of synthetic and real samples, all of it in closed form: what batch b holds follows from b alone.

With batch size B and ratio r, the first b batches hold floor(b r B) synthetic samples. So every batch has either
floor(r B) or ceil(r B) of them, and the stream never drifts from r (DESIGN.md, contract 4).
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage import measure
from torch import Tensor

from synthaug.errors import InputError
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED

MIN_SHARE = 0.5
"""A volume that fills at least so much of the stream's size along each axis is continued by its mirror image."""


def exact_ratio(ratio: float | Fraction) -> Fraction:
    """The ratio as a fraction, so that 1/3 means a third and sums stay exact.

    >>> exact_ratio(0.1), exact_ratio(1 / 3)
    (Fraction(1, 10), Fraction(1, 3))
    """
    if not isinstance(ratio, numbers.Real) or isinstance(ratio, bool) or not 0 <= ratio <= 1:
        raise InputError(
            "synthetic_ratio", expected="a number in [0, 1]", got=repr(ratio), remedy="Pass 0.5 for a 50:50 mix."
        )
    return Fraction(ratio).limit_denominator(10**6)


class Mix:
    """Which samples of which batch are synthetic, and which real sample each of the others is.

    Args:
        batch_size: B, samples in a global batch.
        ratio: r, share of synthetic samples.
        seed: Decides which slots are synthetic and the order of the real samples.
        num_real: Number of real samples; 0 only if the ratio is 1.

    >>> mix = Mix(batch_size=5, ratio=0.5, seed=0, num_real=3)
    >>> [mix.num_synthetic(b) for b in range(4)]
    [2, 3, 2, 3]
    """

    def __init__(self, batch_size: int, ratio: float | Fraction, seed: int, num_real: int) -> None:
        self.batch_size, self.ratio, self.num_real = batch_size, exact_ratio(ratio), num_real
        self._key = SampleKey(seed)
        self._epochs: dict[int, np.ndarray] = {}
        self._slots: dict[int, list[int]] = {}

    def _synthetic_before(self, batch: int) -> int:
        return batch * self.batch_size * self.ratio.numerator // self.ratio.denominator

    def num_synthetic(self, batch: int) -> int:
        """Synthetic samples in the batch: within 1 of r B."""
        return self._synthetic_before(batch + 1) - self._synthetic_before(batch)

    def synthetic_slots(self, batch: int) -> list[int]:
        """Positions of the synthetic samples within the batch, ascending."""
        if batch not in self._slots:
            if len(self._slots) > 4096:
                self._slots.clear()
            order = self._key.child("slots", batch).numpy().permutation(self.batch_size)
            self._slots[batch] = sorted(order[: self.num_synthetic(batch)].tolist())
        return self._slots[batch]

    def real_indices(self, batch: int) -> list[int]:
        """Indices of the batch's real samples, in the order of their slots: every epoch visits each sample once."""
        first = batch * self.batch_size - self._synthetic_before(batch)
        num = self.batch_size - self.num_synthetic(batch)
        return [int(self._epoch(k // self.num_real)[k % self.num_real]) for k in range(first, first + num)]

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            if len(self._epochs) > 2:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = self._key.child("real", epoch).numpy().permutation(self.num_real)
        return self._epochs[epoch]


class RealOrder(torch.utils.data.Sampler[list[int]]):
    """The order in which a stream visits its real samples, as a batch sampler.

    At ratio 0 `SynthDataset(..., real=real)` is `DataLoader(real, batch_sampler=RealOrder(len(real), batch_size,
    seed))`, bit for bit, if the real samples already have the stream's size and labels contiguous from 1.

    Args:
        num_real: Number of real samples.
        batch_size: Samples in a global batch, synthetic ones included.
        seed: The stream's seed.
        synthetic_ratio: The stream's ratio; at r the batches hold about (1 - r) * batch_size real samples.
        num_batches: Batches in an epoch; endless if None.
        start: First batch.

    >>> list(RealOrder(4, batch_size=2, seed=0, num_batches=2)) == list(RealOrder(4, 2, seed=0, num_batches=2))
    True
    """

    def __init__(
        self,
        num_real: int,
        batch_size: int,
        seed: int = 0,
        *,
        synthetic_ratio: float | Fraction = 0.0,
        num_batches: int | None = None,
        start: int = 0,
    ) -> None:
        if num_real < 1 or batch_size < 1:
            raise InputError("RealOrder", expected="num_real >= 1 and batch_size >= 1", got=f"{num_real}, {batch_size}")
        self._mix = Mix(batch_size, synthetic_ratio, seed, num_real)
        self.num_batches, self.start = num_batches, start

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.start
        while self.num_batches is None or batch < self.start + self.num_batches:
            yield self._mix.real_indices(batch)
            batch += 1

    def __len__(self) -> int:
        if self.num_batches is None:
            raise TypeError("RealOrder without num_batches is endless and has no length")
        return self.num_batches


def check_real(real: Any, ratio: Fraction) -> int:
    """Number of real samples, after a look at whether they can serve a stream of that synthetic ratio."""
    if real is None:
        if ratio < 1:
            raise InputError(
                "real",
                expected=f"a map-style dataset of image-label pairs at synthetic_ratio {float(ratio):g}",
                got="None",
                remedy="Pass real=..., or synthetic_ratio=1.0 for a purely synthetic stream.",
            )
        return 0
    if not hasattr(real, "__getitem__") or not hasattr(real, "__len__"):
        raise InputError(
            "real",
            expected="a map-style dataset (with __len__ and __getitem__)",
            got=type(real).__name__,
            remedy="An iterable dataset has no order that can be repeated; wrap it in a list.",
        )
    if len(real) == 0 and ratio < 1:
        raise InputError("real", expected="at least one sample", got="an empty dataset")
    return len(real)


def read_real(real: Any, index: int, size: Sequence[int], key: SampleKey) -> tuple[Tensor, Tensor]:
    """One real sample, cut to size at a place that `key` decides.

    Planes of a volume that nobody annotated stay `UNLABELLED` throughout; the cut holds at least one that is annotated.
    A volume that is somewhat short along an axis is continued by its mirror image, as stacks of one experiment differ by
    a few voxels; a mirrored cell gets a label of its own unless it touches its original.

    Args:
        real: Map-style; items are dicts with `image` and `label`, or pairs, of arrays or tensors [(Z,) Y, X] or
            [1, (Z,) Y, X].
        index: Which item.
        size: ((Z,) Y, X) in pixels.

    Returns:
        image float32 [1, *size] and label int32 [1, *size], contiguous from 1, 0 = background.
    """
    name = f"real[{index}]"
    image, label = read_pair(real, index, len(size))
    if any(have < want for have, want in zip(image.shape, size)):
        image, label = _continue_to(image, label, size, name)
    rng = key.numpy()
    places = [_corners(label, axis, want, name) for axis, want in enumerate(size)]
    corner = [int(corners[rng.integers(len(corners))]) for corners in places]
    window = tuple(slice(start, start + want) for start, want in zip(corner, size))
    return (
        torch.from_numpy(np.array(image[window], dtype=np.float32))[None],
        torch.from_numpy(relabel(label[window]))[None],
    )


def read_pair(real: Any, index: int, ndim: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """One real sample as it is: image and label [(Z,) Y, X] of their own types, looked at; arguments as in `read_real`."""
    name = f"real[{index}]"
    try:
        item = real[index]
    except Exception as error:
        error.add_note(f"synthaug: while reading {name}")
        raise
    if isinstance(item, Mapping) and {"image", "label"} <= set(item):
        image, label = _array(item["image"], f"{name} image"), _array(item["label"], f"{name} label")
    elif isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
        image, label = _array(item[0], f"{name} image"), _array(item[1], f"{name} label")
    else:
        got = f"a dict with keys {sorted(map(str, item))}" if isinstance(item, Mapping) else type(item).__name__
        raise InputError(name, expected='{"image": ..., "label": ...} or (image, label)', got=got)
    if image.dtype.kind not in "fiu":
        raise InputError(f"{name} image", expected="grey values", got=str(image.dtype))
    image = _spatial(image, ndim, f"{name} image")
    label = check_labels(_spatial(label, ndim, f"{name} label"), f"{name} label")
    if image.shape != label.shape:
        raise InputError(name, expected="image and label of one shape", got=f"{image.shape} and {label.shape}")
    return image, label


def _corners(label: NDArray[Any], axis: int, want: int, name: str) -> NDArray[np.int64]:
    """Where along an axis a window of `want` pixels may begin: along z only so that it holds an annotated plane."""
    corners = np.arange(label.shape[axis] - want + 1)
    if axis or label.ndim == 2:
        return corners
    before = np.concatenate([[0], np.cumsum(label[:, 0, 0] != UNLABELLED)])
    if not before[-1]:
        raise InputError(f"{name} label", expected="at least one annotated plane", got=f"{UNLABELLED} everywhere")
    return corners[before[corners + want] > before[corners]]


def _continue_to(
    image: NDArray[Any], label: NDArray[Any], size: Sequence[int], name: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    """A volume of at least `size`, mirrored at its sides where it is short of it."""
    if image.ndim == 2 or any(have < MIN_SHARE * want for have, want in zip(image.shape, size)):
        raise InputError(
            name,
            expected=f"at least {tuple(size)} pixels, the stream's size",
            got=str(image.shape),
            remedy="Choose a smaller size, pad the real images, or leave out the small ones.",
        )
    missing = [max(want - have, 0) for have, want in zip(image.shape, size)]
    pad = [(n // 2, n - n // 2) for n in missing]
    mirrored = np.pad(label, pad, mode="reflect").astype(np.int64)
    # A number that now stands in several places is several cells: the cell and its images.
    parts = measure.label(np.maximum(mirrored, 0), connectivity=3)
    return np.pad(image, pad, mode="reflect"), np.where(mirrored == UNLABELLED, UNLABELLED, parts)


def relabel(label: NDArray[Any]) -> NDArray[np.int32]:
    """int32, contiguous from 1 in the order of the old numbers; 0 and `UNLABELLED` stay. A cut cell keeps a label.

    >>> relabel(np.array([0, 7, 3, 7, -1])).tolist()
    [0, 2, 1, 2, -1]
    """
    values, inverse = np.unique(label, return_inverse=True)
    numbers = np.where(values > 0, np.cumsum(values > 0), values.astype(np.int64))
    return numbers[inverse.reshape(label.shape)].astype(np.int32)


def _array(value: Any, what: str) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        return value.as_subclass(Tensor).numpy()  # MetaTensor and its kin
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise InputError(what, expected="an array or a tensor of numbers", got=type(value).__name__)
    return array


def check_labels(label: NDArray[Any], what: str) -> NDArray[Any]:
    """The label [(Z,) Y, X], if it is one of instances; `what` names it in the error."""
    if label.dtype.kind not in "iu":
        raise InputError(
            what,
            expected="instance labels of an integer type, one number a cell",
            got=str(label.dtype),
            remedy="A boolean or float mask merges touching cells; number its cells with skimage.measure.label first.",
        )
    if label.dtype.kind == "i" and label.size and label.min() < 0:
        if label.ndim != 3 or label.min() < UNLABELLED:
            raise InputError(what, expected="labels >= 0", got=f"down to {label.min()}")
        missing = label == UNLABELLED
        if (missing.any((1, 2)) != missing.all((1, 2))).any():
            raise InputError(
                what,
                expected=f"{UNLABELLED}, for not annotated, in whole planes only",
                got=f"planes with {UNLABELLED} in a part",
                remedy="Leave out planes that are annotated in part.",
            )
    return label


def _spatial(array: np.ndarray, ndim: int, what: str) -> np.ndarray:
    if array.ndim == ndim + 1 and array.shape[0] == 1:
        return array[0]
    if array.ndim != ndim:
        axes = "[Y, X] or [1, Y, X]" if ndim == 2 else "[Z, Y, X] or [1, Z, Y, X]"
        raise InputError(what, expected=axes, got=f"shape {array.shape}", remedy="Pick one grey channel.")
    return array
