"""Surfaces are closer to the shapes than their hull, robust against views that disagree, and each cell is by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from synthaug.errors import InputError
from synthaug.generators.cameras import build_cameras
from synthaug.generators.fields import camera_rays, select_rays
from synthaug.generators.shapes import LUMPY, SMOOTH, draw_shapes, silhouettes, view_distance
from synthaug.generators.surface import NeuSSurface, SurfaceConfig, dents, enlarge, one_part, redistance
from synthaug.kernels.hull import carve, hull_distance
from synthaug.randomness import SampleKey
from synthaug.types import Surface, Views

CAMERAS = build_cameras()
TINY_MLP = {"mlp_width": 16, "mlp_depth": 5, "mlp_rays": 64, "mlp_samples": 16, "mlp_rate": 2e-3}


def ball(size: int, radius: float, shift: float = 0.0) -> Tensor:
    """Signed distance in voxels to a ball, `shift` voxels from the middle along z."""
    axis = torch.arange(size) + 0.5 - size / 2
    return ((axis[:, None, None] - shift) ** 2 + axis[:, None] ** 2 + axis**2).sqrt() - radius


def ball_views(cells: int, radius: float = 9.0, side: int = 32) -> Views:
    axis = torch.arange(side) + 0.5 - side / 2
    disc = (axis[:, None] ** 2 + axis**2).sqrt() - radius
    sdf = disc + 0.2 * torch.arange(cells)[:, None, None, None]
    return Views(sdf.expand(cells, 16, side, side).contiguous(), torch.full((cells,), 20.0), torch.arange(cells) + 1.0)


def fit(views: Views, **options: Any) -> Surface:
    stage = NeuSSurface(SurfaceConfig(**options))
    return stage(views, CAMERAS, stage.draw([SampleKey(0, ("fit", i)) for i in range(len(views))]))


def iou(a: Tensor, b: Tensor) -> Tensor:
    return (a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1)


@pytest.fixture(scope="module")
def shapes() -> Tensor:
    """Two smooth and two lumpy ones."""
    keys = [SampleKey(5, ("test-surface", i)) for i in range(2)]
    return torch.cat([draw_shapes(keys, config, 64) for config in (SMOOTH, LUMPY)])


@pytest.fixture(scope="module")
def views(shapes: Tensor) -> Views:
    return Views(view_distance(silhouettes(shapes, CAMERAS, 64)), torch.full((4,), 30.0), torch.ones(4))


def disturbed(views: Views) -> Views:
    """Every view moved by up to two pixels, and every third shrunk by one."""
    sdf = views.sdf.clone()
    for n in range(16):
        sdf[:, n] = torch.roll(sdf[:, n], (n % 5 - 2, (3 * n) % 5 - 2), (1, 2)) + float(n % 3 == 0)
    return Views(sdf, views.half_side, views.brightness)


def test_surfaces_are_closer_to_the_shapes_than_their_hulls(shapes: Tensor, views: Views) -> None:
    surface = fit(views)
    got, hull = iou(surface.mask, shapes < 0), iou(carve(views.silhouette, CAMERAS.rotation, 64), shapes < 0)
    fine_hull = iou(hull_distance(views.sdf, CAMERAS.rotation, 64) < 0, shapes < 0)
    assert (got > hull + 0.005).all()
    assert (got > fine_hull + 0.003).all()
    assert (got[:2] > 0.96).all()
    assert (got[2:] > 0.91).all()
    assert torch.equal(surface.half_side, views.half_side)


def test_the_signed_distance_has_slope_one(views: Views) -> None:
    sdf = fit(views.select(slice(2))).sdf
    slope = torch.stack(torch.gradient(sdf, dim=(1, 2, 3))).norm(dim=0)
    for band in (sdf.abs() < 1.5, sdf.abs() < 6):
        assert abs(float(slope[band].mean()) - 1) < 0.03
    assert (slope[sdf.abs() < 1.5] - 1).abs().quantile(0.9) < 0.15


def test_surfaces_reproduce_their_silhouettes(views: Views) -> None:
    again = silhouettes(fit(views).sdf, CAMERAS, 64)
    assert (iou(again.flatten(0, 1), views.silhouette.flatten(0, 1)) > 0.93).all()


def test_a_ball_becomes_a_ball() -> None:
    surface = fit(ball_views(1), grid_size=48)
    exact = ball(48, 9 * 48 / 32)
    near = exact.abs() < 4
    assert (surface.sdf[0] - exact)[near].abs().max() < 0.6
    assert float(surface.mask.sum() / (exact < 0).sum()) == pytest.approx(1, abs=0.03)


def test_a_cell_does_not_depend_on_its_companions(views: Views) -> None:
    eight = Views.cat([views, disturbed(views)])
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    options = {"num_iterations": (8,), "grid_size": 24}
    together = fit(eight, **options).sdf
    assert torch.equal(fit(eight.select(order), **options).sdf, together[order])
    assert torch.equal(fit(eight.select(slice(5, 6)), **options).sdf, together[5:6])
    assert torch.equal(fit(eight, **options).sdf, together)


def test_views_that_disagree_give_one_closed_part_better_than_the_hull(shapes: Tensor, views: Views) -> None:
    wrong = disturbed(views)
    surface = fit(wrong)
    hull = carve(wrong.silhouette, CAMERAS.rotation, 64)
    assert (iou(surface.mask, shapes < 0) > iou(hull, shapes < 0) + 0.05).all()
    for mask in surface.mask.numpy():
        assert ndimage.label(mask)[1] == 1
        assert ndimage.label(~mask)[1] == 1


def test_one_empty_or_misplaced_view_does_not_empty_the_surface(shapes: Tensor, views: Views) -> None:
    sdf = views.sdf[:2].clone()
    sdf[0, 5] = 2.0
    sdf[1, 3] = torch.roll(sdf[1, 3], 12, 0)
    surface = fit(Views(sdf, views.half_side[:2], views.brightness[:2]))
    got = iou(surface.mask, shapes[:2] < 0)
    assert got[0] > 0.95
    assert got[1] > 0.6


def test_empty_views_give_an_empty_surface() -> None:
    views = ball_views(2)
    sdf = views.sdf.clone()
    sdf[1] = 3.0
    surface = fit(Views(sdf, views.half_side, views.brightness), grid_size=32)
    assert surface.mask.flatten(1).any(1).tolist() == [True, False]
    assert torch.isfinite(surface.sdf).all()


def test_truncated_views_do_as_well(shapes: Tensor, views: Views) -> None:
    truncated = Views(views.sdf[::2].clamp(-4, 4), views.half_side[::2], views.brightness[::2])
    got, whole = iou(fit(truncated).mask, shapes[::2] < 0), iou(fit(views.select(slice(0, 4, 2))).mask, shapes[::2] < 0)
    assert (got > whole - 0.01).all()


def test_two_levels_agree_with_one(shapes: Tensor, views: Views) -> None:
    two = fit(views.select(slice(1)), levels=(16, 32), num_iterations=(20, 40))
    assert iou(two.mask, shapes[:1] < 0) > 0.95


def test_the_network_starts_as_the_hulls_ball_and_improves() -> None:
    views = ball_views(1)
    stretched = Views(views.sdf + 0.0, views.half_side, views.brightness)
    axis = torch.arange(32) + 0.5 - 16
    stretched.sdf[:, 0] = ((axis[:, None] / 1.3) ** 2 + (axis * 1.2) ** 2).sqrt() - 9
    first, later = (fit(stretched, field="mlp", grid_size=32, mlp_iterations=n, **TINY_MLP).mask[0] for n in (0, 150))
    hull = hull_distance(stretched.sdf, CAMERAS.rotation, 32)[0] < 0
    assert float(first.sum() / hull.sum()) == pytest.approx(1, abs=0.05)
    assert iou(later[None], hull[None]) > iou(first[None], hull[None]) + 0.02


def test_the_network_depends_on_its_key_alone() -> None:
    stage = NeuSSurface(SurfaceConfig(field="mlp", grid_size=16, levels=(16,), mlp_iterations=3, **TINY_MLP))
    keys = [SampleKey(1, ("mlp", i)) for i in range(2)]
    views = ball_views(2)
    state = torch.get_rng_state()
    both = stage(views, CAMERAS, stage.draw(keys)).sdf
    with torch.inference_mode():
        alone = stage(views.select(slice(1, 2)), CAMERAS, stage.draw(keys[1:])).sdf
    assert torch.equal(both[1:], alone)
    assert torch.equal(state, torch.get_rng_state())


def test_rays_stay_inside_the_grid_and_cross_it() -> None:
    rays = camera_rays(CAMERAS.rotation, 10)
    used = rays.span[:, 1] > rays.span[:, 0]
    for end in (rays.span[:, 0], rays.span[:, 1] - 1):
        where = (rays.origin + end[:, None] * rays.along)[used]
        assert (where >= 0).all()
        assert (where < 9).all()
    straight = rays.span.reshape(16, 10, 10, 2)[0, 1:9, 1:9]
    assert (straight[..., 1] - straight[..., 0] >= 9).all()
    assert torch.allclose(rays.along.norm(dim=1), torch.ones(1600))


def test_rays_far_outside_the_silhouette_are_left_out() -> None:
    views = ball_views(1).sdf[0]
    hull = hull_distance(views[None], CAMERAS.rotation, 32)[0]
    chosen = select_rays(camera_rays(CAMERAS.rotation, 32), views, hull)
    assert chosen.distance.max() < 3
    assert len(chosen.distance) > 0.9 * (views < 3).sum()
    assert (chosen.span[:, 1] - chosen.span[:, 0]).max() < 32


def test_dents_tell_lumpy_from_smooth(views: Views) -> None:
    measured = [dents(v) for v in torch.nn.functional.avg_pool2d(views.sdf, 2) / 2]
    assert max(measured[:2]) < 0.18 < min(measured[2:])
    assert dents(ball_views(1).sdf[0]) < 0.03
    assert dents(torch.full((3, 8, 8), 5.0)) == 0


@pytest.mark.parametrize(("size", "wanted"), [(16, 32), (12, 17), (9, 9)])
def test_enlarging_keeps_position_and_unit(size: int, wanted: int) -> None:
    radius = size * 0.25
    large = enlarge(ball(size, radius, shift=1.5), wanted)
    exact = ball(wanted, radius * wanted / size, shift=1.5 * wanted / size)
    near = exact.abs() < wanted * 0.08
    assert (large - exact)[near].abs().max() < 0.12


def test_redistancing_keeps_the_zero_level() -> None:
    exact = ball(24, 7.0, shift=0.3)
    got = redistance(exact.clamp(-3, 3) * 1.3)
    assert torch.equal(got < 0, exact < 0)
    assert (got - exact)[exact.abs() < 2].abs().max() < 0.25
    assert (got - exact)[exact > -4].abs().max() < 0.6
    for plain in (torch.ones(8, 8, 8), -torch.ones(8, 8, 8)):
        assert torch.equal(redistance(plain), plain)


def test_one_part_drops_specks_and_fills_cavities() -> None:
    whole = ball(24, 8.0)
    broken = whole.clone()
    broken[12, 12, 12], broken[1, 1, 1] = 0.4, -0.4
    assert torch.equal(one_part(broken) < 0, whole < 0)
    assert torch.equal(one_part(whole), whole)


def test_a_stage_comes_back_from_disk(tmp_path: Any) -> None:
    stage = NeuSSurface(SurfaceConfig(levels=(16, 24), num_iterations=(3, 4), grid_size=24))
    stage.save_pretrained(tmp_path)
    again = NeuSSurface.from_pretrained(tmp_path)
    assert again.config == stage.config
    assert torch.equal(again(ball_views(1), CAMERAS, {}).sdf, stage(ball_views(1), CAMERAS, {}).sdf)


@pytest.mark.parametrize(
    "options", [{"field": "octree"}, {"levels": (32, 64)}, {"levels": (), "num_iterations": ()}, {"grid_size": 4}]
)
def test_impossible_configs_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        SurfaceConfig(**options)


def test_views_and_cameras_must_fit() -> None:
    with pytest.raises(InputError, match="12 cameras"):
        NeuSSurface(SurfaceConfig())(ball_views(1), build_cameras("hemisphere", 12), {})
