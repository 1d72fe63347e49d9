"""Volumes of which single planes are annotated: their planes as frames, crops of their outlines, and how long cells are
along the optical axis.

The third axis is read from the image: light along z through the core of an annotated outline shows where the cell's middle
lies. As a plane anywhere within a cell is as likely to be annotated as any other, the distances of outlines from these
middles tell how long cells are as somebody annotates them, which the light alone does not: outlines often include the blur.
No label is ever followed from plane to plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage import measure
from torch import Tensor

from synthaug.datasets.crops import CropSet, extract_crops
from synthaug.datasets.decoding import contiguous
from synthaug.errors import DataError, InputError
from synthaug.generators.axial import shrink
from synthaug.generators.frame_fit import cell_contrasts
from synthaug.generators.volume_fit import annotated_planes, dark_level
from synthaug.types import UNLABELLED

__all__ = [
    "AxialFit",
    "SliceCrops",
    "SlicePair",
    "annotated_planes",
    "extract_slice_crops",
    "fit_axial",
    "slice_pairs",
    "thin_annotations",
]

Volume = tuple[NDArray[np.float32], NDArray[np.int32]]
"""Image [Z, Y, X] in camera counts; labels [Z, Y, X], `UNLABELLED` throughout planes nobody annotated."""

CENTRAL = 0.3
"""Distance from a cell's middle, in half lengths, up to which a plane is central: an ellipsoid is 95 % as wide there."""

MIN_OUTLINE = 4
"""Pixels below which an outline is a speck that tells nothing."""

LEAST_RADIUS = 0.4
"""Over the median, of outlines that tell the radius of their cell: the last sliver at its end may be anyone's."""

MEDIAN_SLOPE = 1 / np.sqrt(3)
"""Median distance of an ellipsoid's planes from its middle over their radii, in units of its elongation."""


class SlicePair(NamedTuple):
    """One annotated plane as a frame: image float32 [Y, X], labels int32 [Y, X] contiguous from 1, and where it lies."""

    image: NDArray[np.float32]
    labels: NDArray[np.int32]
    volume: int
    z: int


@dataclass(frozen=True, kw_only=True)
class SliceCrops(CropSet):
    """Crops of outlines in single planes; `frame` counts the annotated planes, brightness is relative to the volume.

    Attributes:
        volume: int64 [N]; index of the volume.
        z: int64 [N]; plane in it.
        central: bool [N]; the plane lies near the cell's middle, so that the outline is nearly the cell's largest.
    """

    volume: Tensor
    z: Tensor
    central: Tensor


@dataclass(frozen=True)
class AxialFit:
    """How long cells are along the optical axis, and where they lie, from outlines in single planes.

    Attributes:
        z_spacing: Image pixels from plane to plane.
        stretch: Length along z over width in plane of cells as they are annotated; 1 is a sphere.
        light_stretch: The same of their light, at half of its maximum.
        num_outlines: Outlines looked at; the shares below are of these.
        central_share: Outlines near the middle of their cell.
        cut_share: Outlines of cells whose light does not fall to half within the stack.
        counts: Cells of each volume, estimated; 0 where none is annotated.
        centres: float32 [n, 3] of each volume: middles (ZYX in voxels) of those cells that have a central outline.
        moments: Mean [3] and covariance [3, 3] of the positions (ZYX in voxels) of each volume's bright voxels, which are
            more than half of a cell's contrast above the background; of all voxels where no cell is annotated.
    """

    z_spacing: float
    stretch: float
    light_stretch: float
    num_outlines: int
    central_share: float
    cut_share: float
    counts: tuple[float, ...]
    centres: tuple[NDArray[np.float32], ...]
    moments: tuple[tuple[NDArray[np.float64], NDArray[np.float64]], ...]


