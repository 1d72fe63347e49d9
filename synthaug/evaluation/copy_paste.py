"""Copy-paste (Ghiasi et al., CVPR 2021) by our own population stage: the rival that any synthesis of cells has to beat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from synthaug.cascade import Cascade
from synthaug.datasets.crops import CropSet, extract_crops
from synthaug.errors import InputError
from synthaug.evaluation.annotations import Pair
from synthaug.randomness import SampleKey
from synthaug.types import Cells


class CopyPaste(Cascade):
    """A cascade whose cells are the real ones, cut out; placement, background and camera stay its own.

    Args:
        cascade: A 2D cascade.
        pairs: Real frames with labels.
    """

    def __init__(self, cascade: Cascade, pairs: Sequence[Pair]) -> None:
        if cascade.ndim != 2:
            raise InputError(
                "copy-paste",
                expected="frames",
                got="volumes",
                remedy="Cells of which one plane is known cannot be cut out.",
            )
        stages: dict[str, Any] = cascade.stages()
        super().__init__(cascade.config, **stages)
        self.crops: CropSet = extract_crops(pairs, crop_size=cascade.crop_size, min_area=cascade.config.min_area)

    def cells(self, keys: Sequence[SampleKey]) -> Cells:
        """A real cell a key, drawn with replacement."""
        if not keys:
            raise InputError("keys", expected="at least one SampleKey", got="none")
        rows = [int(key.numpy().integers(len(self.crops))) for key in keys]
        return Cells(
            image=self.crops.image[rows][:, None],
            sdf=self.crops.sdf[rows][:, None],
            brightness=self.crops.brightness[rows],
            scale=self.crops.scale[rows],
        ).to(self.background.device)

    def fingerprint(self) -> str:
        """Also of the cells."""
        own = hashlib.sha256(self.crops.image.numpy().tobytes()).hexdigest()
        return hashlib.sha256(f"{super().fingerprint()}{own}".encode()).hexdigest()
