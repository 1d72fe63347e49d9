"""MONAI transforms: fresh synthetic populations inside an existing MONAI pipeline.

They work on intensities in camera counts, so they belong before the intensity normalisation. For a stream with an exact
ratio, several workers and resume use `SynthDataset`; these fit where the data loading must stay as it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, get_track_meta, list_data_collate
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.utils.data import get_worker_info

from synthaug.datasets.bank import Dealer, no_cells
from synthaug.datasets.loader import check_workers
from synthaug.datasets.mixing import check_labels, relabel
from synthaug.datasets.stream import check_population
from synthaug.errors import InputError
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED, Cells


class RandSynthPopulation(RandomizableTransform):
    """Replace a sample by a synthetic population of its size, or paste synthetic cells into its free space.

    Cells come from a small pool: each is used in at most `max_reuse` samples, then new ones are made. After
    `set_random_state` the same calls give the same results.

    Args:
        cascade: Where the cells come from; on the CPU if used in DataLoader workers.
        mode: "replace" or "paste".
        prob: Probability that a sample is changed.
        max_reuse: Uses of one cell.
        num_cells: Cells of a sample, or (low, high); None draws the density as in the cascade's data (replace), or as
            many as the sample already has (paste).
        density: Cells per pixel (3D: per voxel), instead of num_cells.
        clustering: Probability that a cell is placed next to another one; None takes the one fitted to the data.
        background: Of replaced samples: "model", or "real" for the free regions of real frames.

    Raises:
        InputError: An argument or a sample is not what it has to be.
    """

    def __init__(
        self,
        cascade: Any,
        mode: str = "replace",
        prob: float = 0.5,
        max_reuse: int = 16,
        num_cells: int | tuple[int, int] | None = None,
        density: float | None = None,
        clustering: float | None = None,
        background: str = "model",
    ) -> None:
        RandomizableTransform.__init__(self, prob)
        if mode not in ("replace", "paste"):
            raise InputError("mode", expected='"replace" or "paste"', got=repr(mode))
        if not isinstance(max_reuse, int) or max_reuse < 1:
            raise InputError("max_reuse", expected="a whole number >= 1", got=repr(max_reuse))
        check_population(num_cells, density, clustering, background)
        self.cascade, self.mode, self.max_reuse = cascade, mode, max_reuse
        self.num_cells, self.density, self.clustering, self.background = num_cells, density, clustering, background
        self._key = SampleKey(0)
        self._pool: CellPool | None = None

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> Self:
        """As everywhere in MONAI; the pool starts anew."""
        super().set_random_state(seed, state)
        self._pool = None
        return self

    def randomize(self, data: Any = None) -> None:
        """Draw whether the sample is changed, its key, and for a new pool the key of its cells."""
        super().randomize(None)
        if not self._do_transform:
            return
        self._key = SampleKey(int(self.R.randint(2**31)), ("transform",))
        if self._pool is None:
            self._pool = CellPool(self.cascade, self.max_reuse, SampleKey(int(self.R.randint(2**31)), ("pool",)))

    def __call__(self, img: Any, label: Any, randomize: bool = True) -> tuple[Tensor, Tensor]:
        """Apply to one sample.

        Args:
            img: [1, (Z,) Y, X], array or tensor, camera counts; with Z for a 3D cascade.
            label: [1, (Z,) Y, X], instance labels of an integer type.
            randomize: Draw anew; otherwise as drawn last.

        Returns:
            image float32 and label int32 [1, (Z,) Y, X], MetaTensors unless MONAI's tracking is off. A changed sample's
            labels are contiguous from 1. A replaced sample's affine carries the cascade's voxel size where known, in
            micrometres and in the order of the tensor's axes: diag(Z, Y, X, 1), in 2D diag(Y, X, 1, 1).
        """
        if randomize:
            self.randomize()
        if not self._do_transform:
            return finish(img, torch.float32), finish(label, torch.int32)
        image, labels = plain(img), plain(label)
        if image.ndim not in (3, 4) or image.shape[0] != 1 or image.shape != labels.shape:
            raise InputError(
                type(self).__name__,
                expected="image and label of one shape [1, Y, X] or [1, Z, Y, X]",
                got=f"{tuple(image.shape)} and {tuple(labels.shape)}",
                remedy="EnsureChannelFirst makes the first axis; a multi-channel image has to be split.",
            )
        if image.ndim != self.cascade.ndim + 1:
            raise InputError(
                type(self).__name__,
                expected="[1, Z, Y, X] for a 3D cascade" if self.cascade.ndim == 3 else "[1, Y, X] for a 2D cascade",
                got=f"shape {tuple(image.shape)}",
                remedy="Frames need a cascade fitted to frames, and volumes one fitted to volumes.",
            )
        if (worker := get_worker_info()) is not None:
            check_workers(self.cascade.device, worker.num_workers)
        assert self._pool is not None, "randomize() makes the pool"
        with torch.no_grad():
            make = self._replace if self.mode == "replace" else self._paste
            new_image, new_labels, voxel_size_um = make(image, labels, self._pool)
        device = image.device
        return (
            finish(new_image.to(device), torch.float32, like=img, voxel_size_um=voxel_size_um),
            finish(new_labels.to(device), torch.int32, like=label, voxel_size_um=voxel_size_um),
        )

    def _replace(self, image: Tensor, labels: Tensor, pool: CellPool) -> tuple[Tensor, Tensor, Any]:
        size = tuple(image.shape[1:])
        num = self.cascade.num_cells([self._key], size, num_cells=self.num_cells, density=self.density)[0]
        population = self.cascade.populate(
            pool.take(num, self._key.child("pick")),
            [self._key],
            size,
            picks=[torch.arange(num)],
            num_cells=self.num_cells,
            density=self.density,
            clustering=self.clustering,
            background=self.background,
        )
        return population.image[0], population.labels[0], population.voxel_size_um

    def _paste(self, image: Tensor, labels: Tensor, pool: CellPool) -> tuple[Tensor, Tensor, None]:
        device = self.cascade.device
        checked = check_labels(labels[0].cpu().numpy(), "label")
        if (checked == UNLABELLED).any():
            raise InputError(
                "label",
                expected="cells marked in every plane, as new ones go where none are",
                got="planes nobody annotated",
                remedy='Use mode="replace".',
            )
        known = torch.from_numpy(relabel(checked))[None]
        num = max(int(known.max()), 1)
        if self.num_cells is not None or self.density is not None:
            size = tuple(image.shape[1:])
            num = self.cascade.num_cells([self._key], size, num_cells=self.num_cells, density=self.density)[0]
        if num == 0:
            return image, known, None
        cells = pool.take(num, self._key.child("pick"))
        counts = image.to(device, torch.float32)
        pasted = self.cascade.paste(
            cells, counts, known.to(device), self._key, num_cells=num, clustering=self.clustering
        )
        return *pasted, None


class RandSynthPopulationd(RandomizableTransform, MapTransform):
    """Dictionary version of `RandSynthPopulation`.

    Args:
        keys: The image's key and the label's, in any order.
        cascade: See `RandSynthPopulation`, as for all that is not listed here.
        label_key: Which of the keys is the label.
        allow_missing_keys: Leave a sample as it is that lacks one of them; otherwise that is a KeyError.
    """

    def __init__(
        self,
        keys: KeysCollection,
        cascade: Any,
        mode: str = "replace",
        prob: float = 0.5,
        max_reuse: int = 16,
        num_cells: int | tuple[int, int] | None = None,
        density: float | None = None,
        clustering: float | None = None,
        background: str = "model",
        label_key: Hashable = "label",
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        if len(self.keys) != 2 or label_key not in self.keys:
            raise InputError(
                "keys",
                expected=f"two keys, one of them the label_key {label_key!r}",
                got=self.keys,
                remedy="Image and label can only change together.",
            )
        self.label_key = label_key
        self.image_key = next(key for key in self.keys if key != label_key)
        self.population = RandSynthPopulation(
            cascade,
            mode=mode,
            prob=1.0,
            max_reuse=max_reuse,
            num_cells=num_cells,
            density=density,
            clustering=clustering,
            background=background,
        )

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> Self:
        """Also that of the array transform."""
        super().set_random_state(seed, state)
        self.population.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of the sample with new image and label, both tensors also if it is left as it is."""
        sample = dict(data)
        present = list(self.key_iterator(sample))
        self.randomize(None)
        if self._do_transform and len(present) == 2:
            self.population.randomize()
            image, label = self.population(sample[self.image_key], sample[self.label_key], randomize=False)
            sample[self.image_key], sample[self.label_key] = image, label
            return sample
        for key in present:
            sample[key] = finish(sample[key], torch.int32 if key == self.label_key else torch.float32)
        return sample


