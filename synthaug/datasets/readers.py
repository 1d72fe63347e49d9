"""Image + instance-label pairs from disk, in the layouts people have: folder pairs, Cellpose, StarDist and the Cell
Tracking Challenge. Pairs are found at once and read when asked for; what is wrong with a file is said with its name.

Sources: `cellpose/io.py` for the suffixes `_masks`, `_cp_masks`, `_img`; the naming conventions of the Cell Tracking
Challenge (celltrackingchallenge.net) for `t000.tif`, `man_seg000.tif`, silver (`_ST`) and gold (`_GT`) truth.
"""

from __future__ import annotations

import re
import struct
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from synthaug.errors import DataError, InputError

SUFFIXES = (".tif", ".tiff", ".png")
"""What is read; where one name comes with several of them, the first one wins."""

CELLPOSE_EXTRAS = ("_flows", "_flows_0", "_flows_1", "_flows_2", "_cp_output", "_cellprob", "_outlines", "_cp_outlines")
"""What Cellpose writes beside its masks, neither image nor labels."""

IMAGE_FOLDERS, LABEL_FOLDERS, MASK_FOLDERS = ("images", "image"), ("labels", "label"), ("masks", "mask")

LAYOUTS = {
    "folder": "images/ + labels/ or masks/ with the same file names",
    "stardist": "images/ + masks/ with the same file names",
    "cellpose": "x.tif|png + x_masks.tif|png in one folder",
    "ctc": "01/t000.tif + 01_ST/SEG/man_seg000.tif or 01_GT/SEG/man_seg000.tif (Cell Tracking Challenge)",
}

SEG_NPY_REMEDY = (
    "A _seg.npy is a Python pickle, and opening a pickle can run any code hidden in it, so it is never read here. "
    "Export the masks: in the Cellpose GUI with File > Save masks as PNG/tif, on its command line with --save_tif, in "
    "Python with cellpose.io.save_masks(image, masks, flows, 'x.tif', png=False, tif=True); x_cp_masks.tif beside "
    "x.tif is then found."
)

NO_3D_REMEDY = (
    "This reader takes 2D frames; 3D volumes and time stacks are not supported by it yet. "
    "Save single slices or a projection, one 2D file a frame."
)


@dataclass(frozen=True)
class Pair:
    """Where one pair lies.

    Attributes:
        name: Unique in its data set, fit for a file name.
        image: Intensities.
        label: Instance ids.
        markers: One marker for each cell of the frame (Cell Tracking Challenge `TRA`), if labels may be incomplete.
    """

    name: str
    image: Path
    label: Path
    markers: Path | None = None


@dataclass(frozen=True)
class Remark:
    """Something a user should know about a file, yet no reason to stop."""

    kind: str
    path: Path
    text: str
    count: int = 1


