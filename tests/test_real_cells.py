"""Real cells among those of a stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthaug import Cascade, SynthDataset
from synthaug.datasets.bank import Block
from synthaug.datasets.real_cells import RealCells
from synthaug.errors import DataError, InputError
from synthaug.randomness import SampleKey
from tests.shapes import ellipse_frame
from tests.test_bank import make_plan

PAIRS = [ellipse_frame(seed) for seed in range(2)]


def test_cells_are_those_of_the_frames_and_depend_on_their_key_alone() -> None:
    cells = RealCells.cut(PAIRS, Cascade.from_pretrained("nuclei-2d"))
    keys = [SampleKey(0, ("cell", i)) for i in range(40)]
    drawn = cells.cells(keys)
    known = {crop.numpy().tobytes() for crop in cells.crops.image}
    assert {image[0].numpy().tobytes() for image in drawn.image} <= known
    assert len({image[0].numpy().tobytes() for image in drawn.image}) > 10
    assert torch.equal(cells.cells(keys[7:8]).image[0], drawn.image[7])
    assert cells.fingerprint() != RealCells.cut(PAIRS[:1], Cascade.from_pretrained("nuclei-2d")).fingerprint()


def test_a_share_of_the_blocks_is_real() -> None:
    plan = make_plan()
    assert not any(plan.is_real(Block(0, 0, 0, n)) for n in range(50))
    plan._real_share = 0.3
    chosen = [plan.is_real(Block(1, 0, 2, n)) for n in range(50)]
    assert sum(chosen) == 15
    assert max(np.diff(np.flatnonzero(chosen))) <= 4, "evenly spread"
    plan._real_share = 1.0
    assert all(plan.is_real(Block(0, 0, 0, n)) for n in range(50))


def test_a_stream_mixes_them_in_and_stays_pure() -> None:
    cascade = Cascade.from_pretrained("nuclei-2d")

    def stream(share: float) -> SynthDataset:
        return SynthDataset(cascade, (96, 96), 4, real=PAIRS, real_cells=share, num_lanes=2, num_batches=3, max_reuse=2)

    made = {}
    for share in (0.0, 0.5, 1.0):
        data = stream(share)
        made[share] = list(data)
        stats = data.stats()
        assert (stats.real_cells > 0) == (share > 0)
        assert (stats.fresh_cells > 0) == (share < 1)
        assert data.fingerprint() == stream(share).fingerprint()
        data.close()
    again = list(stream(0.5).loader(num_workers=2))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(made[0.5], again, strict=True))
    assert not torch.equal(made[0.0][0]["image"], made[0.5][0]["image"])
    assert len({stream(share).fingerprint() for share in made}) == 3
    assert made[1.0][0]["synthetic"].all()


def test_mistakes_are_named() -> None:
    cascade = Cascade.from_pretrained("nuclei-2d")
    for share in (-0.1, 1.5, True, "half"):
        with pytest.raises(InputError, match="real_cells"):
            SynthDataset(cascade, (96, 96), real=PAIRS, real_cells=share)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="frames to cut"):
        SynthDataset(cascade, (96, 96), real_cells=0.5)
    with pytest.raises(InputError, match="0 for a 3D cascade"):
        RealCells.cut(PAIRS, Cascade.from_pretrained("nuclei-3d"))
    empty = [(image, np.zeros_like(labels)) for image, labels in PAIRS]
    with pytest.raises(DataError, match="whole cell") as caught:
        SynthDataset(cascade, (96, 96), real=empty, real_cells=0.5)
    assert "real_cells=0" in caught.value.__notes__[0]
