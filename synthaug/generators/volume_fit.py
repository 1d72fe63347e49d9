"""What real stacks tell about background and camera: one row a volume, as `frame_fit.py` measures one a frame.

Cells are taken from the planes somebody annotated; what is empty, and where light comes from, is told by the image itself,
so that a single annotated plane is enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, optimize

from synthaug.generators.axial import Section, measure_section, wide_blur_volume
from synthaug.generators.camera import autocovariance, high_pass
from synthaug.generators.frame_fit import (
    BLOCK,
    FAR,
    LAGS,
    NEAR,
    RING_INNER,
    TEXTURE_SIGMAS,
    FrameMeasure,
    cell_contrasts,
    fit_cling,
    positions,
    spaced,
    spread_of,
    texture_correlation,
)
from synthaug.types import UNLABELLED

HAZE_BLURS = ((8.0, 4.0), (24.0, 12.0), (24.0, 40.0))
"""Widths of the blurs that make the haze, planes and pixels: light from out of focus reaches far along the axis."""

TEXTURE_BLURS = tuple((s / 2, s) for s in TEXTURE_SIGMAS[1:])
"""Widths of the blurs that make the texture of the background, planes and pixels."""

CLING_BLUR = HAZE_BLURS[1]
"""Width of the blur of the cells that the texture's amplitude follows."""

VOLUME_HAZES = tuple(f"haze_{xy:g}" for _, xy in HAZE_BLURS)
VOLUME_TEXTURES = tuple(f"texture_{xy:g}" for _, xy in TEXTURE_BLURS)
VOLUME_FIELDS = (
    "field_z",
    "field_y",
    "field_x",
)  # no higher orders: an embryo's haze in the middle would be taken for them
VOLUME_POSITIVE = ("level", "brightness", "density", "flat_variance", "gain", *VOLUME_HAZES, *VOLUME_TEXTURES)
VOLUME_NAMES = (
    *VOLUME_POSITIVE,
    "axial_sigma",
    "attenuation",
    "cling",
    "glow",
    *VOLUME_FIELDS,
    "depth",
    "height",
    "width",
)
"""Columns of a table of volumes: as `frame_fit.NAMES`, with density in cells per voxel, axial_sigma in planes (blur along z
in focus), attenuation, fall of the logarithm of the cells' light from plane to plane."""

PLANES_A_BLOCK = 3
MAX_PLANES, MAX_SECTIONS = 24, 400
"""Annotated planes and outlines looked at in one volume, evenly spread: more tell nothing new."""


NOISE_GATE = 0.04
"""As `noise_kernel` has it; a stack has so many more pixels than a frame that smaller correlations are sure."""

CELL_PIXELS = 40
"""Pixels well inside a cell that tell as much of the noise as one cell of a frame."""


def annotated_planes(labels: NDArray[np.int32]) -> list[int]:
    """Indices of the planes somebody annotated, of int32 [Z, Y, X]."""
    return [z for z, plane in enumerate(labels) if not (plane == UNLABELLED).any()]


