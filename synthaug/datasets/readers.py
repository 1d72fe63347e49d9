"""Image + instance-label pairs from disk, found at once and read when asked for; what is wrong with a file is said with
its name. Where pairs lie is in `layouts.py`, how a file is decoded in `decoding.py`.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from synthaug.datasets.decoding import (
    contiguous,
    drop_small,
    read_array,
    read_image,
    read_labels,
    read_slices,
    voxel_size_um,
)
from synthaug.datasets.layouts import FINDERS, LAYOUTS, SEG_NPY_REMEDY, Pair, Remark, nothing_found
from synthaug.errors import DataError, InputError
from synthaug.types import UNLABELLED


class PairDataset(Dataset[dict[str, Tensor]]):
    """Map-style data set of 2D or 3D image + instance-label pairs, each read when it is asked for.

    It pickles and survives a fork: no file stays open, and what is cached is left behind.

    Args:
        pairs: Where the pairs lie.
        remarks: What was found while looking for them.
        min_area: Instances of fewer pixels (voxels in a volume) are dropped and counted.
        cache_pairs: How many decoded pairs to keep in memory (8 bytes a pixel), least recently used out first.

    Attributes:
        warnings: What was odd, counted by kind; a file counts once however often it is read. The first of each kind is
            also given to `warnings.warn`, with file and remedy. A DataLoader's worker counts what it read itself.
    """

    def __init__(
        self, pairs: list[Pair], *, remarks: tuple[Remark, ...] = (), min_area: int = 0, cache_pairs: int = 0
    ) -> None:
        for what, value in (("min_area", min_area), ("cache_pairs", cache_pairs)):
            if not isinstance(value, int | np.integer) or value < 0:
                raise InputError(what, expected="an integer >= 0", got=repr(value))
        self.pairs = tuple(pairs)
        self.min_area, self.cache_pairs = int(min_area), int(cache_pairs)
        self.warnings: Counter[str] = Counter()
        self._remarked: set[tuple[str, Path]] = set()
        self._checked: set[Path] = set()  # a check that passed once is not worth a second in every epoch
        self._ndim: tuple[int, Path] | None = None
        self._voxel_size: tuple[float, float, float] | None = None
        self._voxel_size_known = False
        self._cache: OrderedDict[int, tuple[NDArray[np.float32], NDArray[np.int32]]] = OrderedDict()
        for remark in remarks:
            self._remark(remark)

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        """What pair `index` is called: the stem of its file, or `01_t000` in the Cell Tracking Challenge layout."""
        return self.pairs[index].name

    @property
    def ndim(self) -> int:
        """2 for frames, 3 for volumes. All pairs are of one kind: those of the other raise when they are read."""
        if self._ndim is None:
            self.read(0)
        assert self._ndim is not None
        return self._ndim[0]

    @property
    def voxel_size_um(self) -> tuple[float, float, float] | None:
        """(Z, Y, X) in micrometres as the first image's OME or ImageJ metadata tell; None if they do not.

        In 2D, Z has no meaning. Where another image says otherwise a warning says so when it is read.
        """
        if not self._voxel_size_known and self.pairs:
            self._voxel_size, self._voxel_size_known = voxel_size_um(self.pairs[0].image), True
        return self._voxel_size

    def read(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """One pair.

        Returns:
            image float32 [Y, X] or [Z, Y, X], camera counts as stored, and labels int32 of that shape, contiguous from 1,
            background 0; in volumes of which single planes are annotated, `synthaug.types.UNLABELLED` in all others.

        Raises:
            DataError: The files cannot be used; it names the file and what to do.
        """
        index = range(len(self.pairs))[index]  # negative indices, and IndexError past the end
        cached = self._cache.get(index)
        if cached is None:
            cached = self._decode(self.pairs[index])
        if not self.cache_pairs:
            return cached
        # No lock, which a fork could inherit locked: each of these dictionary operations is atomic by itself.
        self._cache[index] = cached
        try:
            self._cache.move_to_end(index)
            while len(self._cache) > self.cache_pairs:
                self._cache.popitem(last=False)
        except KeyError:  # another thread dropped it first
            pass
        return cached[0].copy(), cached[1].copy()

    def read_all(self) -> list[tuple[NDArray[np.float32], NDArray[np.int32]]]:
        """Every pair in memory, as `read` gives them."""
        return [self.read(i) for i in range(len(self))]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One pair as `{"image": float32 [1, (Z,) Y, X], "label": int32 [1, (Z,) Y, X]}`, see `read`."""
        image, label = self.read(index)
        return {"image": torch.from_numpy(image)[None], "label": torch.from_numpy(label)[None]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def _decode(self, pair: Pair) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        image = read_image(pair.image, self._remark)
        first_time = pair.label not in self._checked
        if pair.slices:
            labels = read_slices(
                pair.slices, image.shape, self._remark, shared_ids=pair.shared_ids, check_instances=first_time
            )
        else:
            labels = read_labels(pair.label, self._remark, check_instances=first_time)
        if image.shape != labels.shape:
            remedy = "Export both at one size and without transposing; check that the names pair the right files."
            if (image.ndim, labels.ndim) == (3, 2):
                name = pair.label.stem.removesuffix("_masks")
                remedy = f"Labels of one plane of a stack are named after it, counted from 0: {name}_z012 of plane 12."
            raise DataError(
                str(pair.label),
                expected=f"the shape of its image {pair.image.name}, {image.shape}",
                got=labels.shape,
                remedy=remedy,
            )
        self._compare(pair.image, image.ndim, first_time)
        if pair.markers is not None and first_time:
            self._compare_markers(pair, pair.markers, labels)
        self._checked.add(pair.label)
        return image, drop_small(pair.label, labels, self.min_area, self._remark)

    def _compare(self, path: Path, ndim: int, first_time: bool) -> None:
        """One data set is of frames or of volumes, and of one voxel size."""
        self._ndim = self._ndim or (ndim, path)
        if ndim != self._ndim[0]:
            raise DataError(
                str(path),
                expected=f"{self._ndim[0]}D as {self._ndim[1]}",
                got=f"{ndim}D",
                remedy="Keep frames and volumes in folders of their own.",
            )
        known = self.voxel_size_um
        if known and first_time and (own := voxel_size_um(path)) and not np.allclose(own, known, rtol=0.01):
            text = f"{own} um, where {self.pairs[0].image.name} says {known}. Resample it, or keep it in a folder of its own."
            self._remark(Remark("another voxel size", path, text))

    def _compare_markers(self, pair: Pair, markers: Path, labels: NDArray[np.int32]) -> None:
        """Say so where there are more markers than labelled cells."""
        stored = read_array(markers, self._remark)
        if pair.slices and stored.shape == labels.shape:  # a marker may lie beside the plane: only those in it count
            stored = np.where(labels == UNLABELLED, 0, stored)
        elif pair.slices:
            return
        num_cells, num_labelled = int(contiguous(stored).max()), int(labels.max())
        if num_labelled < num_cells:
            text = (
                f"{num_labelled} of {num_cells} cells are labelled, the others would pass for background. "
                "Use the silver truth (NN_ST), or leave such frames out."
            )
            self._remark(Remark("gold frame only partly annotated", pair.label, text))

    def _remark(self, remark: Remark) -> None:
        if (remark.kind, remark.path) in self._remarked:
            return
        self._remarked.add((remark.kind, remark.path))
        if remark.kind not in self.warnings:
            more = " More of this kind are counted in the data set's `warnings`."
            warnings.warn(f"{remark.path}: {remark.kind}: {remark.text}{more}", UserWarning, stacklevel=3)
        self.warnings[remark.kind] += remark.count


def open_pairs(path: str | Path, *, layout: str = "auto", min_area: int = 0, cache_pairs: int = 0) -> PairDataset:
    """Find the image + label pairs under a folder.

    Images are 2D frames or stacks along z, labels of the same shape. Of a stack single planes may be annotated, in 2D files
    named after the plane, counted from 0: any number of `labels/NAME_z012.tif` beside `images/NAME.tif`, of
    `NAME_z012_masks.tif` in the Cellpose layout, or of `man_seg_000_012.tif` in that of the Cell Tracking Challenge. A plane
    without a cell in a labelled stack is background.

    The first pair is read at once, so that a folder of unusable files fails here and not in the middle of a training.

    Args:
        path: The folder; for the Cell Tracking Challenge its root or one sequence (`.../01`).
        layout: "auto", or one of `LAYOUTS`: "folder" (`images/` + `labels/` or `masks/`), "stardist" (`images/` +
            `masks/`), "cellpose" (`x.tif` + `x_masks.tif`), "ctc" (silver truth first, gold where silver is missing).
        min_area: Instances of fewer pixels (voxels in a volume) are dropped and counted.
        cache_pairs: How many decoded pairs to keep in memory; 0 reads from disk every time.

    Raises:
        InputError: An argument is not what it has to be.
        DataError: No pair was found, or the first one cannot be used.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise InputError("layout", expected=f"one of {['auto', *LAYOUTS]}", got=repr(layout))
    root = Path(path).expanduser().absolute()
    if root.name.endswith("_seg.npy"):
        raise DataError(str(root), expected="a folder of image-label pairs", got="a pickle", remedy=SEG_NPY_REMEDY)
    if not root.is_dir():
        got = "a file" if root.exists() else "nothing of that name"
        raise DataError(str(root), expected="a folder of image-label pairs", got=got)
    remarks: list[Remark] = []
    tried = ["folder", "ctc", "cellpose"] if layout == "auto" else [layout]  # "folder" finds StarDist's, too
    for name in tried:
        if pairs := FINDERS[name](root, remarks):
            break
    else:
        raise nothing_found(root, tried, remarks)
    dataset = PairDataset(pairs, remarks=tuple(remarks), min_area=min_area, cache_pairs=cache_pairs)
    dataset.read(0)
    return dataset
