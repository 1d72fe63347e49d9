"""Cells to populations: rotate, flip, place one after another, add up the light (paper, "Cell Population Synthesis").

The clustering probability, the gaps between neighbours and the spread of the number of cells are fitted to real labels by
`training/population_fit.py`.

Frames and volumes are made by the same stage. In a volume cells are turned and mirrored in plane (the optical axis has a
blur of its own, so they are never tilted), may be mirrored along z, and are put at whole planes: what they are shifted by
beyond that is in their slices already. They can be confined to a region (`region.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthaug.errors import InputError
from synthaug.generators import layout
from synthaug.generators.fragments import draw_fragments, scatter_fragments
from synthaug.generators.population_config import PopulationConfig
from synthaug.generators.stage import Noise, Stage
from synthaug.kernels.compositing import composite, resample, resample_stacks
from synthaug.randomness import SampleKey
from synthaug.types import Cells, Scenes

DEEPEST_FURROW = 0.5
"""Share of a cell's light that is missing at most where it is pressed against another."""

OF_FRAMES = ("region", "fragment", "fragment_place")
"""Noise that belongs to frames, not to cells."""

ODD = (1.5, 4.0)
"""By how much a very bright (dim) cell is brighter (dimmer) than it would be, drawn evenly on a logarithmic scale."""


