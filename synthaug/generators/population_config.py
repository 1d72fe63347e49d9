"""What `PopulationSynthesis` is told: how cells of a data set lie to each other, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from synthaug.errors import InputError
from synthaug.generators.region import Region


@dataclass(frozen=True)
class PopulationConfig:
    """What is fitted to the label images of a data set.

    Attributes:
        min_area: pixels (voxels) an instance must keep on the canvas, >= 1.
        clustering: probability p in [0, 1] that a cell is placed next to one that is already there.
        gaps: quantiles of the gap to that neighbour, whole pixels, ascending; 0 means touching, less that the two are
            pressed together by so many pixels.
        clearance: pixels >= 0 which the other cells keep from their neighbours at most; each keeps a random part of it.
        reach: pixels by which the canvas grows, along Y and X, for the centres of cells that keep `min_area` on it.
        frame_size: ((Z,) Y, X) of the frames in which densities were counted; (0, 0): density is taken as it is.
        dispersion: variance over mean of the number of cells in small windows of one frame; 0 = none, 1 = Poisson's.
        num_tries: candidate positions a cell gets in each way of placing.
        gain_sigma: standard deviation of the log of the brightness gain a cell gets every time it is used.
        odd_rate: share of the uses, in [0, 1], in which a cell is much dimmer or brighter besides, as cells out of focus and
            cells in mitosis are: by a factor of `population.ODD`, two of three times dimmer.
        fragment_rate, fragment_radius: of frames: groups of fragments for each cell, in [0, 1], and the radius of the usual
            cell, pixels > 0, by which they are measured; see `fragments.py`.
        z_spacing: pixels of the image plane from plane to plane, > 0; gaps and clearances along z are counted with it.
        reach_z: planes by which a volume grows along Z, as `reach`.
        mirror_z: whether cells of volumes are also mirrored along z.
        region: where in a volume cells lie; None = anywhere.
    """

    min_area: int = 1
    clustering: float = 0.0
    gaps: tuple[int, ...] = (0,)
    clearance: int = 0
    reach: float = 0.0
    frame_size: tuple[int, ...] = (0, 0)
    dispersion: float = 0.0
    num_tries: int = 64
    gain_sigma: float = 0.04
    odd_rate: float = 0.0
    fragment_rate: float = 0.0
    fragment_radius: float = 10.0
    z_spacing: float = 1.0
    reach_z: float = 0.0
    mirror_z: bool = True
    region: Region | None = None

    def __post_init__(self) -> None:
        if isinstance(self.region, dict):  # from a config file
            object.__setattr__(self, "region", Region(**self.region))
        probabilities, lengths = (
            (self.clustering, self.odd_rate, self.fragment_rate),
            (self.z_spacing, self.fragment_radius),
        )
        if self.min_area < 1 or self.num_tries < 1 or min(lengths) <= 0 or not all(0 <= p <= 1 for p in probabilities):
            expected = (
                "min_area, num_tries >= 1, clustering, odd_rate and fragment_rate in [0, 1], "
                "z_spacing and fragment_radius > 0"
            )
            raise InputError("PopulationConfig", expected=expected, got=self)
        lowest = min(self.clearance, self.reach, self.reach_z, self.dispersion, self.gain_sigma)
        if not self.gaps or lowest < 0:
            raise InputError(
                "PopulationConfig", expected="gaps, and clearance, reach, dispersion and gain_sigma >= 0", got=self
            )
        if self.region is not None and (len(self.frame_size) != 3 or min(self.frame_size) < 1):
            raise InputError("PopulationConfig", expected="frame_size (Z, Y, X) beside a region", got=self.frame_size)

    def at_scale(self, z: float, plane: float) -> PopulationConfig:
        """For voxels `z` times as deep and `plane` times as wide."""
        sizes = (z, plane, plane)[-len(self.frame_size) :]
        region = self.region
        if region is not None:
            axes = tuple((a / z, b / plane, c / plane) for a, b, c in region.semi_axes)
            region = replace(region, semi_axes=axes)
        return replace(
            self,
            min_area=max(round(self.min_area / (z * plane**2)), 1),
            gaps=tuple(round(gap / plane) for gap in self.gaps),
            clearance=round(self.clearance / plane),
            reach=self.reach / plane,
            fragment_radius=self.fragment_radius / plane,
            frame_size=tuple(round(n / f) for n, f in zip(self.frame_size, sizes)),
            z_spacing=self.z_spacing * z / plane,
            reach_z=self.reach_z / z,
            region=region,
        )
