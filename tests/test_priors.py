"""Random shapes as stand-ins: sizes of the given masks, fits that find what made the outlines."""

from __future__ import annotations

import pytest
import torch

from synthaug.errors import InputError
from synthaug.generators.cameras import VIEW_RADIUS
from synthaug.generators.priors import (
    PriorConfig,
    ShapePrior,
    _simulate,
    concavity,
    contour_power,
    elongation,
)
from synthaug.generators.shapes import KINDS
from synthaug.randomness import SampleKey
from synthaug.types import CellMasks


def keys(count: int) -> list[SampleKey]:
    return [SampleKey(9, ("cell", i)) for i in range(count)]


def discs(*radii: float, size: int = 48, scale: float = 1.0) -> CellMasks:
    distance = torch.hypot(*torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * 2, indexing="ij"))
    sdf = distance - torch.tensor(radii)[:, None, None]
    brightness = torch.linspace(0.5, 1.5, len(radii))
    return CellMasks(sdf, brightness, torch.full((len(radii),), scale))


def ellipses(aspect: float, *, count: int = 12, size: int = 32, area: float = 200.0) -> torch.Tensor:
    yy, xx = torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * 2, indexing="ij")
    angle = torch.linspace(0, torch.pi, count)[:, None, None]
    u, v = xx * angle.cos() + yy * angle.sin(), yy * angle.cos() - xx * angle.sin()
    return u**2 / aspect + v**2 * aspect < area / torch.pi


@pytest.mark.parametrize("kind", KINDS)
def test_surfaces_and_outlines_take_the_size_and_brightness_of_the_masks(kind):
    prior = ShapePrior(PriorConfig(kind, grid_size=32))
    masks = discs(8.0, 11.0, 14.0)
    noise = prior.draw(keys(3))
    surface = prior(masks, noise)
    area = masks.mask.flatten(1).sum(1)
    seen = surface.mask.any(1).flatten(1).float().mean(1) * 4 * surface.half_side**2
    assert torch.allclose(seen, area.float(), rtol=0.01)
    assert torch.equal(surface.brightness, masks.brightness)
    outlines = prior.outlines(masks, noise)
    got = outlines.mask.flatten(1).sum(1) * outlines.scale**2
    assert torch.allclose(got, area.float(), rtol=0.06)
    assert torch.equal(outlines.brightness, masks.brightness)
    # The outline's enclosing circle is that of the surface's view along the axis.
    axis = torch.arange(48) - 23.5
    reach = torch.where(outlines.mask, torch.hypot(axis[:, None], axis), 0).amax((1, 2)) * outlines.scale
    assert torch.allclose(reach, VIEW_RADIUS * surface.half_side, atol=1.2)


def test_an_outline_too_large_for_the_crop_is_stored_at_a_coarser_scale():
    prior = ShapePrior(PriorConfig("ellipsoid", grid_size=32))
    masks = discs(20.0, scale=2.0)
    outlines = prior.outlines(masks, prior.draw(keys(1)))
    assert float(outlines.scale) >= 20 * 2 / (24 - 5) * 0.98
    assert float(outlines.mask.sum() * outlines.scale**2) == pytest.approx(float(masks.mask.sum()) * 4, rel=0.05)
    frame = torch.ones(48, 48, dtype=torch.bool)
    frame[4:-4, 4:-4] = False
    assert not bool((outlines.mask[0] & frame).any())


def test_empty_masks_pass():
    masks = CellMasks(torch.ones(1, 32, 32), torch.ones(1), torch.ones(1))
    prior = ShapePrior(PriorConfig("ellipsoid", grid_size=24))
    assert float(prior(masks, prior.draw(keys(1))).half_side) < 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_does_not_depend_on_its_companions(kind):
    prior = ShapePrior(PriorConfig(kind, grid_size=24))
    masks = discs(7.0, 9.0, 12.0)
    together, apart = prior(masks, prior.draw(keys(3))), prior(masks.select(slice(2, 3)), prior.draw(keys(3)[2:]))
    assert torch.equal(together.sdf[2:], apart.sdf)
    assert torch.equal(together.half_side[2:], apart.half_side)
    assert not torch.equal(together.sdf[0], together.sdf[1])


