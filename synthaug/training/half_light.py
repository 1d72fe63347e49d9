"""Where annotators draw outlines, compared with half of the cell's light, and a cascade whose frames show the same.

`border.py` compares single crops, painted and real. On its way into a frame light is moved again: cells are drawn enlarged,
networks that are lent paint some of them, haze and neighbours add to it, and planes get light from those above and below.
Outlines were off by 0.2 px then, and a segmenter learns that to the pixel: of cells of 6 px, a fifteenth of their area.

In planes that goes by the mean profile across an outline (volumes were measured so), in frames by the contour of half light. A
mean makes up for dim stretches of an edge by bright ones, a segmenter does not: it saw lent cells, whose light is clumpy, 6 %
smaller than they were labelled (BBBC039; real ones 0.5 %), and so outlined real ones wider, the sooner to merge with others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from synthaug.cascade import Cascade
from synthaug.generators.frame_fit import far_level, spaced
from synthaug.generators.texture import TextureDiffusion
from synthaug.randomness import SampleKey
from synthaug.types import Cells

Frame = tuple[NDArray[np.floating], NDArray[np.integer]]
"""Image and labels [Y, X]."""

USUAL = {2: -0.4, 3: -1.15}
"""Pixels from an outline to half of the light where hardly any frame tells (`half_contour`), or plane of a volume
(`half_light`), by the dimensions; negative inside. Medians of training frames: -0.29 (BBBC039, small and large ones of DSB2018
-0.35 and -0.69), planes -1.14 (BBBC050)."""

USUAL_FRAMES = 2.0
"""Frames that `USUAL` weighs as much as. Within a set frames differ by 0.17 to 0.66 px, as they come from several hands."""

DISTANCES = np.arange(-4, 6)
"""Whole pixels from the outline at which light is looked at, negative inside."""

LEAST_AREA, LEAST_CORE, LEAST_EDGE = 30, 10, 8
"""Pixels of a cell, of its part deeper than 2 px, and of its edge away from others, from which on it tells something."""

RIM, SMOOTH = 4, 0.7
"""Pixels from the outline within which light's contour is looked for, and of the blur against noise before."""

LEAST_SPREAD = 20.0
"""Sum of squared e-folds of brightness, of a few hundred annotated cells, from which on they tell how outlines follow it. Cells
differ by 0.5 px besides; four patches miss the slopes of -0.70 (BBBC039), -0.69 and -0.30 (small and large cells of DSB2018) by
0.2, and cascades made to follow such taught no better."""

NUM_CELLS, NUM_FRAMES = 48, {2: 24, 3: 8}
"""Fresh cells that are looked at, and frames or volumes they are placed in, by the dimensions. Medians of 24 frames repeat to
0.02 px, of 8 to 0.04 px, and no better with four times the cells, which take much longer than the frames."""

MOST_FRAMES, LARGEST = 64, 512
"""Annotated frames that are looked at, spread over all, and the longest side (Y, X) of those made."""

GAIN, GAINS = {2: 0.85, 3: 0.57}, (0.4, 1.3)
"""Pixels that half of the light moves for each that `outline_shift` says: where it is not measured, and what is believed."""

LEAST_TRIED = 0.1
"""Crop pixels of a change below which its effect tells nothing."""

FARTHEST = 3.0
"""Crop pixels by which `outline_shift` is changed at most."""


def half_light(frame: Frame) -> NDArray[np.float64]:
    """Distance in pixels from each outline to half of the cell's light, negative inside; of cells that tell it, [n].

    Light is compared with the mean of what lies deeper than 2 px, over the background. Places within 3 px of another cell
    are left out.
    """
    found = []
    for light, _, inside, outside, near_others in _cells_of(frame, blur=0.0):
        distance = np.where(inside > 0, 0.5 - inside, outside - 0.5)
        distance[(outside > 0) & near_others] = np.inf
        rings = [light[(distance > d - 0.5) & (distance <= d + 0.5)] for d in DISTANCES]
        profile = np.array([ring.mean() if ring.size > 3 else np.nan for ring in rings])
        falls = np.flatnonzero((profile[:-1] >= 0.5) & (profile[1:] < 0.5))
        if len(falls):
            i = falls[0]
            found.append(DISTANCES[i] + (profile[i] - 0.5) / (profile[i] - profile[i + 1]))
    return np.array(found, np.float64)


def half_contour(frame: Frame) -> NDArray[np.float64]:
    """Mean distance in pixels from each outline to the contour of half of the cell's light, negative inside, [n].

    That is the area of what is brighter than half outside the outline less what is dimmer inside, both within `RIM` px of it,
    over its length. Light is compared and places are left out as by `half_light`.
    """
    return _contours(frame)[:, 0]


