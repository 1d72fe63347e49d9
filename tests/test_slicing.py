"""Slicing: the planes' geometry, the conditioning outline, scale, rejection, keys."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from synthaug.errors import InputError
from synthaug.generators.cameras import VIEW_RADIUS
from synthaug.generators.shapes import LUMPY, SMOOTH, draw_shapes, view_distance
from synthaug.generators.slicing import (
    Slicing,
    SlicingConfig,
    plane_distances,
    slices_needed,
    why_rejected,
    without_specks,
)
from synthaug.randomness import SampleKey
from synthaug.types import CellMasks, Surface


def keys(count: int) -> list[SampleKey]:
    return [SampleKey(5, ("cell", i)) for i in range(count)]


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1)


def ball(radius: float, half_side: float, *, size: int = 48, count: int = 1) -> Surface:
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    sdf = (grid.norm(dim=-1) - radius) * size / 2
    return Surface(sdf.expand(count, -1, -1, -1).clone(), torch.full((count,), half_side), torch.ones(count))


def offsets(*values: float) -> dict[str, torch.Tensor]:
    return {"offset": torch.tensor(values)}


def random_cells(config, radius: float, size: int, count: int = 8) -> tuple[Surface, CellMasks]:
    """Surfaces and the outlines that view 0 sees of them, both in the frame of the outline."""
    sdf = draw_shapes(keys(count), config, 48, frame="outline")
    half_side = radius / VIEW_RADIUS
    seen = torch.nn.functional.grid_sample(
        sdf.amin(1)[:, None],
        torch.nn.functional.affine_grid(
            (torch.eye(2, 3) * size / 2 / half_side).expand(count, -1, -1), [count, 1, size, size], align_corners=False
        ),
        padding_mode="border",
        align_corners=False,
    )
    masks = CellMasks(view_distance(seen[:, 0] < 0), torch.ones(count), torch.ones(count))
    return Surface(sdf, torch.full((count,), half_side), torch.ones(count)), masks


@pytest.mark.parametrize("offset", [0.0, -0.5, 0.3])
def test_the_sections_of_a_ball_have_their_radius_and_place(offset):
    # A ball of 12 px radius that looks 1.5 times longer along z, cut every 2 px.
    stage = Slicing(SlicingConfig(crop_size=40, num_slices=25, z_spacing=2.0, stretch=1.5))
    slices, rejects = stage(ball(0.6, 20.0), None, offsets(offset))
    assert rejects == [None]
    height = (torch.arange(25) - 12 + offset) * 2.0 / 1.5
    radius = (144 - height**2).clamp_min(0).sqrt()
    area = slices.mask[0].flatten(1).sum(1)
    assert torch.allclose(area.float(), math.pi * radius**2, rtol=0.06, atol=12)
    assert bool((area > 0)[radius > 2].all())
    assert not bool((area > 0)[radius == 0].any())
    assert float(slices.scale[0]) == 1
    # Distances are those within the plane: at the crop's edge, 20 - 12 px from the equator's outline.
    assert float(slices.sdf[0, 12, 20, 0]) == pytest.approx(19.5 - float(radius[12]), abs=0.7)
    assert bool((slices.sdf[0][radius == 0] == 40).all())


@pytest.mark.parametrize(("config", "alone"), [(SMOOTH, 0.95), (LUMPY, 0.9)])
@pytest.mark.parametrize(("radius", "size"), [(18.0, 64), (9.0, 32)])
def test_the_section_at_the_conditioning_plane_is_the_outline(config, alone, radius, size):
    surface, masks = random_cells(config, radius, size)
    count = slices_needed(radius / VIEW_RADIUS, 2.3, 2.0)
    stage = Slicing(SlicingConfig(crop_size=size, num_slices=count, z_spacing=2.3, stretch=2.0))
    noise = offsets(*[0.0] * len(surface))
    led, rejects = stage(surface, masks, noise)
    assert rejects == [None] * len(surface)
    equator = count // 2
    assert float(overlap(led.mask[:, equator], masks.mask).min()) >= 0.97
    free, _ = stage(surface, None, noise)
    assert float(overlap(free.mask[:, equator], masks.mask).mean()) < alone
    # The outline is the whole view along the axis: no section goes beyond it, and far planes are left as they are.
    assert not bool((led.mask & ~masks.mask[:, None]).any())
    far = [k for k in range(count) if abs(k - equator) > 4]
    assert float(overlap(led.mask[:, far], free.mask[:, far]).mean()) > 0.95
    # Half a plane away the outline still holds.
    away, _ = stage(surface, masks, offsets(*[-0.5] * len(surface)))
    assert float(overlap(away.mask[:, equator], masks.mask).mean()) > 0.92


def test_bulging_cells_keep_their_ends_and_their_middle() -> None:
    plain = SlicingConfig(crop_size=40, num_slices=25)
    surface = ball(0.5, half_side=16.0, size=96)
    areas = []
    for bulge in (1.0, 1.2):
        stage = Slicing(replace(plain, bulge=bulge))
        slices, rejects = stage(surface, None, offsets(0.0))
        assert rejects == [None]
        areas.append(slices.mask[0].flatten(1).sum(1).double().numpy())
    before, after = areas
    assert ((before > 0) == (after > 0)).all(), "as long as before"
    assert after[12] == before[12] == before.max(), "as wide as before"
    height = np.abs(np.arange(25) - 12) / 8
    inside = height < 1
    expected = before.max() * (1 - height[inside] ** 2.4)
    assert after[inside] == pytest.approx(expected, abs=0.06 * before.max())
    assert after.sum() / (16 * after.max()) > before.sum() / (16 * before.max()) + 0.03
    with pytest.raises(InputError, match="bulge: expected a number >= 1"):
        SlicingConfig(bulge=0.9)


def test_a_large_cell_is_stored_at_a_coarser_scale():
    stage = Slicing(SlicingConfig(crop_size=32, num_slices=41, z_spacing=2.0))
    slices, rejects = stage(ball(0.6, 50.0), None, offsets(0.0))
    scale = float(slices.scale[0])
    assert rejects == [None]
    assert scale == pytest.approx(30 / 11, rel=0.04)
    assert float(slices.mask[0, 20].sum()) * scale**2 == pytest.approx(math.pi * 900, rel=0.03)
    # With an outline its scale counts.
    sdf = torch.hypot(*torch.meshgrid(*[torch.arange(32) - 15.5] * 2, indexing="ij")) - 10
    masks = CellMasks(sdf[None], torch.ones(1), torch.tensor([3.0]))
    assert float(stage(ball(0.6, 50.0), masks, offsets(0.0))[0].scale) == 3


def test_planes_needed_hold_any_surface_at_any_offset():
    for half_side, z_spacing, stretch in ((15.0, 2.3, 2.0), (10.0, 1.0, 1.0), (23.7, 3.1, 1.4)):
        count = slices_needed(half_side, z_spacing, stretch)
        stage = Slicing(SlicingConfig(64, count, z_spacing, stretch))
        deep = ball(0.6, half_side)
        squeezed = torch.nn.functional.grid_sample(
            deep.sdf[:, None],
            torch.nn.functional.affine_grid(
                torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.6 / 0.94, 0]]]),
                [1, 1, 48, 48, 48],
                align_corners=False,
            ),
            align_corners=False,
        )
        surface = Surface(squeezed[:, 0], deep.half_side, deep.brightness)
        for offset in (-0.5, 0.0, 0.499):
            assert stage(surface, None, offsets(offset))[1] == [None]
        assert Slicing(SlicingConfig(64, count - 4, z_spacing, stretch))(surface, None, offsets(0.0))[1] == [
            "over the volume's edge"
        ]


def test_offsets_are_uniform_and_belong_to_their_keys():
    stage = Slicing(SlicingConfig())
    offset = stage.draw(keys(400))["offset"]
    assert float(offset.min()) >= -0.5
    assert float(offset.max()) < 0.5
    assert float(offset.mean()) == pytest.approx(0, abs=0.05)
    assert float(offset.std()) == pytest.approx(12**-0.5, abs=0.02)
    assert torch.equal(stage.draw(keys(4)[2:3])["offset"], offset[2:3])


def test_a_cell_does_not_depend_on_its_companions():
    surface, masks = random_cells(SMOOTH, 9.0, 32, 4)
    stage = Slicing(SlicingConfig(32, 31, 2.3, 2.0))
    noise = stage.draw(keys(4))
    together, _ = stage(surface, masks, noise)
    order = torch.tensor([2, 0])
    apart, _ = stage(surface.select(order), masks.select(order), {"offset": noise["offset"][order]})
    assert torch.equal(apart.sdf, together.sdf[order])
    free, _ = stage(surface, None, noise)
    assert torch.equal(stage(surface.select(order), None, {"offset": noise["offset"][order]})[0].sdf, free.sdf[order])


def test_no_cells_at_all():
    stage = Slicing(SlicingConfig(32, 5))
    slices, rejects = stage(ball(0.6, 10.0, count=0), None, stage.draw([]))
    assert slices.sdf.shape == (0, 5, 32, 32)
    assert rejects == []


def solid(*shape: int) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[2:-2, 2:-2, 2:-2] = True
    return mask


def test_rejections():
    good = solid(9, 12, 12)
    assert why_rejected(good, 100, (0, 0)) is None
    assert why_rejected(torch.zeros_like(good), 0, (0, 0)) == "empty"
    for face in ([0, 5, 5], [-1, 5, 5], [4, 0, 5], [4, -1, 5], [4, 5, 0], [4, 5, -1]):
        cut = good.clone()
        cut[tuple(face)] = True
        assert why_rejected(cut, 100, (0, 0)) == "over the volume's edge"
    split = good.clone()
    split[4] = False
    assert why_rejected(split, 100, (0, 0)) == "several parts"
    hollow = good.clone()
    hollow[4, 6, 6] = False
    assert why_rejected(hollow, 100, (0, 0)) == "hollow"
    dented = good.clone()
    dented[4, 6, 6:] = False
    assert why_rejected(dented, 100, (0, 0)) is None


def test_volumes_outside_the_real_range_are_rejected_in_voxels_of_the_data():
    surface, noise = ball(0.6, 50.0), offsets(0.0)
    sizes = {"crop_size": 32, "num_slices": 41, "z_spacing": 2.0}
    true = 4 / 3 * math.pi * 30**3 / 2  # image pixels across, 2 of them from plane to plane
    for low, high, reason in (
        (0.9 * true, 1.1 * true, None),
        (1.1 * true, 2 * true, "volume outside the real range"),
        (0.0, 0.9 * true, "volume outside the real range"),
    ):
        assert Slicing(SlicingConfig(**sizes, volume_range=(low, high)))(surface, None, noise)[1] == [reason]


def test_specks_are_left_out_and_parts_are_not():
    mask = solid(9, 12, 12)
    speck = mask.clone()
    speck[4, 0, 0] = True
    assert torch.equal(without_specks(speck), mask)
    twins = torch.cat([mask, mask])
    assert torch.equal(without_specks(twins), twins)


def test_empty_planes_are_a_crop_away():
    sdf = plane_distances(torch.zeros(3, 16, 16, dtype=torch.bool))
    assert bool((sdf == 16).all())


def test_wrong_masks_and_configs_are_refused():
    stage = Slicing(SlicingConfig(32, 9))
    surface = ball(0.6, 10.0)
    with pytest.raises(InputError, match="32 x 32"):
        stage(surface, CellMasks(torch.ones(1, 48, 48), torch.ones(1), torch.ones(1)), offsets(0.0))
    for wrong in ({"crop_size": 8}, {"num_slices": 0}, {"z_spacing": 0.0}, {"stretch": -1.0}, {"volume_range": (2, 1)}):
        with pytest.raises(InputError):
            SlicingConfig(**wrong)


def test_the_stage_comes_back_from_disk(tmp_path):
    config = SlicingConfig(32, 27, 2.3, 2.1, volume_range=(100.0, 4000.0))
    Slicing(config).save_pretrained(tmp_path)
    assert Slicing.from_pretrained(tmp_path).config == config
