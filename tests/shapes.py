"""Small synthetic frames for tests: bright smooth ellipses on a noisy background, with exact labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def ellipse_frame(
    seed: int, size: tuple[int, int] = (160, 160), num: int = 14, *, level: float = 100.0, gain: float = 400.0
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """An image in camera counts and its labels; ellipses of about 9 x 13 px that do not overlap."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(size, np.int32)
    light = np.zeros(size)
    yy, xx = np.mgrid[: size[0], : size[1]]
    for _ in range(40 * num):
        if labels.max() == num:
            break
        cy, cx = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        a, b, angle = rng.uniform(10, 15), rng.uniform(7, 11), rng.uniform(0, np.pi)
        u = (xx - cx) * np.cos(angle) + (yy - cy) * np.sin(angle)
        v = -(xx - cx) * np.sin(angle) + (yy - cy) * np.cos(angle)
        radius = np.sqrt((u / a) ** 2 + (v / b) ** 2)
        inside = radius < 1
        if (labels[inside] > 0).any() or inside.sum() < 60:
            continue
        labels[inside] = labels.max() + 1
        light += rng.uniform(0.7, 1.3) / (1 + np.exp((radius - 1) * 9))
    image = level + gain * light + rng.normal(0, 4, size)
    return np.round(image).astype(np.float32), labels


def ellipsoid_volume(
    seed: int, size: tuple[int, int, int] = (24, 64, 64), num: int = 7, *, level: float = 100.0, gain: float = 300.0
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """A stack in camera counts and its dense labels; ellipsoids of about 11 x 16 x 14 voxels that do not overlap."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(size, np.int32)
    light = np.zeros(size)
    grid = np.meshgrid(*(np.arange(n) for n in size), indexing="ij")
    for _ in range(60 * num):
        if labels.max() == num:
            break
        centre = [rng.uniform(0.3 * n, 0.7 * n) if axis == 0 else rng.uniform(0, n) for axis, n in enumerate(size)]
        axes, angle = (rng.uniform(4.5, 6.5), rng.uniform(7, 9), rng.uniform(6, 8)), rng.uniform(0, np.pi)
        z, y, x = (g - c for g, c in zip(grid, centre))
        turned = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        radius = np.sqrt((z / axes[0]) ** 2 + (turned[0] / axes[1]) ** 2 + (turned[1] / axes[2]) ** 2)
        inside = radius < 1
        if (labels[inside] > 0).any() or inside.sum() < 200:
            continue
        labels[inside] = labels.max() + 1
        light += rng.uniform(0.8, 1.2) / (1 + np.exp((radius - 1) * 8))
    image = level + gain * light + rng.normal(0, 5, size)
    return np.round(image).astype(np.float32), labels
