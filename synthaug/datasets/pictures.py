"""Samples as pictures: grey values, outlines and labels in colour, and volumes as three planes at true aspect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Frame = tuple[NDArray[np.float32], NDArray[np.int32]]
"""image float32 [(Z,) Y, X] in any scale, labels int32 of its shape; 0 = background, UNLABELLED = not annotated."""
VoxelSize = tuple[float, float, float]
"""(Z, Y, X) in micrometres."""

GAMMA = 0.6
"""Grey = (counts between the two ends of the display range) ** GAMMA: haze and dim halos are to be seen."""

SEAM = 3
"""Pixels between the planes of a volume."""

T = TypeVar("T", bound=np.generic)


def grey(image: NDArray[np.float32], limits: tuple[float, float]) -> Bytes:
    """uint8 [Y, X] for display only."""
    scaled = np.clip((np.asarray(image, np.float64) - limits[0]) / (limits[1] - limits[0]), 0, 1) ** GAMMA
    return np.rint(255 * scaled).astype(np.uint8)


def label_colours(labels: NDArray[np.int32], alpha: int = 255) -> Bytes:
    """uint8 RGBA [Y, X, 4]: a colour an instance, far from those of the neighbouring ids; 0 is transparent."""
    from matplotlib.colors import hsv_to_rgb

    index = np.arange(int(labels.max()) + 1)
    # Steps by the golden ratio spread any run of ids over the colour circle.
    hsv = np.stack([index * 0.618034 % 1, 0.55 + 0.35 * (index % 2), 0.8 + 0.2 * (index % 3 > 0)], -1)
    table = np.concatenate([np.rint(255 * hsv_to_rgb(hsv)), np.full((len(index), 1), alpha)], 1).astype(np.uint8)
    table[0] = 0
    return table[labels]


def outlines(labels: NDArray[np.int32]) -> Bytes:
    """uint8 RGBA [Y, X, 4]: the inner border pixels of every instance in its colour."""
    from skimage.segmentation import find_boundaries

    return np.where(find_boundaries(labels, mode="inner")[..., None], label_colours(labels), np.uint8(0))


def panel(views: Mapping[str, Bytes], fill: int) -> Bytes:
    """One picture of the three planes of `orthogonal_views`: "xy", below it "xz", on its right "yz"."""
    xy, xz, yz = (views[name] for name in ("xy", "xz", "yz"))
    height, width = len(xy) + SEAM + len(xz), xy.shape[1] + SEAM + yz.shape[1]
    out = np.full((height, width, *xy.shape[2:]), fill, np.uint8)
    out[: len(xy), : xy.shape[1]] = xy
    out[len(xy) + SEAM :, : xz.shape[1]] = xz
    out[: len(yz), xy.shape[1] + SEAM :] = yz
    return out


def aspect(voxel_size_um: VoxelSize | None) -> float:
    """Pixels a plane is thick; 1 where the voxel size is unknown."""
    return 1.0 if voxel_size_um is None else voxel_size_um[0] / float(np.sqrt(voxel_size_um[1] * voxel_size_um[2]))


def stretch_rows(plane: NDArray[T], factor: float) -> NDArray[T]:
    """A plane [Z, X] with square pixels: [round(Z * factor), X], linear between planes, labels (integers) nearest."""
    num = max(round(len(plane) * factor), 1)
    if num == len(plane):
        return plane
    at = np.clip((np.arange(num) + 0.5) * len(plane) / num - 0.5, 0, len(plane) - 1)
    if plane.dtype.kind in "iu":
        return plane[np.floor(at + 0.5).astype(int)]
    low = np.floor(at).astype(int)
    share = (at - low)[:, None].astype(plane.dtype)
    return (1 - share) * plane[low] + share * plane[np.minimum(low + 1, len(plane) - 1)]


def orthogonal_views(pair: Frame, voxel_size_um: VoxelSize | None = None) -> dict[str, Frame]:
    """Three planes at true aspect, each through as much of the cells as one can be.

    Args:
        pair: A volume. The plane across each axis is the one that most labelled voxels lie in, the middle without any.
        voxel_size_um: None: voxels count as cubes.

    Returns:
        "xy" [Y, X], "xz" [Z', X] and "yz" [Y, Z'], Z' = Z planes in pixels; UNLABELLED pixels are 0.
    """
    image, labels = pair[0], np.maximum(pair[1], 0)
    inside = labels > 0
    counts = [inside.sum(tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    z, y, x = (int(n.argmax()) if n.any() else len(n) // 2 for n in counts)
    factor = aspect(voxel_size_um)
    return {
        "xy": (image[z], labels[z]),
        "xz": (stretch_rows(image[:, y], factor), stretch_rows(labels[:, y], factor)),
        "yz": (stretch_rows(image[:, :, x], factor).T, stretch_rows(labels[:, :, x], factor).T),
    }
