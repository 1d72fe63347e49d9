"""Signed distances to the outlines of binary images, which MaskDDPM, the textures and the views of 3D shapes speak in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


def signed_distance(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Signed distance to the outline of `mask` [Y, X], negative inside, without the staircase of its pixels.

    Smoothed over 1.2 px and shifted so that the area stays: turned by any angle and cut at 0, outlines of real nuclei keep
    their solidity within 0.003; without smoothing they come out ragged (see benchmarks/README.md).
    """
    outside = ndimage.distance_transform_edt(~mask)
    inside = ndimage.distance_transform_edt(mask)
    distance = ndimage.gaussian_filter(np.where(mask, 0.5 - inside, outside - 0.5), 1.2)
    area = int(mask.sum())
    if 0 < area < mask.size:
        distance -= np.partition(distance, [area - 1, area], axis=None)[area - 1 : area + 1].mean()
    return distance.astype(np.float32)