def thin_annotations(labels: NDArray[np.int32], step: int, *, first: int | None = None) -> NDArray[np.int32]:
    """Dense labels as if only every `step`-th plane had been annotated, each plane by itself.

    Args:
        labels: int32 [Z, Y, X].
        step: Planes from one annotated plane to the next, >= 1.
        first: The first annotated plane; default: half a step from the end.

    Returns:
        int32 [Z, Y, X]: connected parts of cells in each kept plane, with ids of their own, contiguous from 1; `UNLABELLED`
        in the others.
    """
    first = step // 2 if first is None else first
    if step < 1 or not 0 <= first < len(labels):
        expected = f"step >= 1 and first from 0 to {len(labels) - 1}"
        raise InputError("thin_annotations", expected=expected, got=f"step {step}, first {first}")
    thin = np.full(labels.shape, UNLABELLED, np.int32)
    highest = 0
    for z in range(first, len(labels), step):
        if (labels[z] == UNLABELLED).any():
            continue
        parts = measure.label(labels[z], background=0, connectivity=2)
        thin[z] = np.where(parts > 0, parts + highest, 0)
        highest += int(parts.max())
    return thin


def slice_pairs(volumes: Sequence[Volume]) -> list[SlicePair]:
    """All annotated planes, in the order of volumes and planes."""
    return [
        SlicePair(image[z], contiguous(labels[z]), index, z)
        for index, (image, labels) in enumerate(volumes)
        for z in annotated_planes(labels)
    ]


def extract_slice_crops(
    volumes: Sequence[Volume],
    *,
    crop_size: int | None = None,
    min_area: int | None = None,
    least_scale: float = 1.0,
) -> SliceCrops:
    """Cut every whole outline out of its plane, see `crops.extract_crops`.

    Args:
        volumes: Images and labels, see `Volume`.
        crop_size: Pixels; default: chosen from the sizes of the outlines (32 to 128).
        min_area: Smaller outlines are specks: dropped and counted. Default: 2 % of the median area, at least 20 px.
        least_scale: See `crops.extract_crops`.

    Raises:
        DataError: If no outline is left.
    """
    slices = slice_pairs(volumes)
    outlines = _measure_outlines(volumes, slices)
    central = _central(outlines, _elongation(outlines))
    # One exposure a volume: a plane through the caps of a few cells must not make them as bright as whole cells.
    references = _contrast_of_volumes(outlines, central, len(volumes))
    crops = extract_crops(
        [(s.image, s.labels) for s in slices],
        crop_size=crop_size,
        min_area=min_area,
        references=[references[s.volume] for s in slices],
        least_scale=least_scale,
    )
    known = dict(zip(zip(outlines.frame.tolist(), outlines.label.tolist()), central.tolist()))
    keys = list(zip(crops.frame.tolist(), crops.label.tolist()))
    return SliceCrops(
        **{name: getattr(crops, name) for name in CropSet.__dataclass_fields__},
        volume=torch.tensor([slices[frame].volume for frame, _ in keys]),
        z=torch.tensor([slices[frame].z for frame, _ in keys]),
        central=torch.tensor([known.get(key, False) for key in keys]),
    )


def fit_axial(
    volumes: Sequence[Volume], voxel_size_um: Sequence[float] | None = None, expected_half_length: float = 0.0
) -> AxialFit:
    """Length of cells along z, numbers and positions of cells, from annotations in single planes.

    Args:
        volumes: Images and labels, see `Volume`; dense labels are taken plane by plane.
        voxel_size_um: (Z, Y, X) in micrometres; None: planes are one pixel apart.
        expected_half_length: Of annotated cells along z in planes, see `axial.expected_half_length`; few outlines are pulled
            towards it. 0 if unknown.

    Raises:
        DataError: No outline shows where its cell's middle lies.
    """
    z_spacing = 1.0
    if voxel_size_um is not None:
        z_spacing = float(voxel_size_um[0] / np.sqrt(voxel_size_um[1] * voxel_size_um[2]))
    slices = slice_pairs(volumes)
    outlines = _measure_outlines(volumes, slices)
    elongation = _elongation(outlines, expected_half_length)
    central = _central(outlines, elongation)
    contrasts = _contrast_of_volumes(outlines, central, len(volumes))
    counts, centres, moments = [], [], []
    for index, (image, labels) in enumerate(volumes):
        own = outlines.volume == index
        bright = _bright(image, contrasts[index])
        counts.append(_count_cells(outlines, own, central, elongation, bright, annotated_planes(labels)))
        centres.append(_distinct_centres(outlines, own & central, elongation))
        voxels = np.argwhere(bright)
        moments.append((voxels.mean(0), np.cov(voxels.T)))
    return AxialFit(
        z_spacing=z_spacing,
        stretch=elongation * z_spacing,
        light_stretch=float(np.median((outlines.length / (2 * outlines.radius))[central])) * z_spacing,
        num_outlines=len(central),
        central_share=float(central.mean()),
        cut_share=float(outlines.cut.mean()),
        counts=tuple(counts),
        centres=tuple(centres),
        moments=tuple(moments),
    )


