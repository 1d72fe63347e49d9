"""Where half of the light lies, compared with outlines: in drawn frames, and in those of a cascade that is to match them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from synthaug import Cascade
from synthaug.randomness import SampleKey
from synthaug.training import half_light as module
from synthaug.training.half_light import (
    USUAL,
    brightness_slope,
    half_contour,
    half_light,
    made_half_light,
    match_half_light,
    wanted_half_light,
)

Measure = Callable[[module.Frame], NDArray[np.float64]]


def disks(inside: float, blur: float = 1.0, noise: float = 0.0, slope: float = 0.0) -> module.Frame:
    """Four disks of radius 12 whose light ends `inside` px inside their outlines, over a background of 100.

    It ends `slope` px farther inside for each e-fold they are brighter than the first.
    """
    y, x = np.mgrid[:160, :160]
    image, labels = np.full((160, 160), 100.0), np.zeros((160, 160), np.int32)
    for label, centre in enumerate([(40, 40), (40, 110), (110, 40), (115, 105)], start=1):
        distance = np.hypot(y - centre[0], x - centre[1]) - 12
        labels[distance < 0] = label
        image += 200 * label * (0.5 - distance - inside - slope * np.log(label)).clip(0, 1)
    random = SampleKey(0, ("half light",)).numpy()
    return ndimage.gaussian_filter(image, blur) + noise * random.standard_normal(image.shape), labels


@pytest.mark.parametrize("inside", [-1.0, 0.0, 0.7, 1.5])
@pytest.mark.parametrize("measure", [half_light, half_contour])
def test_half_of_the_light_is_found_whatever_the_brightness_and_blur(measure: Measure, inside: float) -> None:
    for blur in (0.7, 1.5):
        found = measure(disks(inside, blur, noise=4.0))
        assert len(found) == 4
        assert found == pytest.approx(-inside, abs=0.35)


def test_where_an_edge_is_dim_its_contour_lies_inside_and_its_mean_profile_does_not() -> None:
    image, labels = disks(0.0)
    y, x = np.mgrid[:160, :160]
    dim = (labels == 1) & (np.hypot(y - 40, x - 40) > 8) & (y < 40 - np.abs(x - 40))  # a quarter of the rim
    patchy = np.where(dim, 100 + 0.3 * (image - 100), image), labels
    even, uneven = (
        [measure(frame)[0] for measure in (half_light, half_contour)] for frame in ((image, labels), patchy)
    )
    assert uneven[0] > even[0] - 0.1
    assert uneven[1] < even[1] - 0.5


@pytest.mark.parametrize("measure", [half_light, half_contour])
def test_cells_that_tell_nothing_are_left_out(measure: Measure) -> None:
    image, labels = disks(0.0)
    assert len(measure((image, np.where(labels == 2, 0, labels)))) == 3
    assert len(measure((image[:, 30:], labels[:, 30:]))) == 2, "two are cut off"
    assert len(measure((image[::6, ::6], labels[::6, ::6]))) == 0, "all are too small"
    assert len(measure((300 - image, labels))) == 0, "all are darker than their surroundings"
    assert len(measure((image, np.zeros_like(labels)))) == 0


def test_an_edge_along_another_cell_tells_nothing() -> None:
    image, labels = disks(0.0)
    image[:, :] = 100 + 200 * (labels == 1)
    apart = half_contour((image, labels))
    y, x = np.mgrid[:160, :160]
    labels[(np.hypot(y - 40, x - 64) < 12) & (labels == 0)] = 5  # as bright and up against it
    image[labels == 5] = 300
    assert half_contour((image, labels))[0] == pytest.approx(apart[0], abs=0.15)


def test_a_few_frames_are_pulled_towards_what_is_usual() -> None:
    many = wanted_half_light([disks(2.0)] * 30)
    assert many == pytest.approx(-2.0, abs=0.35)
    for ndim, measure in ((2, half_contour), (3, half_light)):
        own = float(np.median(measure(disks(2.0))))
        assert wanted_half_light([disks(2.0)], ndim) == pytest.approx((own + 2 * USUAL[ndim]) / 3)
    assert np.isnan(wanted_half_light([(np.zeros((9, 9)), np.zeros((9, 9), np.int32))]))


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.9])
def test_how_outlines_follow_brightness_is_found_where_cells_tell_it(slope: float) -> None:
    frame = disks(0.5, noise=4.0, slope=slope)
    assert brightness_slope([frame]) == pytest.approx(-slope, abs=0.25)
    alone = (frame[0], np.where(frame[1] == 3, 1, 0).astype(np.int32))
    assert np.isnan(brightness_slope([alone])), "one cell is not brighter than others"
    spread = float(np.log([1, 2, 3, 4]).var() * 4)
    assert np.isfinite(brightness_slope([frame], least_spread=0.8 * spread))
    assert np.isnan(brightness_slope([frame], least_spread=1.2 * spread))


def test_bright_cells_of_a_matched_cascade_are_outlined_as_tight_as_annotated_ones(monkeypatch) -> None:
    monkeypatch.setattr(module, "NUM_CELLS", 16)
    monkeypatch.setattr(module, "LEAST_SPREAD", 0.0)
    cascade = Cascade.from_pretrained("nuclei-2d")
    frames = [disks(0.4, slope=-0.9)]
    before = brightness_slope(made(cascade))
    assert "wider" in match_half_light(cascade, frames, (256, 256), seed=0)[-1]
    asked = brightness_slope(frames)
    assert abs(brightness_slope(made(cascade)) - asked) < 0.6 * abs(before - asked)


def made(cascade: Cascade) -> list[module.Frame]:
    """Frames of cells of many brightnesses."""
    cells = cascade.cells([SampleKey(2, ("test", i)) for i in range(32)])
    found = cascade.populate(cells, [SampleKey(2, ("frame", i)) for i in range(4)], (256, 256), num_cells=20)
    return [(found.image[i, 0].numpy(), found.labels[i, 0].numpy()) for i in range(4)]


def test_a_cascade_matches_annotated_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUM_CELLS", 8)
    monkeypatch.setattr(module, "USUAL_FRAMES", 0.0)
    cascade = Cascade.from_pretrained("nuclei-2d")
    cascade.config = replace(cascade.config, lent_share=0.3)
    lender = Cascade.from_pretrained("nuclei-2d")
    cascade.lent_masks, cascade.lent_texture = lender.masks, lender.texture
    pair = disks(1.3)
    notes = match_half_light(cascade, [pair], (256, 256), seed=0)
    assert cascade.texture.config.outline_slope == 0, "four cells do not tell it"
    assert [("own" in line, "lent" in line) for line in notes] == [(True, False), (False, True)]
    assert cascade.config.lent_share == 0.3
    asked = wanted_half_light([pair])
    for share in (0.0, 1.0):
        cascade.config = replace(cascade.config, lent_share=share)
        cells = cascade.cells([SampleKey(1, ("test", i)) for i in range(16)])
        assert made_half_light(cascade, cells, (256, 256), seed=1) == pytest.approx(asked, abs=0.25)


def test_cells_that_are_there_are_looked_at_and_light_is_not_moved_without_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cascade = Cascade.from_pretrained("nuclei-2d")
    cells = cascade.cells([SampleKey(0, ("test", i)) for i in range(8)])
    monkeypatch.setattr(cascade, "cells", None)
    begun = cascade.texture.config.outline_shift
    assert len(match_half_light(cascade, [disks(-4.0)] * 9, (256, 256), 0, cells)) == 1
    assert cascade.texture.config.outline_shift == begun - module.FARTHEST
