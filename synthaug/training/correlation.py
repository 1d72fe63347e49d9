"""How alike neighbouring planes of one cell are, and the strength of eq. 2 (paper) that makes synthetic ones as alike.

Planes of real stacks are alike, also because the microscope blurs along z; noise of the camera hides it. That differs from
pixel to pixel, so that covariances at a lag of one pixel do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from synthaug.errors import InputError
from synthaug.generators.distance import signed_distance
from synthaug.generators.frame_fit import cell_contrasts, spaced
from synthaug.generators.texture import TextureDiffusion, slice_correlation
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED, Slices

Patch = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""Light [3, S, S] of the planes before, at and behind an annotated outline, over the local background, and its mask [S, S]."""

MARGIN = 3
"""Pixels from an outline within which light tells of the border, not of the texture."""

TREND = 4.0
"""Width in pixels of the blur that tells a cell's smooth course from its texture."""

MIN_PIXELS = 40
"""Pixels left inside below which a cell tells nothing."""

SHARES = (0.0, 0.25, 0.5, 0.75, 0.95, 0.99)
"""Correlations of the latent noise of two planes at which synthetic textures are measured: rho^2 / (1 + rho^2)."""

SIGMAS = np.linspace(0, 4, 41)
"""Blurs of the unique noise over slices that are tried."""


@dataclass(frozen=True)
class PlaneStatistics:
    """Texture of planes of stacks, without camera noise.

    Attributes:
        contrast: Standard deviation over mean inside cells, from the covariance at a lag of one pixel.
        correlation: Between planes one and two apart, at the same lag; an estimate may exceed 1.
        num_cells: Cells it was read from.
    """

    contrast: float
    correlation: tuple[float, float]
    num_cells: int


@dataclass(frozen=True)
class RhoFit:
    """What `fit_rho` found.

    Attributes:
        rho: Strength of the common noise, eq. 2, for `TextureConfig.rho`.
        slice_sigma: Blur of the unique noise over slices, for `TextureConfig.slice_sigma`.
        real, synthetic, independent: Real planes; synthetic ones so made; synthetic ones with independent noise.
    """

    rho: float
    slice_sigma: float
    real: PlaneStatistics
    synthetic: PlaneStatistics
    independent: PlaneStatistics


