"""Samples as a network gets them, and what would go wrong in a training on them; `check.py` takes them from a stream."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthaug.types import UNLABELLED

LEAST_OVERLAP = 0.3
"""Ranges of grey values of real and synthetic samples that overlap by a smaller share of both together are warned of."""

MAX_SIZE_RATIO = 3.0
"""Cells of real and synthetic samples that differ by more than this factor in area are warned of."""


@dataclass(frozen=True)
class SeenSample:
    """One sample as the network gets it, after the stream's transform.

    Attributes:
        image: float32 [C, (Z,) Y, X].
        label: As it came, usually int32 [1, (Z,) Y, X].
        synthetic: Whether the stream made it.
    """

    image: NDArray[np.float32]
    label: NDArray[Any]
    synthetic: bool

    @property
    def kind(self) -> str:
        """What it is called in the picture and the warnings."""
        return "synthetic" if self.synthetic else "real"

    @property
    def ids(self) -> NDArray[Any]:
        """The labels of its cells, sorted."""
        values = np.unique(self.label)
        return values[values > 0]

    @property
    def areas(self) -> NDArray[np.int64]:
        """Pixels of every cell; of volumes, of its largest section across the optical axis."""
        if self.label.dtype.kind not in "iu":
            return np.zeros(0, np.int64)
        numbers = np.searchsorted(self.ids, self.label, side="right") * (self.label > 0)
        planes = numbers.reshape(-1, numbers.shape[-2] * numbers.shape[-1])
        return np.max([np.bincount(plane, minlength=len(self.ids) + 1)[1:] for plane in planes], axis=0)

    @property
    def range(self) -> tuple[float, float]:
        """1st and 99.8th percentile of the finite grey values."""
        finite = self.image[np.isfinite(self.image)]
        low, high = np.percentile(finite, (1.0, 99.8)) if finite.size else (math.nan, math.nan)
        return float(low), float(high)


def by_kind(samples: Sequence[SeenSample]) -> dict[str, list[SeenSample]]:
    """The samples by what they are, "real" or "synthetic"."""
    return {kind: [s for s in samples if s.kind == kind] for kind in sorted({s.kind for s in samples})}


def range_of(group: Sequence[SeenSample]) -> tuple[float, float]:
    """Median of the samples' ranges."""
    low, high = np.median([s.range for s in group], axis=0)
    return float(low), float(high)


def find_faults(samples: Sequence[SeenSample]) -> list[str]:
    """What would go wrong in a training on these samples, a sentence each."""
    faults = []

    def tell(wrong: Sequence[bool], what: str, remedy: str) -> None:
        if any(wrong):
            kinds = Counter(sample.kind for sample, is_wrong in zip(samples, wrong) if is_wrong)
            named = " and ".join(f"{num} {kind}" for kind, num in sorted(kinds.items()))
            faults.append(f"{named} of {len(samples)} samples {what}. {remedy}")

    finite = [bool(np.isfinite(s.image).all()) for s in samples]
    tell([not ok for ok in finite], "have images with NaN or infinity", "The loss becomes NaN: look at the transform.")
    constant = [ok and s.image.min() == s.image.max() for ok, s in zip(finite, samples)]
    tell(constant, "have a constant image", "The transform may clip or scale all contrast away.")
    integer = [s.label.dtype.kind in "iu" for s in samples]
    tell(
        [not ok for ok in integer],
        "have labels that are no integers",
        "Interpolate labels by mode='nearest', as integers.",
    )
    fits = [s.image.shape[1:] == s.label.shape[1:] for s in samples]
    tell([not ok for ok in fits], "have labels of another shape than the image", "Give transforms both keys.")
    negative = [bool((s.label < (UNLABELLED if s.label.ndim == 4 else 0)).any()) for s in samples]
    tell(negative, "have negative labels", "0 is background; -1 marks planes of volumes nobody annotated.")
    gaps = [ok and len(s.ids) > 0 and int(s.ids[-1]) != len(s.ids) for ok, s in zip(integer, samples)]
    tell(
        gaps, "have labels that are not contiguous from 1", "A crop in the transform cuts cells away: number them anew."
    )
    empty = [len(s.ids) == 0 for s in samples]
    remedy = (
        "Choose a larger size, or num_cells." if not all(empty) else "There is nothing to learn: look at the picture."
    )
    tell(empty, "have no cells", remedy)
    groups = by_kind(samples)
    if len(groups) == 2:
        ranges = {kind: range_of(group) for kind, group in groups.items()}
        (a, b), (c, d) = ranges.values()
        together = max(b, d) - min(a, c)
        if not together * LEAST_OVERLAP <= min(b, d) - max(a, c):
            said = ", ".join(f"{kind} {low:.4g} to {high:.4g}" for kind, (low, high) in sorted(ranges.items()))
            faults.append(
                f"Grey values of real and synthetic samples are far apart ({said}): the network can tell them by that alone. "
                "Fit the cascade to your images, or scale each sample's intensities in the transform."
            )
        areas = {kind: np.concatenate([s.areas for s in group]) for kind, group in groups.items()}
        if all(len(values) for values in areas.values()):
            # Of the larger ones, as many others are cut by the border.
            large = {kind: float(np.percentile(values, 90)) for kind, values in areas.items()}
            if max(large.values()) > MAX_SIZE_RATIO * min(large.values()):
                said = ", ".join(f"{kind} {area:.0f} px" for kind, area in large.items())
                faults.append(
                    f"Cells of real and synthetic samples differ in size (90th percentile of areas: {said}). Fit the cascade "
                    "to your images, or bring these to its pixel size."
                )
    return faults
