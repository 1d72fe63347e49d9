"""Dim light around cells that nobody annotated: the cytoplasm's own, with edges, patches and rings around vacuoles.

A segmenter that knows no light beside that of nuclei but a smooth haze takes every edge for the outline of a dim nucleus. A
frame or two of annotations hardly show it, so it comes in some of the frames, in all strengths and shapes: level sets of a
random field, near the cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from synthaug.generators.camera import random_texture, texture_grid, wide_blur
from synthaug.generators.stage import Noise
from synthaug.randomness import SampleKey, normal, uniform

NEAR = 2.0
"""Widths of the field within which it lies around cells (standard deviation of a Gaussian)."""

FULL = 0.25
"""Blurred share of cells from which on the light is not dimmed."""

CONTRAST = (0.03, 0.3)
"""Over that of the frame's median cell, drawn evenly on a logarithmic scale."""

THRESHOLD = (-0.6, 1.0)
"""Level of the field, in standard deviations, above which patches lie and along which rings run."""

SOFTNESS = (0.08, 0.48)
"""Width of the edges, in standard deviations of the field."""

PATCHES = 0.6
"""Share of the frames in which it comes in patches; in the others as rings."""


def draw_cytoplasm(keys: Sequence[SampleKey], size: Sequence[int], width: float) -> Noise:
    """The random numbers of `cytoplasm_light`: `cytoplasm` uniform [B, 5]; `cytoplasm_field` normal, on a coarse grid."""
    grid = texture_grid((size[0], size[1]), width)
    return {
        "cytoplasm": uniform([k.child("cytoplasm") for k in keys], (5,)),
        "cytoplasm_field": normal([k.child("cytoplasm", "field") for k in keys], (1, *grid)),
    }


def cytoplasm_light(labels: Tensor, noise: Noise, rate: float, width: float) -> Tensor:
    """That light, under the cells as well as beside them; float32 [B, 1, Y, X], 1 = the contrast of the frame's median cell.

    Args:
        labels: int32 [B, 1, Y, X], 0 = background.
        noise: From `draw_cytoplasm` for the same size and width.
        rate: Share of the frames that have it; in the others all is 0.
        width: Of the blur that makes the random field, pixels.
    """
    shown, contrast, threshold, softness, kind = noise["cytoplasm"][:, :, None, None, None].unbind(1)
    if not bool((shown < rate).any()):
        return torch.zeros(labels.shape, device=labels.device)
    near = (wide_blur((labels > 0).float(), NEAR * width) / FULL).clamp(max=1)
    field = random_texture(noise["cytoplasm_field"], (labels.shape[2], labels.shape[3]), width)
    distance = (field - _between(THRESHOLD, threshold)) / _between(SOFTNESS, softness)
    shape = torch.where(kind < PATCHES, torch.sigmoid(2 * distance), (-distance.square()).exp())
    strength = _between((math.log(CONTRAST[0]), math.log(CONTRAST[1])), contrast).exp()
    return torch.where(shown < rate, strength * shape * near, torch.zeros_like(near))


def _between(ends: tuple[float, float], share: Tensor) -> Tensor:
    return ends[0] + (ends[1] - ends[0]) * share
