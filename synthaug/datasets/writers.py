"""Image + label pairs to disk, one at a time, in the layouts the readers and the segmentation tools know.

A pair is complete once its image has its final name: labels come first, and every file is written under a temporary
name and then renamed. So after a kill at any moment `count_written` knows the complete pairs, and where to go on.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from synthaug.errors import DataError, InputError

FORMATS = {
    "folder": ("images/{0:06d}.tif", "labels/{0:06d}.tif"),
    "stardist": ("images/{0:06d}.tif", "masks/{0:06d}.tif"),
    "cellpose": ("{0:06d}.tif", "{0:06d}_masks.tif"),
    "ctc": ("{0:02d}/t{1:03d}.tif", "{0:02d}_GT/SEG/man_seg{1:03d}.tif"),
    "ome": ("images/{0:06d}.ome.tif", "labels/{0:06d}.ome.tif"),
}
"""Image and label file of pair {0}; for "ctc" of frame {1} of sequence {0}."""

DTYPES = ("uint8", "uint16", "float32")

VoxelSize = tuple[float, float, float]

RESOLUTION_BASE = 1_000_000
"""Denominator of ImageJ's resolutions, pixels a micrometre."""

BELOW, ABOVE = "lay below the range and were clipped to", "lay above the range and were clipped to"
FAINT = "have values of at most 1 and lost their detail when rounded to"

MAX_FRAMES = 1000
"""Frames in one "ctc" sequence, t000 to t999: t1000 would come before t101 in tools that sort names as text."""

MAX_ID = np.iinfo(np.uint16).max
"""Cell Tracking Challenge tools, Cellpose and StarDist take 16-bit labels."""


def write_pairs(
    pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]],
    out: str | Path,
    *,
    format: str = "folder",
    dtype: str = "uint16",
    start: int = 0,
    voxel_size_um: Sequence[float] | None = None,
) -> int:
    """Write pairs as they come; one pair is in memory at a time.

    Files are deflate-compressed TIFF that tifffile, Fiji and libtiff read without further codecs. No complete pair is
    ever written over. Images are rounded and clipped to the range of `dtype`; pixels that were out of range are counted
    and reported by one warning at the end.

    In format "ctc" the frames do not belong together: every cell is a track of one frame, with an id of its own in the
    sequence, the same in `SEG`, `TRA` and `man_track.txt`. A new sequence (02, 03, ...) begins after 1,000 frames or
    when the 65,535 ids of a 16-bit sequence are used up.

    Args:
        pairs: Image [Y, X] or [Z, Y, X] with Z > 1, finite, and labels of the same shape, whole numbers from 0 to 65,535;
            arrays or CPU tensors; all of them frames or all of them volumes.
        out: Folder, created if missing.
        format: "folder" (`images/` + `labels/`), "stardist" (`images/` + `masks/`), "cellpose" (`x.tif` +
            `x_masks.tif`), "ctc" (`01/t000.tif`, `01_GT/SEG/man_seg000.tif`, `01_GT/TRA/man_track000.tif` and
            `man_track.txt`) or "ome" (`images/x.ome.tif` + `labels/x.ome.tif`, OME-TIFF). A volume is a stack of pages.
        dtype: Of the images: "uint16", "uint8" or "float32" (unrounded).
        start: Number of the first pair; `count_written(out, format)` to continue an interrupted run.
        voxel_size_um: (Z, Y, X) in micrometres, Z of no meaning in 2D. It goes into the files' metadata: OME's in format
            "ome", ImageJ's in the others. None writes none.

    Returns:
        How many pairs were written.

    Raises:
        InputError: An argument or a pair is not what it has to be.
        DataError: A file exists already, or a sequence cannot be continued.
    """
    if dtype not in DTYPES:
        raise InputError("dtype", expected=f"one of {list(DTYPES)}", got=repr(dtype))
    if not isinstance(start, int | np.integer) or start < 0:
        raise InputError("start", expected="an integer >= 0", got=repr(start))
    voxel_size = _as_voxel_size(voxel_size_um)
    target: _Target
    if _known(format) == "ctc":
        target = _Sequences(Path(out), start, voxel_size)
    else:
        target = _Numbered(Path(out), format, start, voxel_size)
    odd: Counter[str] = Counter()
    first: dict[str, Path] = {}
    num_written = num_pixels = ndim = 0
    try:
        for image, labels in pairs:
            where = f"pair {start + num_written}"
            counts, ids = _as_counts(image, where), _as_ids(labels, where)
            if counts.shape != ids.shape:
                raise InputError(where, expected="image and labels of one shape", got=f"{counts.shape} and {ids.shape}")
            ndim = ndim or counts.ndim
            if counts.ndim != ndim:
                raise InputError(where, expected=f"{ndim}D as those before it", got=f"shape {counts.shape}")
            stored, seen = _to_range(counts, np.dtype(dtype))
            path = target.write(stored, ids)
            num_written, num_pixels = num_written + 1, num_pixels + stored.size
            odd.update(seen)
            for kind in seen:
                first.setdefault(kind, path)
    finally:  # also said of what an interrupted run wrote
        for kind, path in first.items():
            of = f"{num_written} images" if kind == FAINT else f"{num_pixels} pixels"
            text = f"{odd[kind]} of {of} {kind} {dtype}, first in {path}. Pass dtype='float32' to keep what is lost."
            warnings.warn(text, UserWarning, stacklevel=2)
    return num_written


