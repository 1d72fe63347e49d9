"""Where image + label pairs lie: folder pairs, Cellpose, StarDist and the Cell Tracking Challenge.

All of them hold 2D frames or 3D stacks. Of a stack single planes may be annotated, each in a 2D file whose name ends in the
number of the plane, counted from 0.

Sources: `cellpose/io.py` for the suffixes `_masks`, `_cp_masks`, `_img`; the naming conventions of the Cell Tracking
Challenge (celltrackingchallenge.net) for `t000.tif`, `man_seg000.tif`, `man_seg_000_012.tif` (plane 12 of time
point 0), silver (`_ST`) and gold (`_GT`) truth.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from synthaug.errors import DataError

SUFFIXES = (".tif", ".tiff", ".png")
"""What is read; where one name comes with several of them, the first one wins."""

CELLPOSE_EXTRAS = ("_flows", "_flows_0", "_flows_1", "_flows_2", "_cp_output", "_cellprob", "_outlines", "_cp_outlines")
"""What Cellpose writes beside its masks, neither image nor labels."""

IMAGE_FOLDERS, LABEL_FOLDERS, MASK_FOLDERS = ("images", "image"), ("labels", "label"), ("masks", "mask")

LAYOUTS = {
    "folder": "images/ + labels/ or masks/ with the same file names (labels/NAME_z012.tif: plane 12 of a stack)",
    "stardist": "images/ + masks/ with the same file names",
    "cellpose": "x.tif|png + x_masks.tif|png in one folder",
    "ctc": "01/t000.tif + 01_ST/SEG/man_seg000.tif or 01_GT/SEG/man_seg000.tif or, of single planes of stacks, "
    "01_GT/SEG/man_seg_000_012.tif (Cell Tracking Challenge)",
}

SEG_NPY_REMEDY = (
    "A _seg.npy is a Python pickle, and opening a pickle can run any code hidden in it, so it is never read here. "
    "Export the masks: in the Cellpose GUI with File > Save masks as PNG/tif, on its command line with --save_tif, in "
    "Python with cellpose.io.save_masks(image, masks, flows, 'x.tif', png=False, tif=True); x_cp_masks.tif beside "
    "x.tif is then found."
)

PLANE_NAME = re.compile(r"(.+)_z(\d+)")
"""Stem of a file that annotates one plane of a stack."""


@dataclass(frozen=True)
class Pair:
    """Where one pair lies.

    Attributes:
        name: Unique in its data set, fit for a file name.
        image: Intensities.
        label: Instance ids; of single planes the first file.
        markers: One marker for each cell of the frame (Cell Tracking Challenge `TRA`), if labels may be incomplete.
        slices: Planes, counted from 0, and their 2D files where only single planes of a stack are annotated.
        shared_ids: One id in several of these planes is one cell.
    """

    name: str
    image: Path
    label: Path
    markers: Path | None = None
    slices: tuple[tuple[int, Path], ...] = ()
    shared_ids: bool = False


@dataclass(frozen=True)
class Remark:
    """Something a user should know about a file, yet no reason to stop."""

    kind: str
    path: Path
    text: str
    count: int = 1


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
    planes: dict[str, dict[int, Path]] = {}
    for name, path in labels.items():
        if name not in images and (match := PLANE_NAME.fullmatch(name)) and match[1] in images:
            planes.setdefault(match[1], {}).setdefault(int(match[2]), path)
    pairs = []
    for name, path in images.items():
        if name in labels:
            pairs.append(Pair(name, path, labels[name]))
        elif name in planes:
            slices = tuple(sorted(planes[name].items()))
            pairs.append(Pair(name, path, slices[0][1], slices=slices))
    read = {p.label for p in pairs} | {path for p in pairs for _, path in p.slices}
    if images and labels and not pairs:
        image, label = next(iter(images.values())), next(iter(labels.values()))
        raise DataError(
            str(image),
            expected="a label file of the same name",
            got=f"{len(images)} images and {len(labels)} label files without one name in common, such as {label}",
            remedy="Rename the label files after their images (the suffix .tif or .png may differ).",
        )
    read |= {p.image for p in pairs}
    for kind, paths in (("image without labels", images), ("labels without image", labels)):
        for path in paths.values():
            if path not in read:
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
        name = next((n for n in names if n in images), base.removesuffix("_cp"))
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


def _numbered_planes(folder: Path) -> dict[int, dict[int, Path]]:
    """The files man_seg_000_012.tif of a folder by time point and plane."""
    planes: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := re.fullmatch(r"man_seg_(\d+)_(\d+)\.tif", path.name):
            planes.setdefault(int(match[1]), {})[int(match[2])] = path
    return planes


def _find_ctc(root: Path, remarks: list[Remark]) -> list[Pair]:
    alone = re.fullmatch(r"\d{2,3}", root.name) and _numbered(root, r"t(\d+)\.tif")
    inside = sorted(p for p in root.iterdir() if p.is_dir() and re.fullmatch(r"\d{2,3}", p.name))
    pairs: list[Pair] = []
    for sequence in [root] if alone else inside:
        silver, gold = (sequence.parent / f"{sequence.name}_{kind}" / "SEG" for kind in ("ST", "GT"))
        frames = _numbered(sequence, r"t(\d+)\.tif")
        golden = _numbered(gold, r"man_seg(\d+)\.tif")
        labels = {**golden, **_numbered(silver, r"man_seg(\d+)\.tif")}
        # Labels of a whole stack tell more than single planes, whoever made them.
        planes = {n: p for n, p in {**_numbered_planes(gold), **_numbered_planes(silver)}.items() if n not in labels}
        markers = _numbered(gold.parent / "TRA", r"man_track(\d+)\.tif")
        for number in sorted((labels.keys() | planes.keys()) & frames.keys()):
            slices = tuple(sorted(planes.get(number, {}).items()))
            label = slices[0][1] if slices else labels[number]
            # Gold truth often labels some cells of a frame only; the tracking markers know how many there are.
            known = markers.get(number) if label.parent == gold else None
            name = f"{sequence.name}_{frames[number].stem}"
            pairs.append(Pair(name, frames[number], label, known, slices, shared_ids=bool(slices)))
        for number in sorted((labels.keys() | planes.keys()) - frames.keys()):
            label = labels.get(number) or min(planes[number].items())[1]
            digits = label.stem.removeprefix("man_seg").strip("_").split("_")[0]
            text = f"left out. Add {sequence.name}/t{digits}.tif, or remove it."
            remarks.append(Remark("labels without image", label, text))
        for number in sorted(frames.keys() - labels.keys() - planes.keys()):
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


def nothing_found(root: Path, tried: list[str], remarks: list[Remark]) -> DataError:
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
