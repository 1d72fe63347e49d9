"""Cascades without weights: cheap deterministic discs and balls, with counters, so that streams can be tested alone."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from synthaug.randomness import SampleKey, normal, uniform
from synthaug.types import Cells, Population


class FakeCascade:
    """The interface of `Cascade` on discs.

    Args:
        fail_at: Number of the call to `cells` that raises, counted from 0.
        delay: Seconds a call to `cells` takes on top.
        voxel_size_um: Handed to populations.
    """

    ndim = 2
    num_slices = 1
    block_size = 4
    crop_size = 16
    device = torch.device("cpu")

    def __init__(
        self, fail_at: int | None = None, delay: float = 0.0, voxel_size_um: tuple[float, float, float] | None = None
    ) -> None:
        self.fail_at, self.delay, self.voxel_size_um = fail_at, delay, voxel_size_um
        self.rejects: Counter = Counter()
        self.num_calls = 0
        self.num_made = 0
        self.dealt: list[
            list[tuple[float, float]]
        ] = []  # brightness and size, which name a cell, of each frame's cells

    def fingerprint(self) -> str:
        return "fake"

    def at_voxel_size(self, voxel_size_um: tuple[float, float, float]) -> Self:
        other = copy.copy(self)
        other.voxel_size_um = voxel_size_um
        return other

    def cells(self, keys: Sequence[SampleKey]) -> Cells:
        self.num_calls += 1
        if self.fail_at is not None and self.num_calls > self.fail_at:
            raise ArithmeticError("the network went up in smoke")
        if self.delay:
            time.sleep(self.delay)
        self.num_made += len(keys)
        self.rejects["empty"] += 1
        draws = uniform(keys, (2,))
        z, y, x = (torch.arange(n) - (n - 1) / 2 for n in (self.num_slices, self.crop_size, self.crop_size))
        distance = (z[:, None, None] ** 2 + y[:, None] ** 2 + x**2).sqrt()
        sdf = distance - (1.6 + 2 * draws[:, 0, None, None, None])
        light = (sdf < 0).float()
        return Cells(image=light, sdf=sdf, brightness=0.5 + draws[:, 1], scale=torch.ones(len(keys)))

    def num_cells(
        self, keys: Sequence[SampleKey], size: tuple[int, ...], *, num_cells: Any = None, density: Any = None
    ) -> list[int]:
        low, high = num_cells if isinstance(num_cells, tuple) else (num_cells, num_cells)
        if num_cells is None:
            low, high = (2, 6) if density is None else (round(density * math.prod(size)),) * 2
        return [int(key.child("count").numpy().integers(low, high + 1)) for key in keys]

    def populate(
        self,
        cells: Cells,
        keys: Sequence[SampleKey],
        size: tuple[int, ...],
        *,
        picks: Sequence[Tensor] | None = None,
        num_cells: Any = None,
        density: Any = None,
        clustering: float | None = None,
        background: str = "model",
    ) -> Population:
        picks = picks if picks is not None else [torch.arange(len(cells))] * len(keys)
        image = 100 + normal(keys, (1, *size))
        labels = torch.zeros(len(keys), 1, *size, dtype=torch.int32)
        placed = []
        for i, (key, pick) in enumerate(zip(keys, picks)):
            centre = cells.sdf[pick, self.num_slices // 2, self.crop_size // 2, self.crop_size // 2]
            self.dealt.append(list(zip(cells.brightness[pick].tolist(), centre.tolist())))
            placed.append(self._place(cells.select(pick), image[i], labels[i], key))
        return Population(
            image=image,
            labels=labels,
            num_requested=torch.tensor([len(pick) for pick in picks]),
            num_placed=torch.tensor(placed),
            voxel_size_um=self.voxel_size_um,
        )

    def paste(
        self,
        cells: Cells,
        image: Tensor,
        labels: Tensor,
        key: SampleKey,
        *,
        num_cells: Any = None,
        clustering: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        image, labels = image.clone(), labels.clone()
        self._place(cells, image, labels, key)
        return image, labels

    def generate(self, keys: Sequence[SampleKey], size: tuple[int, ...], **same: Any) -> Population:
        wishes = {k: same.get(k) for k in ("num_cells", "density")}
        counts = self.num_cells(keys, size, **wishes)
        parts = [
            self.populate(self.cells([key.child("cell", i) for i in range(n)]), [key], size, **same)
            for key, n in zip(keys, counts)
        ]
        return Population.cat(parts)

    def _place(self, cells: Cells, image: Tensor, labels: Tensor, key: SampleKey) -> int:
        """Each cell at the first of a few random positions where it touches nothing; in place."""
        rng, last = key.child("place").numpy(), int(labels.max())
        masks, lights = (t[:, 0] if self.ndim == 2 else t for t in (cells.mask, cells.image))
        number = last
        for mask, light, brightness in zip(masks, lights, cells.brightness):
            for _ in range(4):
                corner = [int(rng.integers(0, n - m + 1)) for n, m in zip(labels.shape[1:], mask.shape)]
                place = (0, *(slice(c, c + m) for c, m in zip(corner, mask.shape)))
                window = labels[place]
                if not bool((window[mask] > 0).any()):
                    number += 1
                    window[mask] = number
                    image[place] += 50 * brightness * light
                    break
        return number - last


class FakeCascade3D(FakeCascade):
    """The interface of a 3D `Cascade` on balls."""

    ndim = 3
    num_slices = 8
    crop_size = 8