def count_written(out: str | Path, format: str = "folder") -> int:
    """How many complete pairs `write_pairs` left in `out`, counted from pair 0 to the first one missing.

    Pass it as `start` to continue. A folder that does not exist holds 0.
    """
    if _known(format) == "ctc":
        return sum(_count_frames(Path(out), sequence) for sequence in _sequences(Path(out)))
    number = 0
    while all((Path(out) / name.format(number)).is_file() for name in FORMATS[format]):
        number += 1
    return number


def _known(format: str) -> str:
    if format not in FORMATS:
        raise InputError("format", expected=f"one of {list(FORMATS)}", got=repr(format))
    return format


# ------------------------------------------------------------------------------------------------------- where files go


class _Target(Protocol):
    def write(self, image: NDArray[Any], ids: NDArray[np.int64]) -> Path:
        """Store the next pair; the path of its image."""


class _Numbered:
    """Independent pairs with a number for a name."""

    def __init__(self, out: Path, format: str, start: int, voxel_size_um: VoxelSize | None) -> None:
        self.out, self.names, self.number = out, FORMATS[format], start
        self.metadata: dict[str, Any] = {"voxel_size_um": voxel_size_um, "ome": format == "ome"}

    def write(self, image: NDArray[Any], ids: NDArray[np.int64]) -> Path:
        image_path, label_path = (self.out / name.format(self.number) for name in self.names)
        _refuse_existing(image_path)
        _write_tiff(label_path, ids.astype(np.uint16), **self.metadata)
        _write_tiff(image_path, image, **self.metadata)
        self.number += 1
        return image_path


class _Sequences:
    """Frames of Cell Tracking Challenge sequences, every cell a track of its own."""

    def __init__(self, out: Path, start: int, voxel_size_um: VoxelSize | None) -> None:
        there = count_written(out, "ctc")
        if start != there:
            raise InputError(
                "start",
                expected=f"{there}, the number of frames in {out}, as track ids go on from there",
                got=start,
                remedy="Pass count_written(out, 'ctc'), or another folder.",
            )
        self.out, self.voxel_size_um = out, voxel_size_um
        self.sequence = max(_sequences(out), default=1)
        self.frame = _count_frames(out, self.sequence)
        _refuse_existing(self.out / FORMATS["ctc"][0].format(self.sequence, self.frame))
        self.next_id = self._resume_tracks()

    @property
    def tracks(self) -> Path:
        return self.out / f"{self.sequence:02d}_GT" / "TRA" / "man_track.txt"

    def write(self, image: NDArray[Any], ids: NDArray[np.int64]) -> Path:
        present = np.unique(ids[ids > 0])
        if self.frame == MAX_FRAMES or self.next_id + len(present) - 1 > MAX_ID:
            self.sequence, self.frame, self.next_id = self.sequence + 1, 0, 1
        image_name, label_name = (name.format(self.sequence, self.frame) for name in FORMATS["ctc"])
        _refuse_existing(self.out / image_name)
        table = np.zeros(int(ids.max(initial=0)) + 1, np.uint16)
        table[present] = np.arange(self.next_id, self.next_id + len(present))
        tracks = table[ids]
        _write_tiff(self.out / label_name, tracks, self.voxel_size_um)
        _write_tiff(self.tracks.parent / f"man_track{self.frame:03d}.tif", tracks, self.voxel_size_um)
        # Lines of a frame whose image never came are taken out again on resuming.
        with self.tracks.open("a", encoding="ascii", newline="\n") as file:
            file.writelines(f"{track} {self.frame} {self.frame} 0\n" for track in table[present])
        _write_tiff(self.out / image_name, image, self.voxel_size_um)
        self.frame, self.next_id = self.frame + 1, self.next_id + len(present)
        return self.out / image_name

    def _resume_tracks(self) -> int:
        """Keep the lines of complete frames; the next free id."""
        if not self.tracks.is_file():
            if self.frame:
                remedy = "Name another folder, or restore the file."
                raise DataError(str(self.tracks), expected="the tracks written so far", got="no file", remedy=remedy)
            return 1
        text = self.tracks.read_text(encoding="ascii")
        fields = [line.split() for line in text.splitlines()]
        kept = [f for f in fields if len(f) == 4 and int(f[1]) < self.frame]  # a kill can cut the last line short
        if (whole := "".join(f"{' '.join(f)}\n" for f in kept)) != text:
            with _renamed(self.tracks) as part:
                part.write_text(whole, encoding="ascii", newline="\n")
        return max((int(f[0]) for f in kept), default=0) + 1


