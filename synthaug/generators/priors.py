"""Random shapes as stand-ins for learned ones, fitted to the same 2D outlines: the ablations of the paper's argument.

In 3D a prior replaces the views and the surface, in 2D the outlines of MaskDDPM; size and brightness stay those of the
drawn masks. What a prior has in parameters is fitted by simulated moments (McFadden 1989): shapes are drawn, seen along
the optical axis at the size of the real outlines, and measured as these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from skimage.measure import regionprops
from torch import Tensor
from torch.nn import functional

from synthaug.errors import InputError
from synthaug.generators.cameras import VIEW_RADIUS
from synthaug.generators.shapes import (
    KINDS,
    ShapeConfig,
    ShapeKind,
    StarShapes,
    draw_star_shapes,
    frame_by_outline,
    frame_by_volume,
    view_distance,
    voxelise,
)
from synthaug.generators.stage import Noise, Stage
from synthaug.randomness import SampleKey
from synthaug.types import CellMasks, Surface

NUM_SIMULATED = 256
"""Shapes drawn to measure one setting of a prior: their mean elongation is uncertain by 5 %."""

FIT_GRID = 24
"""Voxels on a side for those shapes."""


@dataclass(frozen=True)
class PriorConfig(ShapeConfig):
    """A distribution of shapes, and how they are stored.

    Attributes:
        grid_size: Voxels on a side of the surfaces.
        margin: Pixels kept free between an outline's enclosing circle and the crop's edge, as for masks.
    """

    grid_size: int = 64
    margin: float = 5.0


class ShapePrior(Stage):
    """Shapes of a `PriorConfig` with the sizes and brightness of given masks. Has no weights."""

    config_class = PriorConfig
    config: PriorConfig

    def draw(self, keys: Sequence[SampleKey]) -> Noise:
        """The shapes themselves, as radial functions (see `StarShapes`)."""
        shapes = frame_by_outline(draw_star_shapes([k.child("shape") for k in keys], self.config))
        return {"radii": shapes.radii, "origin": shapes.origin, "scale": shapes.scale}

    @torch.no_grad()
    def forward(self, masks: CellMasks, noise: Noise) -> Surface:
        """Surfaces whose view along the optical axis has the area of each mask; in place of views and surface."""
        sdf = self._voxels(noise)
        half_side = _half_side(sdf.amin(1), masks).to(masks.sdf.device)
        return Surface(sdf=sdf.to(masks.sdf.device), half_side=half_side, brightness=masks.brightness)

    @torch.no_grad()
    def outlines(self, masks: CellMasks, noise: Noise) -> CellMasks:
        """Views along the optical axis with the area of each mask; in place of MaskDDPM's outlines."""
        size, device = masks.sdf.shape[-1], masks.sdf.device
        seen = self._voxels(noise).amin(1)
        half_side = _half_side(seen, masks)
        needed = VIEW_RADIUS * half_side / (size / 2 - self.config.margin)
        scale = torch.maximum(needed, masks.scale.cpu().clamp_max(1.0))  # no coarser than the mask, if it fits
        sdf = view_distance(_on_crops(seen, half_side / scale, size))
        return CellMasks(sdf=sdf.to(device), brightness=masks.brightness, scale=scale.to(device))

    def _voxels(self, noise: Noise) -> Tensor:
        shapes = StarShapes(noise["radii"].cpu(), noise["origin"].cpu(), noise["scale"].cpu())
        return voxelise(shapes, self.config.grid_size)

    @classmethod
    def fit(cls, masks: Tensor, kind: ShapeKind) -> Self:
        """The prior of a kind whose views look most like `masks`, bool [N, S, S], one outline in each.

        Fitted: of ellipsoids the spread of the axes, to the outlines' mean elongation; of Bézier shapes the bend, to
        their mean concavity, and the spread; of spherical harmonics the power law, to the ratio of the contours' powers at
        periods 3 to 6 to that at period 2, and the amplitude, to the latter. By bisection, in 3 to 16 seconds.
        """
        if masks.ndim != 3 or masks.dtype != torch.bool or not len(masks) or not bool(masks.flatten(1).any(1).all()):
            raise InputError(
                "masks", expected="bool [N, S, S] with an outline in each", got=f"{masks.dtype} {tuple(masks.shape)}"
            )
        if kind not in KINDS:
            raise InputError("kind", expected=f"one of {KINDS}", got=repr(kind))
        config = PriorConfig(kind)
        row = torch.linspace(0, len(masks) - 1, NUM_SIMULATED).round().long()
        radius = (masks.flatten(1).sum(1) / math.pi).sqrt()[row]
        for _ in range(len(_MOMENTS[kind])):  # a moment depends a little on the other parameter
            for parameter, measure, low, high in _MOMENTS[kind]:
                target = measure(masks)
                for _ in range(9):
                    trial = _with(config, parameter, (low + high) / 2)
                    more = measure(_simulate(trial, radius, masks.shape[-1])) < target
                    low, high = ((low + high) / 2, high) if more else (low, (low + high) / 2)
                config = _with(config, parameter, (low + high) / 2)
        return cls(config)


