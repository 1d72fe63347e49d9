"""Where in a volume cells may lie: within ellipsoids like those of real embryos, as balls or shells.

The table holds one ellipsoid a real volume together with its number of cells, so that many cells come with the ellipsoid of
a volume of many cells. How far from the middle cells lie (filled ball or shell) is one distribution for all volumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthaug.errors import InputError
from synthaug.randomness import SampleKey

Floats = NDArray[np.float64]

NUM_WINDOWS = 32
"""Windows drawn for a canvas, of which the one is taken that shows about as many cells as asked for."""

NUM_RINGS = 16
"""Steps of the distance from the middle in which the density of cells is told."""

FEWEST_CENTRES = 8
"""Cells below which their positions do not tell an ellipsoid."""


@dataclass(frozen=True)
class Region:
    """Ellipsoids of real volumes, and how far from their middle cells lie.

    Attributes:
        semi_axes: (along z, longest in plane, shortest in plane) of each volume's ellipsoid, voxels > 0.
        counts: cells of each volume, > 0.
        radii: quantiles of the distance of cell centres from the middle, > 0, ascending; 1 is the ellipsoid's surface.
    """

    semi_axes: tuple[tuple[float, float, float], ...]
    counts: tuple[float, ...]
    radii: tuple[float, ...]

    def __post_init__(self) -> None:
        # Lists come back from a config file
        object.__setattr__(self, "semi_axes", tuple(tuple(float(a) for a in axes) for axes in self.semi_axes))
        object.__setattr__(self, "counts", tuple(float(n) for n in self.counts))
        object.__setattr__(self, "radii", tuple(float(r) for r in self.radii))
        table = all(len(axes) == 3 and min(axes) > 0 for axes in self.semi_axes)
        if not table or not self.semi_axes or len(self.counts) != len(self.semi_axes) or min(self.counts) <= 0:
            raise InputError("Region", expected="three semi-axes > 0 and a count > 0 for each volume", got=self)
        if len(self.radii) < 2 or self.radii[0] <= 0 or list(self.radii) != sorted(set(self.radii)):
            raise InputError("Region.radii", expected="two or more numbers > 0, ascending", got=self.radii)

    @classmethod
    def fit(
        cls,
        sizes: Sequence[Sequence[int]],
        centres: Sequence[NDArray[Any]],
        counts: Sequence[float],
        moments: Sequence[tuple[NDArray[Any], NDArray[Any]]] | None = None,
    ) -> Region | None:
        """Region of real volumes from the positions of some of their cells; None if cells lie all over the volumes.

        A filled ellipsoid has semi-axes of sqrt(5) standard deviations. Cells count as confined where the ellipsoid's
        box is smaller than the volume, in the median over the volumes (one that cells fill evenly gives 2.1 of it).

        Args:
            sizes: (Z, Y, X) of each volume, voxels.
            centres: float [n, 3] (ZYX) each, voxels, of any n cells (in 2D annotations: of those whose middle is known).
            counts: cells of each whole volume.
            moments: mean [3] and covariance [3, 3] of the positions of each volume's bright voxels, ZYX in voxels.
                Without them, the centres' own: volumes with fewer than 8 centres are left out then.
        """
        semi_axes, radii, kept, shares = [], [], [], []
        for i, (size, points) in enumerate(zip(sizes, centres, strict=True)):
            points = np.asarray(points, np.float64).reshape(-1, 3)
            if moments is None and len(points) < FEWEST_CENTRES:
                continue
            middle, covariance = moments[i] if moments is not None else (points.mean(0), np.cov(points.T))
            axes, turn = _axes(np.asarray(covariance, np.float64))
            if counts[i] <= 0 or not np.isfinite(axes).all():
                continue
            semi_axes.append(axes)
            kept.append(float(counts[i]))
            away = (points - np.asarray(middle, np.float64)) @ turn
            radii.append(np.sqrt(((away / axes) ** 2).sum(1)))
            shares.append(np.prod(2 * np.array(axes) / np.asarray(size, np.float64)))
        levels = (np.arange(32) + 0.5) / 32
        if not shares or np.median(shares) >= 1:
            return None
        if sum(len(r) for r in radii) >= FEWEST_CENTRES:
            quantiles = np.quantile(np.concatenate(radii), levels)
        elif moments is not None:
            # Where the light is says where the cells are; how they lie in there, too few tell: evenly.
            quantiles = levels ** (1 / 3)
        else:
            return None
        # Equal distances (of a volume that came twice, say) would make a ring without width
        quantiles = np.maximum(quantiles, 1e-3) + 1e-6 * np.arange(len(quantiles))
        return cls(
            tuple((round(a, 2), round(b, 2), round(c, 2)) for a, b, c in semi_axes),
            tuple(round(n, 2) for n in kept),
            tuple(round(float(r), 6) for r in quantiles),
        )

    def weights(self) -> Floats:
        """How densely cells lie at `NUM_RINGS` equal steps of the distance from the middle, the densest as 1."""
        edges = np.linspace(0, self.radii[-1], NUM_RINGS + 1)
        levels = np.linspace(0, 1, len(self.radii) + 1)
        share = np.diff(np.interp(edges, [self._innermost(), *self.radii], levels))
        density = share / np.diff(edges**3)
        # The rings around the middle hold few cells: what is found there must not set the scale of all
        return np.asarray(np.minimum(density / density[NUM_RINGS // 4 :].max(), 1.0))

    def count(
        self, key: SampleKey, size: Sequence[int], reach: Sequence[float], total: float, frame: Sequence[int]
    ) -> int:
        """Cells seen on a canvas, the window of the region being random; one whole region holds `total` cells.

        `frame` (Z, Y, X) are the voxels of a real volume.
        """
        random = key.numpy()
        nearest = np.argsort(np.abs(np.log(np.array(self.counts) / max(total, 1e-6))), kind="stable")
        row = nearest[random.integers(0, max(3, len(nearest) // 5)) % len(nearest)]
        window = self._windows(random, np.array([row]), size, frame)
        return int(np.floor(total * self._shares(window, size, reach)[0] + random.random()))

    def ellipsoid(
        self,
        random: np.random.Generator,
        size: Sequence[int],
        reach: Sequence[float],
        count: int,
        frame: Sequence[int],
    ) -> Floats:
        """Place of the region for a canvas which shows `count` cells, float64 [7, 3] (ZYX).

        A canvas as large as a real volume (`frame`) holds the whole region; a smaller one is a window of the volume, anywhere
        in it, with the region in its middle, as a crop of a real volume is. Of some such draws, each a real
        volume's ellipsoid turned by any angle in plane, the one is taken whose window holds most nearly `count` cells.

        Returns:
            Middle in voxels, matrix from the unit ball of the outermost cell centres to voxels, and its inverse.
        """
        rows = random.integers(0, len(self.counts), NUM_WINDOWS)
        windows = self._windows(random, rows, size, frame)
        contents = np.array(self.counts)[rows] * self._shares(windows, size, reach)
        return np.asarray(windows[np.abs(np.log((contents + 1) / (count + 1))).argmin()])

    def positions(
        self, random: np.random.Generator, ellipsoid: Floats, size: Sequence[int], reach: Sequence[float], num: int
    ) -> NDArray[np.float32]:
        """Points of the unit ball, float32 [num, 3], distributed as real cells, that lie on the canvas as far as any do."""
        kept, found = np.empty((0, 3)), 0
        for _ in range(64):
            points = self._points(random, num)
            inside = points[_is_seen(ellipsoid[None], points, size, reach)[0]]
            kept, found = np.concatenate([kept, inside]), found + len(inside)
            if found >= num:
                break
        if not found:
            kept = points  # a window beside all cells: none will be placed there
        return np.asarray(kept[np.arange(num) % len(kept)], np.float32)

    def around(self, labels: NDArray[np.integer[Any]], ellipsoid: Floats) -> Floats:
        """The ellipsoid of the cells that are there already, or `ellipsoid` brought to them if they are too few to tell.

        Args:
            labels: int [Z, Y, X], 0 where free.
            ellipsoid: float64 [7, 3].
        """
        voxels = np.argwhere(labels > 0)
        if not len(voxels):
            return ellipsoid
        middle = voxels.mean(0)
        if len(np.unique(labels)) <= FEWEST_CENTRES:
            return np.concatenate([middle[None], ellipsoid[1:]])
        axes, turn = _axes(np.cov(voxels.T))
        return _pack(middle[None], np.array(axes)[None] * self.radii[-1], turn[None])[0]

    def _innermost(self) -> float:
        return max(self.radii[0] - (self.radii[1] - self.radii[0]) / 2, 0.0)

    def _points(self, random: np.random.Generator, num: int) -> Floats:
        """Points [num, 3] of the unit ball; the outermost quantile lies on its surface."""
        levels = np.linspace(0, 1, len(self.radii) + 1)
        distance = np.interp(random.random(num), levels, [self._innermost(), *self.radii]) / self.radii[-1]
        height, angle = random.uniform(-1, 1, num), random.random(num) * (2 * np.pi)
        flat = np.sqrt(1 - height**2)
        return np.asarray(
            distance[:, None] * np.stack([height, flat * np.sin(angle), flat * np.cos(angle)], axis=-1), np.float64
        )

    def _windows(
        self, random: np.random.Generator, rows: NDArray[np.integer[Any]], size: Sequence[int], frame: Sequence[int]
    ) -> Floats:
        """Ellipsoids [K, 7, 3] of these rows, turned by random angles and put at random places of a canvas."""
        axes = np.array(self.semi_axes)[rows]
        angle = random.random(len(rows)) * (2 * np.pi)
        cosine, sine = np.cos(angle), np.sin(angle)
        turn = np.zeros((len(rows), 3, 3))
        turn[:, 0, 0] = 1
        turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cosine, -sine, sine, cosine
        half = np.sqrt(((turn * axes[:, None]) ** 2).sum(2))  # of the ellipsoid's box
        canvas, whole = np.asarray(size, np.float64), np.maximum(frame, 2 * half)
        within = canvas >= whole
        low, high = np.where(within, half, canvas - whole / 2), np.where(within, canvas - half, whole / 2)
        middle = low + random.random(half.shape) * (high - low) - 0.5
        return _pack(middle, axes * self.radii[-1], turn)

    def _shares(self, windows: Floats, size: Sequence[int], reach: Sequence[float]) -> Floats:
        """Share [K] of the region's cells that are seen on the canvas."""
        points = self._points(SampleKey(0, ("share of a region",)).numpy(), 512)
        return np.asarray(_is_seen(windows, points, size, reach).mean(1))


