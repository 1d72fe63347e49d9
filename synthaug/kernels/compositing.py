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


def resample(cells: Cells, rotation: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
    """Light and signed distance of rotated and flipped cells in image pixels (bicubic, so textures stay sharp).

    Args:
        cells: N cells on the CPU.
        rotation: float32 [N, 2], cosine and sine.
        flip: float32 [N], -1 mirrors.

    Returns:
        float32 [N, P, P] each, P the largest crop size of all in image pixels; a cell's values depend neither on P
        nor on the other cells. The distance is truncated at 8 crop pixels.
    """
    n, side = len(cells), cells.image.shape[-1]
    sides = (torch.ceil(cells.scale * (side / 8) - 1e-4) * 8).long()
    largest = int(sides.max()) if n else side
    out = torch.zeros((n, 2, largest, largest))
    out[:, 1] = SDF_LIMIT
    stacked = torch.cat([cells.image, cells.sdf.clamp(-SDF_LIMIT, SDF_LIMIT) - SDF_LIMIT], dim=1)
    for one in sorted(set(sides.tolist())):
        index = torch.nonzero(sides == one)[:, 0]
        axis = torch.arange(one, dtype=torch.float32) - (one - 1) / 2
        # Crop pixels from the centre to grid_sample's units: half a crop is 1
        cosine, sine = (rotation[index] / (cells.scale[index, None] * (side / 2))).T[:, :, None, None]
        grid = torch.stack([cosine * axis - sine * axis[:, None], sine * axis + cosine * axis[:, None]], dim=-1)
        grid[..., 0] *= flip[index, None, None]
        value = functional.grid_sample(stacked[index], grid, mode="bicubic", padding_mode="zeros", align_corners=False)
        value[:, 1] += SDF_LIMIT
        start = (largest - one) // 2  # both are multiples of 8, so the middle stays the middle
        out[index, :, start : start + one, start : start + one] = value
    return out[:, 0], out[:, 1]


def composite(
    image: Tensor, brightness: Tensor, corners: Tensor, counts: Sequence[int], size: tuple[int, int]
) -> Tensor:
    """Sum of the light of the placed cells, each times its brightness, float32 [B, Y, X].

    A loop of array additions: at a few microseconds a cell there is nothing for a compiled kernel to win.

    Args:
        image: float32 [N, P, P], light of the cells of all frames, frame after frame.
        brightness: float32 [N].
        corners: int64 [N, 3], of `place_cells`.
        counts: cells of each frame.
        size: (Y, X).
    """
    light = np.zeros((len(counts), *size), np.float32)
    side, values, factors = image.shape[-1], image.numpy(), brightness.numpy()
    frames = np.repeat(np.arange(len(counts)), counts)
    for i, (top, left, label) in enumerate(corners.tolist()):
        if label:
            y, x = slice(max(top, 0), min(top + side, size[0])), slice(max(left, 0), min(left + side, size[1]))
            part = values[i, y.start - top : y.stop - top, x.start - left : x.stop - left]
            light[frames[i], y, x] += part * factors[i]
    return torch.from_numpy(light)
