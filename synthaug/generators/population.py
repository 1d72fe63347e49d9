"""Cells to populations: rotate, flip, place one after another, add up the light (paper, "Cell Population Synthesis").

The clustering probability, the gaps between neighbours and the spread of the number of cells are fitted to real labels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance
from torch import Tensor

from synthaug.errors import InputError
from synthaug.generators import layout
from synthaug.generators.stage import Noise, Stage
from synthaug.kernels.compositing import composite, resample
from synthaug.randomness import SampleKey
from synthaug.types import Cells, Scenes


@dataclass(frozen=True)
class PopulationConfig:
    """What is fitted to the label images of a data set.

    Attributes:
        min_area: pixels an instance must keep on the canvas, >= 1.
        clustering: probability p in [0, 1] that a cell is placed next to one that is already there.
        gaps: quantiles of the gap to that neighbour, whole pixels >= 0, ascending; 0 means touching.
        clearance: pixels >= 0 which the other cells keep from their neighbours at most; each keeps a random part of it.
        reach: pixels by which the canvas grows, along each axis, for the centres of cells that keep `min_area` on it.
        frame_size: (Y, X) of the frames in which densities were counted; (0, 0): density is taken as it is.
        dispersion: variance over mean of the number of cells in small windows of one frame; 0 = none, 1 = Poisson's.
        num_tries: candidate positions a cell gets in each way of placing.
        gain_sigma: standard deviation of the log of the brightness gain a cell gets every time it is used.
    """

    min_area: int = 1
    clustering: float = 0.0
    gaps: tuple[int, ...] = (0,)
    clearance: int = 0
    reach: float = 0.0
    frame_size: tuple[int, int] = (0, 0)
    dispersion: float = 0.0
    num_tries: int = 64
    gain_sigma: float = 0.1

    def __post_init__(self) -> None:
        if self.min_area < 1 or not 0 <= self.clustering <= 1 or self.num_tries < 1:
            raise InputError("PopulationConfig", expected="min_area, num_tries >= 1, clustering in [0, 1]", got=self)
        if not self.gaps or min(self.gaps) < 0 or min(self.clearance, self.reach, self.dispersion, self.gain_sigma) < 0:
            raise InputError(
                "PopulationConfig", expected="gaps, clearance, reach, dispersion and gain_sigma >= 0", got=self
            )


class PopulationSynthesis(Stage):
    """Places single cells on an empty (or partly occupied) canvas; no pixel is ever overwritten."""

    config_class = PopulationConfig
    config: PopulationConfig

    @classmethod
    def fit(cls, labels: Sequence[NDArray[np.integer[Any]]], *, min_area: int) -> PopulationSynthesis:
        """Fit all of the configuration to real label images; a few seconds.

        Args:
            labels: int [Y, X] each, 0 = background. Instances under `min_area` pixels are ignored.
            min_area: pixels an instance must have, >= 1.

        Raises:
            InputError: no frame holds a cell that is not cut by the border.
        """
        if min_area < 1:
            raise InputError("min_area", expected="a number of pixels >= 1", got=min_area)
        frames = [layout.drop_small(np.asarray(frame), min_area) for frame in labels]
        masks = [mask for frame in frames for mask in layout.whole_masks(frame)]
        if not masks:
            raise InputError(
                "labels",
                expected=f"at least one cell of {min_area} pixels or more that is not cut by the border",
                got=f"none in {len(frames)} frames",
                remedy="Give other frames or a smaller min_area.",
            )
        reach = layout.reach(masks, min_area)
        config = PopulationConfig(
            min_area=min_area,
            reach=reach,
            frame_size=(int(np.median([f.shape[0] for f in frames])), int(np.median([f.shape[1] for f in frames]))),
            dispersion=layout.dispersion(frames, reach, min_area),
        )
        return cls(replace(config, **_fit_clustering(frames, masks, config)))

    def num_cells(
        self,
        keys: Sequence[SampleKey],
        size: tuple[int, int],
        density: Tensor,
        *,
        num_cells: int | tuple[int, int] | None = None,
    ) -> list[int]:
        """How many labelled cells each frame asks for, border-cut ones included; row i depends on `keys[i]` alone.

        By default density x area, where both are corrected for the cells cut by the border (a small canvas shows more
        of them per pixel than a large frame), with the spread that windows of real frames have, rounded at random.

        Args:
            keys: B keys.
            size: (Y, X) of the canvas.
            density: float [B], labelled instances per pixel of a real frame, border-cut ones included.
            num_cells: fixed number, or (lowest, highest) to draw from, both included.

        Raises:
            InputError: a negative number, an empty range, or densities that are not one a key.
        """
        _check_size(size)
        if num_cells is not None:
            low, high = (num_cells, num_cells) if isinstance(num_cells, int | np.integer) else num_cells
            if not 0 <= low <= high:
                raise InputError("num_cells", expected="a number >= 0 or (lowest, highest)", got=num_cells)
            return [int(key.child("count").numpy().integers(low, high + 1)) for key in keys]
        if density.shape != (len(keys),) or bool((density < 0).any()):
            raise InputError("density", expected=f"{len(keys)} numbers >= 0", got=tuple(density.shape))
        area = self._reached_area(size)
        frame_area, share = float(size[0] * size[1]), 0.0
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
        self, keys: Sequence[SampleKey], size: tuple[int, int], num_cells: Sequence[int]
    ) -> Noise:
        """All random numbers, rows padded with zeros to max(num_cells) = n; row i depends on `keys[i]`, `num_cells[i]`.

        Returns:
            "rotation" [B, n, 2] cosine and sine, "flip" [B, n] (+1 or -1), "gain" [B, n] > 0, "cluster" [B, n] in
            [0, 1), "position" and "direction" [B, n, T, 2], "gap" [B, n, T] in [0, 1); float32.
        """
        _check_size(size)
        n, t = max(num_cells, default=0), self.config.num_tries
        shapes = {
            "rotation": (2,),
            "flip": (),
            "gain": (),
            "cluster": (),
            "position": (t, 2),
            "direction": (t, 2),
            "gap": (t,),
        }
        noise = {name: torch.zeros((len(keys), n, *shape)) for name, shape in shapes.items()}
        for row, (key, count) in enumerate(zip(keys, num_cells, strict=True)):
            # Sines and exponentials are taken row by row: vector code may round them otherwise in another batch
            random = key.child("placement").numpy()
            angle = random.random((count, t + 1)) * (2 * np.pi)
            cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
            values = {
                "rotation": np.stack([cosine[:, 0], sine[:, 0]], axis=-1),
                "flip": np.where(random.random(count) < 0.5, -1.0, 1.0),
                "gain": np.exp(self.config.gain_sigma * random.standard_normal(count)),
                "cluster": random.random(count, dtype=np.float32),
                "position": random.random((count, t, 2), dtype=np.float32),
                "direction": np.stack([sine[:, 1:], cosine[:, 1:]], axis=-1),
                "gap": random.random((count, t), dtype=np.float32),
            }
            for name, value in values.items():
                noise[name][row, :count] = torch.from_numpy(np.asarray(value, np.float32))
        return noise

    def forward(
        self,
        cells: Cells,
        picks: Sequence[Tensor],
        noise: Noise,
        size: tuple[int, int],
        *,
        clustering: float | None = None,
        occupied: Tensor | None = None,
    ) -> Scenes:
        """Place the picked cells of every frame in their order.

        A cell that finds no place within the bounded number of tries is left out; compare `num_placed` with
        `num_requested`. Light adds up, also that of the parts of a cell beyond its mask.

        Args:
            cells: the bank, one slice (S = 1); on any device.
            picks: B tensors, int64 [n_i], which cells go into frame i; n_i <= the `num_cells[i]` noise was drawn for.
            noise: of `draw`.
            size: (Y, X) of the canvas.
            clustering: probability in [0, 1] instead of the fitted one.
            occupied: int32 [B, 1, Y, X], labels of what is there already, not to be touched; new cells cluster next
                to it too, but the returned labels hold the new cells alone.

        Returns:
            light and labels on the device of `cells`.

        Raises:
            InputError: arguments that do not fit each other.
        """
        p = self.config.clustering if clustering is None else clustering
        _check_forward(cells, picks, noise, size, p, occupied)
        device, counts = cells.image.device, [len(pick) for pick in picks]
        chosen = cells.select(torch.cat([*picks, torch.empty(0, dtype=torch.int64)]).to(device)).to("cpu")
        drawn = {
            name: torch.cat([value.flatten(0, 1)[:0], *(value[i, :n] for i, n in enumerate(counts))])
            for name, value in noise.items()
        }
        image, sdf = resample(chosen, drawn["rotation"], drawn["flip"])
        labels, corners = self._place(sdf < 0, drawn, counts, p, _compact(occupied, len(picks), size))
        light = composite(image, chosen.brightness * drawn["gain"], corners, counts, size)
        return Scenes(
            light=light[:, None].to(device),
            labels=labels[:, None].to(device),
            num_requested=torch.tensor(counts, dtype=torch.int64, device=device),
            num_placed=labels.flatten(1).amax(1).to(device, torch.int64),
        )

    def _place(
        self, masks: Tensor, drawn: Noise, counts: list[int], clustering: float, occupied: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Labels [B, Y, X] and corners [N, 3] of N masks with their noise; see `place_cells`."""
        from synthaug.kernels.placement import place_cells  # imports numba, which reading a cascade does not need

        table = torch.tensor(self.config.gaps)
        return place_cells(
            masks,
            torch.tensor(counts, dtype=torch.int64),
            drawn["position"],
            drawn["direction"],
            table[(drawn["gap"] * len(table)).long().clamp_(max=len(table) - 1)],
            (drawn["gap"] * (self.config.clearance + 1)).long().clamp_(max=self.config.clearance),
            drawn["cluster"] < clustering,
            occupied,
            self.config.min_area,
        )

    def _reached_area(self, size: tuple[int, int]) -> float:
        return layout.reached_area(size, self.config.reach)


