"""Dim light around cells that nobody annotated: where it lies, how often and how strong."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from synthaug.cascade import Cascade
from synthaug.generators.cytoplasm import CONTRAST, cytoplasm_light, draw_cytoplasm
from synthaug.randomness import SampleKey
from synthaug.training.borrowing import CYTOPLASM, add_cytoplasm

SIZE = (128, 128)
WIDTH = 4.0


def labels() -> torch.Tensor:
    """One disc of radius 10 in the middle of the left half."""
    y, x = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    return ((y - 64) ** 2 + (x - 32) ** 2 < 100).int()[None, None]


def lights(rate: float, num: int = 64) -> torch.Tensor:
    noise = draw_cytoplasm([SampleKey(0, ("frame", i)) for i in range(num)], SIZE, WIDTH)
    return cytoplasm_light(labels().expand(num, 1, *SIZE), noise, rate, WIDTH)


def test_it_lies_around_the_cells_in_a_share_of_the_frames() -> None:
    some, every = lights(0.5), lights(1.0)
    assert every.shape == (64, 1, *SIZE)
    assert float(every.min()) >= 0
    shown = some.flatten(1).amax(1) > 0
    assert 0.3 < float(shown.float().mean()) < 0.7
    assert torch.equal(some[shown], every[shown]), "which frames have it does not change what it looks like"
    assert float(every[..., 64 + 32 :].max()) == 0, "none far from any cell"
    assert float(every[..., 44:50].amax((1, 2, 3)).median()) > 0.005, "but beside it"


def test_it_is_dim_and_as_strong_as_it_says() -> None:
    peak = lights(1.0).flatten(1).amax(1)
    assert float(peak.max()) <= CONTRAST[1]
    assert 0.02 < float(peak.median()) < 0.2
    assert float(peak.quantile(0.9)) > 3 * float(peak.quantile(0.2))


def test_a_key_decides_it() -> None:
    keys = [SampleKey(0, ("frame", i)) for i in range(3)]
    together, alone = draw_cytoplasm(keys, SIZE, WIDTH), draw_cytoplasm(keys[1:2], SIZE, WIDTH)
    for name, value in alone.items():
        assert torch.equal(together[name][1:2], value)


@pytest.fixture(scope="module")
def glowing() -> Cascade:
    cascade = copy.deepcopy(Cascade.from_pretrained("nuclei-2d"))
    cascade.background.config = replace(cascade.background.config, cytoplasm_rate=1.0)
    return cascade


def test_frames_are_the_same_but_for_it(glowing: Cascade) -> None:
    plain = Cascade.from_pretrained("nuclei-2d")
    keys = [SampleKey(0, ("frame", i)) for i in range(4)]
    cells = plain.cells([SampleKey(0, ("cell", i)) for i in range(16)])
    with_it = glowing.populate(cells, keys, SIZE, num_cells=12)
    without = plain.populate(cells, keys, SIZE, num_cells=12)
    assert torch.equal(with_it.labels, without.labels)
    brighter = (with_it.image - without.image).flatten(1).mean(1)
    assert (brighter > 0).all()
    alone = glowing.populate(cells, keys[2:3], SIZE, num_cells=12)
    assert torch.equal(alone.image[0], with_it.image[2]), "a frame does not depend on its company"
    assert glowing.fingerprint() != plain.fingerprint()


def test_the_fewer_frames_are_annotated_the_more_there_is_of_it(glowing: Cascade) -> None:
    background = copy.deepcopy(glowing.background)
    rates = []
    for num in (1, 4, 100):
        add_cytoplasm(background, 12.0, num)
        rates.append(background.config.cytoplasm_rate)
    assert CYTOPLASM > rates[0] > rates[1] > rates[2] == 0
    assert background.config.cytoplasm_width == 6.0
    background.scale_table(1.0, 2.0)
    assert background.config.cytoplasm_width == 3.0
