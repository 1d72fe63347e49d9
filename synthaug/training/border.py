"""Where a cell's light ends, compared with its outline, and how softly: set by measuring, not by training.

Some annotators draw outlines wide, others tight, and microscopes differ in sharpness. Minutes of training on a few cells move
neither: outlines adapted from crisp images stayed crisp, and a segmenter trained on such cells draws all outlines too narrow.
Two numbers of the texture stage, `TextureConfig.outline_shift` and `blur`, do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from synthaug.datasets.crops import CropSet
from synthaug.generators.camera import gaussian_blur
from synthaug.generators.texture import TextureDiffusion
from synthaug.randomness import SampleKey
from synthaug.types import CellMasks

DISTANCES = range(-6, 6)
"""Whole pixels from the outline at which light is compared, negative inside; beyond them it is faded out."""

SHIFTS = (-3.0, -1.5, 0.0, 1.5, 3.0)
"""Values of `outline_shift` at which cells are painted; those between are interpolated."""

BLURS = tuple(0.25 * i for i in range(21))

STEP = 0.25
"""Of the shift."""

MOST_CROPS = 32

RELUCTANCE = 2e-4
"""Squared error of the profile that a pixel of shift or blur has to save."""


@dataclass(frozen=True)
class BorderFit:
    """What `fit_border` found.

    Attributes:
        outline_shift, blur: For `TextureConfig`.
        real, before, after: float64 [12] each, light at `DISTANCES` over the mean inside.
    """

    outline_shift: float
    blur: float
    real: np.ndarray
    before: np.ndarray
    after: np.ndarray


def border_profile(image: Tensor, sdf: Tensor) -> np.ndarray:
    """Light at `DISTANCES` from the outline, median over cells of each cell's mean; float64 [12].

    Args:
        image: float32 [N, S, S], mean 1 inside.
        sdf: float32 [N, S, S].
    """
    rows = []
    for d in DISTANCES:
        near = (sdf > d - 0.5) & (sdf <= d + 0.5)
        num = near.flatten(1).sum(1)
        mean = (image * near).flatten(1).sum(1) / num.clamp_min(1)
        rows.append(float(mean[num > 0].median()) if bool((num > 0).any()) else np.nan)
    return np.asarray(rows)


@torch.no_grad()
def fit_border(stage: TextureDiffusion, crops: CropSet, seed: int) -> BorderFit:
    """The shift and blur at which painted cells have the border of the real ones they take the outlines of.

    Args:
        stage: Trained; its own shift and blur are not used.
        crops: Real cells, on the stage's device.
        seed: Of the noise and of the cells looked at.
    """
    order = torch.randperm(len(crops), generator=SampleKey(seed, ("border",)).generator())[:MOST_CROPS]
    some = crops.select(order)
    masks = CellMasks(sdf=some.sdf, brightness=some.brightness, scale=some.scale)
    noise = stage.draw([SampleKey(seed, ("border", i)) for i in range(len(some))])
    real = border_profile(some.image, some.sdf)
    plain, profiles = stage.config, np.zeros((len(SHIFTS), len(BLURS), len(real)))
    inside = some.sdf < 0
    try:
        for i, shift in enumerate(SHIFTS):
            stage.config = replace(plain, outline_shift=shift, blur=0.0)
            painted = stage(masks, noise).image
            for j, blur in enumerate(BLURS):
                image = gaussian_blur(painted, blur)[:, 0] if blur else painted[:, 0]
                mean = (image * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
                profiles[i, j] = border_profile(image / mean[:, None, None], some.sdf)
    finally:
        stage.config = plain
    found = []
    for shift in np.arange(SHIFTS[0], SHIFTS[-1] + STEP / 2, STEP):
        low = min(int(np.searchsorted(SHIFTS, shift, side="right")) - 1, len(SHIFTS) - 2)
        share = shift - SHIFTS[low]
        between = (1 - share) * profiles[low] + share * profiles[low + 1]
        for blur, profile in zip(BLURS, between):
            error = float(np.nanmean((profile - real) ** 2)) + RELUCTANCE * (abs(shift) + blur)
            found.append((error, float(shift), blur, profile))
    _, shift, blur, after = min(found, key=lambda f: f[0])
    return BorderFit(shift, blur, real, profiles[SHIFTS.index(0.0), 0], after)
