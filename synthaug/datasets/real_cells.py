"""Real cells cut out of annotated frames, for populations that are partly or wholly made of them.

Pasted into other surroundings, cells that somebody annotated are right by construction (copy-paste, Ghiasi et al., CVPR 2021);
there are only so few of them. A stream mixes them with cells of a cascade: `SynthDataset(real_cells=...)`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from synthaug.datasets.crops import CropSet, extract_crops
from synthaug.datasets.mixing import read_pair, relabel
from synthaug.errors import DataError, InputError
from synthaug.randomness import SampleKey
from synthaug.types import Cells

MOST_FRAMES = 64
"""Frames that are cut up, spread evenly over the data set: they hold more cells than a stream needs beside fresh ones."""


class RealCells:
    """Cells drawn with replacement from those cut out.

    Args:
        crops: Whole cells, each alone in its crop.
    """

    def __init__(self, crops: CropSet) -> None:
        self.crops = crops

    def __len__(self) -> int:
        return len(self.crops)

    @classmethod
    def cut(cls, real: Any, cascade: Any) -> Self:
        """The whole cells of a data set's frames.

        Args:
            real: Map-style, as `SynthDataset` takes it; of more than 64 frames that many, spread evenly.
            cascade: A 2D cascade, whose crop size and smallest area they get.

        Raises:
            InputError: The cascade makes volumes, of which single planes of cells are known.
            DataError: No frame holds a whole cell.
        """
        if cascade.ndim != 2:
            raise InputError(
                "real_cells",
                expected="0 for a 3D cascade",
                got="a share of real cells",
                remedy="Cells of which single planes are annotated cannot be cut out.",
            )
        chosen = np.unique(np.linspace(0, len(real) - 1, min(len(real), MOST_FRAMES)).astype(int)).tolist()
        pairs = [read_pair(real, i, 2) for i in chosen]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "only .* whole cells to learn from")  # nothing is learned here
            try:
                crops = extract_crops(
                    [(image.astype(np.float32), relabel(label)) for image, label in pairs],
                    crop_size=cascade.crop_size,
                    min_area=cascade.config.min_area,
                )
            except DataError as error:
                error.add_note("synthaug: while cutting out real cells; real_cells=0 does without them")
                raise
        return cls(crops)

    def cells(self, keys: Sequence[SampleKey]) -> Cells:
        """A cell a key, [N, 1, S, S]; row i depends on `keys[i]` alone."""
        rows = [int(key.numpy().integers(len(self.crops))) for key in keys]
        return Cells(
            image=self.crops.image[rows][:, None],
            sdf=self.crops.sdf[rows][:, None],
            brightness=self.crops.brightness[rows],
            scale=self.crops.scale[rows],
        )

    def fingerprint(self) -> str:
        """SHA-256 over the cells."""
        digest = hashlib.sha256()
        for tensor in (self.crops.image, self.crops.sdf, self.crops.brightness, self.crops.scale):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()
