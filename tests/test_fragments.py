"""Fragments of dead cells: where they lie, how they are labelled, how often there are any."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.measure import label as components

from synthaug.cascade import Cascade
from synthaug.errors import InputError
from synthaug.generators.fragments import COLUMNS, MOST, draw_fragments, scatter_fragments
from synthaug.generators.population_config import PopulationConfig
from synthaug.randomness import SampleKey
from synthaug.training.borrowing import FRAGMENTS, add_fragments

SIZE, CELL, LEAST = (128, 160), 16.0, 20


def keys(num: int) -> list[SampleKey]:
    return [SampleKey(0, ("frame", i)) for i in range(num)]


def canvases(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Light and labels of one dim disc of radius 16."""
    y, x = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    disc = ((y - 64) ** 2 + (x - 60) ** 2 < CELL**2).int().expand(num, *SIZE).clone()
    return 0.5 * disc.float(), disc


def test_they_are_small_single_pieces_of_their_own_beside_the_cells() -> None:
    light, labels = canvases(24)
    before = labels.clone()
    scatter_fragments(light, labels, draw_fragments(keys(24), [40] * 24, 0.1), CELL, LEAST)
    sizes, bright = [], []
    for frame, old, shine in zip(labels.numpy(), before.numpy(), light.numpy()):
        assert (frame[old > 0] == 1).all(), "the cell keeps its pixels"
        ids = np.unique(frame)
        assert ids.tolist() == list(range(len(ids))), "labels stay contiguous"
        for i in ids[2:]:
            assert components(frame == i, connectivity=1).max() == 1
            sizes.append(int((frame == i).sum()))
            bright.append(float(shine[frame == i].max()))
    assert len(sizes) > 50
    assert min(sizes) >= LEAST
    assert np.quantile(sizes, 0.9) < 0.2 * np.pi * CELL**2
    assert 0.5 < np.median(bright) < 2.5
    assert max(bright) > 3


def test_what_would_be_too_small_is_drawn_larger() -> None:
    noise = draw_fragments(keys(24), [40] * 24, 0.1)
    sizes = []
    for least in (20, 80):
        light, labels = canvases(24)
        scatter_fragments(light, labels, noise, CELL, least)
        found = [np.bincount(frame.ravel())[2:] for frame in labels.numpy()]
        sizes.append(np.concatenate(found))
        # What shines is outlined, but for the glow around it.
        assert float(light[labels == 0].max()) < 0.75 * float(light.max())
    assert all(len(found) > 40 and found.min() >= least for found, least in zip(sizes, (20, 80)))
    assert np.median(sizes[1]) < 160


def test_they_touch_nothing_that_is_occupied() -> None:
    light, labels = torch.zeros(4, *SIZE), torch.zeros(4, *SIZE, dtype=torch.int32)
    occupied = canvases(4)[1]
    scatter_fragments(light, labels, draw_fragments(keys(4), [50] * 4, 0.2), CELL, LEAST, occupied)
    assert int(labels.max()) > 5
    assert not bool((labels[occupied > 0] > 0).any())


def test_a_full_frame_gets_none() -> None:
    light, labels = torch.zeros(2, *SIZE), torch.ones(2, *SIZE, dtype=torch.int32)
    scatter_fragments(light, labels, draw_fragments(keys(2), [50, 50], 0.2), CELL, LEAST)
    assert int(labels.max()) == 1
    assert float(light.max()) == 0


def test_a_key_decides_them() -> None:
    three, counts = keys(3), [5, 60, 0]
    together, alone = draw_fragments(three, counts, 0.3), draw_fragments(three[1:2], counts[1:2], 0.3)
    for name, value in alone.items():
        assert torch.equal(together[name][1:2, : value.shape[1]], value)
        assert not together[name][2].any(), "no cells, no fragments"
    group = COLUMNS.index("group")
    sizes = torch.bincount(alone["fragment"][0, :, group].long())[1:]
    assert 1 <= int(sizes.min()) <= int(sizes.max()) <= MOST
    assert len(sizes) == alone["fragment_place"].shape[1] == len(sizes[sizes > 0])


def test_populations_have_them_behind_their_cells() -> None:
    cascade = copy.deepcopy(Cascade.from_pretrained("nuclei-2d"))
    names = [SampleKey(3, ("frame", i)) for i in range(4)]
    arguments = {"size": (128, 128), "num_cells": 12}
    plain = cascade.generate(names, **arguments)
    cascade.population.config = replace(cascade.population.config, fragment_rate=0.4, fragment_radius=11.0)
    made = cascade.generate(names, **arguments)
    again = cascade.generate(names[2:3], **arguments)
    assert torch.equal(made.num_placed, plain.num_placed)
    for i, placed in enumerate(made.num_placed.tolist()):
        assert torch.equal(made.labels[i] * (made.labels[i] <= placed), plain.labels[i]), "the cells are the same"
    assert int(made.labels.max()) > int(plain.labels.max())
    assert torch.equal(again.image[0], made.image[2])
    assert torch.equal(again.labels[0], made.labels[2])
    image, there = plain.image[0], plain.labels[0]
    cells = cascade.cells([SampleKey(4, ("cell", i)) for i in range(8)])
    pasted, labels = cascade.paste(cells, image, there, SampleKey(5, ("paste",)), num_cells=8)
    assert torch.equal(labels[there > 0], there[there > 0]), "what was there keeps its pixels"
    added = labels[(there == 0) & (labels > 0)].unique().tolist()
    assert added == list(range(int(there.max()) + 1, int(labels.max()) + 1))
    assert len(added) > 8
    assert not torch.equal(pasted, image)


def test_the_fewer_frames_are_annotated_the_more_there_are() -> None:
    cascade = copy.deepcopy(Cascade.from_pretrained("nuclei-2d"))
    rates = []
    for num in (1, 4, 40):
        add_fragments(cascade.population, 12.0, num)
        rates.append(cascade.population.config.fragment_rate)
    assert rates == pytest.approx([0.8 * FRAGMENTS, 0.5 * FRAGMENTS, 0.0])
    assert cascade.population.config.at_scale(1.0, 2.0).fragment_radius == 6.0


def test_a_rate_is_a_share() -> None:
    with pytest.raises(InputError, match="fragment_rate"):
        PopulationConfig(fragment_rate=1.5)
