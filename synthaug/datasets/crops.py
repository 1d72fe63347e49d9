"""Square crops of single cells, centred, with mask and brightness: what the mask and texture stages learn from (paper, §3).

Two things differ from the paper's code (REFERENCE in the docstrings): the cell keeps the pixels around it, so that the blur
of its border is learned, and a cell too large for the crop is rescaled, never cut. Light that belongs to neighbours is
replaced by the average border profile, so that a crop shows one cell alone.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage import measure
from torch import Tensor

from synthaug.errors import DataError
from synthaug.generators.distance import signed_distance
from synthaug.generators.frame_fit import cell_contrasts
from synthaug.generators.texture import HALO, fade

MIN_RELATIVE_CONTRAST = 0.05
"""Cells dimmer than this share of their frame's median are annotation without signal; they cannot be normalised."""


SHARED_FIELDS = ("profile", "min_area", "counts")


@dataclass(frozen=True)
class CropSet:
    """Crops of whole cells (those cut by the frame's border are left out).

    Attributes:
        image: float32 [N, S, S]; light over the local background divided by the cell's own mean: 0 outside, mean 1 inside.
        sdf: float32 [N, S, S]; signed distance to the outline in crop pixels, negative inside.
        brightness: float32 [N]; the cell's contrast over the median contrast of its frame.
        radius: float32 [N]; radius of the enclosing circle in image pixels.
        scale: float32 [N]; image pixels per crop pixel.
        frame: int64 [N]; index of the frame the cell comes from.
        label: int64 [N]; its id there.
        profile: float32 [2 * HALO + 1]; median light at distances -HALO .. HALO from the outline (the border's blur).
        min_area: smallest instance taken, pixels.
        counts: how many instances were kept, and why others were not.
    """

    image: Tensor
    sdf: Tensor
    brightness: Tensor
    radius: Tensor
    scale: Tensor
    frame: Tensor
    label: Tensor
    profile: Tensor
    min_area: int = 20
    counts: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.image)

    def select(self, index: Tensor) -> Self:
        """The crops at `index`; profile, min_area and counts stay those of the whole set."""
        own = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name not in SHARED_FIELDS}
        return replace(self, **own)

    def to(self, device: str | torch.device) -> Self:
        """The same crops on another device."""
        tensors = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        moved: Self = replace(self, **tensors)  # type: ignore[arg-type]  # mypy takes them for fields of other types
        return moved


def enclosing_circle(points: NDArray[np.float64], num_iterations: int = 64) -> tuple[NDArray[np.float64], float]:
    """Centre and radius of a nearly smallest circle around `points` [n, 2] (Badoiu and Clarkson 2003, within 2 %)."""
    centre = (points.min(0) + points.max(0)) / 2
    for i in range(1, num_iterations):
        farthest = points[np.argmax(((points - centre) ** 2).sum(1))]
        centre = centre + (farthest - centre) / (i + 1)
    return centre, float(np.sqrt(((points - centre) ** 2).sum(1).max()))


def crop_size_for(radii: NDArray[np.float32]) -> int:
    """Crop size for cells of these enclosing radii: a multiple of 32 that holds 90 % of them with half a halo."""
    needed = 2 * (float(np.quantile(radii, 0.9)) + HALO / 2)
    return int(np.clip(32 * round(needed / 32), 32, 128))


