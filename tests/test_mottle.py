"""Cells with clumps and holes beyond what was learned: how many, how strong, and only inside."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from synthaug.cascade import Cascade
from synthaug.generators.mottle import STRENGTH, draw_mottle, mottled
from synthaug.randomness import SampleKey

SIDE = 64


def keys(num: int) -> list[SampleKey]:
    return [SampleKey(0, ("cell", i)) for i in range(num)]


def test_a_share_of_the_cells_is_mottled_in_all_strengths() -> None:
    some, every = draw_mottle(keys(400), SIDE, 0.3), draw_mottle(keys(400), SIDE, 1.0)
    shown = some.flatten(1).abs().amax(1) > 0
    assert 0.22 < float(shown.float().mean()) < 0.38
    assert torch.equal(some[shown], every[shown]), "which of them are does not change how"
    spread = every.flatten(1).std(1)
    assert float(spread.quantile(0.05)) < 1.5 * STRENGTH[0]
    assert float(spread.quantile(0.95)) > 0.7 * STRENGTH[1]
    assert 0.15 < float(every.square().mean().sqrt()) < 0.35, "as strong as it says in the mean"
    assert torch.equal(draw_mottle(keys(8)[3:5], SIDE, 1.0), every[3:5])


def test_light_changes_inside_alone() -> None:
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    sdf = (torch.hypot(y - 32.0, x - 32.0) - 15)[None]
    image = torch.ones(1, SIDE, SIDE)
    changed = mottled(image, sdf, draw_mottle(keys(1), SIDE, 1.0))
    assert float((changed - 1).abs()[sdf > 8].max()) < 1e-3
    assert float((changed - 1).abs()[sdf < -3].mean()) > 0.02


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return copy.deepcopy(Cascade.from_pretrained("nuclei-2d"))


def test_cells_keep_their_outlines_and_their_brightness(cascade: Cascade) -> None:
    plain = cascade.cells(keys(16))
    cascade.texture.config = replace(cascade.texture.config, mottle_rate=0.5)
    made = cascade.cells(keys(16))
    assert torch.equal(made.sdf, plain.sdf)
    assert torch.equal(made.brightness, plain.brightness)
    differ = (made.image != plain.image).flatten(1).any(1)
    assert 0 < int(differ.sum()) < 16
    mean = (made.image * made.mask).flatten(1).sum(1) / made.mask.flatten(1).sum(1)
    assert torch.allclose(mean, torch.ones(16), atol=1e-4)
    assert torch.equal(cascade.cells(keys(16)[5:7]).image, made.image[5:7]), "a cell's bits depend on its key alone"
