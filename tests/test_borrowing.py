"""Spread that few annotations cannot show comes from elsewhere; the mean stays their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from synthaug.cascade import Cascade
from synthaug.errors import InputError
from synthaug.generators.background import Background
from synthaug.generators.population import PopulationSynthesis
from synthaug.randomness import SampleKey
from synthaug.training.borrowing import ENOUGH, PRIOR_FRAMES, borrow_clustering, borrow_spread, borrow_styles
from tests.shapes import ellipse_frame, ellipsoid_volume


def test_borrowed_rows_lie_around_the_own_mean_and_weigh_what_the_prior_says() -> None:
    own = torch.tensor([[10.0, 1.0], [12.0, 3.0]])
    source = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)) * 0.3
    table = borrow_spread(own, source, prior=4)
    copies = (table[:, None] == own).all(2).sum(0).tolist()
    assert copies == [25, 25], "2 own rows weigh half of what 4 borrowed ones do"
    borrowed = table[50:]
    assert torch.allclose(borrowed.mean(0), own.mean(0), atol=1e-5)
    assert torch.allclose(borrowed.std(0), source.std(0), atol=1e-5)


def test_many_own_rows_borrow_nothing() -> None:
    own = torch.randn(int(ENOUGH * 4), 2)
    assert borrow_spread(own, torch.randn(50, 2), prior=4) is own


def test_what_a_row_cannot_tell_does_not_spoil_the_mean() -> None:
    own = torch.tensor([[1.0, torch.nan], [3.0, 5.0]])
    table = borrow_spread(own, torch.tensor([[0.0, 0.0], [1.0, torch.nan]]), prior=1)
    assert table[-2:].tolist() == [[1.5, 5.0], [2.5, 5.0]]


def test_one_frame_takes_the_variety_of_another_data_set() -> None:
    image, labels = ellipse_frame(0)
    background = Background.fit([image], [labels])
    alone = background.table.clone()
    source = Cascade.from_pretrained("nuclei-2d").background
    borrow_styles(background, source)
    assert torch.isfinite(background.table).all()
    share = float((background.table == alone).all(1).float().mean())
    assert share == pytest.approx(1 / (1 + PRIOR_FRAMES), abs=0.02)
    styles = background.draw_styles([SampleKey(0, ("frame", i)) for i in range(300)])
    for name in ("level", "brightness", "density"):
        column = background.names.index(name)
        own, drawn = alone[0, column].log(), styles[name].log()
        assert float(drawn.mean()) == pytest.approx(float(own), abs=0.15)
        there = source.table[source.table[:, column] > 0, column].log()
        assert 0.4 * float(there.std()) < float(drawn.std()) < 1.3 * float(there.std())
    assert set(styles["height"].tolist()) == {160.0}


def test_one_frame_does_not_tell_how_cells_cluster() -> None:
    source = Cascade.from_pretrained("nuclei-2d").population
    for num, low, high in ((1, 0.3, 0.35), (1000, 0.99, 1.0)):
        population = PopulationSynthesis(replace(source.config, clustering=1.0))
        borrow_clustering(population, source, num)
        assert low < population.config.clustering < high


def test_frames_do_not_borrow_from_volumes() -> None:
    background = Background.fit(*([x] for x in ellipse_frame(0)))
    with pytest.raises(InputError, match="2D data"):
        borrow_styles(background, Background.fit(*([x] for x in ellipsoid_volume(0))))
