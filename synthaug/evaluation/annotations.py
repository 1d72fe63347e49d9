"""How much annotation an experiment grants: a few patches of frames, or single planes of volumes, or all of it.

Choices are nested: the first patch of a seed is also the first of its four, so that budgets and arms differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from synthaug.datasets.mixing import relabel
from synthaug.datasets.volumes import thin_annotations
from synthaug.errors import DataError, InputError
from synthaug.generators.camera import expose
from synthaug.randomness import SampleKey, normal
from synthaug.types import UNLABELLED, Pair

MIN_CELLS = 3
"""Cells that a patch or plane holds at least: nobody annotates an empty one while there are others."""

TRIES = 64
"""Places looked at for such a patch."""

BUSY = 0.75
"""Share of the cells of a volume's fullest plane that the annotated plane holds at least."""

READ_NOISE, DARK, GAIN, OFFSET = 1.5, 2.0, 10.0, 100.0
"""Of the dim camera: electrons, electrons of background, counts per electron, counts."""


def choose_patches(pairs: Sequence[Pair], num: int | None, size: Sequence[int], seed: int) -> list[Pair]:
    """Annotated patches, each of another frame as long as there are enough.

    Args:
        pairs: Frames at least `size` large.
        num: How many; None for all frames, whole.
        size: (Y, X) in pixels.
        seed: Decides which.

    Raises:
        DataError: No place with `MIN_CELLS` cells was found.
    """
    if num is None:
        return list(pairs)
    if num < 1:
        raise InputError("num_patches", expected=">= 1, or all", got=num)
    small = [image.shape for image, _ in pairs if any(n < m for n, m in zip(image.shape, size))]
    if small:
        raise InputError("size", expected=f"at most the smallest frame, {min(small)}", got=tuple(size))
    order = SampleKey(seed, ("patches",)).numpy().permutation(len(pairs))
    chosen: list[Pair] = []
    for place in range(TRIES * len(pairs)):
        image, labels = pairs[order[place % len(pairs)]]
        rng = SampleKey(seed, ("patch", place)).numpy()
        for _ in range(TRIES):
            corner = [int(rng.integers(n - m + 1)) for n, m in zip(image.shape, size)]
            window = tuple(slice(c, c + m) for c, m in zip(corner, size))
            if len(np.unique(labels[window])) > MIN_CELLS:  # background is one of the values
                chosen.append((image[window].copy(), relabel(labels[window])))
                break
        if len(chosen) == num:
            return chosen
    raise DataError(
        "the real frames", expected=f"patches of {tuple(size)} with {MIN_CELLS} cells or more", got=f"{len(chosen)}"
    )


def choose_planes(volumes: Sequence[Pair], num: int | None, seed: int) -> list[Pair]:
    """Volumes of each of which a single plane is annotated, one through the many of its cells.

    Args:
        volumes: Densely labelled.
        num: How many volumes; None for all.
        seed: Decides which volumes and planes.

    Returns:
        Images as they are; labels int32 of the plane's own parts, `UNLABELLED` in the other planes.
    """
    if num is not None and not 1 <= num <= len(volumes):
        raise InputError("num_patches", expected=f"1 to {len(volumes)} volumes, or all", got=num)
    order = SampleKey(seed, ("patches",)).numpy().permutation(len(volumes))
    chosen = []
    for index in order[: len(volumes) if num is None else num]:
        image, labels = volumes[index]
        cells = np.array([len(np.unique(plane)) - 1 for plane in labels])
        busy = np.flatnonzero(cells >= max(BUSY * cells.max(), 1))
        if not len(busy):
            raise DataError("the real volumes", expected="cells in every one", got=f"none in volume {index}")
        z = int(SampleKey(seed, ("plane", int(index))).numpy().choice(busy))
        thin = thin_annotations(labels, len(labels), first=z)
        thin[np.arange(len(labels)) != z] = UNLABELLED
        chosen.append((image, thin))
    return chosen


def dense_of(volumes: Sequence[Pair], chosen: Sequence[Pair]) -> list[Pair]:
    """The chosen volumes with all of their labels: the upper reference for what planes alone can give."""
    known = {id(image): (image, labels) for image, labels in volumes}
    return [known[id(image)] for image, _ in chosen]


def planes_of(volumes: Sequence[Pair]) -> list[Pair]:
    """The annotated planes of volumes as frames."""
    frames = []
    for image, labels in volumes:
        for z in np.flatnonzero((labels != UNLABELLED).all((1, 2))):
            frames.append((image[z], relabel(labels[z])))
    return frames


def dimmed(pairs: Sequence[Pair], photons: float, seed: int) -> list[Pair]:
    """The same scenes through a camera that gets few photons.

    The brightest pixels (99.8 %) give `photons` electrons over a background of `DARK`; shot noise and read noise are added
    by the camera model of the cascade (`camera.expose`).

    Args:
        pairs: Frames or volumes.
        photons: Electrons of the brightest pixels, > 0.
        seed: Of the noise.
    """
    if not photons > 0:
        raise InputError("photons", expected="> 0", got=photons)
    import torch

    out = []
    for index, (image, labels) in enumerate(pairs):
        low, high = np.percentile(image, (1.0, 99.8))
        electrons = np.clip((image - low) / max(high - low, 1e-9), 0, None) * photons + DARK
        expected = torch.from_numpy((electrons * GAIN + OFFSET).astype(np.float32))[None, None]
        variance = torch.from_numpy(((electrons + READ_NOISE**2) * GAIN**2).astype(np.float32))[None, None]
        noise = normal([SampleKey(seed, ("dimmed", index))], (1, *image.shape))
        seen: Any = expose(expected, variance, noise, integer=True, saturation=65535.0)
        out.append((seen[0, 0].numpy(), labels))
    return out
