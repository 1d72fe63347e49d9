"""Do texture and label agree? A cell thresholded by its own brightness has to give its mask back."""

from __future__ import annotations

import torch
from torch import Tensor

from synthaug.errors import InputError


def mask_agreement(image: Tensor, sdf: Tensor) -> Tensor:
    """IoU of each cell's mask with the cell thresholded at half of its mean light.

    Real crops do not reach 1 either: annotators draw outlines outside of half the maximum, and chromatin has holes. So
    give generated and real crops of one data set, and compare.

    Args:
        image: float32 [N, (Z,) Y, X], light of single cells: 0 in the background, mean 1 inside the mask. A stack counts
            as a whole: its planes beyond the cell matter only where they are bright.
        sdf: float32 of the same shape, negative inside.

    Returns:
        float32 [N] in [0, 1].

    Raises:
        InputError: If the shapes differ or there is no cell.
    """
    if image.shape != sdf.shape or image.ndim not in (3, 4) or not len(image):
        got = f"{tuple(image.shape)}, {tuple(sdf.shape)}"
        raise InputError("image and sdf", expected="one shape [N, (Z,) Y, X], N >= 1", got=got)
    mask, bright = sdf < 0, image > 0.5
    both = (mask & bright).flatten(1).sum(1)
    either = (mask | bright).flatten(1).sum(1)
    return both / either.clamp_min(1).to(torch.float32)