class PopulationSynthesis(Stage):
    """Places single cells on an empty (or partly occupied) canvas, 2D or 3D; no pixel is ever overwritten."""

    config_class = PopulationConfig
    config: PopulationConfig

    def num_cells(
        self,
        keys: Sequence[SampleKey],
        size: tuple[int, ...],
        density: Tensor,
        *,
        num_cells: int | tuple[int, int] | None = None,
    ) -> list[int]:
        """How many labelled cells each frame asks for, border-cut ones included; row i depends on `keys[i]` alone.

        By default density x area, where both are corrected for the cells cut by the border (a small canvas shows more
        of them per pixel than a large frame), with the spread that windows of real frames have, rounded at random. With
        a region, density x volume of a real frame is what a whole region holds, and a canvas that is smaller than the
        region shows a part of it, larger or smaller according to its place.

        Args:
            keys: B keys.
            size: ((Z,) Y, X) of the canvas.
            density: float [B], labelled instances per pixel (voxel) of a real frame, border-cut ones included.
            num_cells: fixed number, or (lowest, highest) to draw from, both included.

        Raises:
            InputError: a negative number, an empty range, or densities that are not one a key.
        """
        self._check_size(size)
        if num_cells is not None:
            low, high = (num_cells, num_cells) if isinstance(num_cells, int | np.integer) else num_cells
            if not 0 <= low <= high:
                raise InputError("num_cells", expected="a number >= 0 or (lowest, highest)", got=num_cells)
            return [int(key.child("count").numpy().integers(low, high + 1)) for key in keys]
        if density.shape != (len(keys),) or bool((density < 0).any()):
            raise InputError("density", expected=f"{len(keys)} numbers >= 0", got=tuple(density.shape))
        region = self.config.region
        if region is not None:
            totals = [value * math.prod(self.config.frame_size) for value in density.tolist()]
            return [
                region.count(k.child("count"), size, self._reach(), n, self.config.frame_size)
                for k, n in zip(keys, totals)
            ]
        area = self._reached_area(size)
        frame_area, share = float(math.prod(size)), 0.0
        if min(self.config.frame_size) > 0:
            reached = self._reached_area(self.config.frame_size)
            frame_area = area * math.prod(self.config.frame_size) / reached
            share = max(1 - area / reached, 0.0)
        counts = []
        for key, value in zip(keys, density.tolist()):
            random = key.child("count").numpy()
            mean = value * frame_area
            # A gamma variable has the wanted mean and variance and is never negative; rounding adds 1/6 to the variance
            variance = self.config.dispersion * mean * share - 1 / 6
            if variance > 0 and mean > 0:
                mean = random.gamma(mean * mean / variance, variance / mean)
            counts.append(math.floor(mean + random.random()))
        return counts

    def draw(  # type: ignore[override]  # the number of random numbers depends on the number of cells
        self, keys: Sequence[SampleKey], size: tuple[int, ...], num_cells: Sequence[int]
    ) -> Noise:
        """All random numbers, rows padded with zeros to max(num_cells) = n; row i depends on `keys[i]`, `num_cells[i]`.

        Returns:
            "rotation" [B, n, 2] cosine and sine, "flip" [B, n] (+1 or -1), "gain" [B, n] > 0, "cluster" [B, n] in
            [0, 1), "position" and "direction" [B, n, T, 2 or 3], "gap" [B, n, T] in [0, 1); float32. Where cells are
            pressed together also "furrow" [B, n] in [0, 1), how dark the line between is. In 3D also
            "mirror" [B, n] (+1 or -1) and "choice" [B, n, T, 2] in [0, 1), and with a region "region" float64
            [B, 7, 3], whose unit ball then holds the positions. Where there are fragments, what `draw_fragments` returns.
        """
        self._check_size(size)
        n, t, axes = max(num_cells, default=0), self.config.num_tries, len(size)
        shapes = {
            "rotation": (2,),
            "flip": (),
            "gain": (),
            "cluster": (),
            "position": (t, axes),
            "direction": (t, axes),
            "gap": (t,),
        }
        if axes == 3:
            shapes |= {"mirror": (), "choice": (t, 2)}
        if min(self.config.gaps) < 0:
            shapes |= {"furrow": ()}
        noise = {name: torch.zeros((len(keys), n, *shape)) for name, shape in shapes.items()}
        if self.config.region is not None:
            noise["region"] = torch.zeros((len(keys), 7, 3), dtype=torch.float64)
        for row, (key, count) in enumerate(zip(keys, num_cells, strict=True)):
            # Sines and exponentials are taken row by row: vector code may round them otherwise in another batch
            random = key.child("placement").numpy()
            values = self._values(random, count, axes)
            if "furrow" in shapes:
                values["furrow"] = DEEPEST_FURROW * random.random(count, dtype=np.float32)
            if axes == 3:
                values |= self._values_3d(random, count, values["direction"])
            if self.config.region is not None:
                ellipsoid = self.config.region.ellipsoid(random, size, self._reach(), count, self.config.frame_size)
                points = self.config.region.positions(random, ellipsoid, size, self._reach(), count * t)
                noise["region"][row] = torch.from_numpy(ellipsoid)
                values["position"] = points.reshape(count, t, 3)
            for name, value in values.items():
                noise[name][row, :count] = torch.from_numpy(np.asarray(value, np.float32))
        if axes == 2 and self.config.fragment_rate > 0:
            noise |= draw_fragments(keys, num_cells, self.config.fragment_rate)
        return noise

    def _values(self, random: np.random.Generator, count: int, axes: int) -> dict[str, NDArray[Any]]:
        """One row's numbers; directions in the plane."""
        t = self.config.num_tries
        angle = random.random((count, t + 1)) * (2 * np.pi)
        cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        return {
            "rotation": np.stack([cosine[:, 0], sine[:, 0]], axis=-1),
            "flip": np.where(random.random(count) < 0.5, -1.0, 1.0),
            "gain": self._gains(random, count),
            "cluster": random.random(count, dtype=np.float32),
            "position": random.random((count, t, axes), dtype=np.float32),
            "direction": np.stack([sine[:, 1:], cosine[:, 1:]], axis=-1),
            "gap": random.random((count, t), dtype=np.float32),
        }

    def _gains(self, random: np.random.Generator, count: int) -> NDArray[np.float64]:
        gains = np.exp(self.config.gain_sigma * random.standard_normal(count))
        if self.config.odd_rate > 0:  # asked first: streams without keep their random numbers
            odd = random.random(count) < self.config.odd_rate
            sign = np.where(random.random(count) < 2 / 3, -1.0, 1.0)
            factor = np.exp(sign * random.uniform(math.log(ODD[0]), math.log(ODD[1]), count))
            gains *= np.where(odd, factor, 1.0)
        return gains

    def _values_3d(self, random: np.random.Generator, count: int, flat: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """What one row has besides in 3D, and directions in space made of those in the plane."""
        t = self.config.num_tries
        height = random.uniform(-1, 1, (count, t, 1))
        chance = 0.5 if self.config.mirror_z else 0.0
        return {
            "direction": np.concatenate([height, np.sqrt(1 - height**2) * flat], axis=-1),
            "choice": random.random((count, t, 2), dtype=np.float32),
            "mirror": np.where(random.random(count) < chance, -1.0, 1.0),
        }

    def forward(
        self,
        cells: Cells,
        picks: Sequence[Tensor],
        noise: Noise,
        size: tuple[int, ...],
        *,
        clustering: float | None = None,
        occupied: Tensor | None = None,
    ) -> Scenes:
        """Place the picked cells of every frame in their order.

        A cell that finds no place within the bounded number of tries is left out; compare `num_placed` with
        `num_requested`. Light adds up, also that of the parts of a cell beyond its mask.

        Args:
            cells: the bank, one slice (S = 1) for frames, S planes for volumes; on any device.
            picks: B tensors, int64 [n_i], which cells go into frame i; n_i <= the `num_cells[i]` noise was drawn for.
            noise: of `draw`.
            size: ((Z,) Y, X) of the canvas, as noise was drawn.
            clustering: probability in [0, 1] instead of the fitted one.
            occupied: int32 [B, 1, (Z,) Y, X], labels of what is there already, not to be touched; new cells cluster next
                to it too, and a region is that of the cells in it, but the returned labels hold the new cells alone.

        Returns:
            light and labels on the device of `cells`.

        Raises:
            InputError: arguments that do not fit each other.
        """
        p = self.config.clustering if clustering is None else clustering
        self._check_forward(cells, picks, noise, size, p, occupied)
        device, counts = cells.image.device, [len(pick) for pick in picks]
        which = torch.cat([*picks, torch.empty(0, dtype=torch.int64)])
        if device.type != "cpu":  # only those that are placed are copied
            cells, which = cells.select(which.to(device)).to("cpu"), torch.arange(len(which))
        drawn = of_cells(noise, counts)
        known = None if occupied is None else _compact(occupied)
        if len(size) == 2:
            image, masks = resample(cells, drawn["rotation"], drawn["flip"], which)
            canvas = torch.zeros((len(picks), *size), dtype=torch.int32) if known is None else known
            labels, corners = self.place(masks, drawn, counts, p, canvas)
        else:
            image, masks = resample_stacks(cells, drawn["rotation"], drawn["flip"], drawn["mirror"], which)
            labels, corners = self.place_3d(masks, drawn, counts, p, size, self.regions(noise, known), known)
        pressed = (masks, labels, drawn["furrow"]) if "furrow" in drawn else None
        light = composite(image, cells.brightness[which] * drawn["gain"], corners, counts, size, pressed)
        num_placed = labels.flatten(1).amax(1).to(device, torch.int64)
        if "fragment" in noise:
            scatter_fragments(light, labels, noise, self.config.fragment_radius, self.config.min_area, known)
        return Scenes(
            light=light[:, None].to(device),
            labels=labels[:, None].to(device),
            num_requested=torch.tensor(counts, dtype=torch.int64, device=device),
            num_placed=num_placed,
        )

    def place(
        self, masks: Tensor, drawn: Noise, counts: list[int], clustering: float, occupied: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Labels [B, Y, X] and corners [N, 3] of N masks with their noise; see `place_cells`."""
        from synthaug.kernels.placement import place_cells  # imports numba, which reading a cascade does not need

        return place_cells(
            masks,
            torch.tensor(counts, dtype=torch.int64),
            drawn["position"],
            drawn["direction"],
            *self._gaps(drawn),
            drawn["cluster"] < clustering,
            occupied,
            self.config.min_area,
        )

    def place_3d(
        self,
        masks: Tensor,
        drawn: Noise,
        counts: list[int],
        clustering: float,
        size: tuple[int, ...],
        regions: Tensor,
        occupied: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Labels [B, Z, Y, X] and corners [N, 4] of N masks with their noise; see `place_cells_3d`."""
        from synthaug.kernels.placement3d import place_cells_3d

        region = self.config.region
        weights = torch.empty(0, dtype=torch.float64) if region is None else torch.from_numpy(region.weights())
        return place_cells_3d(
            masks,
            torch.tensor(counts, dtype=torch.int64),
            drawn["position"],
            drawn["direction"],
            drawn["choice"],
            *self._gaps(drawn),
            drawn["cluster"] < clustering,
            regions,
            weights,
            occupied,
            size,
            self.config.min_area,
            self.config.z_spacing,
        )

    def _gaps(self, drawn: Noise) -> tuple[Tensor, Tensor]:
        """Gaps and clearances, int64 [N, T] each."""
        table, clearance = torch.tensor(self.config.gaps), self.config.clearance
        gaps = table[(drawn["gap"] * len(table)).long().clamp_(max=len(table) - 1)]
        return gaps, (drawn["gap"] * (clearance + 1)).long().clamp_(max=clearance)

    def regions(self, noise: Noise, occupied: Tensor | None) -> Tensor:
        """The ellipsoid of each volume, float64 [B, 7, 3]."""
        if self.config.region is None:
            return torch.zeros((noise["gain"].shape[0], 7, 3), dtype=torch.float64)
        if occupied is None:
            return noise["region"]
        around = [self.config.region.around(o, e) for o, e in zip(occupied.numpy(), noise["region"].numpy())]
        return torch.from_numpy(np.array(around).reshape(-1, 7, 3))

    def _reach(self) -> tuple[float, float, float]:
        return self.config.reach_z, self.config.reach, self.config.reach

    def _reached_area(self, size: tuple[int, ...]) -> float:
        return layout.reached_area(size, self.config.reach, self.config.reach_z)

    def _check_size(self, size: tuple[int, ...]) -> None:
        fitted = min(self.config.frame_size) > 0  # if not, it places in frames as well as in volumes
        axes = (len(self.config.frame_size),) if fitted else (2, 3)
        if len(size) not in axes or min(size) < 1:
            raise InputError("size", expected=f"{' or '.join(map(str, axes))} numbers ((Z,) Y, X), all >= 1", got=size)

    def _check_forward(
        self,
        cells: Cells,
        picks: Sequence[Tensor],
        noise: Noise,
        size: tuple[int, ...],
        p: float,
        occupied: Tensor | None,
    ) -> None:
        self._check_size(size)
        if cells.image.shape[2] != cells.image.shape[3] or (len(size) == 2 and cells.image.shape[1] != 1):
            expected = "square crops of one slice, [N, 1, S, S]" if len(size) == 2 else "square slices, [N, S, P, P]"
            raise InputError("cells", expected=expected, got=tuple(cells.image.shape))
        if not 0 <= p <= 1:
            raise InputError("clustering", expected="a probability in [0, 1]", got=p)
        if noise["position"].shape[-1] != len(size):
            raise InputError("noise", expected=f"drawn for {len(size)} axes", got=noise["position"].shape[-1])
        rows, most = noise["gain"].shape
        if rows != len(picks) or max((len(pick) for pick in picks), default=0) > most:
            raise InputError(
                "picks",
                expected=f"{rows} tensors of up to {most} cells, as noise was drawn",
                got=[len(pick) for pick in picks],
            )
        if any(len(pick) and not 0 <= int(pick.min()) <= int(pick.max()) < len(cells) for pick in picks):
            raise InputError(
                "picks", expected=f"indices of the {len(cells)} cells", got=[pick.tolist() for pick in picks]
            )
        wanted = (len(picks), 1, *size)
        if occupied is not None and (
            occupied.shape != wanted or occupied.dtype != torch.int32 or bool((occupied < 0).any())
        ):
            raise InputError(
                "occupied", expected=f"int32 labels {wanted}", got=f"{tuple(occupied.shape)} {occupied.dtype}"
            )


def of_cells(noise: Noise, counts: Sequence[int]) -> Noise:
    """The noise of all cells of all frames, one after another; what belongs to frames is left out."""
    return {
        name: torch.cat([value.flatten(0, 1)[:0], *(value[i, :n] for i, n in enumerate(counts))])
        for name, value in noise.items()
        if name not in OF_FRAMES
    }


def _compact(occupied: Tensor) -> Tensor:
    """Labels of each frame renumbered from 1 without holes; int32 [B, (Z,) Y, X] on the CPU."""
    out = torch.zeros(occupied[:, 0].shape, dtype=torch.int32)
    for row, labels in zip(out.numpy(), occupied[:, 0].cpu().numpy()):
        ids = np.unique(labels)
        row[:] = np.where(labels != 0, np.searchsorted(ids[ids != 0], labels) + 1, 0)
    return out