def brightness_slope(frames: Sequence[Frame], least_spread: float = 0.0) -> float:
    """Pixels by which `half_contour` grows for each e-fold that a cell is brighter than others of its frame; least squares.

    Args:
        frames: Images and labels.
        least_spread: Sum of squared e-folds below which the answer is NaN.
    """
    return _slope([_contours(frame) for frame in spaced(frames, MOST_FRAMES)], least_spread)


def _slope(found: Sequence[NDArray[np.float64]], least_spread: float) -> float:
    """`brightness_slope` of what `_contours` found in each frame."""
    products, squares = 0.0, 0.0
    for told in found:
        if len(told) > 1:
            distance, brightness = (told - told.mean(0)).T
            products += float(distance @ brightness)
            squares += float(brightness @ brightness)
    return products / squares if squares > least_spread else np.nan


def _contours(frame: Frame) -> NDArray[np.float64]:
    """`half_contour` and log brightness in counts, of cells that tell both, [n, 2]."""
    found = []
    for light, brightness, inside, outside, near_others in _cells_of(frame, blur=SMOOTH):
        length = ((inside == 1) & ~near_others).sum()
        if length >= LEAST_EDGE:
            won = (outside > 0) & (outside <= RIM) & (light > 0.5) & ~near_others
            lost = (inside > 0) & (inside <= RIM) & (light <= 0.5) & ~near_others
            found.append(((won.sum() - lost.sum()) / length, np.log(brightness)))
    return np.array(found, np.float64).reshape(-1, 2)


MEASURES = {2: half_contour, 3: half_light}
"""What is compared in frames and in planes of volumes."""


def _cells_of(
    frame: Frame, blur: float
) -> Iterator[tuple[NDArray[Any], float, NDArray[Any], NDArray[Any], NDArray[np.bool_]]]:
    """Of all cells that tell something: light over their core's, blurred by so many pixels, their core's in counts, how deep
    inside a pixel lies, how far outside, and whether within 3 px of others."""
    image, labels = frame[0].astype(np.float64), frame[1]
    cells, background = labels > 0, far_level(image, labels)[1]
    image = ndimage.gaussian_filter(image, blur)
    margin = int(DISTANCES[-1]) + 3
    for label, box in enumerate(ndimage.find_objects(labels.astype(np.int32)), start=1):
        if box is None or any(s.start == 0 or s.stop == n for s, n in zip(box, labels.shape)):
            continue
        near = tuple(slice(max(s.start - margin, 0), s.stop + margin) for s in box)
        own = labels[near] == label
        if own.sum() < LEAST_AREA:
            continue
        others = cells[near] & ~own
        near_others = ndimage.distance_transform_edt(~others) <= 3 if others.any() else np.zeros_like(own)
        light = image[near] - background
        inside = ndimage.distance_transform_edt(own)
        core = light[inside > 2.5]
        if core.size >= LEAST_CORE and core.mean() > 0:
            yield light / core.mean(), float(core.mean()), inside, ndimage.distance_transform_edt(~own), near_others


def wanted_half_light(frames: Sequence[Frame], ndim: int = 2) -> float:
    """Median over the cells of annotated frames, or planes (`ndim` 3), pulled to `USUAL` where these are few; NaN without."""
    return _wanted([MEASURES[ndim](frame) for frame in spaced(frames, MOST_FRAMES)], ndim)


def _wanted(found: Sequence[NDArray[np.float64]], ndim: int) -> float:
    """`wanted_half_light` of what was found in each frame, or plane."""
    found = [distances for distances in found if len(distances)]
    if not found:
        return np.nan
    own = float(np.median(np.concatenate(found)))
    return (len(found) * own + USUAL_FRAMES * USUAL[ndim]) / (len(found) + USUAL_FRAMES)


