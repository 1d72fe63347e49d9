"""What is peculiar to the optical axis of a stack: blur and attenuation along z, and how long cells are there.

A microscope blurs far more along its axis than across. In focus the blur is taken for a Gaussian over z; the rest, light
from out of focus, is haze of `background.py`, made of blurs that are wide in all three axes. All of it is read from
images and from outlines in single planes: no volume need be annotated in 3D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, optimize, special
from torch import Tensor
from torch.nn import functional

from synthaug.generators.camera import mirror_index, texture_pitch

MAX_RUN = 24
"""Planes above and below an outline that are searched for the cell's ends."""

ANNOTATED_TO = 1.28
"""Standard deviations of the axial blur beyond a cell's light to which it is annotated: where a tenth of it is left."""

PRIOR_SECTIONS = 40
"""Outlines that `ANNOTATED_TO` weighs as much as: so many of four planes give the annotated length to 14 %."""

MIN_CORE = 12
"""Pixels of a cell's core below which its profile is too noisy to tell."""


# Blurs of stacks --------------------------------------------------------------------------------------------------


def blur_axis(volume: Tensor, sigma: float, axis: int) -> Tensor:
    """Gaussian blur along one axis of [B, 1, Z, Y, X] with mirrored borders, sigma in voxels; by shifts and sums."""
    if sigma <= 0.05:
        return volume
    radius = max(1, math.ceil(3 * sigma))
    taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(radius + 1)]
    total = 2 * sum(taps) - taps[0]
    return _filter(volume, [t / total for t in taps], axis, mirrored=True)


def _filter(volume: Tensor, taps: list[float], axis: int, *, mirrored: bool) -> Tensor:
    """Symmetric filter, middle tap first; without mirrored borders the axis gets shorter."""
    if _is_compiled(volume):
        from synthaug.kernels.wide_blur import filter_axis  # imports numba, which reading a cascade does not need

        return torch.stack([filter_axis(v[0], taps, axis - 2, mirrored) for v in volume])[:, None]
    radius, size = len(taps) - 1, volume.shape[axis]
    if mirrored:
        volume = volume.index_select(axis, mirror_index(-radius, size + 2 * radius, size).to(volume.device))
    else:
        size -= 2 * radius
    out = volume.narrow(axis, radius, size) * taps[0]
    for i in range(radius, 0, -1):
        pair = volume.narrow(axis, radius - i, size) + volume.narrow(axis, radius + i, size)
        out = out + pair * taps[i]
    return out


def _is_compiled(volume: Tensor) -> bool:
    return volume.device.type == "cpu" and volume.dtype == torch.float32


@dataclass(frozen=True)
class CoarseGrid:
    """A smooth volume, stored as coarsely as it is smooth.

    Attributes:
        nodes: [B, 1, z, y, x].
        factors: Voxels from node to node, (Z, Y, X).
        offsets: Where the volume begins on the enlarged grid, voxels.
    """

    nodes: Tensor
    factors: tuple[int, ...]
    offsets: tuple[int, ...] = (0, 0, 0)

    def add_to(self, total: Tensor, weight: float = 1.0, amplitude: Tensor | None = None) -> None:
        """total += weight * this, linearly interpolated, * amplitude; in place.

        Args:
            total: [B, 1, Z, Y, X], contiguous.
            weight: A factor.
            amplitude: As `total`, or None for 1.
        """
        if _is_compiled(total):
            from synthaug.kernels.wide_blur import add_enlarged

            for i, row in enumerate(total[:, 0]):
                own = None if amplitude is None else amplitude[i, 0]
                add_enlarged(row, self.nodes[i, 0], self.factors, self.offsets, weight, own)
            return
        fine = self.nodes
        if max(self.factors) > 1:
            whole = [n * f for n, f in zip(fine.shape[2:], self.factors)]
            fine = functional.interpolate(fine, size=whole, mode="trilinear", align_corners=False)
        for axis, (offset, length) in enumerate(zip(self.offsets, total.shape[2:]), start=2):
            fine = fine.narrow(axis, offset, length)
        total += weight * (fine if amplitude is None else fine * amplitude)


