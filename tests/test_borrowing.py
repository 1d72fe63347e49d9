"""Spread that few annotations cannot show comes from elsewhere; the middle stays their own."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from synthaug.cascade import Cascade
from synthaug.errors import InputError
from synthaug.generators.masks import usual_rows
from synthaug.generators.population import PopulationSynthesis
from synthaug.randomness import SampleKey
from synthaug.training.background_fit import fit_background
from synthaug.training.borrowing import (
    CROWDED,
    EMPTY,
    ENOUGH,
    LARGEST_LENT,
    LEAST_SPREAD,
    LENT,
    MOTTLED,
    ODD_RATE,
    PRIOR_FRAMES,
    SMALL,
    TOUCHING,
    borrow_placement,
    borrow_spread,
    borrow_styles,
    lend_cells,
    mean_of_columns,
    mottle_of_lent,
    press_cells,
)
from tests.shapes import ellipse_frame, ellipsoid_volume


def test_borrowed_rows_lie_around_the_own_median_and_weigh_what_the_prior_says() -> None:
    own = torch.tensor([[10.0, 1.0], [12.0, 3.0]])
    source = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)) * 0.3
    table = borrow_spread(own, source, prior=4)
    copies = (table[:, None] == own).all(2).sum(0).tolist()
    assert copies == [25, 25], "2 own rows weigh half of what 4 borrowed ones do"
    borrowed = table[50:]
    assert torch.allclose(borrowed.quantile(0.5, dim=0), own.mean(0), atol=1e-5)
    assert torch.allclose(borrowed.std(0), source.std(0), atol=1e-5)


def test_specks_of_the_other_data_set_do_not_make_cells_larger() -> None:
    own = torch.full((10, 1), math.log(12))
    radii = torch.tensor([20.0] * 80 + [2.5] * 40).log()[:, None]
    borrowed = borrow_spread(own, radii, prior=40)[-120:, 0].exp()
    assert float(borrowed.median()) == pytest.approx(12, rel=0.01)
    assert float(borrowed.max()) == pytest.approx(12, rel=0.01)


def test_what_volumes_borrow_lies_around_means() -> None:
    own = torch.tensor([[0.0], [0.0], [3.0]])
    source = torch.tensor([[0.0], [0.3], [0.9]])
    borrowed = borrow_spread(own, source, prior=4, centre=mean_of_columns)[-3:, 0]
    assert borrowed.tolist() == pytest.approx([0.6, 0.9, 1.5])


def test_odd_rows_are_not_borrowed() -> None:
    table = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    table[:20, 0] -= 6  # specks
    table[20:30, 1] += 5
    kept = usual_rows(table, 2.0)
    assert 140 < len(kept) < 170
    assert float(kept.abs().max()) < 3
    assert torch.equal(usual_rows(torch.ones(5, 2), 2.0), torch.ones(5, 2))
    assert usual_rows(table, None) is table


def test_many_own_rows_borrow_nothing() -> None:
    own = torch.randn(int(ENOUGH * 4), 2)
    assert borrow_spread(own, torch.randn(50, 2), prior=4) is own


def test_what_a_row_cannot_tell_does_not_spoil_the_middle() -> None:
    own = torch.tensor([[1.0, torch.nan], [3.0, 5.0]])
    table = borrow_spread(own, torch.tensor([[0.0, 0.0], [1.0, torch.nan]]), prior=1)
    assert table[-2:].tolist() == [[1.5, 5.0], [2.5, 5.0]]


def test_one_frame_takes_the_variety_of_another_data_set() -> None:
    image, labels = ellipse_frame(0)
    background = fit_background([image], [labels])
    alone = background.table.clone()
    source = Cascade.from_pretrained("nuclei-2d").background
    borrow_styles(background, source)
    assert torch.isfinite(background.table).all()
    share = float((background.table == alone).all(1).float().mean())
    assert share == pytest.approx((1 - EMPTY) / (1 + PRIOR_FRAMES), abs=0.02)
    styles = background.draw_styles([SampleKey(0, ("frame", i)) for i in range(300)])
    seen = styles["density"] > 0
    for name in ("level", "brightness", "density"):
        column = background.names.index(name)
        own, drawn = alone[0, column].log(), styles[name][seen].log()
        assert float(drawn.mean()) == pytest.approx(float(own), abs=0.15)
        there = source.table[source.table[:, column] > 0, column].log()
        assert 0.4 * float(there.std()) < float(drawn.std()) < 1.3 * float(there.std())
    assert set(styles["height"].tolist()) == {160.0}


def test_few_frames_are_joined_by_empty_and_by_crowded_ones() -> None:
    """Also where those of the other data set are all alike."""
    background, source = (
        fit_background(*([x] for x in ellipse_frame(0))),
        Cascade.from_pretrained("nuclei-2d").background,
    )
    density = background.names.index("density")
    source.table[:, density] = source.table[:, density].median() * torch.linspace(0.9, 1.1, len(source.table))
    own = float(background.table[0, density])
    borrow_styles(background, source)
    told = background.table[:, density]
    assert float((told == 0).float().mean()) == pytest.approx(EMPTY, abs=0.01)
    borrowed = told[(told > 0) & (told != own)]
    assert float(borrowed.log().std(correction=0)) == pytest.approx(LEAST_SPREAD["density"], rel=0.05)
    assert background.table[told == 0].isfinite().all()


def test_one_frame_does_not_tell_how_cells_lie() -> None:
    source = Cascade.from_pretrained("nuclei-2d").population
    for num, low, high in ((1, 0.0, 1.0), (30, 0.8, 0.95), (1000, 0.99, 1.0)):
        far = PopulationSynthesis(
            replace(source.config, clustering=1.0, gaps=(9,), clearance=source.config.clearance + 10)
        )
        borrow_placement(far, source, num)
        config, weight = far.config, num / (num + PRIOR_FRAMES)
        assert config.clustering == CROWDED if num == 1 else low < config.clustering < high
        assert list(config.gaps) == sorted(config.gaps)
        share = sum(gap == 9 for gap in config.gaps) / len(config.gaps)
        assert share == pytest.approx(weight, abs=0.04)
        assert config.clearance == pytest.approx(source.config.clearance + 10 * weight, abs=0.51)
        assert config.odd_rate == pytest.approx(ODD_RATE * (1 - weight))


def test_gaps_are_borrowed_for_the_size_of_the_own_cells() -> None:
    source = PopulationSynthesis(replace(Cascade.from_pretrained("nuclei-2d").population.config, gaps=(4,)))
    larger = PopulationSynthesis(replace(source.config, gaps=(0,), reach=3 * source.config.reach))
    borrow_placement(larger, source, 4)
    assert set(larger.config.gaps) == {0, 12}


def test_cells_of_few_frames_are_pressed_together_as_far_as_is_usual_at_least() -> None:
    config = replace(Cascade.from_pretrained("nuclei-2d").population.config, gaps=(-9, *[3] * 31))
    population = PopulationSynthesis(config)
    press_cells(population, 20.0, 4)
    gaps = population.config.gaps
    assert len(gaps) == 32
    assert list(gaps) == sorted(gaps)
    assert gaps[0] == -9, "these were farther already"
    assert gaps[1:4] == (-7, -7, -7), "nearly 0.4 radii"
    assert sum(gap <= 0 for gap in gaps) == pytest.approx(TOUCHING * 32, abs=1)
    assert gaps[-10:] == (3,) * 10, "the others are as they were"
    many = PopulationSynthesis(config)
    press_cells(many, 20.0, 60)
    assert many.config == config


def test_few_frames_are_lent_cells_of_every_size_up_to_the_own() -> None:
    source = Cascade.from_pretrained("nuclei-2d").masks
    own = copy.deepcopy(source)
    own.attributes[:, 0] += math.log(0.4)
    told = [lend_cells(own, source, num) for num in (1, 4, 16, 40)]
    assert [share for share, _ in told] == pytest.approx([LENT, LENT, 0.4 * LENT, 0])
    assert [zoom for _, zoom in told] == pytest.approx([0.4, 0.4, 0.4, 1])
    own.attributes[:, 0] += 5
    assert lend_cells(own, source, 1)[1] == LARGEST_LENT


def test_lent_cells_that_are_small_beside_the_own_ones_are_not_mottled() -> None:
    assert [mottle_of_lent(zoom) for zoom in (0.5, 1.0, SMALL, LARGEST_LENT)] == [MOTTLED, MOTTLED, 0, 0]
    assert MOTTLED > 0


def test_volumes_borrow_numbers_and_brightness_of_cells_from_frames() -> None:
    image, labels = ellipsoid_volume(0)
    background, source = fit_background([image], [labels]), Cascade.from_pretrained("nuclei-2d").background
    alone = background.table[0].clone()
    borrow_styles(background, source)
    table = background.table
    assert table.isfinite().all()
    for i, name in enumerate(background.names):
        if name in LEAST_SPREAD:
            borrowed = table[table[:, i] != alone[i], i].log()
            assert float(borrowed.std()) >= 0.75 * LEAST_SPREAD[name], "wide deviations are cut"
            assert float(borrowed.mean()) == pytest.approx(float(alone[i].log()), abs=0.1)
        else:
            assert torch.allclose(table[:, i], alone[i].expand(len(table)), rtol=1e-5), name


def test_frames_do_not_borrow_from_volumes() -> None:
    background = fit_background(*([x] for x in ellipse_frame(0)))
    with pytest.raises(InputError, match="2D data"):
        borrow_styles(background, fit_background(*([x] for x in ellipsoid_volume(0))))
