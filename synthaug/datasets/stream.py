"""Makes the batches of a stream: a pure function of cascade, config and seed, to be entered anywhere."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthaug.datasets.bank import Bank, Frame, Plan, StreamStats, no_cells
from synthaug.datasets.mixing import Mix, exact_ratio, read_real
from synthaug.datasets.producer import SerialThread
from synthaug.datasets.real_cells import RealCells
from synthaug.errors import InputError, SynthAugError
from synthaug.randomness import SampleKey

STREAM_VERSION = 1
"""Raised whenever the same config gives other batches than before."""

DEFAULT_SIZES = {2: (256, 256), 3: (32, 128, 128)}
"""Size of the samples by number of axes, in pixels."""

SAME_VOXEL_SIZE = 0.01
"""Relative difference of voxel sizes up to which a cascade serves as it is."""

ODD_VOXEL_SIZE = 0.15
"""Relative difference of voxel sizes beyond which mixing real and synthetic samples is likely a mistake; stacks of one
experiment may well differ by a tenth in their z step."""


@dataclass(frozen=True)
class StreamConfig:
    """All that decides a stream besides the cascade, the real samples and the transform; see `SynthDataset`."""

    size: tuple[int, ...]
    batch_size: int
    synthetic_ratio: Fraction
    seed: int
    max_reuse: int
    num_cells: int | tuple[int, int] | None
    density: float | None
    clustering: float | None
    background: str
    num_lanes: int
    num_shards: int
    on_starve: str
    real_cells: float = 0.0
    voxel_size_um: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        size = self.size
        if not isinstance(size, tuple) or len(size) not in (2, 3) or not all(_is_count(s) and s > 0 for s in size):
            raise InputError("size", expected="(Y, X) or (Z, Y, X) in pixels", got=repr(size))
        for name in ("batch_size", "max_reuse", "num_lanes", "num_shards"):
            if not _is_count(getattr(self, name)) or getattr(self, name) < 1:
                raise InputError(name, expected="a whole number >= 1", got=repr(getattr(self, name)))
        if self.batch_size % self.num_shards:
            raise InputError("num_shards", expected=f"a divisor of batch_size = {self.batch_size}", got=self.num_shards)
        object.__setattr__(self, "synthetic_ratio", exact_ratio(self.synthetic_ratio))
        SampleKey(self.seed)
        check_population(self.num_cells, self.density, self.clustering, self.background)
        share = self.real_cells
        if isinstance(share, bool) or not isinstance(share, int | float | np.number) or not 0 <= share <= 1:
            raise InputError("real_cells", expected="a share of the cells, in [0, 1]", got=repr(share))
        object.__setattr__(self, "real_cells", float(share))
        if self.on_starve not in ("wait", "reuse"):
            raise InputError("on_starve", expected='"wait" or "reuse"', got=repr(self.on_starve))
        voxel = self.voxel_size_um
        if voxel is not None:
            if not isinstance(voxel, tuple) or len(voxel) != 3 or not all(_is_length(v) for v in voxel):
                raise InputError("voxel_size_um", expected="(Z, Y, X) > 0 in micrometres, or None", got=repr(voxel))
            object.__setattr__(self, "voxel_size_um", tuple(float(v) for v in voxel))

    def describe(self) -> dict[str, Any]:
        """What decides the bits, as plain JSON values. `on_starve` does not: "reuse" departs only where it has to."""
        values = dataclasses.asdict(self) | {"synthetic_ratio": str(self.synthetic_ratio), "stream": STREAM_VERSION}
        del values["on_starve"]
        for name in ("voxel_size_um", "real_cells"):
            if not values[name]:  # states saved before there was a choice stay valid
                del values[name]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


class Stream:
    """One process's share of a stream: plan, bank, and the two threads that make cells and batches.

    Args:
        config: What the stream is.
        cascade: Makes cells and populations.
        real: Map-style data set of real samples, or None.
        transform: Applied to every sample, or None.
        num_real: Its length.
        slots: The slots of each batch that this rank makes.
        as_meta_tensor: Whether samples and batches are MONAI's MetaTensors.
        real_cells: Cells of real frames that stand among the synthetic samples' cells, or None.
    """

    def __init__(
        self,
        config: StreamConfig,
        cascade: Any,
        real: Any,
        transform: Callable[[dict[str, Any]], Mapping[str, Any]] | None,
        num_real: int,
        slots: range,
        as_meta_tensor: bool = False,
        real_cells: RealCells | None = None,
    ) -> None:
        self.config, self.cascade, self.real, self.transform, self.slots = config, cascade, real, transform, slots
        self.as_meta_tensor = as_meta_tensor
        self.mix = Mix(config.batch_size, config.synthetic_ratio, config.seed, num_real)
        self._wishes = {"num_cells": config.num_cells, "density": config.density}
        self.plan = Plan(
            self.mix,
            config.seed,
            config.num_lanes,
            config.num_shards,
            cascade.block_size,
            config.max_reuse,
            # No method of this stream, which would hold itself and wait for the garbage collector.
            functools.partial(cascade.num_cells, size=config.size, **self._wishes),
            config.real_cells,
        )
        self._producer = SerialThread("synthaug-producer", cascade.device)
        self._composer = SerialThread("synthaug-composer", cascade.device)
        self.bank = Bank(cascade, self.plan, config.on_starve, self._producer, real_cells=real_cells)
        self._ordered: dict[int, list[Frame]] = {}  # frames of coming batches, whose cells are being made

    def batch(self, batch: int, upcoming: Sequence[int] = ()) -> tuple[dict[str, Any], StreamStats]:
        """Global batch number `batch` (this rank's slots), and what making it took.

        Args:
            batch: Which one.
            upcoming: The batches that will be asked for next; the producer works ahead on them.
        """
        return self._composer.submit(self._make, batch, upcoming).result()

    def close(self) -> None:
        """Stop the threads."""
        self._producer.close()
        self._composer.close()

    def _make(self, batch: int, upcoming: Sequence[int]) -> tuple[dict[str, Any], StreamStats]:
        stats = self.bank.stats = StreamStats(batches=1)
        for number in [batch, *upcoming]:
            if number not in self._ordered:
                self._ordered[number] = self.plan.frames(number, self.slots)
                self.bank.order(self._ordered[number])
        frames = self._ordered.pop(batch)
        synthetic = {frame.slot: frame for frame in frames}
        is_synthetic = set(self.mix.synthetic_slots(batch))
        real_slots = [slot for slot in range(self.config.batch_size) if slot not in is_synthetic]
        real = dict(zip(real_slots, self.mix.real_indices(batch)))
        samples, starved = [], False
        for slot in self.slots:
            key = SampleKey(self.config.seed, ("sample", batch, slot))
            if slot in synthetic:
                image, label, late = self._synthesize(synthetic[slot], stats)
                starved |= late
                what = f"synthetic sample {slot} of batch {batch}"
            else:
                image, label = read_real(self.real, real[slot], self.config.size, key.child("crop"))
                what = f"real[{real[slot]}], sample {slot} of batch {batch}"
            sample = {"image": image, "label": label}
            if self.as_meta_tensor:
                sample = _transforms().with_affine(sample, self.cascade.voxel_size_um)
            samples.append(self._transform(sample, key, what))
        stats.synthetic, stats.real = len(frames), len(self.slots) - len(frames)
        stats.starved_batches = int(starved)
        self.bank.retire(batch, batch % self.config.num_lanes)
        made = collate(samples, self.as_meta_tensor)
        made["synthetic"] = torch.tensor([slot in synthetic for slot in self.slots])
        return made, stats

    def _synthesize(self, frame: Frame, stats: StreamStats) -> tuple[Tensor, Tensor, bool]:
        cells, late = self.bank.take(frame)
        if cells is None:
            cells = no_cells(self.cascade)
        # One frame a call: whatever the batch sizes of ranks and workers, no frame's bits can depend on its neighbours.
        population = self.cascade.populate(
            cells,
            [frame.key],
            self.config.size,
            picks=[torch.arange(len(cells))],
            clustering=self.config.clustering,
            background=self.config.background,
            **self._wishes,
        )
        stats.requested += int(population.num_requested.sum())
        stats.placed += int(population.num_placed.sum())
        return population.image[0].cpu(), population.labels[0].cpu(), late

    def _transform(self, sample: dict[str, Any], key: SampleKey, what: str) -> Mapping[str, Any]:
        if self.transform is None:
            return sample
        if hasattr(self.transform, "set_random_state"):  # MONAI's Randomizable, Compose among them
            self.transform.set_random_state(seed=key.child("transform").integer() % 2**32)
        try:
            sample = self.transform(sample)  # type: ignore[assignment]
        except SynthAugError as error:
            error.add_note(f"synthaug: in the transform of {what}")
            raise
        except Exception as error:
            root: BaseException = error
            while root.__cause__ is not None:  # MONAI says only which transform it was, and keeps the reason there
                root = root.__cause__
            why = "" if root is error else f", because of {type(root).__name__}: {root}"
            raise InputError(
                f"transform of {what}",
                expected="a sample",
                got=f"{type(error).__name__}: {error}{why}",
                remedy=f"Call it on {{'image': ..., 'label': ...}}, both [1, {', '.join(map(str, self.config.size))}], to "
                "see where it fails.",
            ) from error
        if not isinstance(sample, Mapping) or not {"image", "label"} <= set(sample):
            got = f"keys {sorted(map(str, sample))}" if isinstance(sample, Mapping) else type(sample).__name__
            raise InputError(
                "transform",
                expected='a dict with "image" and "label" for every sample',
                got=got,
                remedy="Transforms that cut one sample into several belong behind the loader.",
            )
        return sample


def collate(samples: Sequence[Mapping[str, Any]], as_meta_tensor: bool = False) -> dict[str, Any]:
    """Samples as one batch of tensors; keys beside image and label that a transform adds come along.

    Args:
        samples: Dicts with the same keys.
        as_meta_tensor: MetaTensors stay what they are; otherwise every tensor is a plain one.
    """
    batch: dict[str, Any] = {}
    for key in samples[0]:
        try:
            parts = [torch.as_tensor(sample[key]) for sample in samples]
        except (KeyError, TypeError, ValueError, RuntimeError):
            if key in ("image", "label"):
                raise
            continue  # text and other luggage of a transform
        if not as_meta_tensor:
            parts = [part.as_subclass(Tensor) for part in parts]
        if len({part.shape for part in parts}) > 1:
            shapes = sorted({tuple(part.shape) for part in parts})
            raise InputError(
                f"transform, key {key!r}",
                expected="one shape for all samples of a batch",
                got=shapes,
                remedy="Let it end with a crop or resize to a fixed size.",
            )
        if len({part.dtype for part in parts}) > 1:
            raise InputError(f"transform, key {key!r}", expected="one dtype", got={str(part.dtype) for part in parts})
        batch[key] = _transforms().stack(parts) if as_meta_tensor else torch.stack(parts)
    return batch


def _transforms() -> Any:
    """The module that knows MONAI, which takes seconds to import and is needed for MetaTensors only."""
    from synthaug.datasets import transforms

    return transforms


def fitting_cascade(cascade: Any, config: StreamConfig) -> Any:
    """The cascade, brought to the stream's voxel size where another one is asked for.

    Raises:
        InputError: It makes frames and the stream is one of volumes or the other way round, or it cannot serve that
            voxel size.
    """
    if cascade.ndim != len(config.size):
        raise InputError(
            "size",
            expected="(Y, X) for a 2D cascade" if cascade.ndim == 2 else "(Z, Y, X) for a 3D cascade",
            got=config.size,
            remedy=f"Pass a size such as {DEFAULT_SIZES[cascade.ndim]}, or a {len(config.size)}D cascade: frames and "
            "volumes are made by cascades fitted to frames and volumes.",
        )
    wanted, own = config.voxel_size_um, cascade.voxel_size_um
    if wanted is None:
        return cascade
    if own is None:
        raise InputError(
            "voxel_size_um",
            expected="None, as this cascade does not know its own",
            got=wanted,
            remedy="Fit the cascade with its voxel size.",
        )
    return cascade if _differ(wanted, own, cascade.ndim) <= SAME_VOXEL_SIZE else cascade.at_voxel_size(wanted)


def warn_of_voxel_size(real: Any, synthetic: Any, ndim: int) -> None:
    """Warn if real and synthetic samples have clearly different voxel sizes, as far as both are known."""
    if real is not None and synthetic is not None and _differ(real, synthetic, ndim) > ODD_VOXEL_SIZE:
        warnings.warn(
            f"the real samples have voxels of {tuple(real)} um (Z, Y, X), the synthetic ones of {tuple(synthetic)} um: "
            f"cells of one kind come in two sizes. Pass voxel_size_um={tuple(real)}, or resample the real samples.",
            stacklevel=3,  # where the SynthDataset is built
        )


def _differ(one: Sequence[float], other: Sequence[float], ndim: int) -> float:
    """Largest relative difference along the axes that count."""
    return max(abs(a / b - 1) for a, b in zip(one[-ndim:], other[-ndim:]))


def check_population(num_cells: Any, density: Any, clustering: Any, background: Any) -> None:
    """Look at the arguments that say how populated a frame is, before any work is spent."""
    if num_cells is not None:
        bounds = num_cells if isinstance(num_cells, tuple) else (num_cells, num_cells)
        if len(bounds) != 2 or not all(_is_count(n) for n in bounds) or not 0 <= bounds[0] <= bounds[1]:
            raise InputError("num_cells", expected="a whole number, (low, high), or None", got=repr(num_cells))
        if density is not None:
            raise InputError(
                "density", expected="None beside num_cells", got=repr(density), remedy="Give one of the two."
            )
    if density is not None and not (isinstance(density, int | float) and 0 <= density < math.inf):
        raise InputError("density", expected="cells per pixel (3D: per voxel) >= 0, or None", got=repr(density))
    if clustering is not None and not (isinstance(clustering, int | float) and 0 <= clustering <= 1):
        raise InputError("clustering", expected="a probability, or None", got=repr(clustering))
    if background not in ("model", "real"):
        raise InputError("background", expected='"model" or "real"', got=repr(background))


def _is_length(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(0 < value < math.inf)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