def extract_patches(
    volumes: Sequence[tuple[NDArray[np.float32], NDArray[np.int32]]], size: int, *, most: int = 400
) -> list[Patch]:
    """Annotated outlines with the planes before and behind.

    Args:
        volumes: (image [Z, Y, X] in counts, labels [Z, Y, X], planes nobody annotated `UNLABELLED`).
        size: Side of the patches, pixels; larger outlines are left out.
        most: Outlines taken in all, evenly from all there are.

    Returns:
        Patches in the order of volumes and planes.
    """
    found = []
    for index, (image, labels) in enumerate(volumes):
        for z in range(1, len(labels) - 1):
            if (labels[z] == UNLABELLED).any():
                continue
            for label, box in enumerate(ndimage.find_objects(labels[z]), start=1):
                if box is None or max(s.stop - s.start for s in box) > size:
                    continue
                centre = [(s.start + s.stop) // 2 for s in box]
                corner = [c - size // 2 for c in centre]
                if min(corner) >= 0 and all(c + size <= n for c, n in zip(corner, image.shape[1:])):
                    found.append((index, z, label, corner))
    found = spaced(found, most)
    local: dict[tuple[int, int], NDArray[np.float32]] = {}
    patches = []
    for index, z, label, corner in found:
        image, labels = volumes[index]
        if (index, z) not in local:
            local[index, z] = cell_contrasts(image[z], labels[z])[1]
        window = tuple(slice(c, c + size) for c in corner)
        light = image[z - 1 : z + 2, *window].astype(np.float32) - local[index, z][label - 1]
        patches.append((light, labels[z][window] == label))
    return patches


def _detrended(light: NDArray[np.floating], core: NDArray[np.bool_]) -> NDArray[np.float64] | None:
    """What differs from the smooth course of the light inside a cell, over its mean; None in the dark."""
    mean = float(light[core].mean())
    if mean <= 0:
        return None
    weight = np.maximum(ndimage.gaussian_filter(core.astype(np.float64), TREND), 1e-6)
    trend = ndimage.gaussian_filter(np.where(core, light, 0.0).astype(np.float64), TREND) / weight
    return np.where(core, (light - trend) / mean, 0.0)


def _noise_response(core: NDArray[np.bool_]) -> float:
    """Covariance of neighbouring pixels of white noise of unit variance after `_detrended`: its own part of the trend.

    Mean over the core of -2 G(1) / W + (G^2 * core) / W^2, with the trend's kernel G and W = G * core.
    """
    inside = core.astype(np.float64)
    weight = np.maximum(ndimage.gaussian_filter(inside, TREND), 1e-6)
    square = ndimage.gaussian_filter(inside, TREND / math.sqrt(2)) / (4 * math.pi * TREND**2)
    near = math.exp(-0.5 / TREND**2) / (2 * math.pi * TREND**2)
    return float((-2 * near / weight + square / weight**2)[core].mean())


def _lag_one(one: NDArray[np.float64], two: NDArray[np.float64], core: NDArray[np.bool_]) -> tuple[float, float]:
    """Sum of products of neighbouring pixels of two planes, in both orders, and their number."""
    total, pairs = 0.0, 0.0
    for axis in (0, 1):
        a, b = (
            (slice(None, -1), slice(1, None))
            if axis == 0
            else ((slice(None), slice(None, -1)), (slice(None), slice(1, None)))
        )
        both = core[a] & core[b]
        total += float((one[a] * two[b])[both].sum() + (two[a] * one[b])[both].sum())
        pairs += 2.0 * float(both.sum())
    return total, pairs


def plane_statistics(patches: Sequence[Patch]) -> PlaneStatistics:
    """Contrast and correlation of planes, pooled over cells.

    Planes in which the cell has less than half of its light are left out: there its end is seen, not its texture.

    Raises:
        InputError: no cell is large enough to tell.
    """
    sums = np.zeros((3, 2))
    cells = 0
    for planes, mask in patches:
        core = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] > MARGIN
        if core.sum() < MIN_PIXELS:
            continue
        response = _noise_response(core)
        rest = [_detrended(p, core) for p in planes]
        bright = [float(p[core].mean()) for p in planes]
        kept = [r if b > 0.5 * max(bright) else None for r, b in zip(rest, bright)]
        if kept[1] is None:
            continue
        cells += 1
        for i, one in enumerate(kept):
            for j in range(i, len(kept)):
                two = kept[j]
                if one is None or two is None:
                    continue
                total, pairs = _lag_one(one, two, core)
                if i == j:
                    noise = max(float((one[core] ** 2).mean()) - total / pairs, 0.0)
                    total -= pairs * noise * response
                sums[j - i] += (total, pairs)
    if sums[0, 1] == 0:
        raise InputError(
            "patches", expected=f"cells of {MIN_PIXELS} px or more inside", got=f"{len(patches)} too small"
        )
    covariance = sums[:, 0] / np.maximum(sums[:, 1], 1)
    within = max(float(covariance[0]), 1e-9)
    return PlaneStatistics(math.sqrt(within), (float(covariance[1]) / within, float(covariance[2]) / within), cells)


@torch.no_grad()
def synthetic_planes(
    texture: TextureDiffusion, masks: Sequence[NDArray[np.bool_]], *, rho: float, slice_sigma: float = 0.0, seed: int
) -> list[Patch]:
    """Three planes of cylinders over given outlines, textured at `rho`.

    Args:
        texture: Trained stage; its own rho, slice_sigma and axial profile are not used.
        masks: bool [S, S] each, in the middle of the crop.
        rho, slice_sigma: See `TextureConfig`.
        seed: Of the noise, the same for every rho.
    """
    plain = texture.config
    try:
        texture.config = replace(plain, rho=rho, slice_sigma=slice_sigma, axial_extent=1.0, axial_sigma=0.0)
        sdf = torch.from_numpy(np.stack([signed_distance(m) for m in masks])).to(texture.device)
        ones = torch.ones(len(masks), device=texture.device)
        slices = Slices(sdf=sdf[:, None].expand(-1, 3, -1, -1).contiguous(), brightness=ones, scale=ones)
        noise = texture.draw([SampleKey(seed, ("rho", i)) for i in range(len(masks))], 3)
        image = texture(slices, noise).image.cpu()
    finally:
        texture.config = plain
    return [(planes, np.asarray(mask)) for planes, mask in zip(image.numpy(), masks)]


def fit_rho(texture: TextureDiffusion, patches: Sequence[Patch], *, num_cells: int = 16, seed: int = 0) -> RhoFit:
    """The rho, and the blur of the unique noise over slices, at which synthetic planes are as alike as real ones.

    Real planes are the less alike the farther they are apart, more quickly than any rho can have it. How the correlation
    of images follows that of their noise is measured once; it does not matter where the noise has its correlation from.

    Args:
        texture: Trained stage.
        patches: Of real cells, from `extract_patches` at the stage's crop size.
        num_cells: Synthetic cells measured, with the largest of the real outlines.
        seed: Of their noise.

    Raises:
        InputError: no patches, or no cell in them is large enough.
    """
    size = texture.config.crop_size
    if not patches or any(mask.shape != (size, size) for _, mask in patches):
        got = sorted({mask.shape for _, mask in patches}) or "none"
        raise InputError("patches", expected=f"at least one, masks of {size} x {size}", got=got)
    real = plane_statistics(patches)
    masks = sorted((mask for _, mask in patches), key=lambda m: -int(m.sum()))[:num_cells]
    found = []
    for share in SHARES:
        rho = math.sqrt(share / (1 - share))
        found.append(plane_statistics(synthetic_planes(texture, masks, rho=rho, seed=seed)))
    rest: list[tuple[float, float, float]] = []
    for sigma in SIGMAS:
        for common in np.linspace(SHARES[0], SHARES[-1], 100):
            error = 0.0
            for apart in (1, 2):
                share = common + (1 - common) * slice_correlation(sigma, apart)
                made = np.interp(share, SHARES, [s.correlation[apart - 1] for s in found])
                error += float(made - min(real.correlation[apart - 1], 1.0)) ** 2
            rest.append((error, float(sigma), float(common)))
    _, sigma, common = min(rest)  # of equals that with the least blur
    rho = math.sqrt(common / (1 - common))
    return RhoFit(
        rho=rho,
        slice_sigma=sigma,
        real=real,
        synthetic=plane_statistics(synthetic_planes(texture, masks, rho=rho, slice_sigma=sigma, seed=seed)),
        independent=plane_statistics(synthetic_planes(texture, masks, rho=0.0, seed=seed)),
    )
