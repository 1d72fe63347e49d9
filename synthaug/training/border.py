"""Where a cell's light ends, compared with its outline, and how softly: set by measuring, not by training.

Some annotators draw outlines wide, others tight, and microscopes differ in sharpness. Minutes of training on a few cells move
neither: outlines adapted from crisp images stayed crisp, and a segmenter trained on such cells draws all outlines too narrow.
Two numbers of the texture stage, `TextureConfig.outline_shift` and `blur`, do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from synthaug.datasets.crops import CropSet
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
    return _profile(image.cpu().numpy(), _rings(sdf.cpu().numpy()))


def _rings(sdf: np.ndarray) -> np.ndarray:
    """Weights float32 [N, 12, S * S] that give the mean at each distance; all 0 where a cell has no pixel there."""
    near = np.stack([(sdf > d - 0.5) & (sdf <= d + 0.5) for d in DISTANCES], 1).reshape(len(sdf), len(DISTANCES), -1)
    return (near / np.maximum(near.sum(2, keepdims=True), 1)).astype(np.float32)


def _profile(image: np.ndarray, rings: np.ndarray) -> np.ndarray:
    means = (rings @ image.reshape(len(image), -1, 1))[..., 0]
    there = rings.max(2) > 0
    return np.array([np.median(m[t]) if t.any() else np.nan for m, t in zip(means.T, there.T)], np.float64)


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
    rings, inside = _rings(some.sdf.cpu().numpy()), (some.sdf < 0).cpu().numpy()
    real = _profile(some.image.cpu().numpy(), rings)
    plain, profiles = stage.config, np.zeros((len(SHIFTS), len(BLURS), len(real)))
    try:
        for i, shift in enumerate(SHIFTS):
            stage.config = replace(plain, outline_shift=shift, blur=0.0)
            painted = stage(masks, noise).image[:, 0].cpu().numpy()
            for j, blur in enumerate(BLURS):
                # As `gaussian_blur` does it, ten times as fast.
                image = ndimage.gaussian_filter(painted, (0, blur, blur), truncate=3)
                mean = image.mean((1, 2), where=inside)
                profiles[i, j] = _profile(image / mean[:, None, None], rings)
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