def dark_level(image: NDArray[np.float64]) -> float:
    """Mean counts of the darkest third of a volume, in blocks: of a skewed noise the median is not the mean."""
    blocks = np.sort(_means(image, np.ones(image.shape, bool))[0].ravel())
    return float(blocks[: max(len(blocks) // 3, 1)].mean())


def measure_sections(
    image: NDArray[np.float64], labels: NDArray[np.int32], saturation: float, *, most_planes: int = MAX_PLANES
) -> tuple[list[Section], NDArray[np.float64], float, list[float]]:
    """What the annotated planes of one volume tell of its cells.

    Returns:
        Sections whose column can be read; float64 [3], number of pixels well inside outlines, their mean counts and the
        mean of their squared high-pass; outlines a pixel of annotated plane; contrasts of all outlines.
    """
    sections: list[Section] = []
    noise, contrasts = np.zeros(3), []
    planes = spaced(annotated_planes(labels), most_planes)
    outlines = 0
    each = max(MAX_SECTIONS // max(len(planes), 1), 1)
    for z in planes:
        ids, flat = np.unique(labels[z], return_inverse=True)
        first = 0 if ids[0] == 0 else 1  # a plane without any background
        own = (flat.reshape(labels[z].shape) + first).astype(np.int32)
        num = len(ids) - 1 + first
        outlines += num
        if not num:
            continue
        contrast, local = cell_contrasts(image[z].astype(np.float32), own)
        contrasts += contrast[contrast > 0].tolist()
        # the high-pass reaches two pixels, the blur of the border another
        same = (ndimage.maximum_filter(own, 7) == own) & (ndimage.minimum_filter(own, 7) == own)
        inner = same & (own > 0) & (image[z] < saturation)
        noise += [inner.sum(), image[z][inner].sum(), (high_pass(image[z])[inner] ** 2).sum()]
        boxes = ndimage.find_objects(own)
        for i in spaced(range(num), each):
            box = boxes[i]
            section = measure_section(image[:, *box], own[box] == i + 1, z, float(local[i]), float(contrast[i]))
            if section is not None:
                sections.append(section)
    area = max(len(planes) * labels.shape[1] * labels.shape[2], 1)
    noise[1:] /= max(noise[0], 1.0)
    return sections, noise, outlines / area, contrasts


def central_contrasts(sections: Sequence[Section]) -> list[float]:
    """Contrasts, counts, of outlines that lie within their cell's light; at its ends little is left to tell from."""
    return [s.contrast for s in sections if abs(s.plane - s.centre) <= s.half_length]


def cell_brightness(image: NDArray[np.float32], labels: NDArray[np.int32], saturation: float) -> list[float]:
    """Contrasts of the cells in a few annotated planes, counts, as the column `brightness` has their median."""
    sections, _, _, contrasts = measure_sections(image.astype(np.float64), labels, saturation, most_planes=6)
    return central_contrasts(sections) or contrasts


def bright_region(
    image: NDArray[np.float64], labels: NDArray[np.int32], brightness: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Cells in focus, as the image shows them and the annotation says, and what is free of them; bool [Z, Y, X] both."""
    smooth = ndimage.gaussian_filter(image, (1.0, 1.5, 1.5), mode="nearest")
    dark = smooth <= np.quantile(smooth, 0.5)
    level, noise = float(image[dark].mean()), spread_of(smooth[dark])
    bright = smooth > level + max(0.2 * brightness, 8 * noise)
    region = (labels > 0) | bright
    if not region.any():
        return region, np.ones_like(region)
    distance = ndimage.distance_transform_edt(~region, sampling=(2.0, 1.0, 1.0))
    for margin in (RING_INNER, 3, 0):
        free = distance > margin
        if free.sum() >= max(2000, 0.02 * free.size):
            return region, free
    return region, smooth <= np.quantile(smooth, 0.05)


def _means(values: NDArray[np.float64], valid: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of the valid voxels in blocks of 3 x 8 x 8, and how many they are."""
    steps = (PLANES_A_BLOCK, BLOCK, BLOCK)
    pad = [(0, -n % s) for n, s in zip(values.shape, steps)]
    blocks = [(n + p[1]) // s for n, p, s in zip(values.shape, pad, steps)]
    shape = [m for pair in zip(blocks, steps) for m in pair]
    count = np.pad(valid.astype(np.float64), pad).reshape(shape).sum((1, 3, 5))
    total = np.pad(np.where(valid, values, 0.0), pad).reshape(shape).sum((1, 3, 5))
    return total / np.maximum(count, 1), count


def _blurred(values: NDArray[np.float64], widths: tuple[float, float]) -> NDArray[np.float64]:
    return np.asarray(wide_blur_volume(torch.from_numpy(values)[None, None], (widths[0], widths[1], widths[1]))[0, 0])


def _fit_smooth(
    image: NDArray[np.float64], free: NDArray[np.bool_], source: NDArray[np.float64], brightness: float
) -> tuple[float, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Level, relative field [3] and haze amplitudes [3] of one volume, and the background they make [Z, Y, X].

    As `frame_fit` does it for a frame, on blocks of voxels.
    """
    depth, height, width = image.shape
    fields = (positions(depth, depth)[:, None, None], positions(height, height)[:, None], positions(width, width))
    maps = [np.broadcast_to(f, image.shape) for f in (np.ones(1), *fields)]
    num_fields = len(maps)
    if source.any():
        maps += [_blurred(source, widths) for widths in HAZE_BLURS]
    target, count = _means(image, free)
    use = count >= PLANES_A_BLOCK * BLOCK * BLOCK / 4
    if use.sum() < 30:
        use = count > 0
    design = np.stack([_means(m, free)[0][use] for m in maps], axis=1)
    y, weight = target[use], np.sqrt(count[use])
    level = float(np.median(y))
    # haze and field are told apart by a pull of the field towards 0: the cells of an embryo are in its middle
    noise = max(spread_of(y), 1e-3)
    pull = np.zeros((num_fields - 1, len(maps)))
    pull[np.arange(num_fields - 1), np.arange(1, num_fields)] = noise / max(0.05 * abs(level), 1e-6) * weight.max()
    lower = np.concatenate([np.full(num_fields, -np.inf), np.zeros(len(maps) - num_fields)])
    upper = np.concatenate([np.full(num_fields, np.inf), np.full(len(maps) - num_fields, 2.0 * max(brightness, 1e-3))])
    solution, robust = np.zeros(len(maps)), np.ones(len(y))
    for _ in range(6):
        system = np.vstack([design * (weight * robust)[:, None], pull])
        q, r = np.linalg.qr(system)
        rhs = q.T @ np.concatenate([y * weight * robust, np.zeros(len(pull))])
        solution = optimize.lsq_linear(r, rhs, bounds=(lower, upper), method="bvls").x
        residual = y - design @ solution
        robust = np.clip(1 - (residual / (6 * max(spread_of(residual), 1e-3))) ** 2, 0.0, None)
    smooth = np.zeros(image.shape)
    for coefficient, m in zip(solution, maps):
        smooth += coefficient * m
    haze = np.zeros(len(HAZE_BLURS))
    haze[: len(maps) - num_fields] = solution[num_fields:]
    return float(solution[0]), solution[1:num_fields] / max(abs(solution[0]), 1e-6), haze, smooth


def measure_volume(
    image: NDArray[np.float64], labels: NDArray[np.int32], *, saturation: float
) -> tuple[FrameMeasure, list[Section], NDArray[np.float64]]:
    """Everything one volume tells by itself.

    Args:
        image: float64 [Z, Y, X], camera counts.
        labels: int32 [Z, Y, X], 0 = background, `UNLABELLED` throughout planes nobody annotated.
        saturation: Largest count of the camera.

    Returns:
        The measure (its density in outlines a pixel of plane), the outlines whose axial profile can be read, and pixels of
        nearly one expected value, counts, to tell the distribution of the noise from.
    """
    sections, noise, density, contrasts = measure_sections(image, labels, saturation)
    central = central_contrasts(sections) or contrasts
    brightness = float(np.median(central)) if central else 0.0
    region, free = bright_region(image, labels, float(np.median(contrasts)) if contrasts else 0.0)
    base = np.full(image.shape, float(np.median(image[free])))
    for _ in range(2):  # the second time with the haze known that lies over the cells themselves
        source = np.where(region, np.clip(image - base, 0.0, 6 * brightness), 0.0) / max(brightness, 1e-6)
        source = source if brightness else np.zeros_like(image)
        level, field, haze, smooth = _fit_smooth(image, free, source, brightness)
        base = smooth
    residual = image - smooth
    shift = float(residual[free].mean())
    level, smooth, residual = level + shift, smooth + shift, residual - shift
    covariance = np.mean([autocovariance(r, f, LAGS) for r, f in zip(residual, free) if f.any()], axis=0)
    far = covariance[len(NEAR) :].reshape(2, -1).mean(0)
    cling, glow, power = 0.0, 0.0, 1.0
    if source.any():
        cling, glow, power = fit_cling(residual, free, _blurred(source, CLING_BLUR))
    wide, _ = optimize.nnls(np.stack([texture_correlation(s, np.array(FAR)) for s in TEXTURE_SIGMAS[1:]], 1), far)
    sharp = np.stack([high_pass(plane) ** 2 for plane in image])
    inside = ndimage.binary_erosion(free, np.ones((1, 5, 5)))
    inside = inside if inside.sum() >= 1000 else free
    middle = float(smooth[inside].mean())
    # Outlines in stacks are too small to be told one by one: all of them together, weighing as many as would make them up.
    inner = [max(noise[1] - middle, 1e-3), noise[2], 0.0, 0.0]
    cells = np.tile(inner, (int(noise[0]) // CELL_PIXELS, 1)) if noise[1] > middle else np.zeros((0, 4))
    row = {"level": level, "brightness": brightness, "density": density, "cling": cling, "glow": glow, "tail": 0.0}
    row |= dict(zip(VOLUME_HAZES, haze / brightness if brightness else np.full(len(haze), np.nan)))
    row |= dict(zip(VOLUME_FIELDS, field)) | dict(zip(("depth", "height", "width"), map(float, image.shape)))
    dark = free & (smooth <= np.quantile(smooth[free], 0.3))
    measure = FrameMeasure(
        row=row,
        covariance=covariance,
        texture=np.concatenate([[0.0], wide / power]),
        flat=float(sharp[inside].mean()),
        cells=cells,
        smooth=smooth,
        covered=~free,
        excess=middle - level,
    )
    return measure, sections, image[dark]


def pool_attenuation(own: Sequence[tuple[float, float]]) -> list[float]:
    """Attenuation of each volume, pulled towards what all of them share; 0 where nothing is told apart from chance.

    Args:
        own: Slope and its standard error, of each volume.
    """
    slopes, errors = np.array([s for s, _ in own]), np.array([e for _, e in own])
    known = np.isfinite(errors)
    if not known.any():
        return [0.0] * len(own)
    precision = np.where(known, 1 / np.where(known, errors, 1.0) ** 2, 0.0)
    common = float((precision * slopes).sum() / precision.sum())
    if abs(common) < 2 / np.sqrt(precision.sum()):
        common = 0.0
    # variance between volumes beyond the errors (DerSimonian and Laird, Controlled Clinical Trials 7:177, 1986)
    excess = float((precision * (slopes - common) ** 2).sum() - (known.sum() - 1))
    between = max(excess / max(precision.sum() - (precision**2).sum() / precision.sum(), 1e-9), 0.0)
    share = np.where(known, between / (between + np.where(known, errors, 1.0) ** 2), 0.0)
    return [float(common + w * (s - common)) for w, s in zip(share, slopes)]