class CellPool:
    """Cells for one sample after another, each at most `max_reuse` times, none twice in a sample.

    Args:
        cascade: Makes them, a block at a time, when needed.
        max_reuse: Uses of one cell.
        key: Decides the cells.
    """

    def __init__(self, cascade: Any, max_reuse: int, key: SampleKey) -> None:
        self.cascade, self.key = cascade, key
        self._dealer = Dealer(cascade.block_size, max_reuse)
        self._blocks: dict[int, Cells] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks held."""
        return len(self._blocks)

    def take(self, num: int, key: SampleKey) -> Cells:
        """`num` different cells; `key` decides which of those in play."""
        if num == 0:
            return no_cells(self.cascade)
        size = self.cascade.block_size
        hand = self._dealer.deal(num, key.numpy()).tolist()
        blocks = sorted({i // size for i in hand})
        for block in blocks:
            if block not in self._blocks:
                self._blocks[block] = self.cascade.cells([self.key.child("cell", block, i) for i in range(size)])
        rows = [blocks.index(i // size) * size + i % size for i in hand]
        cells = Cells.cat([self._blocks[block] for block in blocks])
        cells = cells.select(torch.tensor(rows, device=cells.image.device))
        self._blocks = {block: b for block, b in self._blocks.items() if not self._dealer.is_used_up(block)}
        return cells


def plain(value: Any) -> Tensor:
    """An array or tensor of any kind as a plain tensor."""
    return torch.as_tensor(value).as_subclass(Tensor)


def finish(
    value: Any, dtype: torch.dtype, like: Any = None, voxel_size_um: tuple[float, float, float] | None = None
) -> Tensor:
    """A tensor as MONAI's transforms return it.

    Args:
        value: Array or tensor, channel first.
        dtype: Of the result.
        like: Whose metadata it takes over, if that has some.
        voxel_size_um: (Z, Y, X) for the affine; None keeps it.
    """
    out = convert_to_tensor(value, dtype=dtype, track_meta=get_track_meta())
    if isinstance(out, MetaTensor):
        if isinstance(like, MetaTensor):
            out.copy_meta_from(like)
        if voxel_size_um is not None:
            num_axes = out.ndim - 1  # MONAI's affine goes by the tensor's axes, here (Z,) Y, X
            scale = torch.ones(4, dtype=torch.float64)
            scale[:num_axes] = torch.tensor(voxel_size_um[-num_axes:], dtype=torch.float64)
            out.affine = torch.diag(scale)
    return out


def with_affine(sample: Mapping[str, Tensor], voxel_size_um: tuple[float, float, float] | None) -> dict[str, Tensor]:
    """A sample as MetaTensors (unless MONAI's tracking is off), their affine as of `finish`; None leaves identity."""
    return {key: finish(value, value.dtype, voxel_size_um=voxel_size_um) for key, value in sample.items()}


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Tensors as one batch; MetaTensors as MONAI's own loader collates them, with an affine [B, 4, 4]."""
    batch: Tensor = list_data_collate(list(parts)) if isinstance(parts[0], MetaTensor) else torch.stack(list(parts))
    return batch


RandSynthPopulationD = RandSynthPopulationDict = RandSynthPopulationd
