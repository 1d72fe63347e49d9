"""Fragments: what is left of cells that died, and micronuclei; small, bright, in groups of up to sixteen, each annotated.

A frame or two of annotations hardly show any, and networks made for cells pass over them or draw a group as one cell. They are
too small to have a texture of their own: soft-edged ellipses, where no cell is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from synthaug.generators.stage import Noise
from synthaug.randomness import SampleKey, log_between

MOST = 16
"""Fragments of a group; every number from 1 on, evenly on a logarithmic scale."""

RADIUS, UNEQUAL_RADII = (0.15, 0.5), 0.3
"""Of the disc that a group would be in one, in radii of the usual cell, evenly on a logarithmic scale; and the standard
deviation of the logarithm of its fragments' radii."""

SPREAD = (0.2, 0.6)
"""Standard deviation of their places around the middle of the group, in radii of the usual cell."""

ASPECT = 2.0
"""Longer over shorter axis at most."""

BRIGHTNESS, UNEQUAL = (0.7, 4.0), 0.3
"""Of a group, 1 = the frame's median cell, evenly on a logarithmic scale; and the standard deviation of the logarithm in it."""

SOFTNESS = (0.4, 0.9)
"""Scale of the logistic edge, pixels."""

LOOSE = 0.7
"""Pixels by which an outline lies outside of half the light: small ones are drawn so by hand."""

LEAST_SEEN = 0.85
"""Share of a fragment that nothing else covers; else it is left out."""

TRIES = 16
"""Places a group gets to find one where no cell is."""

COLUMNS = ("group", "radius", "aspect", "cosine", "sine", "brightness", "softness", "y", "x")
"""Of a fragment: its group, counted from 1 (0 = there is none); and where it lies in it, in radii of the usual cell."""


def draw_fragments(keys: Sequence[SampleKey], num_cells: Sequence[int], rate: float) -> Noise:
    """The random numbers of `scatter_fragments`; row i depends on `keys[i]` and `num_cells[i]` alone.

    Args:
        keys: B keys.
        num_cells: Cells of each frame.
        rate: Groups for each cell, in [0, 1].

    Returns:
        `fragment_place` float32 [B, G, T, 3], where a group may lie (Y and X in [0, 1)) and how far from cells; `fragment`
        float32 [B, M, K], rows of `COLUMNS`. Both are padded with zeros, and left out where there are no keys.
    """
    rows = [_draw(key.child("fragments").numpy(), n, rate) for key, n in zip(keys, num_cells, strict=True)]
    return {
        name: pad_sequence([torch.from_numpy(value) for value in values], batch_first=True)
        for name, values in zip(("fragment_place", "fragment"), zip(*rows))
    }


def _draw(random: np.random.Generator, num_cells: int, rate: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Places of one frame's groups and the fragments of them."""
    num = int(random.binomial(num_cells, rate))
    place = random.random((num, TRIES, 3), dtype=np.float32)
    groups = [np.empty((0, len(COLUMNS)))]
    for group in range(num):
        size = int(log_between((1.0, MOST + 1.0), random.random()))
        spread, bright = random.uniform(*SPREAD), log_between(BRIGHTNESS, random.random())
        radius = log_between(RADIUS, random.random()) / math.sqrt(size)
        angle = random.uniform(0, math.pi, size)
        columns = (
            np.full(size, group + 1.0),
            # The largest come first, so that none surrounds another.
            np.sort(radius * np.exp(UNEQUAL_RADII * random.standard_normal(size)))[::-1],
            log_between((1.0, ASPECT), random.random(size)),
            np.cos(angle),
            np.sin(angle),
            bright * np.exp(UNEQUAL * random.standard_normal(size)),
            random.uniform(*SOFTNESS, size),
            *(spread * random.standard_normal((2, size))),
        )
        groups.append(np.stack(columns, axis=1))
    return place, np.concatenate(groups).astype(np.float32)


def scatter_fragments(
    light: Tensor, labels: Tensor, noise: Noise, radius: float, min_area: int, occupied: Tensor | None = None
) -> None:
    """Add fragments to frames, in place.

    No pixel that is labelled already, as a cell's or another fragment's, is labelled anew. Fragments that would have fewer than
    `min_area` pixels are drawn as large as that: bright specks without an outline teach networks to pass over small cells.

    Args:
        light: float32 [B, Y, X], 1 = the median cell; CPU.
        labels: int32 [B, Y, X], 0 = background, contiguous from 1; theirs follow. CPU.
        noise: From `draw_fragments`.
        radius: Of the usual cell, pixels.
        min_area: Smallest instance, pixels.
        occupied: int32 [B, Y, X], what else must not be touched. CPU.
    """
    for i, (place, fragments) in enumerate(zip(noise["fragment_place"].numpy(), noise["fragment"].numpy())):
        if not fragments.any():
            continue
        frame, canvas = light[i].numpy(), labels[i].numpy()
        taken = canvas > 0
        if occupied is not None:
            taken |= occupied[i].numpy() != 0
        distance = ndimage.distance_transform_edt(~taken) if taken.any() else np.full(taken.shape, np.inf)
        room = np.asarray(distance) / radius
        following = int(canvas.max(initial=0)) + 1
        for group in range(1, int(fragments[:, 0].max()) + 1):
            middle = _place(place[group - 1], room)
            if middle is None:
                continue
            for fragment in fragments[fragments[:, 0] == group]:
                following += _add(frame, canvas, taken, fragment, middle, radius, min_area, following)


def _place(candidates: NDArray[np.float32], room: NDArray[np.float64]) -> tuple[float, float] | None:
    """The first place that is as far from cells as it asks for (up to a radius of the usual one), None if there is none."""
    for y, x, wanted in candidates.tolist():
        at = y * room.shape[0], x * room.shape[1]
        if room[int(at[0]), int(at[1])] > wanted:
            return at
    return None


def _add(
    light: NDArray[np.float32],
    labels: NDArray[np.int32],
    taken: NDArray[np.bool_],
    fragment: NDArray[np.float32],
    middle: tuple[float, float],
    radius: float,
    min_area: int,
    number: int,
) -> bool:
    """Add one fragment, labelled `number`, where there is room for it; whether there was."""
    _, size, aspect, cosine, sine, bright, softness, y, x = fragment.tolist()
    size = max(size * radius, 1.1 * math.sqrt(min_area / math.pi) - LOOSE, 0.5)  # a tenth more, as pixels are counted
    y, x = middle[0] + y * radius, middle[1] + x * radius
    half = math.ceil(size * math.sqrt(aspect) + 8 * softness)
    spans = [(max(round(c) - half, 0), min(round(c) + half + 1, n)) for c, n in zip((y, x), light.shape)]
    if any(start >= end for start, end in spans):
        return False
    window = tuple(slice(*span) for span in spans)
    dy, dx = np.ogrid[window]
    dy, dx = dy - y, dx - x
    along, across = cosine * dx + sine * dy, cosine * dy - sine * dx
    distance = size - np.hypot(along / math.sqrt(aspect), across * math.sqrt(aspect))
    mask = distance > -LOOSE
    free = mask & ~taken[window]
    if free.sum() < max(min_area, LEAST_SEEN * mask.sum()) or ndimage.label(free)[1] > 1:
        return False
    light[window] += np.float32(bright) / (1 + np.exp(-np.maximum(distance / softness, -40.0))).astype(np.float32)
    labels[window][free] = number
    taken[window] |= free
    return True
