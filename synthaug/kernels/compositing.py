"""Turning cells into image pixels, and adding up the light of those that were placed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from synthaug.types import Cells

SDF_LIMIT = 8.0
"""Distances beyond this many crop pixels do not matter for the outline; also the distance outside a crop."""

CONTACT_SIGMA = 1.0
"""Blur of the edge that cells pressed together share, pixels: about as soft as the outer borders of embedded cascades."""

CONTACT_REACH = 3
"""Pixels (planes) around a cell in which it is dimmed by those it is pressed against."""

BLOCK = 64
"""Slices resampled at a time."""


def resample(cells: Cells, rotation: Tensor, flip: Tensor, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Light and mask [N, P, P] of rotated and flipped cells of one slice; see `resample_stacks`."""
    image, mask = resample_stacks(cells, rotation, flip, which=which)
    return image[:, 0], mask[:, 0]


def resample_stacks(
    cells: Cells, rotation: Tensor, flip: Tensor, mirror: Tensor | None = None, which: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Light and mask of cells rotated and flipped in plane, in image pixels (bicubic: textures stay sharp).

    Args:
        cells: cells of S slices on the CPU.
        rotation: float32 [N, 2], cosine and sine.
        flip: float32 [N], -1 mirrors.
        mirror: float32 [N], -1 reverses the order of the slices; none by default.
        which: int64 [N], cells to take, any of them as often as wanted; default: all, N of them.

    Returns:
        float32 and bool [N, S, P, P], P the largest crop size of all in image pixels; a cell's values depend neither on P
        nor on the other cells. The mask is where the signed distance, truncated at 8 crop pixels, is negative.
    """
    which = torch.arange(len(cells)) if which is None else which
    n, slices, side = len(which), cells.image.shape[1], cells.image.shape[-1]
    scale = cells.scale[which]
    sides = (torch.ceil(scale * (side / 8) - 1e-4) * 8).long()
    largest = int(sides.max()) if n else side
    # Memory that the system hands out as zeros costs nothing where nothing is written, and numpy asks for large pages
    light = torch.from_numpy(np.zeros((n, slices, largest, largest), np.float32))
    masks = torch.from_numpy(np.zeros((n, slices, largest, largest), np.bool_))
    first, end = _spans(cells, which, mirror)
    for one in sorted(set(sides.tolist())):
        axis = torch.arange(one, dtype=torch.float32) - (one - 1) / 2
        start = (largest - one) // 2  # both are multiples of 8, so the middle stays the middle
        window = slice(start, start + one)
        # A few cells at a time: what is copied on the way stays in the cache
        for index in torch.nonzero(sides == one)[:, 0].split(max(BLOCK // slices, 1)):
            low, high = int(first[index].min()), int(end[index].max())
            if low >= high:
                continue
            planes = torch.arange(low, high).expand(len(index), -1)
            if mirror is not None:
                planes = torch.where(mirror[index, None] < 0, slices - 1 - planes, planes)
            source = which[index, None], planes
            image, sdf = cells.image[source], cells.sdf[source].clamp_(-SDF_LIMIT, SDF_LIMIT) - SDF_LIMIT
            # Crop pixels from the centre to grid_sample's units: half a crop is 1
            cosine, sine = (rotation[index] / (scale[index, None] * (side / 2))).T[:, :, None, None]
            grid = torch.stack([cosine * axis - sine * axis[:, None], sine * axis + cosine * axis[:, None]], dim=-1)
            grid[..., 0] *= flip[index, None, None]
            value = functional.grid_sample(
                torch.cat([image, sdf], dim=1), grid, mode="bicubic", padding_mode="zeros", align_corners=False
            ).unflatten(1, (2, high - low))
            light[index, low:high, window, window] = value[:, 0]
            masks[index, low:high, window, window] = value[:, 1] + SDF_LIMIT < 0
    return light, masks


def _spans(cells: Cells, which: Tensor, mirror: Tensor | None) -> tuple[Tensor, Tensor]:
    """First slice with something in it, and the one after the last, of each chosen cell as it is mirrored; int64 [N] each."""
    slices = cells.image.shape[1]
    first, end = torch.zeros(len(cells), dtype=torch.int64), torch.full((len(cells),), slices)
    if slices > 1:
        for i in which.unique().tolist():
            dark = (cells.image[i].amin((1, 2)) == 0) & (cells.image[i].amax((1, 2)) == 0)
            used = ~dark | (cells.sdf[i].amin((1, 2)) < SDF_LIMIT)
            inside = torch.nonzero(used)[:, 0]
            first[i], end[i] = (inside[0], inside[-1] + 1) if len(inside) else (0, 0)
    first, end = first[which], end[which]
    if mirror is not None:
        first, end = torch.where(mirror < 0, slices - end, first), torch.where(mirror < 0, slices - first, end)
    return first, end


def composite(
    image: Tensor,
    brightness: Tensor,
    corners: Tensor,
    counts: Sequence[int],
    size: tuple[int, ...],
    pressed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Sum of the light of the placed cells, each times its brightness, float32 [B, (Z,) Y, X].

    Where cells are pressed together, the light of two sharp-edged bodies that share an edge would be blurred by the optics:
    a cell that lost a part of its outline to others shines only where they do not, and what little light the gap between
    the two lets through is missing along the contact.

    A loop of array additions: at a few microseconds a cell there is nothing for a compiled kernel to win.

    Args:
        image: float32 [N, (S,) P, P], light of the cells of all frames, frame after frame.
        brightness: float32 [N].
        corners: int64 [N, 3 (4)], of `place_cells` (`place_cells_3d`).
        counts: cells of each frame.
        size: ((Z,) Y, X).
        pressed: where cells may be pressed together: their masks bool [N, (S,) P, P], labels int32 [B, (Z,) Y, X] of
            `place_cells` (`place_cells_3d`), and float32 [N] in [0, 1], how deep the furrow between a cell and those it is
            pressed against is.
    """
    light = np.zeros((len(counts), *size), np.float32)
    values, factors = image.numpy(), brightness.numpy()
    frames = np.repeat(np.arange(len(counts)), counts)
    for i, (*corner, label) in enumerate(corners.tolist()):
        if label:
            spans = tuple(slice(max(c, 0), min(c + n, s)) for c, n, s in zip(corner, image.shape[1:], size))
            inside = tuple(slice(s.start - c, s.stop - c) for s, c in zip(spans, corner))
            part = values[i][inside] * factors[i]
            if pressed is not None:
                masks, labels, furrow = pressed
                _press(part, masks[i].numpy()[inside], labels[frames[i]].numpy()[spans], label, float(furrow[i]))
            light[frames[i]][spans] += part
    return torch.from_numpy(light)


def _press(
    part: NDArray[np.float32], mask: NDArray[np.bool_], there: NDArray[np.int32], label: int, furrow: float
) -> None:
    """Dim the light of one cell where it is pressed against cells placed before it; in place, all arrays [(Z,) Y, X]."""
    box = next(iter(ndimage.find_objects(mask.view(np.uint8))), None)
    if box is None:
        return
    # No farther than the cell's light reaches: most of a crop is margin.
    window = tuple(slice(max(s.start - CONTACT_REACH, 0), s.stop + CONTACT_REACH) for s in box)
    others = (there[window] > 0) & (there[window] < label)
    if (others & mask[window]).any():
        cover = ndimage.gaussian_filter(
            others.astype(np.float32), CONTACT_SIGMA, truncate=CONTACT_REACH / CONTACT_SIGMA
        )
        part[window] *= (1 - cover) * (1 - furrow * 4 * cover * (1 - cover))
