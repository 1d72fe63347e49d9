"""Frames and volumes as tiles of one size, so that sets of them compare, and volumes as planes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from synthaug.datasets.pictures import VoxelSize, aspect, stretch_rows
from synthaug.errors import InputError
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED, Pair

Floats = NDArray[np.float64]

TILE, TEXTURE_TILE, MIN_TILE = 256, 128, 64
"""Largest tile in pixels for cell statistics and for texture features; smallest frame side that can be compared."""

MIN_ROWS = 32
"""Depth in pixels below which planes along the optical axis say too little about texture."""

MAX_TILES = 400
"""At most so many tiles of each set are measured, drawn at random: more cost minutes and change little."""

MAX_PLANES = 16
"""At most so many planes of a volume, evenly spread: neighbours are nearly alike, and count as one."""


def check_pairs(name: str, pairs: Sequence[Pair]) -> int:
    """Number of axes, 2 or 3, of a set of pairs.

    Raises:
        InputError: The set is empty, or does not consist of finite images [(Z,) Y, X] with integer labels of the same
            shape, >= 0 but for whole planes of a volume that are UNLABELLED.
    """
    if not len(pairs):
        raise InputError(name, expected="at least one (image, labels) pair", got="none")
    axes = set()
    for index, (image, labels) in enumerate(pairs):
        image, labels = np.asarray(image), np.asarray(labels)
        if image.ndim not in (2, 3) or image.shape != labels.shape:
            got = f"{image.shape} and {labels.shape}"
            raise InputError(f"{name}[{index}]", expected="image and labels of one shape [(Z,) Y, X]", got=got)
        if labels.dtype.kind not in "iu":
            raise InputError(f"{name}[{index}]", expected="integer labels", got=labels.dtype)
        if labels.min() < 0:
            missing = labels == UNLABELLED
            whole = missing.ndim == 3 and bool((missing.any((1, 2)) == missing.all((1, 2))).all())
            if labels.min() < UNLABELLED or not whole:
                expected = f"labels >= 0, or {UNLABELLED} in whole planes of a volume"
                raise InputError(f"{name}[{index}]", expected=expected, got=f"minimum {labels.min()}")
        if not np.isfinite(image).all():
            raise InputError(f"{name}[{index}]", expected="a finite image", got="NaN or infinity")
        axes.add(image.ndim)
    if len(axes) > 1:
        raise InputError(name, expected="either frames [Y, X] or volumes [Z, Y, X]", got="both")
    return int(axes.pop())


def check_sets(sets: Mapping[str, Sequence[Pair]], voxel_size_um: Sequence[float] | None = None) -> int:
    """Number of axes, 2 or 3, that all sets have in common; raises InputError as `check_pairs`, or where they differ."""
    axes = {name: check_pairs(name, pairs) for name, pairs in sets.items()}
    if len(set(axes.values())) > 1:
        got = ", ".join(f"{n}D {name}" for name, n in axes.items())
        raise InputError(", ".join(sets), expected="all frames or all volumes", got=got)
    if voxel_size_um is not None and (len(voxel_size_um) != 3 or not all(0 < s < np.inf for s in voxel_size_um)):
        raise InputError("voxel_size_um", expected="(Z, Y, X) > 0 in micrometres", got=voxel_size_um)
    return next(iter(axes.values()))


def is_sparse(pairs: Sequence[Pair]) -> bool:
    """Whether some plane of some volume is not annotated."""
    return any(bool((labels == UNLABELLED).any()) for _, labels in pairs)


def common_shape(sets: Sequence[Sequence[Pair]]) -> tuple[int, ...]:
    """Along each axis the smallest side of all frames or volumes."""
    shapes = np.array([image.shape for pairs in sets for image, _ in pairs])
    return tuple(int(n) for n in shapes.min(0))


def cut_tiles(pairs: Sequence[Pair], tile: int | Sequence[int]) -> list[Pair]:
    """Tiles on a centred grid without overlap, labels contiguous from 1 in each.

    Args:
        pairs: Frames or volumes.
        tile: Side in pixels along every axis, or the sides along each.
    """
    tiles = []
    for image, labels in pairs:
        sides = (tile,) * image.ndim if isinstance(tile, int) else tuple(tile)
        counts = [n // side for n, side in zip(image.shape, sides)]
        starts = [(n - count * side) // 2 for n, count, side in zip(image.shape, counts, sides)]
        for place in np.ndindex(*counts):
            corner = [start + i * side for start, i, side in zip(starts, place, sides)]
            box = tuple(slice(at, at + side) for at, side in zip(corner, sides))
            own = np.asarray(labels[box])
            ids = np.unique(own)
            contiguous = np.where(own > 0, np.searchsorted(ids[ids > 0], own, side="right"), own).astype(np.int32)
            tiles.append((np.asarray(image[box], np.float32), contiguous))
    return tiles


def draw_tiles(items: list[Pair], key: SampleKey) -> list[Pair]:
    """At most `MAX_TILES` of them, in their order."""
    if len(items) <= MAX_TILES:
        return items
    return [items[i] for i in np.sort(key.numpy().choice(len(items), MAX_TILES, replace=False))]


def cut_by_border(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Ids of the instances that touch the border of the frame or volume, sorted."""
    edge = np.unique(np.concatenate([labels.take(i, axis).ravel() for axis in range(labels.ndim) for i in (0, -1)]))
    return edge[edge > 0]


def planes(
    pairs: Sequence[Pair], kind: Literal["xy", "xz"], voxel_size_um: VoxelSize | None = None, *, annotated: bool = False
) -> list[Pair]:
    """Up to `MAX_PLANES` evenly spread planes of every volume, as frames.

    Args:
        pairs: Volumes.
        kind: "xy" as they are; "xz", rows along z, stretched to square pixels.
        voxel_size_um: Of all volumes; None: pixels of "xz" stay as they are.
        annotated: Only planes "xy" that are annotated.
    """
    axis, factor = ("xy", "xz").index(kind), aspect(voxel_size_um)
    out = []
    for image, labels in pairs:
        possible = np.arange(image.shape[axis])
        if annotated:
            possible = possible[(labels != UNLABELLED).any((1, 2))]
        count = min(MAX_PLANES, len(possible))
        for at in possible[((np.arange(count) + 0.5) * len(possible) / max(count, 1)).astype(int)]:
            frame = np.asarray(image.take(at, axis), np.float32), labels.take(at, axis)
            out.append(frame if kind == "xy" else (stretch_rows(frame[0], factor), stretch_rows(frame[1], factor)))
    return out
