"""One file as a 2D or 3D array: images as float32 camera counts, labels as int32, with what is odd about them said by
name; and the voxel size a file carries.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from synthaug.datasets.layouts import Remark
from synthaug.errors import DataError
from synthaug.types import UNLABELLED

STACK_AXES = "ZIQ"
"""Axes taken for z: tifffile calls pages without a name I or Q."""

TIME_REMEDY = "Save every time point as a file of its own, 2D (YX) or a stack along z (ZYX)."

CHANNEL_REMEDY = "Save the channel of interest alone. Are these planes along z? Then save them with axes ZYX."

MICROMETRES = {
    name: size
    for names, size in (
        ("pm", 1e-6),
        ("\u00c5 \u212b", 1e-4),
        ("nm", 1e-3),
        ("\u00b5m \u03bcm um micron microns micrometer micrometre", 1.0),
        ("mm", 1e3),
        ("cm", 1e4),
        ("m", 1e6),
        ("in inch", 25400.0),
    )
    for name in names.split()
}
"""Units of length as OME and ImageJ name them."""


def read_image(path: Path, remark: Callable[[Remark], None]) -> NDArray[np.float32]:
    """The intensities of one file, float32 [Y, X] or [Z, Y, X], values as stored.

    Args:
        path: TIFF or PNG of any real dtype, one channel.
        remark: Is told what is odd.

    Raises:
        DataError: Not readable, of several time points or channels, NaN or infinite.
    """
    stored = read_array(path, remark)
    if stored.dtype.kind not in "uif":
        got = f"dtype {stored.dtype}"
        raise DataError(str(path), expected="grey values", got=got, remedy="Is this a mask? Images carry intensities.")
    image = stored.astype(np.float32)
    bad = image.size - int(np.isfinite(image).sum())
    if bad:
        remedy = "Replace them (numpy.nan_to_num, or the median of their neighbours), or leave this pair out."
        raise DataError(str(path), expected="finite values", got=f"{bad} pixels NaN or infinite", remedy=remedy)
    if image.min() == image.max():
        text = f"every pixel is {image.flat[0]:g}. Leave this pair out unless such frames are to be learned."
        remark(Remark("blank image", path, text))
    return np.ascontiguousarray(image)


def read_labels(path: Path, remark: Callable[[Remark], None], *, check_instances: bool = True) -> NDArray[np.int32]:
    """The instance ids of one file, int32 [Y, X] or [Z, Y, X], contiguous from 1 in the order of the ids stored.

    Args:
        path: TIFF or PNG of whole numbers >= 0, one id a cell, background 0.
        remark: Is told what is odd.
        check_instances: Look whether the ids stand for connected cells.

    Raises:
        DataError: Not readable, of several time points, coloured, not whole numbers, negative, or no instance labels (a
            binary mask).
    """
    labels = contiguous(_read_ids(path, remark))
    if check_instances:
        _check_instances(path, labels, remark)
    return labels


def read_slices(
    slices: Sequence[tuple[int, Path]],
    shape: tuple[int, ...],
    remark: Callable[[Remark], None],
    *,
    shared_ids: bool,
    check_instances: bool = True,
) -> NDArray[np.int32]:
    """Labels of a stack of which single planes are annotated, each in a 2D file of its own.

    Args:
        slices: Plane, counted from 0, and file.
        shape: (Z, Y, X) of the image.
        remark: Is told what is odd.
        shared_ids: One id in several planes is one cell; otherwise every plane's ids are its own.
        check_instances: As for `read_labels`.

    Returns:
        int32 [Z, Y, X]: ids contiguous from 1, background 0, `UNLABELLED` in the planes nobody annotated.

    Raises:
        DataError: As `read_labels`, or a plane that the image does not have.
    """
    labels = np.full(shape, UNLABELLED, np.int32)
    stored: list[NDArray[np.int64]] = []
    for z, path in slices:
        plane = _read_ids(path, remark)
        if len(shape) != 3 or plane.ndim != 2 or plane.shape != shape[1:] or z >= shape[0]:
            raise DataError(
                str(path),
                expected="a 2D plane of a stack, counted from 0",
                got=f"plane {z}, shape {plane.shape}, for an image of {shape}",
                remedy="Export the plane at the image's own size; the first plane is 0.",
            )
        if check_instances:
            _check_instances(path, contiguous(plane), remark)
        ids = plane.astype(np.int64)
        if not shared_ids:
            ids[ids > 0] += max((int(p.max()) for p in stored), default=0)
        stored.append(ids)
    labels[[z for z, _ in slices]] = contiguous(np.stack(stored))
    return labels


def _read_ids(path: Path, remark: Callable[[Remark], None]) -> NDArray[Any]:
    """Whole numbers >= 0 as they are stored."""
    stored = read_array(path, remark)
    if stored.dtype.kind == "f":
        whole = np.isfinite(stored) & (stored == np.round(stored))
        if not whole.all():
            got = f"{stored.dtype} with {stored.size - int(whole.sum())} pixels that are no whole number"
            remedy = (
                "Labels must not be interpolated or normalised: resize them with order 0 and save them as uint16. "
                "Are these probabilities? Then threshold them and call skimage.measure.label first."
            )
            raise DataError(str(path), expected="whole instance ids", got=got, remedy=remedy)
        stored = stored.astype(np.int64)
    if stored.dtype.kind not in "uib":
        raise DataError(str(path), expected="whole instance ids", got=f"dtype {stored.dtype}", remedy="Save as uint16.")
    if stored.dtype.kind == "i" and stored.min() < 0:
        remedy = (
            "Background is 0, cells are 1, 2, ...; set negative pixels to 0. Of a stack of which only some planes are "
            "annotated, save these planes as labels/NAME_z012.tif."
        )
        raise DataError(str(path), expected="ids >= 0", got=f"a minimum of {stored.min()}", remedy=remedy)
    return stored


def contiguous(array: NDArray[Any]) -> NDArray[np.int32]:
    """Ids renumbered 1, 2, ... in their order, 0 stays 0."""
    highest = int(array.max())
    if highest < 1 << 20:  # a table is much faster than sorting all pixels
        stored = array.astype(np.intp)
        present = np.bincount(stored.ravel()) > 0
        present[0] = False
        return np.where(present, np.cumsum(present), 0).astype(np.int32)[stored]
    ids, inverse = np.unique(array, return_inverse=True)
    return (inverse.reshape(array.shape) + int(ids[0] > 0)).astype(np.int32)


def drop_small(
    path: Path, labels: NDArray[np.int32], min_area: int, remark: Callable[[Remark], None]
) -> NDArray[np.int32]:
    """Contiguous labels without the instances of fewer than `min_area` pixels, contiguous again; `UNLABELLED` stays."""
    areas = np.bincount(np.maximum(labels, 0).ravel())[1:]
    if num_small := int((areas < min_area).sum()):
        unit = "px" if labels.ndim == 2 else "voxels"
        text = (
            f"{num_small} instances under {min_area} {unit} dropped, the smallest of {areas.min()} {unit} (min_area)."
        )
        remark(Remark("instance under min_area", path, text, num_small))
        keep = np.concatenate([[False], areas >= min_area])
        # the last entry is what -1 looks up
        table = np.append(np.where(keep, np.cumsum(keep), 0), UNLABELLED)
        labels = table.astype(np.int32)[labels]
    if not (labels > 0).any():
        remark(Remark("empty frame", path, "no instance in it. Remove the pair if cells were forgotten here."))
    return labels


def _check_instances(path: Path, labels: NDArray[np.int32], remark: Callable[[Remark], None]) -> None:
    """Error if one id stands for many cells; remark if an instance lies in several parts. `labels` is contiguous."""
    from skimage.measure import label as connected_components

    num_ids = int(labels.max())
    parts, num_parts = connected_components(labels, background=0, connectivity=labels.ndim, return_num=True)
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


def read_array(path: Path, remark: Callable[[Remark], None]) -> NDArray[Any]:
    """The one grey plane [Y, X] or stack [Z, Y, X] of a file, dtype as stored."""
    array, axes = _decode_png(path) if path.suffix.lower() == ".png" else _decode_tiff(path)
    kept = [i for i, n in enumerate(array.shape) if n > 1 or axes[i] in "YX"]
    array, axes = array.reshape([array.shape[i] for i in kept]), "".join(axes[i] for i in kept)
    if array.ndim > 2 and "S" in axes:
        array, axes = np.moveaxis(array, axes.index("S"), -1), axes.replace("S", "")
        colours = array[..., : array.shape[-1] - (array.shape[-1] in (2, 4))]  # without alpha
        if not (colours == colours[..., :1]).all():
            remedy = "Save the channel of interest alone, or skimage.color.rgb2gray of it; labels as plain uint16 ids."
            raise DataError(str(path), expected="one grey channel", got=f"colour, shape {array.shape}", remedy=remedy)
        remark(Remark("grey saved as colour", path, "its channels are equal, one is read. Save it as grey."))
        array = colours[..., 0]
    if array.ndim > 2 and "C" in axes:
        got = f"{array.shape[axes.index('C')]} channels, shape {array.shape}"
        raise DataError(str(path), expected="one grey channel", got=got, remedy=CHANNEL_REMEDY)
    if array.ndim == 2 or (array.ndim == 3 and axes[0] in STACK_AXES):
        return array
    got = f"axes {axes} of {array.shape}"
    raise DataError(str(path), expected="one time point, axes YX or ZYX", got=got, remedy=TIME_REMEDY)


def voxel_size_um(path: Path) -> tuple[float, float, float] | None:
    """Voxel size (Z, Y, X) in micrometres, from a file's OME or ImageJ metadata; None where they do not tell all of it.

    In a 2D file Z has no meaning; it is Y there unless the file says otherwise.

    Raises:
        DataError: Not readable.
    """
    if path.suffix.lower() == ".png":
        return None
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            deep = any(n > 1 for n, axis in zip(series.shape, series.axes) if axis in STACK_AXES)
            if tiff.is_ome:
                sizes = _ome_sizes(tiff.ome_metadata or "")
            elif tiff.is_imagej:
                sizes = _imagej_sizes(tiff)
            else:
                return None
    except Exception as error:  # as in _decode_tiff
        raise _unreadable(path, "TIFF", error) from error
    z, y, x = sizes
    z = y if z is None and not deep else z
    return None if z is None or y is None or x is None else (z, y, x)


def _ome_sizes(xml: str) -> tuple[float | None, ...]:
    pixels = ElementTree.fromstring(xml).find("{*}Image/{*}Pixels")
    attributes = {} if pixels is None else pixels.attrib
    return tuple(
        _micrometres(attributes.get(f"PhysicalSize{axis}"), attributes.get(f"PhysicalSize{axis}Unit", "\u00b5m"))
        for axis in "ZYX"
    )


def _imagej_sizes(tiff: Any) -> tuple[float | None, ...]:
    metadata, tags = tiff.imagej_metadata or {}, tiff.pages[0].tags
    unit = metadata.get("unit", "")
    sizes = [_micrometres(metadata.get("spacing"), metadata.get("zunit", unit))]
    for tag, name in (("YResolution", "yunit"), ("XResolution", "xunit")):
        # pixels a unit, as a fraction
        pixels, units = tags[tag].value if tag in tags else (0, 1)
        sizes.append(_micrometres(units / pixels if pixels else None, metadata.get(name, unit)))
    return tuple(sizes)


def _micrometres(size: Any, unit: Any) -> float | None:
    factor = MICROMETRES.get(str(unit).replace("\\u00B5", "\u00b5").strip())
    if size is None or factor is None:
        return None
    size = abs(float(size)) * factor
    # fractions and conversions must not make two sizes of one
    return float(f"{size:.6g}") if 0 < size < np.inf else None


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