def test_moments_of_outlines():
    round_, long = ellipses(1.0), ellipses(1.8)
    assert elongation(round_) < 0.02
    assert elongation(long) == pytest.approx(0.588, abs=0.07)
    assert contour_power(round_, (2,)) < 1e-3 < contour_power(long, (2,))
    # r = 1 + a cos(4 t + 0.3): the moment sees a relative amplitude of a.
    yy, xx = torch.meshgrid(*[torch.arange(96) - 47.5] * 2, indexing="ij")
    wavy = (torch.hypot(yy, xx) < 30 * (1 + 0.08 * torch.cos(4 * torch.atan2(yy, xx) + 0.3)))[None]
    assert contour_power(wavy, (4,)) == pytest.approx(0.08**2, rel=0.15)
    assert contour_power(wavy, (3,)) < 1e-4
    disc = torch.hypot(yy, xx)[None] < 30
    wavier = (torch.hypot(yy, xx) < 30 * (1 + 0.16 * torch.cos(4 * torch.atan2(yy, xx) + 0.3)))[None]
    assert concavity(disc) < concavity(wavy) < concavity(wavier) - 0.05


@pytest.mark.parametrize(
    ("kind", "true"),
    [("ellipsoid", {"spread": 0.25}), ("spherical-harmonics", {"amplitude": 0.3, "power": -4.0})],
)
def test_a_fit_finds_what_made_the_outlines(monkeypatch, kind, true):
    monkeypatch.setattr("synthaug.generators.priors.NUM_SIMULATED", 24)
    # The fit sees the same draws: what is left is how well it solves for the parameters.
    masks = _simulate(PriorConfig(kind, **true), torch.full((24,), 12.0), 40)
    found = ShapePrior.fit(masks, kind).config
    for parameter, value in true.items():
        assert getattr(found, parameter) == pytest.approx(value, rel=0.1)


def test_rougher_outlines_give_a_prior_with_more_power(monkeypatch):
    monkeypatch.setattr("synthaug.generators.priors.NUM_SIMULATED", 16)
    powers = []
    for power in (-6.0, -3.0):
        prior = ShapePrior(PriorConfig("spherical-harmonics", amplitude=0.5, power=power, grid_size=32))
        masks = prior.outlines(discs(*[14.0] * 16, size=48), prior.draw(keys(16))).mask
        powers.append(ShapePrior.fit(masks, "spherical-harmonics").config.power)
    assert powers[0] < powers[1] - 1.5


def test_a_fitted_bezier_prior_is_as_long_as_the_outlines(monkeypatch):
    monkeypatch.setattr("synthaug.generators.priors.NUM_SIMULATED", 16)
    masks = ellipses(1.5, count=16)
    config = ShapePrior.fit(masks, "bezier").config
    assert elongation(_simulate(config, torch.full((16,), 8.0), 32)) == pytest.approx(elongation(masks), rel=0.1)


def test_what_cannot_be_fitted_is_refused():
    masks = ellipses(1.2)
    with pytest.raises(InputError, match="masks"):
        ShapePrior.fit(torch.cat([masks, torch.zeros_like(masks[:1])]), "ellipsoid")
    with pytest.raises(InputError, match="masks"):
        ShapePrior.fit(masks.float(), "ellipsoid")
    with pytest.raises(InputError, match="kind"):
        ShapePrior.fit(masks, "cube")  # type: ignore[arg-type]


def test_the_prior_comes_back_from_disk(tmp_path):
    prior = ShapePrior(PriorConfig("bezier", bend=0.3, radius=(0.3, 0.5)))
    prior.save_pretrained(tmp_path)
    again = ShapePrior.from_pretrained(tmp_path)
    assert again.config == prior.config
    assert torch.equal(again.draw(keys(2))["radii"], prior.draw(keys(2))["radii"])
