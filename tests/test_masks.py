"""MaskDDPM: representation, sampling, rejection, keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from synthaug.errors import InputError
from synthaug.generators.distance import signed_distance
from synthaug.generators.masks import (
    ATTRIBUTES,
    MaskConfig,
    MaskDDPM,
    blur,
    measure_attributes,
    principal_angle,
    why_rejected,
)
from synthaug.randomness import SampleKey

SMALL = MaskConfig(
    attributes=("radius", "brightness"), crop_size=32, block_out_channels=(16, 32), num_inference_steps=2
)


@pytest.fixture(scope="module")
def stage() -> MaskDDPM:
    stage = MaskDDPM(SMALL).eval()
    stage.set_tables({"attributes": torch.tensor([[2.0, 0.0], [2.2, 0.3], [1.8, -0.4]])})
    return stage


def ellipse(size: int = 64, a: float = 20, b: float = 10, angle: float = 0.5) -> np.ndarray:
    yy, xx = np.mgrid[:size, :size] - (size - 1) / 2
    u, v = xx * np.cos(angle) + yy * np.sin(angle), -xx * np.sin(angle) + yy * np.cos(angle)
    return (u / a) ** 2 + (v / b) ** 2 < 1


@pytest.mark.parametrize("radius", [8.0, 15.0, 27.0])
def test_the_grid_keeps_sub_pixel_outlines(radius):
    mask = ellipse(a=radius, b=0.6 * radius)
    stage = MaskDDPM(MaskConfig(crop_size=64, block_out_channels=(16, 32)))
    sdf = torch.from_numpy(signed_distance(mask))[None]
    r, one = torch.tensor([radius]), torch.ones(1)
    back = stage.from_grid(stage.to_grid(sdf, r), r, one)[0] < 0
    union = (back | torch.from_numpy(mask)).sum()
    assert float((back & torch.from_numpy(mask)).sum() / union) > 0.97


def test_long_axis_is_laid_along_x():
    masks = torch.stack([torch.from_numpy(ellipse(angle=a)) for a in (0.0, 0.7, 1.5, 2.6)])
    stage = MaskDDPM(MaskConfig(crop_size=64, block_out_channels=(16, 32)))
    sdf = torch.stack([torch.from_numpy(signed_distance(m.numpy())) for m in masks])
    r = torch.full((4,), 20.0)
    turned = stage.from_grid(stage.to_grid(sdf, r, principal_angle(masks)), r, torch.ones(4)) < 0
    for m in turned:
        yy, xx = torch.where(m)
        assert float(xx.float().std()) > 1.6 * float(yy.float().std())


@pytest.mark.parametrize(
    ("mask", "edge", "why"),
    [
        (np.zeros((32, 32), bool), False, "empty"),
        (ellipse(32, 10, 6), True, "touching the crop's edge"),
        (np.eye(32, dtype=bool) & (np.arange(32) % 4 == 0), False, "several parts"),
        (ellipse(32, 10, 10) & ~ellipse(32, 4, 4), False, "with a hole"),
        (ellipse(32, 10, 6), False, None),
    ],
)
def test_why_a_mask_is_rejected(mask, edge, why):
    assert why_rejected(mask, edge) == why


def test_a_keys_bits_do_not_depend_on_its_place_in_the_block(stage):
    keys = [SampleKey(3, ("cell", i)) for i in range(4)]
    one, _ = stage(stage.draw(keys))
    other, _ = stage(stage.draw(keys[::-1]))
    assert torch.equal(one.sdf, other.sdf.flip(0))
    assert torch.equal(one.brightness, other.brightness.flip(0))
    assert not torch.equal(one.sdf[0], one.sdf[1])


def test_size_and_brightness_are_drawn_jointly_from_the_data():
    stage = MaskDDPM(SMALL)
    generator = torch.Generator().manual_seed(0)
    size = 2.5 + 0.3 * torch.randn(400, generator=generator)
    table = torch.stack([size, 0.8 * (size - 2.5) + 0.05 * torch.randn(400, generator=generator)], 1)
    stage.set_tables({"attributes": table})
    noise = stage.draw([SampleKey(0, (i,)) for i in range(2000)])
    row = (noise["row"] * 400).long()
    drawn = table[row] + SMALL.bandwidth * stage.spread() * noise["jitter"]
    assert torch.corrcoef(drawn.T)[0, 1] > 0.9
    torch.testing.assert_close(drawn.mean(0), table.mean(0), atol=0.03, rtol=0)


def test_noise_of_every_step_is_drawn_only_where_it_is_used(stage):
    keys = [SampleKey(0, (0,))]
    assert "steps" not in stage.draw(keys)
    ddpm = MaskDDPM(replace(SMALL, eta=1.0, num_inference_steps=3)).eval()
    noise = ddpm.draw(keys)
    assert noise["steps"].shape == (1, 3, *ddpm.grid_shape)
    assert ddpm(noise)[0].sdf.isfinite().all()


def test_round_trip_on_disk(stage, tmp_path):
    stage.save_pretrained(tmp_path / "masks")
    again = MaskDDPM.from_pretrained(tmp_path / "masks")
    noise = stage.draw([SampleKey(0, (i,)) for i in range(3)])
    assert torch.equal(stage(noise)[0].sdf, again(noise)[0].sdf)


def test_blur_keeps_constants_and_rounds_steps():
    step = torch.zeros(1, 1, 16, 16)
    step[..., 8:] = 1
    soft = blur(step, 0.7)
    assert torch.equal(blur(step, 0.0), step)
    torch.testing.assert_close(blur(torch.full((1, 1, 8, 8), 3.0), 0.7), torch.full((1, 1, 8, 8), 3.0))
    assert 0.1 < float(soft[0, 0, 8, 7]) < 0.5 < float(soft[0, 0, 8, 8]) < 0.9


def test_no_path_of_the_machine_is_saved(stage, tmp_path):
    stage.save_pretrained(tmp_path / "one")
    MaskDDPM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for folder in ("one", "two"):
        assert str(tmp_path) not in (tmp_path / folder / "unet" / "config.json").read_text()


def test_attributes_tell_round_from_long_and_whole_from_concave():
    half_moon = ellipse(32, 10, 10).copy()
    half_moon[:16, 12:20] = False
    masks = torch.from_numpy(np.stack([ellipse(32, 10, 10), ellipse(32, 12, 5), half_moon]))
    found = measure_attributes(masks, torch.tensor([10.0, 12.0, 10.0]), torch.ones(3))
    torch.testing.assert_close(found[:, 0].exp(), torch.tensor([10.0, 12.0, 10.0]))
    assert found[:, 1].abs().max() == 0
    assert abs(found[0, 2]) < 0.05
    assert found[1, 2] > 0.6
    assert found[2, 3] > found[0, 3] + 1
    assert torch.equal(
        found[:, :2], measure_attributes(masks, torch.tensor([10.0, 12.0, 10.0]), torch.ones(3), ATTRIBUTES[:2])
    )


def test_attributes_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match="attributes"):
        MaskConfig(attributes=("radius", "brightness", "colour"))
    with pytest.raises(InputError, match="attributes"):
        MaskConfig(attributes=("brightness", "radius"))