def _with(config: PriorConfig, parameter: str, value: float) -> PriorConfig:
    changes: dict[str, Any] = {parameter: value}
    return replace(config, **changes)


def _half_side(seen: Tensor, masks: CellMasks) -> Tensor:
    """Image pixels from the centre to the cube's side that give the views [B, D, D] the area of the masks, [B]."""
    share = (seen < 0).flatten(1).float().mean(1) * 4
    # Rejected masks pass through the stages with the others of their block, empty ones too.
    area = masks.mask.flatten(1).sum(1).clamp_min(1) * masks.scale**2
    return (area.cpu() / share).sqrt()


def _on_crops(seen: Tensor, half_side: Tensor, size: int) -> Tensor:
    """Views [B, D, D] as bool [B, size, size], with `half_side` [B] in pixels."""
    axis = torch.arange(size) - (size - 1) / 2
    where = torch.stack(torch.meshgrid(axis, axis, indexing="ij")[::-1], -1) / half_side[:, None, None, None]
    level = functional.grid_sample(seen[:, None], where, mode="bicubic", padding_mode="border", align_corners=False)
    return level[:, 0] < 0


def _simulate(config: PriorConfig, radius: Tensor, size: int) -> Tensor:
    """Views of as many shapes as `radius` [N] has entries, of these equivalent radii in pixels, bool [N, size, size]."""
    shapes = draw_star_shapes([SampleKey(0, ("prior", i)) for i in range(len(radius))], config)
    shapes = frame_by_volume(shapes, torch.full_like(radius, 0.5))
    seen = voxelise(shapes, FIT_GRID).amin(1)
    share = (seen < 0).flatten(1).float().mean(1) * 4
    return _on_crops(seen, radius * math.sqrt(math.pi) / share.sqrt(), size)


def elongation(masks: Tensor) -> float:
    """Mean log ratio of the principal axes of outlines, bool [N, S, S]."""
    ratios = [(r.axis_major_length + 1) / (r.axis_minor_length + 1) for r in _regions(masks)]
    return math.fsum(math.log(r) for r in ratios) / len(ratios)


def concavity(masks: Tensor) -> float:
    """Mean share of the convex hull that outlines leave empty, bool [N, S, S]."""
    return math.fsum(1 - r.solidity for r in _regions(masks)) / len(masks)


def _regions(masks: Tensor) -> list[Any]:
    return [regionprops(mask.astype(np.uint8))[0] for mask in masks.numpy()]


def contour_power(masks: Tensor, periods: Sequence[int]) -> float:
    """Mean power of the relative radial function about the centroid at these periods, bool [N, S, S].

    Moments r^2 exp(i m angle) over the pixels of an outline: to first order twice the Fourier coefficients of its relative
    radius, without tracing a contour. Without r^2 the few pixels at the centroid would bring in the lattice.
    """
    axis = torch.arange(masks.shape[-1], dtype=torch.float32)
    share = masks / masks.flatten(1).sum(1)[:, None, None]
    y = axis[:, None] - (share.sum(2) * axis).sum(1)[:, None, None]
    x = axis - (share.sum(1) * axis).sum(1)[:, None, None]
    weight = share * (y**2 + x**2)
    weight = weight / weight.flatten(1).sum(1).clamp_min(1e-9)[:, None, None]
    angle = torch.atan2(y, x)
    waves = [torch.polar(weight, m * angle).sum((1, 2)).abs().square().mean() / 4 for m in periods]
    return float(torch.stack(waves).sum())


_MOMENTS: dict[ShapeKind, tuple[tuple[str, Callable[[Tensor], float], float, float], ...]] = {
    "ellipsoid": (("spread", elongation, 0.0, 0.7),),
    "bezier": (("bend", concavity, 0.0, 0.5), ("spread", elongation, 0.0, 0.7)),
    "spherical-harmonics": (
        ("power", lambda masks: contour_power(masks, (3, 4, 5, 6)) / contour_power(masks, (2,)), -9.0, -1.0),
        ("amplitude", lambda masks: contour_power(masks, (2,)), 0.0, 2.0),
    ),
}
"""Of each kind: parameter, the moment that grows with it, least and largest value.

What shows most, how long the outlines are, is fitted last: it depends on the other parameter too.
"""
