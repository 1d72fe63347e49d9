"""Cutting surfaces into the planes of the microscope, along the optical axis over the full extent (paper, §2).

The planes lie at the data's own z spacing, at a sub-voxel offset that is random for every cell. The paper's code takes the
upper half in 10 levels; half a cell cannot be labelled in a volume.

A surface's section at the conditioning plane z = 0 need not fill the annotated outline: a tilted cell is widest elsewhere,
and a surface is smoother than an outline. There the section is moved onto the outline, by the difference of their distance
maps, with a weight that falls like a Gaussian over the planes above and below. IoU with the outline, smooth / lumpy
spherical-harmonic shapes: 0.90 / 0.80 by the section alone, 1.00 / 0.99 with the correction, 0.98 / 0.96 half a plane away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from synthaug.errors import InputError
from synthaug.generators.shapes import REACH, view_distance
from synthaug.generators.stage import Noise, Stage
from synthaug.randomness import SampleKey, uniform
from synthaug.types import CellMasks, Slices, Surface

SPECK = 0.02
"""Share of a cell's voxels beside its largest part that is left out; with more, the cell is rejected."""


@dataclass(frozen=True)
class SlicingConfig:
    """How cells are cut.

    Attributes:
        crop_size: Side of the crops, pixels; that of the masks.
        num_slices: Planes of a crop; see `slices_needed`.
        z_spacing: Image pixels (in Y and X) from plane to plane.
        stretch: How many times longer a cell looks along z than the surface is; fitted to images.
        bulge: With more than 1 sections shrink later towards a cell's ends, and faster then: the section at a share t of the
            way from z = 0 to an end is the one that the surface has at t ** bulge. At least 1, which leaves it as it is.
        margin: Pixels kept free between the cell and the crop's edge, as for masks.
        least_scale: Image pixels per crop pixel of cells that fit the crop, as for masks.
        outline_reach: Standard deviation, in planes, of the outline's hold on the sections above and below it.
        volume_range: Least and largest volume of real cells in voxels of the data; (0, 0) where it is not known.
    """

    crop_size: int = 64
    num_slices: int = 33
    z_spacing: float = 1.0
    stretch: float = 1.0
    bulge: float = 1.0
    margin: float = 5.0
    least_scale: float = 1.0
    outline_reach: float = 1.0
    volume_range: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.crop_size <= 2 * self.margin or self.num_slices < 1:
            raise InputError("SlicingConfig", expected="a crop wider than its margins, 1 plane or more", got=repr(self))
        for name in ("z_spacing", "stretch", "outline_reach"):
            if not getattr(self, name) > 0:
                raise InputError(name, expected="a number above 0", got=getattr(self, name))
        if not self.bulge >= 1:
            raise InputError("bulge", expected="a number >= 1", got=self.bulge)
        if not 0 <= self.volume_range[0] <= self.volume_range[1]:
            raise InputError("volume_range", expected="0 <= least <= largest", got=self.volume_range)

    def at_scale(self, z: float, plane: float) -> SlicingConfig:
        """For voxels `z` times as deep and `plane` times as wide."""
        planes = 2 * math.ceil((self.num_slices - 1) / 2 / z) + 1
        low, high = (v / (z * plane**2) for v in self.volume_range)
        return replace(self, num_slices=planes, z_spacing=self.z_spacing * z / plane, volume_range=(low, high))


def slices_needed(half_side: float, z_spacing: float, stretch: float) -> int:
    """Planes that hold any surface of `half_side` image pixels at any offset, and one empty plane at either end; odd."""
    return 2 * math.ceil(REACH * half_side * stretch / z_spacing + 0.5) + 1


