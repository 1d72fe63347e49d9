"""From the three classes of `targets.py` back to instances, by watersheds, for frames and for volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthaug.evaluation.targets import BACKGROUND, INTERIOR

MIN_AREA = 20
"""Default size in pixels of the smallest instance that is kept."""

DEEPER = 1.0
"""Two parts of an interior are cells of their own when it gets so many pixels narrower between their middles."""

SMOOTH = 1.0
"""Width in pixels of the blur of the distance: an interior's rough outline makes maxima that mean nothing."""


def without_small(labels: NDArray[np.int32], least: float) -> NDArray[np.int32]:
    """Labels >= 0 of any shape, those of fewer than `least` pixels 0; the others keep their ids."""
    small = np.bincount(labels.ravel()) < least
    return np.where(small[labels], 0, labels).astype(labels.dtype)


def instances_from_probabilities(
    probabilities: NDArray[np.floating[Any]], min_area: int = MIN_AREA
) -> NDArray[np.int32]:
    """Instances by a watershed from the connected interiors, over all pixels that are rather cell than background.

    Args:
        probabilities: float [3, Y, X] of background, interior, border.
        min_area: Instances of fewer pixels are dropped; an interior of less than a quarter of it makes no instance.

    Returns:
        int32 [Y, X], contiguous from 1, 0 = background.
    """
    from skimage.segmentation import relabel_sequential, watershed

    interior = probabilities[INTERIOR]
    seeds, _ = ndimage.label(interior > 0.5)
    # Specks of interior lie on doubtful borders; the smallest cell worth keeping has a larger one.
    seeds = without_small(seeds, min_area / 4)
    labels = without_small(watershed(-interior, seeds, mask=probabilities[BACKGROUND] < 0.5), min_area)
    out: NDArray[np.int32] = relabel_sequential(labels)[0].astype(np.int32)
    return out


def volume_instances(
    probabilities: NDArray[np.floating[Any]],
    min_voxels: int,
    voxel_size_um: Sequence[float] | None = None,
) -> NDArray[np.int32]:
    """Instances of a volume by a watershed of the distance to the border, from its maxima.

    In a volume two cells that touch meet in many voxels, and one voxel of interior among them joins connected interiors: from
    those, half of the cells of BBBC050 were merged. A cell is widest in its middle, whatever the borders leave open.

    Args:
        probabilities: float [3, Z, Y, X] of background, interior, border.
        min_voxels: Instances of fewer voxels are dropped.
        voxel_size_um: (Z, Y, X) in micrometres; None for cubes.

    Returns:
        int32 [Z, Y, X], contiguous from 1, 0 = background.
    """
    from skimage.morphology import h_maxima
    from skimage.segmentation import relabel_sequential, watershed

    spacing = np.ones(3) if voxel_size_um is None else np.asarray(voxel_size_um, float) / voxel_size_um[-1]
    interior = probabilities[INTERIOR] > 0.5
    distance = ndimage.distance_transform_edt(interior, sampling=spacing)
    distance = ndimage.gaussian_filter(distance, SMOOTH / spacing)
    maxima = h_maxima(distance, DEEPER).astype(bool) & interior
    # The interior of a small cell is nowhere deeper than that, and is a seed as a whole.
    whole, num = ndimage.label(interior)
    deep = np.bincount(whole[maxima], minlength=num + 1) > 0
    large = np.bincount(whole.ravel(), minlength=num + 1) >= min_voxels / 4
    seeds, _ = ndimage.label(maxima | (interior & (large & ~deep)[whole]), np.ones((3, 3, 3)))
    labels = without_small(watershed(-distance, seeds, mask=probabilities[BACKGROUND] < 0.5), min_voxels)
    out: NDArray[np.int32] = relabel_sequential(labels)[0].astype(np.int32)
    return out
