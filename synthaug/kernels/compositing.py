"""Turning cells into image pixels, and adding up the light of those that were placed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from synthaug.types import Cells

SDF_LIMIT = 8.0
"""Distances beyond this many crop pixels do not matter for the outline; also the distance outside a crop."""

BLOCK = 64
"""Slices resampled at a time."""


def resample(cells: Cells, rotation: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
    """Light and signed distance [N, P, P] of rotated and flipped cells of one slice; see `resample_stacks`."""
    image, sdf = resample_stacks(cells, rotation, flip)
    return image[:, 0], sdf[:, 0]


def resample_stacks(
    cells: Cells, rotation: Tensor, flip: Tensor, mirror: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Light and signed distance of cells rotated and flipped in plane, in image pixels (bicubic: textures stay sharp).

    Args:
        cells: N cells of S slices on the CPU.
        rotation: float32 [N, 2], cosine and sine.
        flip: float32 [N], -1 mirrors.
        mirror: float32 [N], -1 reverses the order of the slices; none by default.

    Returns:
        float32 [N, S, P, P] each, P the largest crop size of all in image pixels; a cell's values depend neither on P
        nor on the other cells. The distance is truncated at 8 crop pixels.
    """
    n, slices, side = len(cells), cells.image.shape[1], cells.image.shape[-1]
    sides = (torch.ceil(cells.scale * (side / 8) - 1e-4) * 8).long()
    largest = int(sides.max()) if n else side
    out = torch.zeros((n, 2, slices, largest, largest))
    if bool((sides < largest).any()):
        out[:, 1] = SDF_LIMIT
    for one in sorted(set(sides.tolist())):
        axis = torch.arange(one, dtype=torch.float32) - (one - 1) / 2
        start = (largest - one) // 2  # both are multiples of 8, so the middle stays the middle
        # A few cells at a time: what is copied on the way stays in the cache
        for index in torch.nonzero(sides == one)[:, 0].split(max(BLOCK // slices, 1)):
            pair = torch.stack([cells.image[index], cells.sdf[index].clamp(-SDF_LIMIT, SDF_LIMIT) - SDF_LIMIT], dim=1)
            if mirror is not None:
                pair = torch.where(mirror[index, None, None, None, None] < 0, pair.flip(2), pair)
            # Crop pixels from the centre to grid_sample's units: half a crop is 1
            cosine, sine = (rotation[index] / (cells.scale[index, None] * (side / 2))).T[:, :, None, None]
            grid = torch.stack([cosine * axis - sine * axis[:, None], sine * axis + cosine * axis[:, None]], dim=-1)
            grid[..., 0] *= flip[index, None, None]
            value = functional.grid_sample(
                pair.flatten(1, 2), grid, mode="bicubic", padding_mode="zeros", align_corners=False
            ).unflatten(1, (2, slices))
            value[:, 1] += SDF_LIMIT
            out[index, :, :, start : start + one, start : start + one] = value
    return out[:, 0], out[:, 1]


def composite(
    image: Tensor, brightness: Tensor, corners: Tensor, counts: Sequence[int], size: tuple[int, ...]
) -> Tensor:
    """Sum of the light of the placed cells, each times its brightness, float32 [B, (Z,) Y, X].

    A loop of array additions: at a few microseconds a cell there is nothing for a compiled kernel to win.

    Args:
        image: float32 [N, (S,) P, P], light of the cells of all frames, frame after frame.
        brightness: float32 [N].
        corners: int64 [N, 3 (4)], of `place_cells` (`place_cells_3d`).
        counts: cells of each frame.
        size: ((Z,) Y, X).
    """
    light = np.zeros((len(counts), *size), np.float32)
    values, factors = image.numpy(), brightness.numpy()
    frames = np.repeat(np.arange(len(counts)), counts)
    for i, (*corner, label) in enumerate(corners.tolist()):
        if label:
            spans = [slice(max(c, 0), min(c + n, s)) for c, n, s in zip(corner, image.shape[1:], size)]
            part = values[i][tuple(slice(s.start - c, s.stop - c) for s, c in zip(spans, corner))]
            light[frames[i]][tuple(spans)] += part * factors[i]
    return torch.from_numpy(light)