class Slicing(Stage):
    """Surfaces in, outlines in parallel planes out. Has no weights."""

    config_class = SlicingConfig
    config: SlicingConfig

    def draw(self, keys: Sequence[SampleKey]) -> Noise:
        """Where the planes lie, in planes: uniform in [-0.5, 0.5)."""
        return {"offset": uniform([k.child("offset") for k in keys], (1,))[:, 0] - 0.5}

    @torch.no_grad()
    def forward(self, surface: Surface, masks: CellMasks | None, noise: Noise) -> tuple[Slices, list[str | None]]:
        """Cut `surface` [B].

        Args:
            surface: Closed surfaces; `half_side` gives their size.
            masks: The outlines they were completed from, on crops of `crop_size`; the sections near z = 0 then follow
                them, none goes beyond them, and the scale is theirs. None: the sections as they are.
            noise: Of `draw`.

        Returns:
            The slices [B], and for each cell why it has to be redrawn, or None; see `why_rejected`.
        """
        size, device = self.config.crop_size, surface.sdf.device
        if masks is not None and masks.sdf.shape != (len(surface), size, size):
            raise InputError(
                "masks",
                expected=f"{len(surface)} outlines on crops of {size} x {size}",
                got=tuple(masks.sdf.shape),
                remedy="Cut them with the crop size of the mask stage.",
            )
        scale = self.scale_of(surface) if masks is None else masks.scale
        height = self.heights(noise["offset"].to(device))
        stacks, rejects = [], []
        for i in range(len(surface)):  # one after the other, so that no bits depend on the others
            factor = scale[i] / surface.half_side[i]
            level = self._sections(surface.sdf[i], surface.half_side[i], factor, height[i])
            outline = None if masks is None else masks.sdf[i]
            if outline is not None:
                flat = self._sections(surface.sdf[i], surface.half_side[i], factor, torch.zeros_like(height[i, :1]))
                weight = torch.exp(-0.5 * (height[i] / self.config.outline_reach) ** 2)[:, None, None]
                level = torch.maximum(level + weight * (outline - flat), outline)
            stack = plane_distances(without_specks((level < 0).cpu()))
            if outline is not None:  # distances are smoothed a little, and could step over it again
                stack = torch.maximum(stack, outline.cpu())
            mask = without_specks(stack < 0)
            stack[(stack < 0) & ~mask] = 0.5
            rejects.append(why_rejected(mask, float(mask.sum()) * float(scale[i]) ** 2, self.config.volume_range))
            stacks.append(stack)
        sdf = torch.stack(stacks) if stacks else torch.zeros(0, self.config.num_slices, size, size)
        return Slices(sdf=sdf.to(device), brightness=surface.brightness, scale=scale), rejects

    def heights(self, offset: Tensor) -> Tensor:
        """Where the planes lie above z = 0, in planes, float32 [B, S]."""
        count = self.config.num_slices
        return torch.arange(count, device=offset.device) - (count - 1) / 2 + offset[:, None]

    def scale_of(self, surface: Surface) -> Tensor:
        """Image pixels per crop pixel with which each cell keeps the margin, float32 [B]."""
        size = surface.sdf.shape[-1]
        axis = ((torch.arange(size, device=surface.sdf.device) + 0.5) / size * 2 - 1).abs()
        distance = torch.hypot(axis[:, None], axis[None])
        farthest = torch.where(surface.mask.any(1), distance, 0.0).amax((1, 2)) + 1 / size
        return (farthest * surface.half_side / (self.config.crop_size / 2 - self.config.margin)).clamp_min(
            self.config.least_scale
        )

    def _sections(self, sdf: Tensor, half_side: Tensor, factor: Tensor, height: Tensor) -> Tensor:
        """Signed distance [S, H, W] of one surface at the crop's pixels in the planes of `height`, crop pixels."""
        size = self.config.crop_size
        pixel = (torch.arange(size, device=sdf.device) - (size - 1) / 2) * factor
        z = bulged(height * self.config.z_spacing / (self.config.stretch * half_side), sdf, self.config.bulge)
        where = torch.stack(torch.meshgrid(z, pixel, pixel, indexing="ij"), -1)
        value = functional.grid_sample(
            sdf[None, None], where.flip(-1)[None], padding_mode="border", align_corners=False
        )[0, 0]
        voxel = 2 / sdf.shape[-1]
        beyond = (where.abs() - (1 - voxel / 2)).clamp_min(0).norm(dim=-1) / voxel
        return (value + beyond) * (voxel / factor)


def bulged(z: Tensor, sdf: Tensor, bulge: float) -> Tensor:
    """The heights at which a surface `sdf` [D, H, W] is cut instead of at `z` [S], see `SlicingConfig.bulge`; half sides."""
    if bulge == 1:
        return z
    inside = (sdf < 0).flatten(1).any(1).nonzero()[:, 0]
    if not len(inside):
        return z
    below, above = 1 - 2 * inside[0] / len(sdf), 2 * (inside[-1] + 1) / len(sdf) - 1
    end = torch.where(z < 0, below, above).clamp_min(1 / len(sdf)).to(z)
    share = z.abs() / end
    return z.sign() * end * torch.where(share < 1, share**bulge, share)


def plane_distances(mask: Tensor) -> Tensor:
    """Signed distance within each plane of bool [S, H, W], crop pixels; an empty plane is a crop's side away."""
    sdf = torch.full(mask.shape, float(mask.shape[-1]))
    some = mask.flatten(1).any(1)
    if some.any():
        sdf[some] = view_distance(mask[some])
    return sdf


def without_specks(mask: Tensor) -> Tensor:
    """The largest part of bool [S, H, W] alone, where the others together have less than `SPECK` of the voxels."""
    parts, count = ndimage.label(mask.numpy())
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())[1:]
    largest = torch.from_numpy(parts == sizes.argmax() + 1)
    return largest if sizes.sum() - sizes.max() < SPECK * sizes.sum() else mask


def why_rejected(mask: Tensor, volume: float, volume_range: tuple[float, float]) -> str | None:
    """What is wrong with a cut cell, or None.

    Args:
        mask: bool [S, H, W]; it has to be one part (face to face) without cavities, clear of the crop's faces.
        volume: In voxels of the data.
        volume_range: Least and largest volume; (0, 0) lets all pass.
    """
    inside = mask.numpy()
    if not inside.any():
        return "empty"
    faces = [inside[0], inside[-1], inside[:, 0], inside[:, -1], inside[:, :, 0], inside[:, :, -1]]
    if any(face.any() for face in faces):
        return "over the volume's edge"
    if ndimage.label(inside)[1] > 1:
        return "several parts"
    if ndimage.label(~inside, structure=np.ones((3, 3, 3)))[1] > 1:
        return "hollow"
    if volume_range[1] > 0 and not volume_range[0] <= volume <= volume_range[1]:
        return "volume outside the real range"
    return None
