"""One file as a 2D array: images as float32 camera counts, labels as int32, with what is odd about them said by name."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthaug.datasets.layouts import NO_3D_REMEDY, Remark
from synthaug.errors import DataError


def read_image(path: Path, remark: Callable[[Remark], None]) -> NDArray[np.float32]:
    """The intensities of one file, float32 [Y, X], values as stored.

    Args:
        path: TIFF or PNG of any real dtype, one channel.
        remark: Is told what is odd.

    Raises:
        DataError: Not readable, 3D, of several channels, NaN or infinite.
    """
    plane = read_plane(path, remark)
    if plane.dtype.kind not in "uif":
        got = f"dtype {plane.dtype}"
        raise DataError(str(path), expected="grey values", got=got, remedy="Is this a mask? Images carry intensities.")
    image = plane.astype(np.float32)
    bad = image.size - int(np.isfinite(image).sum())
    if bad:
        remedy = "Replace them (numpy.nan_to_num, or the median of their neighbours), or leave this pair out."
        raise DataError(str(path), expected="finite values", got=f"{bad} pixels NaN or infinite", remedy=remedy)
    if image.min() == image.max():
        text = f"every pixel is {image.flat[0]:g}. Leave this pair out unless such frames are to be learned."
        remark(Remark("blank image", path, text))
    return np.ascontiguousarray(image)


def read_labels(path: Path, remark: Callable[[Remark], None], *, check_instances: bool = True) -> NDArray[np.int32]:
    """The instance ids of one file, int32 [Y, X], contiguous from 1 in the order of the ids stored, background 0.

    Args:
        path: TIFF or PNG of whole numbers >= 0, one id a cell.
        remark: Is told what is odd.
        check_instances: Look whether the ids stand for connected cells.

    Raises:
        DataError: Not readable, 3D, coloured, not whole numbers, negative, or no instance labels (a binary mask).
    """
    plane = read_plane(path, remark)
    if plane.dtype.kind == "f":
        whole = np.isfinite(plane) & (plane == np.round(plane))
        if not whole.all():
            got = f"{plane.dtype} with {plane.size - int(whole.sum())} pixels that are no whole number"
            remedy = (
                "Labels must not be interpolated or normalised: resize them with order 0 and save them as uint16. "
                "Are these probabilities? Then threshold them and call skimage.measure.label first."
            )
            raise DataError(str(path), expected="whole instance ids", got=got, remedy=remedy)
        plane = plane.astype(np.int64)
    if plane.dtype.kind not in "uib":
        raise DataError(str(path), expected="whole instance ids", got=f"dtype {plane.dtype}", remedy="Save as uint16.")
    if plane.dtype.kind == "i" and plane.min() < 0:
        remedy = "Background is 0, cells are 1, 2, ...; set negative pixels to 0."
        raise DataError(str(path), expected="ids >= 0", got=f"a minimum of {plane.min()}", remedy=remedy)
    labels = contiguous(plane)
    if check_instances:
        _check_instances(path, labels, remark)
    return labels


def contiguous(plane: NDArray[Any]) -> NDArray[np.int32]:
    """Ids renumbered 1, 2, ... in their order, 0 stays 0."""
    highest = int(plane.max())
    if highest < 1 << 20:  # a table is much faster than sorting all pixels
        stored = plane.astype(np.intp)
        present = np.bincount(stored.ravel()) > 0
        present[0] = False
        return np.where(present, np.cumsum(present), 0).astype(np.int32)[stored]
    ids, inverse = np.unique(plane, return_inverse=True)
    return (inverse.reshape(plane.shape) + int(ids[0] > 0)).astype(np.int32)


def drop_small(
    path: Path, labels: NDArray[np.int32], min_area: int, remark: Callable[[Remark], None]
) -> NDArray[np.int32]:
    """Contiguous labels without the instances of fewer than `min_area` pixels, contiguous again."""
    areas = np.bincount(labels.ravel())[1:]
    if num_small := int((areas < min_area).sum()):
        text = f"{num_small} instances under {min_area} px dropped, the smallest of {areas.min()} px (min_area)."
        remark(Remark("instance under min_area", path, text, num_small))
        keep = np.concatenate([[False], areas >= min_area])
        labels = np.where(keep, np.cumsum(keep), 0).astype(np.int32)[labels]
    if not labels.any():
        remark(Remark("empty frame", path, "no instance in it. Remove the pair if cells were forgotten here."))
    return labels


def _check_instances(path: Path, labels: NDArray[np.int32], remark: Callable[[Remark], None]) -> None:
    """Error if one id stands for many cells; remark if an instance lies in several parts. `labels` is contiguous."""
    from skimage.measure import label as connected_components

    num_ids = int(labels.max())
    parts, num_parts = connected_components(labels, background=0, connectivity=2, return_num=True)
    if num_parts == num_ids:
        return
    # One cell with a few stray pixels is no binary mask: only parts of a size with the largest one count as cells.
    areas = np.bincount(parts.ravel())[1:]
    num_cells = int((areas >= 0.1 * areas.max()).sum())
    if num_ids <= 3 and num_cells >= 3 * num_ids:
        raise DataError(
            str(path),
            expected="instance labels, another id for each cell",
            got=f"a mask of {num_ids} value{'s' * (num_ids > 1)} covering {num_parts} separate regions",
            remedy="If no cells touch, skimage.measure.label(mask > 0) makes instances of it; touching cells need a "
            "watershed or separate annotation.",
        )
    text = (
        f"{num_ids} instances lie in {num_parts} parts. Where two cells share an id, give each its own; "
        "stray pixels of one cell are best removed."
    )
    remark(Remark("instance in several parts", path, text))


def read_plane(path: Path, remark: Callable[[Remark], None]) -> NDArray[Any]:
    """The one [Y, X] plane of a file, dtype as stored."""
    array, axes = _decode_png(path) if path.suffix.lower() == ".png" else _decode_tiff(path)
    kept = [i for i, n in enumerate(array.shape) if n > 1 or axes[i] in "YX"]
    array, axes = array.reshape([array.shape[i] for i in kept]), "".join(axes[i] for i in kept)
    if array.ndim == 2:
        return array
    if array.ndim == 3 and "S" in axes:
        array = np.moveaxis(array, axes.index("S"), -1)
        colours = array[..., : array.shape[-1] - (array.shape[-1] in (2, 4))]  # without alpha
        if (colours == colours[..., :1]).all():
            remark(Remark("grey saved as colour", path, "its channels are equal, one is read. Save it as grey."))
            return colours[..., 0]
        remedy = "Save the channel of interest alone, or skimage.color.rgb2gray of it; labels as plain uint16 ids."
        raise DataError(str(path), expected="one grey channel", got=f"colour, shape {array.shape}", remedy=remedy)
    if array.ndim == 3 and "C" in axes:
        got = f"{array.shape[axes.index('C')]} channels, shape {array.shape}"
        raise DataError(str(path), expected="one grey channel", got=got, remedy="Save the channel of interest alone.")
    raise DataError(str(path), expected="2D, axes YX", got=f"axes {axes} of {array.shape}", remedy=NO_3D_REMEDY)


def _decode_tiff(path: Path) -> tuple[NDArray[Any], str]:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            return series.asarray(), series.axes
    except Exception as error:  # a broken file fails anywhere in the decoder; the user needs to know which file it was
        if "imagecodecs" in str(error):
            remedy = "Run pip install imagecodecs, or save the file with compression='zlib' or none."
            raise DataError(str(path), expected="a TIFF that tifffile reads", got=str(error), remedy=remedy) from error
        raise _unreadable(path, "TIFF", error) from error


def _decode_png(path: Path) -> tuple[NDArray[Any], str]:
    import imageio.v3 as imageio

    try:
        with path.open("rb") as file:
            depth, colour = struct.unpack(">24x2B", file.read(26))  # of the IHDR chunk, always the first
        array = imageio.imread(path, plugin="pillow")
    except Exception as error:  # as above
        raise _unreadable(path, "PNG", error) from error
    if depth == 16 and colour != 0:
        # Pillow cuts 16-bit colour to 8 bits without a word.
        got, remedy = "16-bit colour", "Save the channel of interest as 16-bit grey PNG or TIFF."
        raise DataError(str(path), expected="a grey PNG", got=got, remedy=remedy)
    return array, "YXS"[: array.ndim]


def _unreadable(path: Path, kind: str, error: Exception) -> DataError:
    remedy = "Is it cut short, or of another kind than its suffix says? Copy or export it again."
    return DataError(str(path), expected=f"a readable {kind}", got=f"{type(error).__name__}: {error}", remedy=remedy)
