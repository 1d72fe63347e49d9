"""The multiview stage: geometry of its taps, what the network may see, training, keys, files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from synthaug.errors import InputError
from synthaug.generators.cameras import VIEW_RADIUS, build_cameras
from synthaug.generators.multiview import MultiviewConfig, MultiviewDiffusion
from synthaug.generators.multiview_net import frustums, unprojection
from synthaug.generators.shapes import SMOOTH, draw_shapes, silhouettes
from synthaug.randomness import SampleKey
from synthaug.training.multiview import ViewPool, draw_views, fit_multiview
from synthaug.types import CellMasks

SMALL = MultiviewConfig(
    num_views=4, image_size=16, view_size=32, volume_channels=(8, 16, 24), view_channels=(8, 16), num_inference_steps=2
)


def lively(config: MultiviewConfig = SMALL) -> MultiviewDiffusion:
    """A stage whose weights are all drawn from a key, those that start at zero as well."""
    stage = MultiviewDiffusion(config).eval()
    generator = SampleKey(0, ("weights",)).generator()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return stage


def ellipses(num: int = 3, size: int = 48, scale: float = 1.0) -> CellMasks:
    axis = torch.arange(size) - (size - 1) / 2
    sdf = torch.stack([torch.hypot(axis[:, None], axis * (1 + 0.3 * i)) - 12 - i for i in range(num)])
    return CellMasks(sdf=sdf, brightness=torch.arange(1, num + 1).float(), scale=torch.full((num,), scale))


def keys(num: int = 3) -> list[SampleKey]:
    return [SampleKey(5, ("cell", i)) for i in range(num)]


def test_a_voxel_is_looked_up_where_each_camera_sees_it():
    side, cameras = 8, build_cameras("hemisphere", 5)
    matrix = unprojection(cameras.rotation, side).to_dense()
    assert matrix.shape == (side**3, 5 * side**2)
    # Images that hold their own down and right coordinates: linear, so that bilinear look-ups are exact inside.
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    world = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    for n, rotation in enumerate(cameras.rotation):
        own = matrix[:, n * side**2 : (n + 1) * side**2]
        expected = (world @ rotation.T)[:, 1:]
        inside = expected.abs().amax(1) < 1 - 1 / side
        found = torch.stack([own @ down.flatten(), own @ right.flatten()], 1)
        torch.testing.assert_close(found[inside], expected[inside], atol=1e-5, rtol=0)
        assert inside.sum() > side**3 / 4


def test_rays_meet_the_body_where_the_silhouette_is():
    cameras = build_cameras("hemisphere", 6)
    body = draw_shapes([SampleKey(1)], SMOOTH, 32)
    rays = frustums(cameras.rotation, 32, 32)
    inside = functional.grid_sample(body[None].expand(6, -1, -1, -1, -1), rays, align_corners=False)[:, 0]
    met = inside.masked_fill(rays.abs().amax(-1) > 1, 9.0).amin(1) < 0
    seen = silhouettes(body, cameras, 32)[0]
    assert ((met & seen).sum((1, 2)) / (met | seen).sum((1, 2))).min() > 0.95


def test_the_known_view_is_the_outline_in_the_frame_of_the_cube():
    stage, masks = lively(), ellipses()
    views = stage(masks, stage.draw(keys()))
    assert views.sdf.shape == (3, 4, 32, 32)
    assert torch.equal(views.brightness, masks.brightness)
    axis = (torch.arange(32) + 0.5) / 32 * 2 - 1
    reach = (torch.hypot(axis[:, None], axis) * views.silhouette[:, 0]).flatten(1).amax(1)
    torch.testing.assert_close(reach, torch.full((3,), VIEW_RADIUS), atol=0.06, rtol=0)
    radius = torch.tensor([12.0, 13.0, 14.0])
    torch.testing.assert_close(views.half_side, radius / VIEW_RADIUS, atol=1.0, rtol=0)
    # Distances are metric in pixels of the view (the first outline is a circle), up to the truncation.
    zoom = 16 / views.half_side[0]
    across = views.sdf[0, 0, 16, 16:]
    expected = ((torch.arange(16) + 0.5) / zoom - 12) * zoom
    torch.testing.assert_close(across, expected.clamp(-8, 8), atol=0.6, rtol=0)


def test_cells_stored_at_a_coarser_scale_are_larger_in_image_pixels():
    stage = lively()
    noise = stage.draw(keys())
    plain, coarse = stage(ellipses(), noise), stage(ellipses(scale=1.5), noise)
    torch.testing.assert_close(coarse.half_side, 1.5 * plain.half_side)
    assert torch.equal(coarse.sdf, plain.sdf)


def test_an_empty_outline_passes_through():
    """Rejected masks stay in their block until the end."""
    stage, masks = lively(), ellipses()
    masks = replace(masks, sdf=torch.cat([masks.sdf[:2], torch.full((1, 48, 48), 5.0)]))
    views = stage(masks, stage.draw(keys()))
    assert not views.silhouette[2, 0].any()
    assert views.half_side[2] > 0


def test_a_keys_bits_do_not_depend_on_its_place_in_the_block():
    # Eight, as a cascade's blocks are multiples of: vectorised loops treat what is left over otherwise.
    stage, masks, order = lively(), ellipses().select(torch.arange(8) % 3), torch.tensor([2, 7, 0, 5, 1, 6, 3, 4])
    own = [SampleKey(0, ("block", i)) for i in range(8)]
    one = stage(masks, stage.draw(own))
    other = stage(masks.select(order), stage.draw([own[i] for i in order]))
    assert torch.equal(one.sdf[order], other.sdf)
    assert not torch.equal(one.sdf[0, 1:], one.sdf[1, 1:])


def test_noise_of_a_key_is_its_own_and_independent_between_views():
    stage = lively()
    noise = stage.draw(keys())["views"]
    assert noise.shape == (3, 3, *stage.view_shape)
    assert torch.equal(stage.draw(keys()[1:])["views"], noise[1:])
    many = stage.draw([SampleKey(0, (i,)) for i in range(40)])["views"].flatten(2).transpose(0, 1).flatten(1)
    assert (torch.corrcoef(many) - torch.eye(3)).abs().max() < 0.05


@pytest.mark.parametrize("attends", [True, False])
def test_only_volume_attention_lets_a_view_see_the_others(attends):
    stage = lively(replace(SMALL, volume_attention=attends))
    sample = stage.draw(keys(1))["views"]
    known = stage.encode(functional.avg_pool2d(stage.known_view(ellipses(1))[0], 2) / 2)
    time = torch.tensor([500])
    changed = sample.clone()
    changed[:, 2] += 1
    with torch.no_grad():
        before, after = stage.predict(sample, time, known), stage.predict(changed, time, known)
    assert not torch.equal(before[:, 2], after[:, 2])
    assert torch.equal(before[:, :2], after[:, :2]) is not attends


def test_volume_attention_starts_as_if_it_were_not_there():
    """Its exits are zero before training (SyncDreamer), so a new network ignores the volume."""
    stage = MultiviewDiffusion(SMALL).eval()
    exits = [m for name, m in stage.network.named_modules() if name.endswith(".exit")]
    assert len(exits) == 2
    assert all(not bool(m.weight.any()) and not bool(m.bias.any()) for m in exits)


def test_the_loss_is_of_one_target_view_with_the_first_view_clean():
    stage = lively()
    generator = SampleKey(3).generator()
    clean = torch.rand(2, 4, *stage.view_shape, generator=generator) * 2 - 1
    noise = torch.randn(clean.shape, generator=generator)
    view, time = torch.tensor([1, 3]), torch.tensor([300, 800])
    with torch.no_grad():
        value = stage.loss(clean, noise, view, time)
        alpha = stage.scheduler.alphas_cumprod[time].sqrt()[:, None, None, None, None]
        sigma = (1 - alpha**2).sqrt()
        velocity = stage.predict((alpha * clean + sigma * noise)[:, 1:], time, clean[:, 0])
        expected = functional.mse_loss(
            velocity[torch.arange(2), view - 1], (alpha * noise - sigma * clean)[torch.arange(2), view]
        )
        assert torch.allclose(value, expected, rtol=1e-4)
        noise[:, 0] += 1  # the first view has no noise
        assert torch.equal(stage.loss(clean, noise, view, time), value)


@pytest.mark.parametrize("half", [False, True])
def test_round_trip_on_disk(tmp_path, half):
    stage = lively()
    stage.save_pretrained(tmp_path / "views", half=half)
    again = MultiviewDiffusion.from_pretrained(tmp_path / "views")
    assert again.config == stage.config
    noise = stage.draw(keys())
    one, other = stage(ellipses(), noise).sdf, again(ellipses(), noise).sdf
    assert torch.equal(one, other) if not half else (one - other).abs().mean() < 0.1
    assert str(tmp_path) not in json.dumps([p.read_text() for p in (tmp_path / "views").rglob("*.json")])


def test_the_weights_stay_small(tmp_path):
    MultiviewDiffusion(MultiviewConfig()).save_pretrained(tmp_path, half=True)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")) < 2_500_000


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="MultiviewConfig"):
        MultiviewConfig(image_size=30)
    with pytest.raises(InputError, match="MultiviewConfig"):
        MultiviewConfig(view_size=48)


def test_bodies_fill_the_frame_that_outlines_get():
    names = [SampleKey(7, (i,)) for i in range(8)]
    views = draw_views(names, (SMOOTH,), build_cameras("hemisphere", 3), 64, 32)
    assert views.shape == (8, 3, 32, 32)
    axis = (torch.arange(32) + 0.5) / 32 * 2 - 1
    reach = (torch.hypot(axis[:, None], axis) * (views[:, 0] < 0)).flatten(1).amax(1)
    assert (reach > 0.9 * VIEW_RADIUS).all()
    assert (reach < 1.1 * VIEW_RADIUS).all()
    edge = torch.cat([views[..., 0, :], views[..., -1, :], views[..., 0], views[..., -1]], -1)
    assert (edge > 0).all()
    # A body depends on its own key alone.
    torch.testing.assert_close(draw_views(names[:2], (SMOOTH,), build_cameras("hemisphere", 3), 64, 32), views[:2])


def test_a_mirrored_body_is_seen_from_the_same_cameras():
    """Point reflection turns each view by 180 degrees: checked on the reflected body itself."""
    body = draw_shapes([SampleKey(2)], SMOOTH, 32)
    seen = silhouettes(torch.cat([body, body.flip((1, 2, 3))]), build_cameras("hemisphere", 6), 32)
    assert (seen[0].flip((-2, -1)) != seen[1]).float().mean() < 0.002
    assert (seen[0] != seen[1]).float().mean() > 0.004
    stage = MultiviewDiffusion(SMALL)
    pool = ViewPool(stage, [SampleKey(2, (i,)) for i in range(2)])
    taken = pool.take(torch.tensor([1, 1]), torch.tensor([False, True]), SMALL.patch_size)
    plain, mirrored = stage.decode(taken)
    assert torch.equal(plain.flip((-2, -1)), mirrored)


def test_training_lowers_the_loss(tmp_path):
    _, result = fit_multiview(60.0, 3, tmp_path / "one", config=SMALL, max_steps=40, num_shapes=32)
    assert result.num_steps == 40
    losses = [row[3] for row in result.history]
    assert losses[-1] < 0.9 * losses[0]


def test_a_seed_names_a_whole_training(tmp_path):
    def fit(seed: int, name: str) -> torch.Tensor:
        stage, _ = fit_multiview(60.0, seed, tmp_path / name, config=SMALL, max_steps=2, num_shapes=16)
        return torch.cat([p.flatten() for p in stage.parameters()])

    state = torch.random.get_rng_state()
    one, again, other = fit(0, "one"), fit(0, "again"), fit(1, "other")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_training_goes_on_from_a_stage(tmp_path):
    start = lively()
    before = [p.detach().clone() for p in start.parameters()]
    stage, _ = fit_multiview(60.0, 0, tmp_path / "more", start=start, max_steps=1, num_shapes=8)
    change = max(float((p - q).detach().abs().max()) for p, q in zip(stage.parameters(), before, strict=True))
    assert stage is start
    assert 0 < change < 0.01