def _sequences(out: Path) -> list[int]:
    """The sequences that lie in `out`, by number."""
    folders = out.iterdir() if out.is_dir() else ()
    return sorted(int(p.name) for p in folders if p.is_dir() and re.fullmatch(r"\d{2,3}", p.name))


def _count_frames(out: Path, sequence: int) -> int:
    names = (*FORMATS["ctc"], "{0:02d}_GT/TRA/man_track{1:03d}.tif")
    frame = 0
    while all((out / name.format(sequence, frame)).is_file() for name in names):
        frame += 1
    return frame


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` when all went well and disappears otherwise.

    Always the same name, so that what a kill left behind is written over; hidden, so that no reader takes it in.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_tiff(path: Path, array: NDArray[Any], voxel_size_um: VoxelSize | None = None, ome: bool = False) -> None:
    import tifffile

    # No predictor and no description unless asked for: the plainest file, read by tools that know little of TIFF.
    options: dict[str, Any] = {"metadata": None}
    axes = "ZYX"[-array.ndim :]
    if ome:
        options = {"ome": True, "metadata": {"axes": axes}}
        for axis, size in zip("ZYX", voxel_size_um or ()):
            if axis in axes:
                options["metadata"] |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "\u00b5m"}
    elif voxel_size_um is not None:
        z, y, x = voxel_size_um
        spacing = {"spacing": z} if array.ndim == 3 else {}
        # Resolution is stored as a fraction: a large numerator keeps the digits.
        resolution = tuple((round(RESOLUTION_BASE / size), RESOLUTION_BASE) for size in (x, y))
        options = {"imagej": True, "resolution": resolution, "metadata": {"axes": axes, "unit": "um", **spacing}}
    with _renamed(path) as part:
        tifffile.imwrite(part, array, compression="zlib", photometric="minisblack", **options)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        remedy = "Name an empty folder, or continue with start=count_written(out, format)."
        raise DataError(
            str(path), expected="no file yet", got="an existing one, which is not written over", remedy=remedy
        )


# ------------------------------------------------------------------------------------------------ what goes into them


def _as_counts(image: Any, where: str) -> NDArray[Any]:
    counts = np.asarray(image)
    plane = counts.ndim == 2 or (counts.ndim == 3 and len(counts) > 1)  # a stack of one plane would be read as 2D
    if not plane or not counts.size or counts.dtype.kind not in "uif":
        got = f"shape {counts.shape} of {counts.dtype}"
        expected = "[Y, X] or [Z, Y, X] with Z > 1 of numbers"
        raise InputError(f"{where}, image", expected=expected, got=got, remedy="Take one channel of one frame.")
    if not np.isfinite(counts).all():
        raise InputError(f"{where}, image", expected="finite values", got="NaN or infinity")
    return counts


def _as_ids(labels: Any, where: str) -> NDArray[np.int64]:
    ids = np.asarray(labels)
    if ids.ndim not in (2, 3) or ids.dtype.kind not in "uib":
        got = f"shape {ids.shape} of {ids.dtype}"
        raise InputError(f"{where}, labels", expected="[Y, X] or [Z, Y, X] of whole numbers", got=got)
    if ids.size and not 0 <= ids.min() <= ids.max() <= MAX_ID:
        raise InputError(
            f"{where}, labels",
            expected=f"ids from 0 to {MAX_ID}, which 16 bits hold",
            got=f"{ids.min()} to {ids.max()}",
            remedy="Renumber them with skimage.segmentation.relabel_sequential.",
        )
    return ids.astype(np.int64)


def _as_voxel_size(size: Any) -> VoxelSize | None:
    if size is None:
        return None
    values = np.asarray(size, np.float64).ravel()
    # Finer than a quarter of a nanometre does not fit the 32 bits of a TIFF resolution
    if len(values) != 3 or not (np.isfinite(values) & (values > 2.5e-4)).all():
        raise InputError("voxel_size_um", expected="(Z, Y, X) > 0 in micrometres", got=size)
    return float(values[0]), float(values[1]), float(values[2])


def _to_range(counts: NDArray[Any], dtype: np.dtype[Any]) -> tuple[NDArray[Any], dict[str, int]]:
    """The image in `dtype`, and what that took from it: how often, by kind."""
    if dtype.kind == "f":
        return counts.astype(dtype), {}
    highest = np.iinfo(dtype).max
    rounded = np.rint(counts)
    faint = counts.dtype.kind == "f" and 0 < counts.max() <= 1 and bool((rounded != counts).any())
    seen = {BELOW: int((rounded < 0).sum()), ABOVE: int((rounded > highest).sum()), FAINT: int(faint)}
    return np.clip(rounded, 0, highest).astype(dtype), {kind: n for kind, n in seen.items() if n}
