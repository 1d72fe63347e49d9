"""Fits `PopulationSynthesis` to real label images: clustering, gaps, the spread of the number of cells, the region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthaug.errors import InputError
from synthaug.generators import layout
from synthaug.generators.frame_fit import spaced
from synthaug.generators.population import PopulationSynthesis, of_cells
from synthaug.generators.population_config import PopulationConfig
from synthaug.generators.region import Region
from synthaug.generators.stage import Noise
from synthaug.kernels.compositing import resample, resample_stacks
from synthaug.randomness import SampleKey
from synthaug.types import Cells


def fit_population(
    labels: Sequence[NDArray[np.integer[Any]]],
    *,
    min_area: int,
    z_spacing: float = 1.0,
    depth: float | None = None,
    counts_per_volume: Sequence[float] | None = None,
    centres: Sequence[NDArray[Any]] | None = None,
    moments: Sequence[tuple[NDArray[Any], NDArray[Any]]] | None = None,
) -> PopulationSynthesis:
    """Fit all of the configuration to real label images; a few seconds.

    Volumes need annotations in single planes only: clustering is fitted to the gaps seen in these planes, by placing
    stacks made of the real outlines and looking at the same planes. What planes cannot tell are arguments; for
    volumes annotated in every plane the defaults are measured instead.

    Args:
        labels: int [Y, X] each, 0 = background, or int [Z, Y, X] each, where planes that nobody annotated hold
            `UNLABELLED`. Instances under `min_area` pixels (in planes: `min_area` to the power 2/3) are ignored.
        min_area: pixels (voxels) an instance must have, >= 1.
        z_spacing: pixels of the image plane from plane to plane, > 0.
        depth: planes that a cell spans on average; by default as long as its outline is wide.
        counts_per_volume: cells of each whole volume; by default from the cells of a plane and `depth`.
        centres: float [n, 3] (ZYX, voxels) each, middles of any n cells of each volume: cells are confined to a
            region if those of the real volumes are; by default (if planes are missing) they are not.
        moments: mean [3] and covariance [3, 3] of the positions (ZYX, voxels) of each volume's bright voxels; by
            default those of the centres.

    Raises:
        InputError: no frame holds a cell that is not cut by the border, or arguments do not fit each other.
    """
    if min_area < 1:
        raise InputError("min_area", expected="a number of pixels >= 1", got=min_area)
    dimensions = {np.ndim(frame) for frame in labels}
    if len(dimensions) > 1 or not dimensions <= {2, 3}:
        raise InputError("labels", expected="all [Y, X] or all [Z, Y, X]", got=f"{sorted(dimensions)} axes")
    if dimensions == {3}:
        return PopulationSynthesis(
            _fit_volumes(labels, min_area, z_spacing, depth, counts_per_volume, centres, moments)
        )
    frames = [layout.drop_small(np.asarray(frame), min_area) for frame in labels]
    masks = _whole_masks(frames, min_area)
    reach = layout.reach(masks, min_area)
    config = PopulationConfig(
        min_area=min_area,
        reach=reach,
        frame_size=_median_size(frames),
        dispersion=layout.dispersion(frames, reach, min_area),
    )
    return PopulationSynthesis(replace(config, **_fit_frames(frames, masks, config)))


def _whole_masks(frames: Sequence[layout.Labels], min_area: int) -> list[NDArray[np.bool_]]:
    masks = [mask for frame in frames for mask in layout.whole_masks(frame)]
    if not masks:
        raise InputError(
            "labels",
            expected=f"at least one cell of {min_area} pixels or more that is not cut by the border",
            got=f"none in {len(frames)} frames",
            remedy="Give other frames or a smaller min_area.",
        )
    return masks


def _median_size(frames: Sequence[NDArray[Any]]) -> tuple[int, ...]:
    return tuple(int(np.median(sides)) for sides in zip(*(frame.shape for frame in frames)))


def _diameter(masks: Sequence[NDArray[np.bool_]]) -> float:
    return float(np.median([2 * np.sqrt(mask.sum() / np.pi) for mask in masks]))


def _fit_frames(
    frames: list[NDArray[np.int32]], masks: list[NDArray[np.bool_]], config: PopulationConfig
) -> dict[str, Any]:
    """Clustering probability and gaps: the real masks are placed anew, and the gaps to nearest neighbours compared."""
    frames = [frame for frame in frames if frame.max(initial=0) > 1]
    if frames:  # about 1,500 cells tell enough
        most = math.ceil(1500 / np.mean([frame.max() for frame in frames]))
        frames = spaced(frames, most)
    real = [layout.neighbour_gaps(frame) for frame in frames]
    if not real:
        return {"clustering": 0.0, "gaps": (0,)}
    pooled, diameter = np.concatenate(real), _diameter(masks)
    config = replace(config, gaps=layout.near_gaps(pooled, diameter, frames))
    cells, trials = layout.cells_of_masks(masks), []
    for i, frame in enumerate(frames):
        key, count = SampleKey(0, ("fit clustering", i)), len(real[i])
        drawn = {k: v[0] for k, v in PopulationSynthesis(config).draw([key], (1, 1), [count]).items()}
        chosen = cells.select(torch.from_numpy(key.child("picks").numpy().integers(0, len(cells), count)))
        trials.append((resample(chosen, drawn["rotation"], drawn["flip"])[1], drawn, torch.zeros((1, *frame.shape))))

    def trial(clustering: float, clearance: int) -> NDArray[np.float64]:
        stage = PopulationSynthesis(replace(config, clustering=clustering, clearance=clearance))
        labels = [stage.place(m, drawn, [len(m)], clustering, canvas.int())[0] for m, drawn, canvas in trials]
        return np.concatenate([layout.neighbour_gaps(x[0].numpy()) for x in labels])

    p, clearance = layout.fit_clustering(pooled, diameter, trial)
    return {"clustering": p, "clearance": clearance, "gaps": config.gaps}


def _fit_volumes(
    labels: Sequence[NDArray[np.integer[Any]]],
    min_area: int,
    z_spacing: float,
    depth: float | None,
    counts: Sequence[float] | None,
    centres: Sequence[NDArray[Any]] | None,
    moments: Sequence[tuple[NDArray[Any], NDArray[Any]]] | None,
) -> PopulationConfig:
    """The whole configuration for volumes; see `fit_population`."""
    volumes = [np.asarray(volume) for volume in labels]
    planes = [layout.annotated(volume) for volume in volumes]
    for name, given in (("counts_per_volume", counts), ("centres", centres), ("moments", moments)):
        if given is not None and len(given) != len(volumes):
            raise InputError(name, expected=f"one entry for each of {len(volumes)} volumes", got=len(given))
    if all(len(found) == len(volume) for found, volume in zip(planes, volumes)):
        whole = [layout.drop_small(volume, min_area) for volume in volumes]
        depth = layout.depth(whole) if depth is None else depth
        counts = [float(volume.max(initial=0)) for volume in whole] if counts is None else counts
        centres = [layout.middles(volume) for volume in whole] if centres is None else centres
        moments = layout.moments(whole) if moments is None else moments
    least = max(round(min_area ** (2 / 3)), 1)
    looked_at = [spaced(found, 8) for found in planes]
    frames = [layout.drop_small(volume[z], least) for volume, found in zip(volumes, looked_at) for z in found]
    masks = _whole_masks(frames, least)
    diameter = _diameter(masks)
    depth = depth or diameter / z_spacing
    if counts is None:
        seen = [[layout.drop_small(volume[z], least).max() for z in found] for volume, found in zip(volumes, planes)]
        counts = [float(np.mean(n or [0]) * len(volume) / depth) for n, volume in zip(seen, volumes)]
    cells = layout.cells_of_sections(masks, depth)
    reach_z, reach = layout.reach_volume(cells.mask.numpy(), min_area)
    config = PopulationConfig(
        min_area=min_area,
        reach=reach,
        reach_z=reach_z,
        frame_size=_median_size(volumes),
        dispersion=layout.dispersion(frames, layout.reach(masks, least), least),
        z_spacing=z_spacing,
        region=None if centres is None else Region.fit([v.shape for v in volumes], centres, counts, moments),
    )
    real = [layout.neighbour_gaps(frame) for frame in frames]
    pooled = np.concatenate([np.empty(0), *real])
    if not len(pooled):
        return config
    config = replace(config, gaps=layout.near_gaps(pooled, diameter, frames))
    chosen = spaced(range(len(volumes)), 16)
    trials = [_trial_volume(config, cells, i, volumes[i].shape, round(counts[i])) for i in chosen if planes[i]]

    def trial(clustering: float, clearance: int) -> NDArray[np.float64]:
        stage, gaps = PopulationSynthesis(replace(config, clustering=clustering, clearance=clearance)), [np.empty(0)]
        for (masks, drawn, regions, size), wanted in zip(trials, (looked_at[i] for i in chosen if planes[i])):
            made = stage.place_3d(masks, drawn, [len(masks)], clustering, size, regions)[0][0].numpy()
            gaps += [layout.neighbour_gaps(layout.drop_small(made[z], least)) for z in wanted]
        return np.concatenate(gaps)

    p, clearance = layout.fit_clustering(pooled, diameter, trial)
    return replace(config, clustering=p, clearance=clearance)


def _trial_volume(
    config: PopulationConfig, cells: Cells, i: int, size: tuple[int, ...], count: int
) -> tuple[Tensor, Noise, Tensor, tuple[int, ...]]:
    """Masks of `count` stacks, their noise and region, for a volume of this size."""
    key, stage = SampleKey(0, ("fit clustering", i)), PopulationSynthesis(config)
    noise = stage.draw([key], size, [count])
    drawn = of_cells(noise, [count])
    chosen = cells.select(torch.from_numpy(key.child("picks").numpy().integers(0, len(cells), count)))
    masks = resample_stacks(chosen, drawn["rotation"], drawn["flip"], drawn["mirror"])[1]
    return masks, drawn, stage.regions(noise, None), size