def _fit_clustering(
    frames: list[NDArray[np.int32]], masks: list[NDArray[np.bool_]], config: PopulationConfig
) -> dict[str, Any]:
    """Clustering probability and gaps: the real masks are placed anew, and the gaps to nearest neighbours compared.

    The boundary-to-boundary gap is compared (Wasserstein distance), not that of centroids: it is what clustering
    changes, whatever the cells' sizes and elongations.
    """
    frames = [frame for frame in frames if frame.max(initial=0) > 1]
    if frames:  # about 1,500 cells tell enough
        most = math.ceil(1500 / np.mean([frame.max() for frame in frames]))
        frames = [frames[i] for i in np.unique(np.linspace(0, len(frames) - 1, most).round().astype(int))]
    real = [layout.neighbour_gaps(frame) for frame in frames]
    if not real:
        return {"clustering": 0.0, "gaps": (0,)}
    pooled = np.concatenate(real)
    diameter = float(np.median([2 * np.sqrt(mask.sum() / np.pi) for mask in masks]))
    near = pooled[pooled <= max(diameter / 8, 1)]  # farther neighbours are there without clustering, too
    gaps = tuple(int(g) for g in np.quantile(near, (np.arange(32) + 0.5) / 32).round()) if len(near) else (0,)
    config, cells, trials = replace(config, gaps=gaps), layout.cells_of_masks(masks), []
    for i, frame in enumerate(frames):
        key, count = SampleKey(0, ("fit clustering", i)), len(real[i])
        drawn = {k: v[0] for k, v in PopulationSynthesis(config).draw([key], (1, 1), [count]).items()}
        chosen = cells.select(torch.from_numpy(key.child("picks").numpy().integers(0, len(cells), count)))
        trials.append(
            (resample(chosen, drawn["rotation"], drawn["flip"])[1] < 0, drawn, torch.zeros((1, *frame.shape)))
        )

    @functools.cache
    def distance(clustering: float, clearance: int) -> float:
        trial = PopulationSynthesis(replace(config, clustering=clustering, clearance=clearance))
        labels = [trial._place(m, drawn, [len(m)], clustering, canvas.int())[0] for m, drawn, canvas in trials]
        return float(
            wasserstein_distance(pooled, np.concatenate([layout.neighbour_gaps(x[0].numpy()) for x in labels]))
        )

    p = 0.2
    for step in (0.1, 0.05):
        clearance = min((round(diameter * c / 5) for c in range(6)), key=lambda c: distance(p, c))
        around = np.arange(11) / 10 if step == 0.1 else np.clip([p - step, p, p + step], 0, 1)
        p = min((round(float(q), 2) for q in around), key=lambda q: distance(q, clearance))
    return {"clustering": p, "clearance": clearance, "gaps": gaps}