class PairDataset(Dataset[dict[str, Tensor]]):
    """Map-style data set of 2D image + instance-label pairs, each read when it is asked for.

    It pickles and survives a fork: no file stays open, and what is cached is left behind.

    Args:
        pairs: Where the pairs lie.
        remarks: What was found while looking for them.
        min_area: Instances of fewer pixels are dropped and counted.
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
        self._cache: OrderedDict[int, tuple[NDArray[np.float32], NDArray[np.int32]]] = OrderedDict()
        for remark in remarks:
            self._remark(remark)

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        """What pair `index` is called: the stem of its file, or `01_t000` in the Cell Tracking Challenge layout."""
        return self.pairs[index].name

    def read(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """One pair.

        Returns:
            image float32 [Y, X], camera counts as stored, and labels int32 [Y, X], contiguous from 1, background 0.

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

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One pair as `{"image": float32 [1, Y, X], "label": int32 [1, Y, X]}`, see `read`."""
        image, label = self.read(index)
        return {"image": torch.from_numpy(image)[None], "label": torch.from_numpy(label)[None]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def _decode(self, pair: Pair) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        image = read_image(pair.image, self._remark)
        first_time = pair.label not in self._checked
        labels = read_labels(pair.label, self._remark, check_instances=first_time)
        if image.shape != labels.shape:
            raise DataError(
                str(pair.label),
                expected=f"the shape of its image {pair.image.name}, {image.shape}",
                got=labels.shape,
                remedy="Export both at one size and without transposing; check that the names pair the right files.",
            )
        if pair.markers is not None and first_time:
            num_cells, num_labelled = int(_contiguous(_plane(pair.markers, self._remark)).max()), int(labels.max())
            if num_labelled < num_cells:
                text = (
                    f"{num_labelled} of {num_cells} cells are labelled, the others would pass for background. "
                    "Use the silver truth (NN_ST), or leave such frames out."
                )
                self._remark(Remark("gold frame only partly annotated", pair.label, text))
        self._checked.add(pair.label)
        return image, _drop_small(pair.label, labels, self.min_area, self._remark)

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

    The first pair is read at once, so that a folder of unusable files fails here and not in the middle of a training.

    Args:
        path: The folder; for the Cell Tracking Challenge its root or one sequence (`.../01`).
        layout: "auto", or one of `LAYOUTS`: "folder" (`images/` + `labels/` or `masks/`), "stardist" (`images/` +
            `masks/`), "cellpose" (`x.tif` + `x_masks.tif`), "ctc" (silver truth first, gold where silver is missing).
        min_area: Instances of fewer pixels are dropped and counted.
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
        raise _nothing_found(root, tried, remarks)
    dataset = PairDataset(pairs, remarks=tuple(remarks), min_area=min_area, cache_pairs=cache_pairs)
    dataset.read(0)
    return dataset


# ---------------------------------------------------------------------------------------------------- finding the pairs


def _stem(path: Path) -> str:
    return re.sub(r"\.ome$", "", path.stem)


def _files(folder: Path, remarks: list[Remark]) -> dict[str, Path]:
    """The readable files of a folder by stem, sorted."""
    found: dict[str, Path] = {}
    paths = [p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    for path in sorted(paths, key=lambda p: (_stem(p), SUFFIXES.index(p.suffix.lower()))):
        if (first := found.setdefault(_stem(path), path)) is not path:
            remarks.append(Remark("same name twice", path, f"{first.name} is read instead. Rename or remove one."))
    return found


def _join(images: dict[str, Path], labels: dict[str, Path], remarks: list[Remark]) -> list[Pair]:
    """The files that have a partner; the others become remarks, or an error if no file has one."""
    pairs = [Pair(name, path, labels[name]) for name, path in images.items() if name in labels]
    if images and labels and not pairs:
        image, label = next(iter(images.values())), next(iter(labels.values()))
        raise DataError(
            str(image),
            expected="a label file of the same name",
            got=f"{len(images)} images and {len(labels)} label files without one name in common, such as {label}",
            remedy="Rename the label files after their images (the suffix .tif or .png may differ).",
        )
    for kind, ours, theirs in (("image without labels", images, labels), ("labels without image", labels, images)):
        for name, path in ours.items():
            if name not in theirs:
                remarks.append(Remark(kind, path, "left out. Add its partner under the same name, or remove it."))
    return pairs


def _subfolder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((p for p in sorted(root.iterdir()) if p.is_dir() and p.name.lower() in names), None)


def _find_folders(root: Path, remarks: list[Remark]) -> list[Pair]:
    images, labels = _subfolder(root, IMAGE_FOLDERS), _subfolder(root, LABEL_FOLDERS)
    masks = _subfolder(root, MASK_FOLDERS)
    if images is None or (labels or masks) is None:
        return []
    if labels and masks:
        text = f"{labels.name}/ is read, not {masks.name}/. Pass layout='stardist' for the other."
        remarks.append(Remark("two folders of labels", masks, text))
    chosen = labels or masks
    assert chosen is not None
    return _in_folders(images, chosen, remarks)


def _find_stardist(root: Path, remarks: list[Remark]) -> list[Pair]:
    images, masks = _subfolder(root, IMAGE_FOLDERS), _subfolder(root, MASK_FOLDERS)
    return _in_folders(images, masks, remarks) if images and masks else []


def _in_folders(images: Path, labels: Path, remarks: list[Remark]) -> list[Pair]:
    found = _files(images, remarks), _files(labels, remarks)
    unread = {_stem(p)[: -len("_seg")]: p for folder in (images, labels) for p in sorted(folder.glob("*_seg.npy"))}
    _remark_pickles(unread, set(found[1]), remarks)
    return _join(*found, remarks)


def _find_cellpose(root: Path, remarks: list[Remark]) -> list[Pair]:
    images = {s: p for s, p in _files(root, remarks).items() if not s.endswith(CELLPOSE_EXTRAS)}
    masks = {stem: images.pop(stem) for stem in list(images) if stem.endswith("_masks")}
    labels: dict[str, Path] = {}
    for stem, path in masks.items():
        base = stem.removesuffix("_masks")
        # x_cp_masks is what Cellpose writes, x_masks what it trains on; x_img is how its own data set names images.
        names = [base, f"{base}_img", base.removesuffix("_cp"), f"{base.removesuffix('_cp')}_img"]
        name = next((n for n in names if n in images), base)
        if (first := labels.setdefault(name, path)) is not path:
            # Sorted, _cp_masks (predicted) comes before _masks (what a person trains on): the latter wins.
            labels[name] = path
            remarks.append(Remark("same name twice", first, f"{path.name} is read instead. Rename or remove one."))
    unread = {p.name.removesuffix("_seg.npy"): p for p in sorted(root.glob("*_seg.npy"))}
    _remark_pickles(unread, set(labels), remarks)
    return _join(images, labels, remarks) if labels else []


def _remark_pickles(unread: dict[str, Path], labelled: set[str], remarks: list[Remark]) -> None:
    for name, path in unread.items():
        if name not in labelled:  # beside an exported mask it is not missed
            remarks.append(Remark("_seg.npy not read", path, SEG_NPY_REMEDY))


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """The files of a folder that match, by the number in their name: t000.tif and t0000.tif are both frame 0."""
    matches = ((re.fullmatch(pattern, p.name), p) for p in (sorted(folder.iterdir()) if folder.is_dir() else ()))
    return {int(match[1]): path for match, path in matches if match}


def _find_ctc(root: Path, remarks: list[Remark]) -> list[Pair]:
    alone = re.fullmatch(r"\d{2,3}", root.name) and _numbered(root, r"t(\d+)\.tif")
    inside = sorted(p for p in root.iterdir() if p.is_dir() and re.fullmatch(r"\d{2,3}", p.name))
    pairs: list[Pair] = []
    for sequence in [root] if alone else inside:
        silver, gold = (sequence.parent / f"{sequence.name}_{kind}" / "SEG" for kind in ("ST", "GT"))
        for folder in (silver, gold):
            if folder.is_dir() and (slices := sorted(folder.glob("man_seg_*_*.tif"))):
                text = "labels of single slices of a 3D volume"
                raise DataError(str(slices[0]), expected="labels of 2D frames", got=text, remedy=NO_3D_REMEDY)
        frames = _numbered(sequence, r"t(\d+)\.tif")
        golden = _numbered(gold, r"man_seg(\d+)\.tif")
        labels = {**golden, **_numbered(silver, r"man_seg(\d+)\.tif")}
        markers = _numbered(gold.parent / "TRA", r"man_track(\d+)\.tif")
        for number in sorted(labels.keys() & frames.keys()):
            label = labels[number]
            # Gold truth often labels some cells of a frame only; the tracking markers know how many there are.
            known = markers.get(number) if label == golden.get(number) else None
            pairs.append(Pair(f"{sequence.name}_{frames[number].stem}", frames[number], label, known))
        for number in sorted(labels.keys() - frames.keys()):
            text = f"left out. Add {sequence.name}/{labels[number].stem.replace('man_seg', 't')}.tif, or remove it."
            remarks.append(Remark("labels without image", labels[number], text))
        for number in sorted(frames.keys() - labels.keys()):
            text = f"left out. To use it, add man_seg{frames[number].stem[1:]}.tif to {silver.parent.name}/SEG."
            remarks.append(Remark("image without labels", frames[number], text))
    return pairs


FINDERS: dict[str, Callable[[Path, list[Remark]], list[Pair]]] = {
    "folder": _find_folders,
    "stardist": _find_stardist,
    "cellpose": _find_cellpose,
    "ctc": _find_ctc,
}
assert FINDERS.keys() == LAYOUTS.keys()


def _nothing_found(root: Path, tried: list[str], remarks: list[Remark]) -> DataError:
    expected = f"image-label pairs as {'; or '.join(LAYOUTS[name] for name in tried)}"
    if pickles := sorted([*root.glob("*_seg.npy"), *root.glob("*/*_seg.npy")]):
        got = f"{len(pickles)} _seg.npy and no other labels"
        return DataError(str(pickles[0]), expected=expected, got=got, remedy=SEG_NPY_REMEDY)
    inside = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    folders = [p for p in inside if p.is_dir()]
    endings = Counter(p.suffix or "no suffix" for p in inside if p.is_file())
    got = f"subfolders {[p.name for p in folders[:8]]} and files {dict(endings)}"
    if unpaired := Counter(r.kind for r in remarks):
        got += f" ({', '.join(f'{n} x {kind}' for kind, n in unpaired.items())})"
    better = [str(p) for p in (root.parent, *folders) if any(_looks_right(p, f) for f in FINDERS.values())]
    remedy = f"There are pairs in {', '.join(better)}: pass that." if better else "Sort the files in one of these ways."
    return DataError(str(root), expected=expected, got=got, remedy=remedy)


def _looks_right(folder: Path, find: Callable[[Path, list[Remark]], list[Pair]]) -> bool:
    try:
        return bool(find(folder, []))
    except DataError:
        return False


# ---------------------------------------------------------------------------------------------------- reading one file


def read_image(path: Path, remark: Callable[[Remark], None]) -> NDArray[np.float32]:
    """The intensities of one file, float32 [Y, X], values as stored.

    Args:
        path: TIFF or PNG of any real dtype, one channel.
        remark: Is told what is odd.

    Raises:
        DataError: Not readable, 3D, of several channels, NaN or infinite.
    """
    plane = _plane(path, remark)
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
    plane = _plane(path, remark)
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
    labels = _contiguous(plane)
    if check_instances:
        _check_instances(path, labels, remark)
    return labels


def _contiguous(plane: NDArray[Any]) -> NDArray[np.int32]:
    """Ids renumbered 1, 2, ... in their order, 0 stays 0."""
    highest = int(plane.max())
    if highest < 1 << 20:  # a table is much faster than sorting all pixels
        stored = plane.astype(np.intp)
        present = np.bincount(stored.ravel()) > 0
        present[0] = False
        return np.where(present, np.cumsum(present), 0).astype(np.int32)[stored]
    ids, inverse = np.unique(plane, return_inverse=True)
    return (inverse.reshape(plane.shape) + int(ids[0] > 0)).astype(np.int32)


def _drop_small(
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


def _plane(path: Path, remark: Callable[[Remark], None]) -> NDArray[Any]:
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
