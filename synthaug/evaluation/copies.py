"""Near-copies: does the generator repeat its training cells?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synthaug.evaluation.tiles import Floats, cut_by_border
from synthaug.randomness import SampleKey
from synthaug.types import Pair

_NUM_RADII, _NUM_ANGLES, _REACH, _TEXTURE_WEIGHT, _NUM_CANDIDATES = 12, 64, 1.6, 2.0, 64


_TURNED_FRAMES, _TURNED_PLANES = 8, 96
"""Frames, and planes of volumes with far fewer cells each, that the control turns."""


def cell_planes(volumes: Sequence[Pair], share: float = 1.0) -> list[Pair]:
    """Planes of volumes as frames, in each of which only the cells are labelled that are large there.

    Args:
        volumes: Where single planes were annotated with ids of their own, every section counts as a cell.
        share: Of a cell's largest section, in (0, 1], which its section in the plane has at least; 1: every cell is in
            one plane only, the first in which it is largest.

    Returns:
        image [Y, X] and labels [Y, X] of every plane that has such a cell; ids are those of the volume.
    """
    out = []
    for image, volume in volumes:
        labels = np.maximum(volume, 0)
        sections = np.stack([np.bincount(plane.ravel(), minlength=int(labels.max()) + 1) for plane in labels])
        largest = sections.max(0)
        large = sections >= np.maximum(share * largest, 1)
        if share == 1:
            large &= np.arange(len(sections))[:, None] == sections.argmax(0)
        large[:, 0] = False
        out += [(image[z], np.where(large[z][labels[z]], labels[z], 0)) for z in np.flatnonzero(large.any(1))]
    return out


def polar_descriptors(pairs: Sequence[Pair], sigma: float, min_area: int = 20) -> NDArray[np.float32]:
    """Every whole cell, masked and divided by its mean intensity, resampled on rings around its centre.

    Polar, because aligning by the principal axis fails for nearly round cells: of training cells rotated by 33° it
    found 10 in 100 at best, trying all rotations of polar samples finds 99 (BBBC039).

    Args:
        pairs: Frames of any size; cells cut by a border and cells under `min_area` pixels are left out.
        sigma: Gaussian smoothing in pixels, against camera noise and resampling.

    Returns:
        float32 [N, 24, 64]: 12 radii up to 1.6 times that of a disc of the same area, first of the soft mask, then of
        the texture (mean 0, weighted by 2), by 64 angles. Squared differences sum to a mean over the disc.
    """
    from scipy import ndimage

    radii = (np.arange(_NUM_RADII) + 0.5) / _NUM_RADII * _REACH
    angles = np.arange(_NUM_ANGLES) * 2 * np.pi / _NUM_ANGLES
    weight = np.sqrt(radii / (radii.sum() * _NUM_ANGLES))[:, None]
    pad = math.ceil(4 * sigma) + 1
    out = []
    for image, labels in pairs:
        free = ndimage.distance_transform_edt(labels == 0) > 6
        base = float(np.median(image[free])) if free.any() else float(image.min())
        cut = set(cut_by_border(labels).tolist())
        for index, box in enumerate(ndimage.find_objects(labels), start=1):
            if box is None or index in cut:
                continue
            own = np.pad(labels[box] == index, pad).astype(np.float32)
            area = own.sum()
            light = own * np.pad(image[box] - base, pad)
            if area < min_area or light.sum() <= 0:
                continue
            centre = ndimage.center_of_mass(own)
            reach = np.sqrt(area / np.pi) * radii[:, None]
            where = [centre[0] + reach * np.sin(angles), centre[1] + reach * np.cos(angles)]
            mask = ndimage.map_coordinates(ndimage.gaussian_filter(own, sigma), where, order=1)
            inside = ndimage.map_coordinates(ndimage.gaussian_filter(light, sigma), where, order=1) * area / light.sum()
            out.append(np.concatenate([mask * weight, _TEXTURE_WEIGHT * (inside - mask) * weight]))
    return np.asarray(out, np.float32).reshape(-1, 2 * _NUM_RADII, _NUM_ANGLES)


def nearest_distances(cells: NDArray[np.float32], training: NDArray[np.float32]) -> Floats:
    """Distance of each cell to the training cell it resembles most, over all rotations and mirror images.

    The 64 training cells with the most similar rotation-invariant moduli (one matrix product) are compared in full, by
    circular correlation over the angle.

    Args:
        cells: float32 [N, 24, 64] of `polar_descriptors`.
        training: float32 [M, 24, 64], M >= 1.

    Returns:
        float64 [N], >= 0; 0 = identical.
    """
    turns, training_turns = np.fft.rfft(cells), np.fft.rfft(training)
    invariant, training_invariant = (
        np.abs(f[..., :12]).reshape(len(f), -1).astype(np.float32) for f in (turns, training_turns)
    )
    norms = (training.astype(np.float64) ** 2).sum((1, 2))
    count = min(_NUM_CANDIDATES, len(training))
    best = np.empty(len(cells))
    for start in range(0, len(cells), 512):
        block = slice(start, start + 512)
        rough = (training_invariant**2).sum(1) - 2 * invariant[block] @ training_invariant.T
        for row, near in enumerate(np.argpartition(rough, count - 1, axis=1)[:, :count], start=start):
            products = [(f * training_turns[near]).sum(1) for f in (turns[row].conj(), turns[row])]
            alike = np.fft.irfft(np.stack(products), n=_NUM_ANGLES).max((0, 2))
            squared = (cells[row].astype(np.float64) ** 2).sum() + norms[near] - 2 * alike
            best[row] = np.sqrt(max(float(squared.min()), 0.0))
    return best


@dataclass(frozen=True)
class NearCopies:
    """How many cells are near-copies of a training cell.

    Attributes:
        threshold: Distances under it count as near-copies: where 1 % of the val cells would lie if their log distances
            were normal, by their median and lower quartile. (Their own 1 % quantile would be set by the duplicates that
            some data sets hold.)
        val_share: Of the val cells, in [0, 1]. Much over 0.01 says that val and train share cells.
        synthetic_share: Of the synthetic cells. Smooth or featureless cells are near to some training cell too, so a
            large share asks for a look, it does not prove copying.
        control_share: Of training cells after a rotation by 33° with interpolation: how many copies the test finds.
        val_median: Median distance of val cells to their nearest training cell.
        synthetic_median: The same for synthetic cells.
        num_train: Training cells compared with; of volumes, sections of them.
        num_val: Val cells compared.
        num_synthetic: Synthetic cells compared.
    """

    threshold: float
    val_share: float
    synthetic_share: float
    control_share: float
    val_median: float
    synthetic_median: float
    num_train: int
    num_val: int
    num_synthetic: int


def near_copies(
    train: Sequence[Pair],
    val: Sequence[Pair],
    synthetic: Sequence[Pair],
    *,
    max_cells: int = 2000,
    seed: int = 0,
) -> NearCopies:
    """Share of near-copies of training cells among synthetic cells, beside that among val cells.

    A generator of volumes learns from planes. So of volumes every val and synthetic cell is looked at in the plane where
    it is largest, and compared with all sections of training cells that are at least half as large as the largest one.

    Args:
        train: All frames or volumes the generator was trained on; every whole cell of them is compared with.
        val: Real ones it has not seen.
        synthetic: Those it made.
        max_cells: So many val and so many synthetic cells are compared at most, drawn at random.
        seed: For that draw.

    Returns:
        `NearCopies`; NaN shares where a set has no whole cell.
    """
    from scipy import ndimage

    def chosen(cells: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        rng = SampleKey(seed, ("near_copies", name)).numpy()
        return cells if len(cells) <= max_cells else cells[np.sort(rng.choice(len(cells), max_cells, replace=False))]

    num_turned = _TURNED_FRAMES
    if train[0][0].ndim == 3:
        num_turned = _TURNED_PLANES
        train, val, synthetic = cell_planes(train, 0.5), cell_planes(val), cell_planes(synthetic)
    areas = np.concatenate([np.zeros(0, np.int64), *(np.bincount(labels.ravel())[1:] for _, labels in train)])
    sigma = max(0.08 * math.sqrt(float(np.median(areas[areas > 0])) / math.pi), 0.5) if areas.any() else 1.0
    training = polar_descriptors(train, sigma)
    others = chosen(polar_descriptors(val, sigma), "val"), chosen(polar_descriptors(synthetic, sigma), "synthetic")
    counts = len(training), len(others[0]), len(others[1])
    if not all(counts):
        unknown = float("nan")
        return NearCopies(unknown, unknown, unknown, unknown, unknown, unknown, *counts)
    val_distances, distances = (nearest_distances(cells, training) for cells in others)
    quartile, median = np.quantile(np.log(val_distances + 1e-6), (0.25, 0.5))
    threshold = float(np.exp(median - 2.326 * (median - quartile) / 0.6745))

    rotated: list[Pair] = []
    for image, labels in train[:: max(len(train) // num_turned, 1)]:
        whole = np.where(np.isin(labels, cut_by_border(labels)), 0, labels)
        turned = ndimage.rotate(image, 33.0, order=1, mode="reflect")
        rotated.append((turned, ndimage.rotate(whole, 33.0, order=0)))
    control = chosen(polar_descriptors(rotated, sigma), "control")
    control_share = float((nearest_distances(control, training) < threshold).mean()) if len(control) else float("nan")
    return NearCopies(
        threshold,
        float((val_distances < threshold).mean()),
        float((distances < threshold).mean()),
        control_share,
        float(np.median(val_distances)),
        float(np.median(distances)),
        *counts,
    )