def _compact(occupied: Tensor | None, num_frames: int, size: tuple[int, int]) -> Tensor:
    """Labels of each frame renumbered from 1 without holes; int32 [B, Y, X] on the CPU."""
    out = torch.zeros((num_frames, *size), dtype=torch.int32)
    if occupied is not None:
        for row, labels in zip(out.numpy(), occupied[:, 0].cpu().numpy()):
            ids = np.unique(labels)
            row[:] = np.where(labels != 0, np.searchsorted(ids[ids != 0], labels) + 1, 0)
    return out


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1:
        raise InputError("size", expected="(Y, X), both >= 1", got=size)


def _check_forward(
    cells: Cells, picks: Sequence[Tensor], noise: Noise, size: tuple[int, int], p: float, occupied: Tensor | None
) -> None:
    _check_size(size)
    if cells.image.shape[1] != 1 or cells.image.shape[2] != cells.image.shape[3]:
        raise InputError("cells", expected="one slice and square crops, [N, 1, S, S]", got=tuple(cells.image.shape))
    if not 0 <= p <= 1:
        raise InputError("clustering", expected="a probability in [0, 1]", got=p)
    rows, most = noise["gain"].shape
    if rows != len(picks) or max((len(pick) for pick in picks), default=0) > most:
        raise InputError(
            "picks",
            expected=f"{rows} tensors of up to {most} cells, as noise was drawn",
            got=[len(pick) for pick in picks],
        )
    if any(len(pick) and not 0 <= int(pick.min()) <= int(pick.max()) < len(cells) for pick in picks):
        raise InputError("picks", expected=f"indices of the {len(cells)} cells", got=[pick.tolist() for pick in picks])
    wanted = (len(picks), 1, *size)
    if occupied is not None and (
        occupied.shape != wanted or occupied.dtype != torch.int32 or bool((occupied < 0).any())
    ):
        raise InputError("occupied", expected=f"int32 labels {wanted}", got=f"{tuple(occupied.shape)} {occupied.dtype}")