def blur_widely(volume: Tensor, sigmas: Sequence[float]) -> CoarseGrid:
    """Gaussian blur of [B, 1, Z, Y, X] with mirrored borders, on a grid coarse enough to be cheap.

    Args:
        volume: float32 or float64.
        sigmas: (Z, Y, X) in voxels.
    """
    pools = tuple(max(1, 2 ** int(math.log2(max(s / 2.4, 1.0)))) for s in sigmas)
    if _is_compiled(volume):
        from synthaug.kernels.wide_blur import shrink

        coarse = torch.stack([shrink(v[0], pools) for v in volume])[:, None]
    else:
        for axis, (n, p) in enumerate(zip(volume.shape[2:], pools), start=2):
            if n % p:
                volume = volume.index_select(axis, mirror_index(0, -(-n // p) * p, n).to(volume.device))
        coarse = functional.avg_pool3d(volume, pools)
    for axis, (sigma, pool) in enumerate(zip(sigmas, pools), start=2):
        coarse = blur_axis(coarse, sigma / pool, axis)
    return CoarseGrid(coarse, pools)


def wide_blur_volume(volume: Tensor, sigmas: Sequence[float]) -> Tensor:
    """The same at full size: [B, 1, Z, Y, X]."""
    total = torch.zeros_like(volume)
    blur_widely(volume, sigmas).add_to(total)
    return total


def texture_grid_volume(size: Sequence[int], sigmas: Sequence[float]) -> tuple[int, ...]:
    """Shape of the white noise that `random_texture_volume` needs for a canvas of (Z, Y, X) voxels."""
    grid = []
    for n, sigma in zip(size, sigmas):
        pitch = texture_pitch(sigma)
        grid.append(-(-n // pitch) + 2 * math.ceil(3 * sigma / pitch) + 2)
    return tuple(grid)


def random_texture_volume(white: Tensor, sigmas: Sequence[float]) -> CoarseGrid:
    """A Gaussian random field of unit variance; see `camera.random_texture`.

    Args:
        white: float32 [B, 1, *texture_grid_volume(size, sigmas)], standard normal, for a volume of that size.
        sigmas: (Z, Y, X) of the blur that makes it, in voxels.
    """
    field, kept = white, 1.0
    pitches = tuple(texture_pitch(s) for s in sigmas)
    for axis, (sigma, pitch) in enumerate(zip(sigmas, pitches), start=2):
        grid = sigma / pitch
        taps = [math.exp(-0.5 * (i / grid) ** 2) for i in range(math.ceil(3 * grid) + 1)]
        energy = math.sqrt(2 * sum(w * w for w in taps) - 1)
        field = _filter(field, [t / energy for t in taps], axis, mirrored=False)
        # standard deviation that linear interpolation between nodes keeps on average
        kept *= math.sqrt(2 / 3 + math.exp(-0.25 / grid**2) / 3) if pitch > 1 else 1.0
    return CoarseGrid(field / kept, pitches, pitches)


def attenuate(light: Tensor, per_plane: float) -> Tensor:
    """Light [B, 1, Z, Y, X] that falls by exp(-per_plane) from plane to plane, unchanged in its own mean plane."""
    # Plane by plane: what is made on the way stays in the cache
    planes = [[plane.clamp(min=0).sum() for plane in volume[0]] for volume in light]
    profile = torch.stack([torch.stack(p) for p in planes]).double()  # [B, Z]
    z = torch.arange(profile.shape[1], device=light.device, dtype=torch.float64)
    middle = (profile * z).sum(1) / profile.sum(1).clamp(min=1e-9)
    factor = torch.exp(-per_plane * (z - middle[:, None])).to(light.dtype)
    return light * factor[:, None, :, None, None]


# What outlines in single planes tell about the axis ------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """One annotated outline of a cell, and what the column of voxels above and below its core shows.

    Attributes:
        plane: Annotated plane.
        centre: Middle of the cell's light along z, planes.
        half_length: Half its length there at half of its light, planes; that of the cell without the blur.
        sigma: Standard deviation of the axial blur, planes.
        contrast: Counts over the background that the cell would have in a plane through its middle.
        seen: The same in the annotated plane.
        radius: Of the circle with the outline's area, pixels.
    """

    plane: int
    centre: float
    half_length: float
    sigma: float
    contrast: float
    seen: float
    radius: float


def _edge(t: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1 + special.erf(t / math.sqrt(2))))


def slab_profile(
    z: NDArray[np.float64], centre: float, half_length: float, sigma: float, base: float, amplitude: float
) -> NDArray[np.float64]:
    """Counts along z of a slab of even light, blurred by a Gaussian."""
    ends = _edge((z - centre + half_length) / sigma) - _edge((z - centre - half_length) / sigma)
    return base + amplitude * ends


def _run(profile: NDArray[np.float64], plane: int) -> tuple[int, int]:
    """First and last plane of the peak that `plane` belongs to: as far as light falls; neighbours rise again."""
    smooth = ndimage.gaussian_filter1d(profile, 1.0, mode="nearest")
    peak, tolerance = plane, 0.02 * float(np.ptp(smooth))
    while True:  # up to the nearest maximum
        near = slice(max(peak - 1, 0), min(peak + 2, len(smooth)))
        best = near.start + int(smooth[near].argmax())
        if best == peak:
            break
        peak = best
    ends = []
    for step in (-1, 1):
        at, lowest = peak, peak
        while 0 <= at + step < len(smooth) and abs(at + step - peak) <= MAX_RUN:
            at += step
            if smooth[at] < smooth[lowest]:
                lowest = at
            elif smooth[at] > smooth[lowest] + tolerance:
                break
        ends.append(lowest)
    return ends[0], ends[1]


def measure_section(
    image: NDArray[np.floating], own: NDArray[np.bool_], plane: int, local: float, seen: float
) -> Section | None:
    """What the column over the core of one outline tells; None where nothing can be told.

    Args:
        image: [Z, Y, X], counts; the box around the outline is enough.
        own: bool [Y, X], the outline.
        plane: Annotated plane.
        local: Counts of the background around the outline in that plane.
        seen: Mean counts of the outline over `local`.
    """
    depth = ndimage.distance_transform_edt(np.pad(own, 1))[1:-1, 1:-1]
    core = depth > max(0.5 * float(depth.max()), 1.0)
    if core.sum() < MIN_CORE or seen <= 0:
        return None
    profile = np.asarray(image[:, core].mean(1), np.float64)
    first, last = _run(profile, plane)
    z = np.arange(first, last + 1, dtype=np.float64)
    column = profile[first : last + 1]
    top, floor = float(column.max()), float(column.min())
    whole = column[0] < floor + 0.4 * (top - floor) and column[-1] < floor + 0.4 * (top - floor)
    if len(z) < 7 or not whole or top - floor < 0.3 * seen:
        return None
    above = z[column > 0.5 * (top + floor)]
    start = [float(above.mean()), max((above[-1] - above[0] + 1) / 2, 0.6), 1.5, floor, top - floor]
    low = [z[0], 0.5, 0.3, min(floor, local) - (top - floor), 0.3 * (top - floor)]
    high = [z[-1], float(len(z)), 8.0, top, 4 * (top - floor)]
    fit = optimize.least_squares(
        lambda p: (slab_profile(z, *p) - column) / (top - floor),
        np.clip(start, np.add(low, 1e-6), np.subtract(high, 1e-6)),
        bounds=(low, high),
        max_nfev=60,
    )
    if not fit.success or math.sqrt(float((fit.fun**2).mean())) > 0.15:
        return None
    centre, half_length, sigma, _, amplitude = (float(v) for v in fit.x)
    peak = amplitude * (2 * float(_edge(np.asarray(half_length / sigma))) - 1)
    here = float(slab_profile(np.asarray([float(plane)]), centre, half_length, sigma, 0.0, amplitude)[0])
    # the core is brighter than the whole outline: what grows from this plane to the middle is taken as a ratio
    growth = min(peak / max(here, 0.1 * peak), 10.0)
    return Section(plane, centre, half_length, sigma, seen * growth, seen, math.sqrt(float(own.sum()) / math.pi))


def axial_sigma(sections: Sequence[Section]) -> float:
    """Standard deviation of the axial blur in planes, median over outlines near the middle of their cells; 0 if unknown.

    Where fewer than three lie there, over all outlines: the column over an outline nearer to the end of a cell is narrower,
    but shows the same blur. (From BBBC050: 1.9 to 2.0 planes near the middles, 2.1 over all.)
    """
    near = [s.sigma for s in sections if abs(s.plane - s.centre) <= max(1.5, 0.5 * s.half_length)]
    if len(near) < 3:
        near = [s.sigma for s in sections]
    return float(np.median(near)) if len(near) >= 3 else 0.0


def expected_half_length(sections: Sequence[Section]) -> float:
    """Half the length of cells along z up to where a tenth of their light is left, planes; 0 if unknown."""
    if len(sections) < 3:
        return 0.0
    return float(np.median([s.half_length + ANNOTATED_TO * s.sigma for s in sections]))


def mask_half_length(sections: Sequence[Section]) -> float:
    """Half the length of cells along z as they are annotated, planes; 0 if unknown.

    A plane anywhere within a cell is as likely to be annotated as any other: its mean distance from the cell's middle is
    half of the half length. Few outlines are pulled towards `expected_half_length`.
    """
    if len(sections) < 3:
        return 0.0
    own = 2 * float(np.mean([abs(s.plane - s.centre) for s in sections]))
    return max(shrink(own, len(sections), expected_half_length(sections)), 0.5)


def shrink(own: float, num: int, expected: float) -> float:
    """A length told by `num` outlines, pulled towards an expected one that weighs as much as `PRIOR_SECTIONS`."""
    return (num * own + PRIOR_SECTIONS * expected) / (num + PRIOR_SECTIONS) if expected > 0 else own


def axial_extent(sections: Sequence[Section]) -> float:
    """Length of cells' light along z over that of their outlines, at most 1: annotations often include the blur.

    For `TextureConfig.axial_extent` where masks are as long as the annotated ones; where they are made as long as the
    light itself it is 1.
    """
    annotated = mask_half_length(sections)
    if annotated == 0:
        return 1.0
    return float(np.clip(np.median([s.half_length for s in sections]) / annotated, 0.3, 1.0))


def fit_attenuation(sections: Sequence[Section]) -> tuple[float, float]:
    """Slope of -log(contrast) a plane, and its standard error (inf where fewer than 5 outlines, or one plane alone, tell).

    Outlines of one plane belong to cells whose middles lie closer together than a cell is long, and the farther a middle is
    from that plane, the less sure is the cell's contrast: light was once made to grow by 17 % a plane from six of them.
    """
    if len(sections) < 5 or len({s.plane for s in sections}) < 2:
        return 0.0, math.inf
    z = np.array([s.centre for s in sections])
    y = np.log([s.contrast for s in sections])
    if np.ptp(z) < 4:
        return 0.0, math.inf
    centred = z - z.mean()
    slope = float((centred * y).sum() / (centred**2).sum())
    rest = y - y.mean() - slope * centred
    # outlines of one cell are one observation: as many cells as outlines over the length of a cell
    cells = max(len(sections) / max(2 * mask_half_length(sections) / _annotation_step(sections), 1.0), 3.0)
    error = float(rest.std() / math.sqrt((centred**2).mean() * max(cells - 2, 1.0)))
    return -slope, max(error, 1e-6)


def _annotation_step(sections: Sequence[Section]) -> float:
    planes = sorted({s.plane for s in sections})
    return float(np.median(np.diff(planes))) if len(planes) > 1 else 1.0