def _axes(covariance: Floats) -> tuple[tuple[float, float, float], Floats]:
    """Semi-axes (z, long, short) of a filled ellipsoid, and its axes as columns [3, 3]; z is kept apart from the plane."""
    values, vectors = np.linalg.eigh(covariance[1:, 1:])
    turn = np.eye(3)
    turn[1:, 1:] = vectors[:, ::-1]
    variances = np.maximum([covariance[0, 0], values[1], values[0]], 0.25)  # cells in one plane still have a thickness
    z, long, short = (float(a) for a in np.sqrt(5 * variances))
    return (z, long, short), turn


def _pack(middle: Floats, axes: Floats, turn: Floats) -> Floats:
    """Ellipsoids [K, 7, 3] as `place_cells_3d` takes them."""
    return np.concatenate([middle[:, None], turn * axes[:, None], (turn / axes[:, None]).transpose(0, 2, 1)], axis=1)


def _is_seen(ellipsoids: Floats, points: Floats, size: Sequence[int], reach: Sequence[float]) -> NDArray[np.bool_]:
    """Which points [n, 3] of the unit ball lie on the canvas grown by `reach`, bool [K, n]."""
    canvas = np.asarray(size, np.float64)
    # Sums written out: a matrix product may round otherwise for another number of points
    places = ellipsoids[:, 0, None] + sum(ellipsoids[:, None, 1:4, a] * points[None, :, None, a] for a in range(3))
    return np.asarray((np.abs(places - (canvas - 1) / 2) <= (canvas + np.asarray(reach)) / 2).all(2))
