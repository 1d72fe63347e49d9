"""Dim blobs nobody annotated: cells far out of focus, polar bodies, debris. In volumes about as many as there are cells.

A segmenter that never saw one takes every one for a cell. Here they are the volume's own cells once more, elsewhere, turned
over, blurred and dim, some of them and some parts of them; how many and how bright is told by the planes that somebody
annotated, where what is bright and not outlined is such a blob.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from synthaug.generators.axial import blur_axis
from synthaug.generators.camera import mirror_index
from synthaug.generators.stage import Noise
from synthaug.generators.volume_fit import annotated_planes
from synthaug.randomness import SampleKey, normal, uniform

PITCH = (8, 24, 24)
"""Voxels (Z, Y, X) between the nodes of the field that says which of the cells appear, about the size of one."""

NODES_A_BLOB = 2.0
"""Nodes that are lit for a blob to be seen: there is no cell to be shown at about every second one."""

SPREAD = 0.5
"""Standard deviation of the logarithm of their brightness."""

BLUR = (2.0, 1.5, 1.5)
"""Of their light, voxels."""

LEAST, MOST = 0.12, 0.8
"""Contrast of a blob over that of cells: less is texture of the background, more is a cell that somebody forgot."""

PRIOR = (2, 20, 0.25)
"""Blobs, the outlines they were found beside, and their contrast, that count beside what is found: as in BBBC050's embryos."""

CLEAR, LEAST_AREA = 3, 8
"""Pixels between a blob and the nearest outline, and its smallest area in plane."""


def draw_ghosts(keys: Sequence[SampleKey], size: Sequence[int]) -> Noise:
    """The random numbers of `ghost_light`: `ghost_place` uniform [B, 6]; `ghost_which` and `ghost_bright` normal [B, ...]."""
    grid = tuple(-(-n // p) + 1 for n, p in zip(size, PITCH))
    return {
        "ghost_place": uniform([k.child("ghost", "place") for k in keys], (6,)),
        "ghost_which": normal([k.child("ghost", "which") for k in keys], (1, *grid)),
        "ghost_bright": normal([k.child("ghost", "bright") for k in keys], (1, *grid)),
    }


def ghost_light(lit: Tensor, noise: Noise, rate: float, contrast: float) -> Tensor:
    """Light of the blobs of one volume, [1, 1, Z, Y, X].

    Args:
        lit: Counts that its cells make, same shape.
        noise: From `draw_ghosts`, one row.
        rate: Blobs a cell, in [0, 1].
        contrast: Their median brightness over that of the cells.
    """
    place = noise["ghost_place"][0].tolist()
    copy = lit
    for axis, share, flip in zip((2, 3, 4), place[:3], place[3:]):
        size = lit.shape[axis]
        # A quarter of the canvas at least, so that a blob is not the shadow of its own cell; mirrored, not wrapped, at borders.
        index = mirror_index(int((0.25 + 0.5 * share) * size), size, size).to(lit.device)
        copy = copy.index_select(axis, index.flip(0) if flip < 0.5 else index)
    for axis, sigma in zip((2, 3, 4), BLUR):
        copy = blur_axis(copy.contiguous(), sigma, axis)
    there = torch.special.ndtr(noise["ghost_which"]) < NODES_A_BLOB * rate
    field = torch.where(there, contrast * torch.exp(SPREAD * noise["ghost_bright"]), 0.0)
    whole = [(n - 1) * p + 1 for n, p in zip(field.shape[2:], PITCH)]
    field = torch.nn.functional.interpolate(field, size=whole, mode="trilinear", align_corners=True)
    return copy * field[:, :, : lit.shape[2], : lit.shape[3], : lit.shape[4]].clamp(max=MOST)


def fit_ghosts(
    volumes: Sequence[NDArray[np.floating]], labels: Sequence[NDArray[np.int32]], contrasts: Sequence[float]
) -> tuple[float, float]:
    """Blobs an outline, at most 1, and their median contrast over that of the cells.

    Few outlines without a blob beside them do not say that there are none: `PRIOR` weighs as much as 20 of them.

    Args:
        volumes: [Z, Y, X] each, counts.
        labels: int32, same shapes, planes nobody annotated `UNLABELLED`.
        contrasts: Median contrast of each volume's cells, counts.
    """
    found: list[float] = []
    outlines = 0
    for volume, own, contrast in zip(volumes, labels, contrasts):
        if not contrast > 0:
            continue
        for z in annotated_planes(own):
            outlines += len(np.unique(own[z][own[z] > 0]))
            plane = np.asarray(volume[max(z - 1, 0) : z + 2], np.float64).mean(0)
            found += _blobs(plane, own[z], contrast)
    blobs, among, usual = PRIOR
    return min((len(found) + blobs) / (outlines + among), 1.0), float(np.median([*found, usual, usual]))


def _blobs(plane: NDArray[np.float64], labels: NDArray[np.int32], contrast: float) -> list[float]:
    """Contrasts of the blobs beside the outlines of one plane [Y, X], over that of its cells."""
    free = ndimage.distance_transform_edt(labels <= 0) > CLEAR
    smooth = ndimage.gaussian_filter(plane, 1.5)
    # The slow course of what is free: light of cells does not reach into it.
    weight = np.maximum(ndimage.gaussian_filter(free.astype(np.float64), 8.0), 1e-3)
    slow = ndimage.gaussian_filter(np.where(free, smooth, 0.0), 8.0) / weight
    relative = np.where(free, smooth - slow, 0.0) / contrast
    parts, num = ndimage.label(relative > LEAST)
    area = np.bincount(parts.ravel(), minlength=num + 1)[1:]
    peaks = np.asarray(ndimage.maximum(relative, parts, range(1, num + 1)))
    kept: list[float] = peaks[(area >= LEAST_AREA) & (peaks < MOST)].tolist()
    return kept