def match_half_light(
    cascade: Cascade, annotated: Sequence[Frame], size: Sequence[int], seed: int, cells: Cells | None = None
) -> list[str]:
    """Set `outline_shift` of the textures, own and lent, so that half of the light lies where annotated frames have it.

    Of many annotated cells in frames `outline_slope`, too: how outlines follow brightness (`brightness_slope`).

    Args:
        cascade: Changed in place.
        annotated: The annotated frames, or planes of volumes.
        size: ((Z,) Y, X) of the frames or volumes that are made to look at.
        seed: Of the cells looked at.
        cells: Fresh ones that are there already. None makes some, and others to see how far a shift moves the light: cells of
            volumes cost too much for that, and have no lender.

    Returns:
        A line about each texture stage that was set.

    Raises:
        SynthAugError: The cascade makes no cells.
    """
    plain, notes, slope = cascade.config, [], np.nan
    if len(size) == 2:
        told = [_contours(frame) for frame in spaced(annotated, MOST_FRAMES)]
        wanted = _wanted([contours[:, 0] for contours in told], 2)
        slope = _slope(told, LEAST_SPREAD) if cells is None else np.nan
    else:
        wanted = wanted_half_light(annotated, len(size))
    if not np.isfinite(wanted):
        return []
    for name, texture, share in (("own", cascade.texture, 0.0), ("lent", cascade.lent_texture, 1.0)):
        if texture is None:
            continue
        cascade.config = replace(plain, lent_share=share)
        try:
            some = _cells(cascade, seed) if cells is None else cells
            scale = float(some.scale.median())
            if np.isfinite(slope):
                some = _follow(cascade, texture, some, slope, size, seed)
            before = made_half_light(cascade, some, size, seed)
            if not np.isfinite(before):
                continue
            missing, gain = (before - wanted) / scale, GAIN[len(size)]
            if cells is None and abs(missing) > LEAST_TRIED:
                tried, after = _try(cascade, texture, missing, size, seed)
                found = (before - after) / scale / tried
                if GAINS[0] <= found <= GAINS[1]:  # else too few cells to tell
                    gain = found
            _shift(texture, missing / gain)
        finally:
            cascade.config = plain
        notes.append(
            f"half of the light lay {-before:.2f} px inside the outlines of {name} cells, and was moved to {-wanted:.2f} px"
        )
    if np.isfinite(slope) and notes:
        notes.append(f"outlines of cells an e-fold brighter than others of a frame are {-slope:.2f} px wider")
    return notes


def _follow(
    cascade: Cascade, texture: TextureDiffusion, cells: Cells, slope: float, size: Sequence[int], seed: int
) -> Cells:
    """Set `outline_slope`, unless frames of these cells do not tell theirs; the same cells with it."""
    steeper = brightness_slope(made_frames(cascade, cells, size, seed)) - slope
    if not np.isfinite(steeper):
        return cells
    steeper = texture.config.outline_slope + steeper / GAIN[len(size)] / float(cells.scale.median())
    texture.config = replace(texture.config, outline_slope=float(np.clip(steeper, -FARTHEST, FARTHEST)))
    return _cells(cascade, seed)


def _try(
    cascade: Cascade, texture: TextureDiffusion, crop_pixels: float, size: Sequence[int], seed: int
) -> tuple[float, float]:
    """By how much the light was moved, and where half of it lies then; the texture stays as it is."""
    plain = texture.config
    try:
        _shift(texture, crop_pixels)
        moved = texture.config.outline_shift - plain.outline_shift
        return moved, made_half_light(cascade, _cells(cascade, seed), size, seed)
    finally:
        texture.config = plain


def _cells(cascade: Cascade, seed: int) -> Cells:
    return cascade.cells([SampleKey(seed, ("half light", i)) for i in range(NUM_CELLS)])


def _shift(texture: TextureDiffusion, crop_pixels: float) -> None:
    """Move the light of cells inwards, at most by `FARTHEST`."""
    shift = texture.config.outline_shift + float(np.clip(crop_pixels, -FARTHEST, FARTHEST))
    texture.config = replace(texture.config, outline_shift=shift)


def made_half_light(cascade: Cascade, cells: Cells, size: Sequence[int], seed: int) -> float:
    """Median of what is compared over frames, or planes of volumes, made of these cells; NaN where none tells."""
    distances = np.concatenate([MEASURES[len(size)](frame) for frame in made_frames(cascade, cells, size, seed)])
    return float(np.median(distances)) if len(distances) else np.nan


def made_frames(cascade: Cascade, cells: Cells, size: Sequence[int], seed: int) -> list[Frame]:
    """Frames, or every other plane of volumes, of these cells."""
    size, found = (*size[:-2], *(min(n, LARGEST) for n in size[-2:])), []
    for i in range(NUM_FRAMES[len(size)]):
        keys = [SampleKey(seed, ("half light", "frame", i))]
        count = min(cascade.num_cells(keys, size)[0], len(cells))
        made = cascade.populate(cells, keys, size, num_cells=max(count, 1))
        image, labels = (t[0].numpy().reshape(-1, *size[-2:]) for t in (made.image, made.labels))
        found += [(image[z], labels[z]) for z in range(0, len(image), 2)]
    return found
