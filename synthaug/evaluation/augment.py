"""The usual augmentation of segmenters, for a whole batch at once and on whatever device it lies.

Frames and volumes go the same way: a volume is turned, zoomed and shifted in plane, all of its planes alike, and flipped
along z. Where the result reaches beyond the sample, it weighs nothing in the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from synthaug.errors import InputError
from synthaug.evaluation.targets import frame_targets, loss_weights, volume_targets
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED

PERCENTILES = (0.01, 0.998)
"""Grey values that become 0 and 1; the range of `segmenter.normalise`."""

MOST_VALUES = 16_384
"""Pixels of a sample by which its percentiles are estimated."""


@dataclass(frozen=True)
class AugmentConfig:
    """How much a training sample is changed.

    Attributes:
        size: (Y, X) of what is cut out of every sample, at a random place.
        rotation: Largest angle either way, radians; pi turns a sample anywhere.
        zoom: Largest factor of size, either way.
        contrast: Largest factor of contrast, either way.
        offset: Largest shift of grey values, in units of the normalised image.
        gamma: Largest exponent, either way.
        noise: Largest standard deviation of white noise, in the same units.
        blur: Largest standard deviation of a Gaussian blur, pixels; every second sample is blurred.
    """

    size: tuple[int, int]
    rotation: float = math.pi
    zoom: float = 1.4
    contrast: float = 1.3
    offset: float = 0.05
    gamma: float = 1.33
    noise: float = 0.05
    blur: float = 1.0


def normalise_batch(image: Tensor) -> Tensor:
    """Every sample with its 1st percentile at 0 and its 99.8th at 1, in [-1, 4]; all 0 where the two are equal.

    Args:
        image: float32 [B, 1, (Z,) Y, X], any scale.
    """
    flat = image.flatten(1)
    some = flat[:, :: max(flat.shape[1] // MOST_VALUES, 1)]
    low, high = torch.quantile(some, torch.tensor(PERCENTILES, device=image.device), dim=1)
    span = high - low
    flat = (flat - low[:, None]) / torch.where(span > 0, span, torch.inf)[:, None]
    # Bounded, because a crossing fibre or a hot pixel can be many times brighter than the cells.
    return flat.clamp(-1, 4).view_as(image)


def training_batch(image: Tensor, label: Tensor, config: AugmentConfig, key: SampleKey) -> dict[str, Tensor]:
    """Normalised, augmented, with target and weight: what `train_segmenter` takes.

    Args:
        image: float32 [B, 1, (Z,) Y, X] in camera counts.
        label: int32 of the same shape, planes of volumes may be `UNLABELLED`.
        config: See `AugmentConfig`.
        key: Decides the augmentation.

    Returns:
        image float32 [B, 1, (Z,) *size], target int64 and weight float32 [B, (Z,) *size].
    """
    if (
        image.shape != label.shape
        or image.ndim not in (4, 5)
        or any(n > m for n, m in zip(config.size, image.shape[-2:]))
    ):
        raise InputError(
            "image, label",
            expected=f"[B, 1, (Z,) Y, X] of one shape, at least {config.size}",
            got=f"{tuple(image.shape)} and {tuple(label.shape)}",
        )
    rng = key.numpy()
    num, device = len(image), image.device
    image = normalise_batch(image)

    def spread(factor: float, count: int = num) -> Tensor:
        """Factors between 1 / `factor` and `factor`."""
        return torch.from_numpy(factor ** rng.uniform(-1, 1, count)).float()

    def column(values: Tensor) -> Tensor:
        return values.to(device).view(num, *[1] * (image.ndim - 1))

    grid = _grid(rng.uniform(-1, 1, (num, 3)), spread(config.zoom), rng.integers(2, size=num) * 2 - 1, image, config)
    planes = image.flatten(1, -3), label.flatten(1, -3).float()
    grey = F.grid_sample(planes[0], grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    # Shifted by one, so that what lies beyond the sample, which is filled with 0, differs from background.
    ids = F.grid_sample(planes[1] - UNLABELLED + 1, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    beyond = ids == 0
    ids = (ids.round().int() + UNLABELLED - 1).masked_fill(beyond, 0)
    shape = (num, 1, *image.shape[2:-2], *config.size)
    grey, ids, beyond = grey.view(shape), ids.view(shape), beyond.view(shape)
    if image.ndim == 5:
        turned = torch.from_numpy(rng.integers(2, size=num).astype(bool)).to(device)[:, None, None, None, None]
        grey, ids, beyond = (torch.where(turned, x.flip(2), x) for x in (grey, ids, beyond))
    grey = torch.sign(grey) * grey.abs() ** column(spread(config.gamma)) * column(spread(config.contrast))
    grey = grey + column(torch.from_numpy(rng.uniform(-config.offset, config.offset, num)).float())
    sigma = torch.from_numpy(rng.uniform(0, config.blur, num) * rng.integers(2, size=num)).float()
    grey = _blur(grey, sigma.to(device))
    noise = torch.from_numpy(rng.standard_normal(grey.shape, dtype=np.float32)).to(device)
    grey = grey + column(torch.from_numpy(rng.uniform(0, config.noise, num)).float()) * noise
    ids = ids[:, 0]
    target = frame_targets(ids) if ids.ndim == 3 else volume_targets(ids)
    return {"image": grey, "target": target, "weight": loss_weights(ids) * ~beyond[:, 0]}


def _grid(draws: object, zoom: Tensor, flip: object, image: Tensor, config: AugmentConfig) -> Tensor:
    """Where each pixel of the result is read, float32 [B, *size, 2] in the units of `grid_sample`.

    Args:
        draws: float64 [B, 3] in [-1, 1]: angle and place.
        zoom: float32 [B].
        flip: int64 [B], -1 mirrors.
    """
    height, width = image.shape[-2:]
    angle, down, right = torch.as_tensor(draws).float().T
    angle = angle * config.rotation
    # Half sides of the result and of the sample, in pixels of the sample.
    sides = [n / 2 for n in config.size]
    free = [(n - m) / 2 for n, m in zip((height, width), config.size)]
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    x_flip = torch.as_tensor(flip).float()
    theta = torch.zeros(len(angle), 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cosine * x_flip * sides[1] / (width / 2), -sine * sides[0] / (width / 2)
    theta[:, 1, 0], theta[:, 1, 1] = sine * x_flip * sides[1] / (height / 2), cosine * sides[0] / (height / 2)
    theta[:, 0, 2], theta[:, 1, 2] = right * free[1] / (width / 2), down * free[0] / (height / 2)
    size = [len(angle), 1, *config.size]
    return F.affine_grid(theta, size, align_corners=False).to(image.device)


def _blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Each sample of [B, 1, (Z,) Y, X] under its own Gaussian in plane; 0 leaves it as it is."""
    radius = max(math.ceil(3 * float(sigma.max())), 1)
    offset = torch.arange(-radius, radius + 1, device=image.device)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    planes = image.flatten(1, -3)
    num, depth = planes.shape[:2]
    planes = planes.transpose(0, 1)  # a plane of all samples is one image of as many channels
    for axes in ((1, -1), (-1, 1)):
        weight = kernel.view(num, 1, *axes)
        pad = [radius if side == -1 else 0 for side in (axes[1], axes[1], axes[0], axes[0])]
        planes = F.conv2d(F.pad(planes, pad, mode="reflect"), weight, groups=num)
    assert len(planes) == depth
    return planes.transpose(0, 1).reshape(image.shape)