def extract_crops(
    pairs: Iterable[tuple[NDArray[np.float32], NDArray[np.int32]]],
    *,
    crop_size: int | None = None,
    min_area: int | None = None,
    references: Sequence[float] | None = None,
    least_scale: float = 1.0,
) -> CropSet:
    """Cut every whole cell out of its frame.

    Args:
        pairs: (image [Y, X] float32 in camera counts, labels [Y, X] int32 contiguous from 1).
        crop_size: Pixels; default: chosen from the sizes of the cells (32 to 128).
        min_area: Smaller instances are specks: dropped and counted. Default: 2 % of the median area, at least 20 px.
        references: Contrast, in counts, of each frame that brightness is relative to. Default: its cells' median.
        least_scale: Image pixels per crop pixel of cells that fit the crop; below 1 they are enlarged.

    Returns:
        The crops, in the order of frames and labels.

    Raises:
        DataError: If no cell is left.
    """
    frames = list(pairs)
    counts: Counter[str] = Counter()
    if min_area is None:
        areas = np.concatenate([np.bincount(labels.ravel())[1:] for _, labels in frames] or [np.zeros(0, np.int64)])
        min_area = max(20, int(0.02 * np.median(areas[areas > 0]))) if (areas > 0).any() else 20
    found = []
    for index, (image, labels) in enumerate(frames):
        contrast, local = cell_contrasts(image, labels)
        areas = np.bincount(labels.ravel(), minlength=len(contrast) + 1)[1:]
        large = areas >= min_area
        counts["speck"] += int((~large & (areas > 0)).sum())
        if not large.any():
            continue
        median = float(np.median(contrast[large])) if references is None else references[index]
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            if box is None or not large[label - 1]:
                continue
            if any(s.start == 0 or s.stop == n for s, n in zip(box, labels.shape)):
                counts["cut by the border"] += 1
                continue
            if median <= 0 or contrast[label - 1] < MIN_RELATIVE_CONTRAST * median:
                counts["without contrast"] += 1
                continue
            if measure.label(labels[box] == label, connectivity=2).max() > 1:
                counts["several parts"] += 1
                continue
            points = np.argwhere(labels[box] == label) + [s.start for s in box]
            centre, radius = enclosing_circle(points.astype(float))
            found.append((index, label, centre, radius + 0.5, contrast[label - 1], local[label - 1], median))
    counts["kept"] = len(found)
    if not found:
        raise DataError(
            "the annotated images",
            expected=f"at least one whole cell of {min_area} px or more",
            got=dict(counts),
            remedy="Check that labels are instance ids (0 = background) and that min_area fits your cells.",
        )
    if len(found) < 20:
        warnings.warn(f"only {len(found)} whole cells to learn from; 20 or more are advisable", stacklevel=2)
    radii = np.asarray([f[3] for f in found], np.float32)
    size = crop_size or crop_size_for(radii)
    images, sdfs, foreign, scales = [], [], [], []
    for index, label, centre, radius, contrast_, base, _ in found:
        image, labels = frames[index]
        scale = max(least_scale, (radius + HALO / 2) / (size / 2))
        cut, own, other = _cut(image, labels, label, centre, scale, size)
        images.append((cut - base) / contrast_)
        sdfs.append(signed_distance(own))
        foreign.append(other)
        scales.append(scale)
    image_t = torch.from_numpy(np.stack(images)).float()
    sdf_t = torch.from_numpy(np.stack(sdfs))
    foreign_t = torch.from_numpy(np.stack(foreign))
    profile = _border_profile(image_t, sdf_t, foreign_t)
    return CropSet(
        image=_single_cell_light(image_t, sdf_t, foreign_t, profile),
        sdf=sdf_t,
        brightness=torch.tensor([f[4] / f[6] for f in found], dtype=torch.float32),
        radius=torch.from_numpy(radii),
        scale=torch.tensor(scales, dtype=torch.float32),
        frame=torch.tensor([f[0] for f in found]),
        label=torch.tensor([f[1] for f in found]),
        profile=profile,
        min_area=min_area,
        counts=counts,
    )


def _cut(
    image: NDArray[np.float32],
    labels: NDArray[np.int32],
    label: int,
    centre: NDArray[np.float64],
    scale: float,
    size: int,
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Image, own mask and foreign pixels (other cells with a margin, or outside the frame) of one crop."""
    reach = int(np.ceil(size * scale / 2)) + 2
    corner = np.round(centre).astype(int) - reach
    side = 2 * reach
    inside = [slice(max(c, 0), min(c + side, n)) for c, n in zip(corner, image.shape)]
    pad = [(s.start - c, c + side - s.stop) for s, c in zip(inside, corner)]
    patch = np.pad(image[tuple(inside)].astype(np.float32), pad, mode="edge")
    ids = np.pad(labels[tuple(inside)], pad, constant_values=-1)
    own = ids == label
    # Three pixels around a neighbour are still lit by it; pixels next to the cell itself stay its own.
    other = ndimage.binary_dilation((ids != label) & (ids != 0), iterations=3) & ~own
    if scale == 1.0:
        start = reach - size // 2
        window = (slice(start, start + size),) * 2
        return patch[window], own[window], other[window]
    # Sampling positions of the crop's pixel centres in the patch; blur first so that shrinking does not alias.
    grid = (np.arange(size) - (size - 1) / 2) * scale + reach - 0.5
    yy, xx = np.meshgrid(grid, grid, indexing="ij")
    smooth = ndimage.gaussian_filter(patch, 0.4 * np.sqrt(max(scale**2 - 1, 0)))
    cut = ndimage.map_coordinates(smooth, [yy, xx], order=1, mode="nearest")
    own_s = ndimage.map_coordinates(own.astype(np.float32), [yy, xx], order=1) > 0.5
    other_s = ndimage.map_coordinates(other.astype(np.float32), [yy, xx], order=1) > 0.5
    return cut.astype(np.float32), own_s, other_s & ~own_s


def _border_profile(image: Tensor, sdf: Tensor, foreign: Tensor) -> Tensor:
    """Median light at each whole distance from the outline, over pixels that belong to no neighbour."""
    values = []
    for d in range(-HALO, HALO + 1):
        near = (sdf > d - 0.5) & (sdf <= d + 0.5) & ~foreign
        values.append(image[near].median() if near.any() else torch.tensor(float(d < 0)))
    profile = torch.stack(values)
    profile[HALO:] = profile[HALO:].clamp_min(0).cummin(0).values  # outside, light only falls
    return profile


def _single_cell_light(image: Tensor, sdf: Tensor, foreign: Tensor, profile: Tensor) -> Tensor:
    """Crops with the neighbours' light replaced by the average profile, faded to 0 at `HALO`."""
    position = (sdf + HALO).clamp(0, 2 * HALO)
    low = position.floor().long().clamp(max=2 * HALO - 1)
    expected = torch.lerp(profile[low], profile[low + 1], position - low)
    return torch.where(foreign, expected, image) * fade(sdf)