# ---------------------------------------------------------------------------------------------- outlines, one row each


class _Outlines(NamedTuple):
    """Columns [n]: where an outline lies, its radius (of a circle of its area) and contrast, the middle and the length of
    its cell's light along z in planes, and whether the stack's end cuts that off."""

    volume: NDArray[np.int64]
    frame: NDArray[np.int64]
    label: NDArray[np.int64]
    z: NDArray[np.float64]
    y: NDArray[np.float64]
    x: NDArray[np.float64]
    radius: NDArray[np.float64]
    contrast: NDArray[np.float64]
    middle: NDArray[np.float64]
    length: NDArray[np.float64]
    cut: NDArray[np.bool_]


def _measure_outlines(volumes: Sequence[Volume], slices: Sequence[SlicePair]) -> _Outlines:
    rows = []
    for frame, (image, labels, volume, z) in enumerate(slices):
        contrast, _ = cell_contrasts(image, labels)
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            own = labels[box] == label
            if own.sum() < MIN_OUTLINE:
                continue
            depth = ndimage.distance_transform_edt(np.pad(own, 1))[1:-1, 1:-1]
            profile = volumes[volume][0][:, *box][:, depth >= 0.5 * depth.max()].mean(1)
            middle, length, cut = axial_run(profile, z)
            y, x = np.argwhere(own).mean(0) + [s.start for s in box]
            radius = np.sqrt(own.sum() / np.pi)
            rows.append((volume, frame, label, z, y, x, radius, contrast[label - 1], middle, length, cut))
    table = np.array(rows, np.float64).reshape(-1, len(_Outlines._fields)).T
    return _Outlines._make([*table[:3].astype(np.int64), *table[3:-1], table[-1].astype(bool)])


def axial_run(profile: NDArray[np.floating], plane: int) -> tuple[float, float, bool]:
    """Middle and length, in planes, of the peak of light that `plane` belongs to.

    The peak ends at half of its height over the lower one of the minima on both sides; where light does not fall that far
    before it rises again, a neighbour begins, at the minimum.

    Args:
        profile: [Z], counts along z.
        plane: A plane of the cell.

    Returns:
        Middle, full width at half maximum, and whether an end of the stack cuts the peak off above its half.
    """
    smooth = ndimage.gaussian_filter1d(np.asarray(profile, np.float64), 1.0, mode="nearest")
    peak = plane
    while (best := max(peak - 1, 0) + int(smooth[max(peak - 1, 0) : peak + 2].argmax())) != peak:
        peak = best
    tolerance = 0.02 * float(np.ptp(smooth))
    lows = []
    for step in (-1, 1):
        at = low = peak
        while 0 <= at + step < len(smooth) and smooth[at + step] <= smooth[low] + tolerance:
            at += step
            low = at if smooth[at] < smooth[low] else low
        lows.append(low)
    half = (smooth[peak] + smooth[lows].min()) / 2
    ends, cut = [], False
    for step, low in zip((-1, 1), lows):
        at = peak
        while at != low and smooth[at] > half:
            at += step
        if smooth[at] > half:
            ends.append(float(low))
            cut |= low in (0, len(smooth) - 1)
        elif at == peak:  # no light above its surroundings
            ends.append(float(peak))
        else:
            before, here = smooth[at - step], smooth[at]
            ends.append(at - step * (half - here) / (before - here))
    return sum(ends) / 2, ends[1] - ends[0], cut


def _told(outlines: _Outlines) -> NDArray[np.bool_]:
    return ~outlines.cut & (outlines.length >= 1)


