"""Mottled cells: chromatin in clumps, dark nucleoli, vacuoles, beyond what a few annotated cells show.

Networks that know the grain of one kind of nucleus alone cut others in two along their blotches. So some cells are multiplied
by a random field, bright clumps or dark holes of all sizes and strengths; their outlines stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from synthaug.randomness import SampleKey, log_between

SIZE = (1.0, 6.0)
"""Standard deviation of the blur that makes the field, crop pixels, evenly on a logarithmic scale."""

STRENGTH = (0.08, 0.5)
"""Standard deviation of the logarithm of the factors, evenly on a logarithmic scale."""

EDGE = 1.0
"""Crop pixels within which it ends at the outline."""


def draw_mottle(keys: Sequence[SampleKey], side: int, rate: float) -> Tensor:
    """Logarithms of the factors, float32 [B, side, side]; all 0 where a cell stays as it is, the others share a variance.

    Row i depends on `keys[i]` alone.

    Args:
        keys: One a cell.
        side: Of a crop, pixels.
        rate: Share of the cells that are mottled.
    """
    fields = torch.zeros(len(keys), side, side)
    for row, key in zip(fields, keys):
        random = key.child("mottle").numpy()
        if random.random() >= rate:
            continue
        sigma, strength = (log_between(ends, random.random()) for ends in (SIZE, STRENGTH))
        sign = 1.0 if random.random() < 0.5 else -1.0
        field = ndimage.gaussian_filter(random.standard_normal((side, side)), sigma, mode="wrap")
        # Analytically: the standard deviation of one small field would be that of a few blotches.
        row[:] = torch.from_numpy((sign * strength * 2 * math.sqrt(math.pi) * sigma * field).astype(np.float32))
    return fields


def mottled(image: Tensor, sdf: Tensor, field: Tensor) -> Tensor:
    """Light [B, S, S] of cells with outlines `sdf` [B, S, S], multiplied by exp(`field`) inside; not normalised."""
    return image * (field * torch.sigmoid(-sdf / EDGE)).exp()
