"""Where light ends and how softly: found from real cells by painting their outlines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from synthaug import Cascade
from synthaug.datasets.crops import CropSet, extract_crops
from synthaug.generators.camera import gaussian_blur
from synthaug.generators.texture import TextureConfig, tiny_config
from synthaug.randomness import SampleKey
from synthaug.training.border import DISTANCES, border_profile, fit_border
from synthaug.types import CellMasks, Cells
from tests.shapes import ellipse_frame


class Plain:
    """Paints even light with a crisp border, moved and blurred as its config says."""

    def __init__(self) -> None:
        self.config: TextureConfig = tiny_config(64)

    def draw(self, keys: list[SampleKey]) -> dict[str, Tensor]:
        return {}

    def __call__(self, masks: CellMasks, noise: Any) -> Cells:
        light = (0.5 - (masks.sdf + self.config.outline_shift)).clamp(0, 1)
        if self.config.blur:
            light = gaussian_blur(light[:, None], self.config.blur)[:, 0]
        inside = masks.sdf < 0
        mean = (light * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
        return Cells((light / mean[:, None, None])[:, None], masks.sdf[:, None], masks.brightness, masks.scale)


@pytest.fixture(scope="module")
def crops() -> CropSet:
    return extract_crops([ellipse_frame(i) for i in range(12)], crop_size=64)


def as_painted(crops: CropSet, shift: float, blur: float) -> CropSet:
    stage = Plain()
    stage.config = replace(stage.config, outline_shift=shift, blur=blur)
    image = stage(CellMasks(crops.sdf, crops.brightness, crops.scale), {}).image[:, 0]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return replace(crops, image=image + 0.1 * noise)


@pytest.mark.parametrize(("shift", "blur"), [(0.0, 0.0), (2.0, 1.5), (-1.0, 2.5)])
def test_the_border_of_real_cells_is_found(crops: CropSet, shift: float, blur: float) -> None:
    found = fit_border(Plain(), as_painted(crops, shift, blur), seed=0)  # type: ignore[arg-type]  # a stand-in
    assert found.outline_shift == pytest.approx(shift, abs=0.5)
    assert found.blur == pytest.approx(blur, abs=0.75)
    assert np.abs(found.after - found.real).max() < 0.06
    if shift:
        assert np.abs(found.before - found.real).max() > 0.1


def test_the_stage_is_left_as_it_was(crops: CropSet) -> None:
    stage = Plain()
    stage.config = replace(stage.config, outline_shift=0.7, blur=0.3)
    before = stage.config
    fit_border(stage, as_painted(crops, 1.0, 1.0), seed=0)  # type: ignore[arg-type]  # a stand-in
    assert stage.config == before


def test_a_profile_is_one_inside_and_falls_across_the_outline(crops: CropSet) -> None:
    profile = border_profile(as_painted(crops, 0.0, 1.0).image, crops.sdf)
    assert profile[:3] == pytest.approx(1.1, abs=0.15)
    assert (np.diff(profile[3:9]) < 0).all()
    assert profile[-1] == pytest.approx(0, abs=0.05)


def test_shift_and_blur_reach_the_light_and_keep_its_mean(crops: CropSet) -> None:
    stage = Cascade.from_pretrained("nuclei-2d-u2os").texture
    masks = CellMasks(crops.sdf[:4], crops.brightness[:4], crops.scale[:4])
    noise = stage.draw([SampleKey(0, (i,)) for i in range(4)])
    at, step = {}, {}
    for shift, blur in ((0.0, 0.0), (2.0, 0.0), (-2.0, 0.0), (0.0, 4.0), (1000.0, 0.0)):
        stage.config = replace(stage.config, outline_shift=shift, blur=blur)
        image = stage(masks, noise).image[:, 0]
        inside = masks.sdf < 0
        mean = (image * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)
        assert mean.tolist() == pytest.approx([1.0] * 4, abs=1e-3)
        profile = border_profile(image, masks.sdf)
        at[shift, blur] = float(profile[DISTANCES.index(0)])
        step[shift, blur] = float(profile[DISTANCES.index(-2)] - profile[DISTANCES.index(2)])
    assert at[2, 0] < at[0, 0] - 0.1  # light that ends further inside is gone at the outline
    assert at[-2, 0] > at[0, 0] + 0.1
    assert step[0, 4] < 0.8 * step[0, 0]  # blurred, it falls less steeply
    assert at[1000, 0] < at[2, 0]  # however far: half of the cell is still lit, as its mean of one says