def _central(outlines: _Outlines, elongation: float) -> NDArray[np.bool_]:
    """Whether planes lie within `CENTRAL` half lengths of the middles; lengths follow from the outlines as of ellipsoids."""
    slope = np.abs(outlines.z - outlines.middle) / (elongation * outlines.radius)
    # half a plane in any case: of cells only a few planes long, one is the middle one
    near = (slope <= CENTRAL / np.sqrt(1 - CENTRAL**2)) | (np.abs(outlines.z - outlines.middle) <= 0.5)
    return _told(outlines) & near


def _elongation(outlines: _Outlines, expected_half_length: float = 0.0) -> float:
    """Half length along z in planes over radius in plane in pixels, of cells as they are annotated.

    Outlines lie at a mean distance of half of the half length from the middle, and each tells the radius of its cell, an
    ellipsoid, of which it is a section. Long cells have more outlines, which weigh so in both. At least the length of the
    light, for where only the middle plane of flat layers of cells is annotated.
    """
    told = _told(outlines)
    if not told.any():
        raise DataError(
            "the annotated planes",
            expected="cells whose light rises and falls along z around their outline",
            got=f"none of {len(told)} outlines",
            remedy="Are image and labels of one stack, planes counted from 0? Flat stacks are better learned in 2D.",
        )
    distance = np.abs(outlines.z - outlines.middle)[told]
    radius, length = outlines.radius[told], outlines.length[told]
    distance = np.minimum(distance, 3 * max(float(np.median(distance)), 0.25))  # a middle far off is another cell's
    half_length = shrink(2 * float(distance.mean()), len(distance), expected_half_length)
    whole = radius > LEAST_RADIUS * np.median(radius)
    elongation = max(float(np.median(distance / radius)) / MEDIAN_SLOPE, 0.1)
    for _ in range(20):
        elongation = max(half_length / float(np.hypot(radius, distance / elongation)[whole].mean()), 0.1)
    central = _central(outlines, elongation)[told]
    if central.any():
        elongation = max(elongation, float(np.median((length / (2 * radius))[central])))
    return elongation


def _contrast_of_volumes(outlines: _Outlines, central: NDArray[np.bool_], num: int) -> NDArray[np.float64]:
    """Median contrast of each volume's cells [num], counts; 0 where nothing is annotated."""
    contrasts = np.zeros(num)
    for index in range(num):
        own = outlines.volume == index
        chosen = own & central if (own & central).any() else own
        contrasts[index] = np.median(outlines.contrast[chosen]) if chosen.any() else 0.0
    return contrasts


def _bright(image: NDArray[np.float32], contrast: float) -> NDArray[np.bool_]:
    """Voxels more than half of `contrast` above the background; all of them where there is no contrast."""
    if contrast > 0:
        smooth = ndimage.gaussian_filter(image, (0.5, 1.0, 1.0))
        bright = smooth > dark_level(image.astype(np.float64)) + contrast / 2
        if bright.sum() > 3:
            return bright
    return np.ones(image.shape, bool)


def _count_cells(
    outlines: _Outlines,
    own: NDArray[np.bool_],
    central: NDArray[np.bool_],
    elongation: float,
    bright: NDArray[np.bool_],
    planes: Sequence[int],
) -> float:
    """Cells of one whole volume.

    Outlines over the planes a cell spans; of central outlines, which are the more frequent the longer a cell is, the
    harmonic mean of the lengths is the cells' own mean. Planes nobody annotated count by their share of the light.
    """
    chosen = own & central if (own & central).any() else central
    span = 2 * elongation / float((1 / outlines.radius[chosen]).mean())
    per_plane = bright.sum((1, 2))
    share = float(per_plane[list(planes)].sum() / per_plane.sum())
    return float(own.sum()) / span / share if share > 0 else 0.0


def _distinct_centres(outlines: _Outlines, chosen: NDArray[np.bool_], elongation: float) -> NDArray[np.float32]:
    """Middles (ZYX) of the cells of these outlines; those of several outlines of one cell lie closer than its radius."""
    kept: list[NDArray[np.float64]] = []
    for i in np.flatnonzero(chosen):
        point = np.array([outlines.middle[i], outlines.y[i], outlines.x[i]])
        unit = np.array([elongation, 1.0, 1.0]) * outlines.radius[i]
        if all(np.linalg.norm((point - other) / unit) > 1 for other in kept):
            kept.append(point)
    return np.array(kept, np.float32).reshape(-1, 3)
