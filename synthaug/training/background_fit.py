"""Fits `Background` to real frames and stacks: a row of measures for each, the noise, the illumination, tiles free of cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from synthaug.errors import InputError
from synthaug.generators.axial import axial_sigma, fit_attenuation, mask_half_length
from synthaug.generators.background import Background, BackgroundConfig
from synthaug.generators.camera import saturation_of
from synthaug.generators.electrons import fit_read_noise
from synthaug.generators.frame_fit import (
    BLOCK,
    NAMES,
    FrameMeasure,
    fill_rows,
    fit_jitter,
    fit_kernel,
    fit_light_field,
    inpaint,
    measure_frame,
)
from synthaug.generators.volume_fit import NOISE_GATE, VOLUME_NAMES, VOLUME_POSITIVE, measure_volume, pool_attenuation
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED

VOLUME_TILE, NUM_VOLUME_TILES = (16, 96, 96), 3
"""Size (Z, Y, X) and number of the background tiles kept of stacks: under 1 MB."""


def fit_background(
    frames: Sequence[NDArray[np.float32]],
    labels: Sequence[NDArray[np.int32]],
    *,
    num_tiles: int = 8,
    tile_size: int = 256,
    counts: Sequence[float] | None = None,
) -> Background:
    """Measure real frames or stacks.

    Args:
        frames: float [Y, X] each, or [Z, Y, X] each, camera counts; sizes may differ.
        labels: int32 of the same shape each, 0 = background; contiguous from 1 in frames. In stacks planes that nobody
            annotated are `UNLABELLED` throughout; one annotated plane in a stack is enough.
        num_tiles: How many background tiles to keep for `background="real"`; of stacks 3 at most.
        tile_size: Their side in pixels; the smallest frame's side if that is less. Of stacks 96 at most, 16 planes.
        counts: Cells in each stack, where known; default: from the annotated planes and the cells' length along z.

    Raises:
        InputError: no frames, or a frame and its labels do not match.
    """
    if len(frames) and frames[0].ndim == 3:
        return _fit_volumes(frames, labels, num_tiles=num_tiles, tile_size=tile_size, counts=counts)
    if not len(frames) or len(frames) != len(labels):
        raise InputError("frames", expected="at least one, each with labels", got=f"{len(frames)} and {len(labels)}")
    for i, (frame, label) in enumerate(zip(frames, labels)):
        if frame.ndim != 2 or frame.shape != label.shape or min(frame.shape) < 2 * BLOCK:
            got = f"{frame.shape} and {label.shape}"
            raise InputError(f"frames[{i}]", expected=f"[Y, X] as its labels, {2 * BLOCK} or more a side", got=got)
        if not np.isfinite(frame).all():
            raise InputError(f"frames[{i}]", expected="finite counts", got="NaN or infinity")
    integer = all(bool((f == np.round(f)).all()) for f in frames)
    saturation = saturation_of(max(float(f.max()) for f in frames), integer)
    stage = Background(BackgroundConfig(integer=integer, saturation=saturation))
    measures = [
        measure_frame(np.asarray(f, np.float64), np.asarray(n, np.int32), saturation=saturation)
        for f, n in zip(frames, labels)
    ]
    kernel = fit_kernel(measures, integer)
    fill_rows(measures, kernel, integer)
    stage.kernel = torch.from_numpy(kernel)
    stage.table = torch.tensor([[m.row[name] for name in NAMES] for m in measures], dtype=torch.float32)
    stage.jitter = torch.from_numpy(fit_jitter(stage.table.numpy(), stage.config.bandwidth))
    stage.light_field = torch.from_numpy(fit_light_field(measures))
    side = min(tile_size, *(n for f in frames for n in f.shape))
    _keep_tiles(stage, frames, measures, num_tiles, (side, side))
    return stage.eval()


def _fit_volumes(
    volumes: Sequence[NDArray[np.float32]],
    labels: Sequence[NDArray[np.int32]],
    *,
    num_tiles: int,
    tile_size: int,
    counts: Sequence[float] | None,
) -> Background:
    """The same for stacks."""
    if len(volumes) != len(labels) or (counts is not None and len(counts) != len(volumes)):
        got = f"{len(volumes)}, {len(labels)} and {len(counts) if counts is not None else 'none'}"
        raise InputError("frames", expected="volumes, labels and counts of one number", got=got)
    for i, (volume, label) in enumerate(zip(volumes, labels)):
        if volume.ndim != 3 or volume.shape != label.shape or volume.shape[0] < 4 or min(volume.shape[1:]) < 2 * BLOCK:
            expected = f"[Z, Y, X] as its labels, 4 planes or more, {2 * BLOCK} pixels or more a side"
            raise InputError(f"frames[{i}]", expected=expected, got=f"{volume.shape} and {label.shape}")
        if not np.isfinite(volume).all():
            raise InputError(f"frames[{i}]", expected="finite counts", got="NaN or infinity")
    if all((label == UNLABELLED).any((1, 2)).all() for label in labels):
        raise InputError("labels", expected="at least one annotated plane", got="none in any volume")
    integer = all(bool((v == np.round(v)).all()) for v in volumes)
    saturation = saturation_of(max(float(v.max()) for v in volumes), integer)
    told = [
        measure_volume(np.asarray(v, np.float64), np.asarray(n, np.int32), saturation=saturation)
        for v, n in zip(volumes, labels)
    ]
    measures = [m for m, _, _ in told]
    sections = [s for _, own, _ in told for s in own]
    kernel = fit_kernel(measures, integer, gate=NOISE_GATE)
    fill_rows(measures, kernel, integer)
    sigma, length = axial_sigma(sections), max(2 * mask_half_length(sections), 1.0)
    slopes = pool_attenuation([fit_attenuation(own) for _, own, _ in told])
    for i, (m, own, _) in enumerate(told):
        m.row["axial_sigma"] = (axial_sigma(own) or sigma) if len(own) >= 10 else sigma
        m.row["attenuation"] = slopes[i]
        m.row["density"] = counts[i] / volumes[i].size if counts is not None else m.row["density"] / length
    reads = [fit_read_noise(d, float(d.var()), m.row["gain"]) for m, _, d in told]
    config = BackgroundConfig(integer, saturation, ndim=3, read_noise=float(np.median(reads)))
    stage = Background(config)
    stage.kernel = torch.from_numpy(kernel)
    stage.table = torch.tensor([[m.row[name] for name in VOLUME_NAMES] for m in measures], dtype=torch.float32)
    jitter = fit_jitter(stage.table.numpy(), config.bandwidth, VOLUME_NAMES, VOLUME_POSITIVE)
    stage.jitter = torch.from_numpy(jitter)
    wanted = (VOLUME_TILE[0], min(VOLUME_TILE[1], tile_size), min(VOLUME_TILE[2], tile_size))
    side = tuple(min(n, *(v.shape[axis] for v in volumes)) for axis, n in enumerate(wanted))
    _keep_tiles(stage, volumes, measures, min(num_tiles, NUM_VOLUME_TILES), side)
    return stage.eval()


def _keep_tiles(
    stage: Background,
    frames: Sequence[NDArray[np.float32]],
    measures: Sequence[FrameMeasure],
    num_tiles: int,
    size: tuple[int, ...],
) -> None:
    """Keep the emptiest window of each of the emptiest frames, cells replaced by smooth background plus noise."""
    found = []
    for i, m in enumerate(measures):
        total = m.covered.astype(np.float64)
        starts = []
        for axis, side in enumerate(size):
            length = total.shape[axis]
            step = 16 if axis >= len(size) - 2 else 4
            starts.append(np.array(sorted({*range(0, length - side + 1, step), length - side})))
            running = np.insert(total.cumsum(axis), 0, 0.0, axis=axis)
            total = running.take(starts[-1] + side, axis) - running.take(starts[-1], axis)
        best = np.unravel_index(int(total.argmin()), total.shape)
        found.append((float(total[best]), i, tuple(int(s[b]) for s, b in zip(starts, best))))
    tiles, levels = [], []
    for _, i, corner in sorted(found)[:num_tiles]:
        m = measures[i]
        window = tuple(slice(c, c + side) for c, side in zip(corner, size))
        image = np.asarray(frames[i], np.float64)[window]
        # four pixels more than the fit leaves out, so that no halo is left around a hole
        hole = ndimage.binary_dilation(m.covered[window], iterations=4)
        hole = hole if not hole.all() else m.covered[window]
        expected = inpaint(image, hole, m.row["level"])
        variance = m.row["flat_variance"] + m.row["gain"] * (expected - m.row["level"])
        margin = len(stage.kernel) - 1
        shape = (*hole.shape[:-2], hole.shape[-2] + margin, hole.shape[-1] + margin)
        white = torch.from_numpy(SampleKey(0, ("tile", i)).numpy().standard_normal([1, 1, *shape])).float()
        filled = stage.camera_counts(
            torch.from_numpy(expected)[None, None].float(),
            torch.from_numpy(variance)[None, None].float(),
            white,
            torch.tensor([m.row["gain"]]).float(),
        )[0, 0].numpy()
        tiles.append(np.where(hole, filled, image))
        levels.append(m.row["level"])
    whole = stage.config.integer and stage.config.saturation <= 65535
    stage.tiles = torch.from_numpy(np.stack(tiles).astype(np.uint16 if whole else np.float32))
    stage.tile_levels = torch.tensor(levels, dtype=torch.float32)
