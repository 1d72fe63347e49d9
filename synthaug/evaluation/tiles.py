"""Frames of all sizes as tiles of one size, so that sets of frames compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from synthaug.errors import InputError
from synthaug.randomness import SampleKey

Pair = tuple[NDArray[np.float32], NDArray[np.int32]]
"""image float32 [Y, X] in camera counts, labels int32 [Y, X], 0 = background."""
Floats = NDArray[np.float64]

TILE, TEXTURE_TILE, MIN_TILE = 256, 128, 64
"""Largest tile in pixels for cell statistics and for texture features; smallest frame side that can be compared."""

MAX_TILES = 400
"""At most so many tiles of each set are measured, drawn at random: more cost minutes and change little."""


def check_pairs(name: str, pairs: Sequence[Pair]) -> None:
    """Raise InputError unless `pairs` is a non-empty sequence of finite images [Y, X] with integer labels [Y, X]."""
    if not len(pairs):
        raise InputError(name, expected="at least one (image, labels) pair", got="none")
    for index, (image, labels) in enumerate(pairs):
        image, labels = np.asarray(image), np.asarray(labels)
        if image.ndim != 2 or image.shape != labels.shape:
            got = f"{image.shape} and {labels.shape}"
            raise InputError(f"{name}[{index}]", expected="image and labels of one shape [Y, X]", got=got)
        if labels.dtype.kind not in "iu":
            raise InputError(f"{name}[{index}]", expected="integer labels", got=labels.dtype)
        if not np.isfinite(image).all():
            raise InputError(f"{name}[{index}]", expected="a finite image", got="NaN or infinity")


def cut_tiles(pairs: Sequence[Pair], tile: int) -> list[Pair]:
    """Tiles [tile, tile] on a centred grid without overlap, labels contiguous from 1 in each."""
    tiles = []
    for image, labels in pairs:
        counts = [n // tile for n in image.shape]
        top, left = ((n - count * tile) // 2 for n, count in zip(image.shape, counts))
        for y in range(counts[0]):
            for x in range(counts[1]):
                box = np.s_[top + y * tile : top + (y + 1) * tile, left + x * tile : left + (x + 1) * tile]
                own = np.asarray(labels[box])
                ids = np.unique(own)
                contiguous = np.searchsorted(ids[ids > 0], own, side="right").astype(np.int32)
                tiles.append((np.asarray(image[box], np.float32), contiguous))
    return tiles


def draw_tiles(items: list[Pair], key: SampleKey) -> list[Pair]:
    if len(items) <= MAX_TILES:
        return items
    return [items[i] for i in np.sort(key.numpy().choice(len(items), MAX_TILES, replace=False))]


def cut_by_border(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Ids of the instances that touch the frame's border, sorted."""
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return edge[edge > 0]
