"""Texture: shapes, conditioning, eq. 2, keys, and the Stable Diffusion layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from synthaug.generators.distance import signed_distance
from synthaug.generators.texture import (
    PLANES,
    TextureConfig,
    TextureDiffusion,
    axial_profile,
    build_unet,
    slice_correlation,
    tiny_config,
)
from synthaug.randomness import SampleKey
from synthaug.types import CellMasks, Slices
from tests.test_masks import ellipse


def small(crop_size: int = 64, **changes: Any) -> TextureConfig:
    defaults: dict[str, Any] = {"vae_channels": (8, 16), "block_out_channels": (8, 16), "num_inference_steps": 2}
    return tiny_config(crop_size, **(defaults | changes))


def masks(num: int, size: int = 64) -> CellMasks:
    sdf = torch.stack([torch.from_numpy(signed_distance(ellipse(size, 18 - i, 10))) for i in range(num)])
    return CellMasks(sdf=sdf, brightness=torch.linspace(0.5, 2, num), scale=torch.ones(num))


@pytest.fixture(scope="module")
def stage() -> TextureDiffusion:
    return TextureDiffusion(small()).eval()


@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_every_crop_size_has_the_same_latents(size):
    stage = TextureDiffusion(small(size)).eval()
    assert stage.latent_shape[1:] == (16, 16)
    cells = stage(masks(2, size), stage.draw([SampleKey(0, (i,)) for i in range(2)]))
    assert cells.image.shape == (2, 1, size, size)


def test_light_is_confined_and_has_mean_one(stage):
    cells = stage(masks(3), stage.draw([SampleKey(0, (i,)) for i in range(3)]))
    outside = cells.sdf > 10
    assert float(cells.image[outside].abs().max()) < 1e-6
    for image, mask in zip(cells.image, cells.mask):
        mean = float(image[mask].mean())
        assert mean == pytest.approx(1.0, abs=1e-3) or mean < 1  # an untrained network may paint no light at all


def test_noise_has_unit_variance_and_the_correlation_of_eq_2():
    for rho in (0.0, 0.7, 2.0):
        stage = TextureDiffusion(small(rho=rho))
        noise = stage.draw([SampleKey(1, (i,)) for i in range(64)], num_slices=3)["latent"]
        assert float(noise.var()) == pytest.approx(1.0, abs=0.02)
        a, b = noise[:, 0].flatten(), noise[:, 2].flatten()
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) == pytest.approx(rho**2 / (1 + rho**2), abs=0.02)


@pytest.mark.parametrize("sigma", [0.3, 1.3, 3.0])
def test_blurred_unique_noise_keeps_its_variance_and_fades_with_the_distance_of_slices(sigma):
    rho = 0.5
    keys = [SampleKey(1, (i,)) for i in range(64)]
    noise = TextureDiffusion(small(rho=rho, slice_sigma=sigma)).draw(keys, num_slices=5)["latent"]
    assert noise.shape[1] == 5
    for k in range(5):
        assert float(noise[:, k].var()) == pytest.approx(1.0, abs=0.04)
    for apart in (1, 2, 4):
        a, b = noise[:, 0].flatten(), noise[:, apart].flatten()
        wanted = (rho**2 + slice_correlation(sigma, apart)) / (1 + rho**2)
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) == pytest.approx(wanted, abs=0.03)
        if sigma > 1:
            assert slice_correlation(sigma, apart) == pytest.approx(np.exp(-((apart / (2 * sigma)) ** 2)), abs=0.01)


def test_one_slice_is_the_same_noise_with_and_without_blur():
    keys = [SampleKey(1, (i,)) for i in range(3)]
    plain, blurred = (TextureDiffusion(small(slice_sigma=s)).draw(keys)["latent"] for s in (0.0, 1.3))
    assert torch.equal(plain, blurred)


def test_a_keys_bits_do_not_depend_on_its_place_in_the_block(stage):
    keys = [SampleKey(0, (i,)) for i in range(4)]
    order = torch.tensor([2, 0, 3, 1])
    one = stage(masks(4), stage.draw(keys))
    other = stage(masks(4).select(order), stage.draw([keys[i] for i in order]))
    assert torch.equal(one.image[order], other.image)


def test_mask_and_brightness_reach_the_network():
    """The control branch starts at zero (zero convolutions); with them opened, every condition matters."""
    stage = TextureDiffusion(small()).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in [*stage.controlnet.controlnet_down_blocks, stage.controlnet.controlnet_mid_block]:
            block.weight.copy_(torch.randn(block.weight.shape, generator=generator))
        weight = stage.controlnet.controlnet_cond_embedding.conv_out.weight
        weight.copy_(torch.randn(weight.shape, generator=generator))
        latent, t = torch.zeros(1, *stage.latent_shape), torch.tensor([500])
        base = stage.predict(latent, t, stage.condition(masks(2).sdf[:1], torch.ones(1)))
        shape = stage.predict(latent, t, stage.condition(masks(2).sdf[1:], torch.ones(1)))
        bright = stage.predict(latent, t, stage.condition(masks(2).sdf[:1], torch.full((1,), 2.0)))
    assert not torch.allclose(base, shape)
    assert not torch.allclose(base, bright)


def test_sixteen_bit_ranges_survive_the_autoencoder_interface(stage):
    """No rounding anywhere: two images that differ by 1/65535 of the range have different latents."""
    image = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, _ = stage.encode_moments(image)
        b, _ = stage.encode_moments(image + 1 / 65535)
    assert not torch.equal(a, b)


def test_control_branch_is_a_copy_of_the_unet(stage):
    own = stage.controlnet.state_dict()
    for name, value in stage.unet.state_dict().items():
        if name.startswith(("down_blocks.0.resnets", "time_embedding")):
            assert torch.equal(own[name], value)


def test_round_trip_on_disk(stage, tmp_path):
    stage.save_pretrained(tmp_path / "texture")
    again = TextureDiffusion.from_pretrained(tmp_path / "texture")
    noise = stage.draw([SampleKey(0, (i,)) for i in range(2)])
    assert torch.equal(stage(masks(2), noise).image, again(masks(2), noise).image)


def test_stable_diffusion_layout_fits_the_same_class():
    """RGB autoencoder with factor 8 pattern, cross-attention, epsilon prediction: the layout of SD 1.5, in miniature."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 16),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        layers_per_block=1,
    )
    config = TextureConfig(crop_size=64, patch_size=1, prediction_type="epsilon", num_inference_steps=2)
    stage = TextureDiffusion(config, vae=vae, unet=unet).eval()
    stage.set_tables({"prompt": torch.randn(1, 7, 12, generator=torch.Generator().manual_seed(0))})
    assert stage.latent_shape == (4, 8, 8)
    cells = stage(masks(2), stage.draw([SampleKey(0, (i,)) for i in range(2)]))
    assert cells.image.shape == (2, 1, 64, 64)
    assert torch.isfinite(cells.image).all()


def test_crop_size_has_to_fit_the_patches():
    with pytest.raises(ValueError, match="multiple of 32"):
        tiny_config(50)
    assert build_unet(tiny_config(96)).config.in_channels == 16


def test_latents_are_normalised_channel_by_channel(stage):
    image = torch.rand(4, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = stage.encode_moments(image)[0]
        moments = torch.stack([raw.mean((0, 2, 3)), raw.std((0, 2, 3))])
        before = stage.latent_moments.clone()
        stage.set_tables({"latent_moments": moments})
        normal = stage.encode(image)
        torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
        torch.testing.assert_close(normal.std((0, 2, 3)), torch.ones(8), atol=1e-3, rtol=0)
        torch.testing.assert_close(stage.decode(normal), stage.decode_raw(raw), atol=1e-4, rtol=1e-4)
        stage.set_tables({"latent_moments": before})


def test_stable_diffusion_latents_are_scaled_as_its_vae_says():
    stage = TextureDiffusion(small())
    scale = stage.vae.config.scaling_factor
    torch.testing.assert_close(stage.latent_moments, torch.stack([torch.zeros(8), torch.full((8,), 1 / scale)]))


# Stacks ---------------------------------------------------------------------------------------------------------------


def slices(num: int, planes: int = 9, size: int = 32) -> Slices:
    """Balls of falling radius in the middle planes; the first and the last plane are empty."""
    sdf = torch.full((num, planes, size, size), float(size))
    for i in range(num):
        for k in range(1, planes - 1):
            radius = 11 - i - abs(k - planes // 2)
            sdf[i, k] = torch.from_numpy(signed_distance(ellipse(size, radius, radius)))
    return Slices(sdf=sdf, brightness=torch.linspace(0.5, 2, num), scale=torch.ones(num))


@pytest.fixture(scope="module")
def stack_stage() -> TextureDiffusion:
    """Untrained, but bright: the decoder's bias stands for light."""
    stage = TextureDiffusion(small(32, latent_size=8, num_inference_steps=1)).eval()
    with torch.no_grad():
        stage.vae.decoder.conv_out.bias.fill_(0.0)
    return stage


def keys(num: int) -> list[SampleKey]:
    return [SampleKey(0, (i,)) for i in range(num)]


def test_every_plane_of_a_stack_has_its_own_outline_and_a_mean_of_one(stack_stage):
    block = slices(3)
    cells = stack_stage(block, stack_stage.draw(keys(3), 9))
    assert cells.image.shape == cells.sdf.shape == (3, 9, 32, 32)
    assert torch.equal(cells.sdf, block.sdf)
    assert float(cells.image[:, [0, 8]].abs().max()) == 0
    assert float(cells.image[cells.sdf > 10].abs().max()) < 1e-6
    for image, mask in zip(cells.image[:, 1:8].flatten(0, 1), cells.mask[:, 1:8].flatten(0, 1)):
        assert float(image[mask].mean()) == pytest.approx(1.0, abs=1e-3)


def test_a_cells_planes_do_not_depend_on_the_company_they_are_packed_with(stack_stage):
    block, noise = slices(8), stack_stage.draw(keys(8), 9)
    assert (block.mask.flatten(2).any(2).sum() % PLANES) != 0  # the last batch has to be filled up
    whole = stack_stage(block, noise)
    for order in ([5], [2, 0, 7], [7, 6, 5, 4, 3, 2, 1, 0]):
        index = torch.tensor(order)
        part = stack_stage(block.select(index), {"latent": noise["latent"][index]})
        assert torch.equal(part.image, whole.image[index])


def test_images_of_neighbouring_planes_are_more_alike_with_rho():
    """Through the whole network, at one outline: only the noise differs from plane to plane."""
    one = torch.from_numpy(signed_distance(ellipse(32, 11, 11)))
    block = Slices(sdf=one.expand(24, 2, 32, 32).clone(), brightness=torch.ones(24), scale=torch.ones(24))
    inside = one < -2
    found = []
    for rho in (0.0, 1.0, 4.0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stage = TextureDiffusion(small(32, latent_size=8, num_inference_steps=1, rho=rho)).eval()
        image = stage(block, stage.draw(keys(24), 2)).image[:, :, inside]
        rest = image - image.mean((0, 1))  # what all cells share comes from the outline
        a, b = rest[:, 0].flatten(), rest[:, 1].flatten()
        found.append(float(torch.corrcoef(torch.stack([a, b]))[0, 1]))
    assert abs(found[0]) < 0.05
    assert found[1] > found[0] + 0.05
    assert found[2] > 0.5  # an untrained network is far from linear: less than the noise's own 0.94


def test_planes_are_as_bright_as_a_blurred_slab():
    mask = torch.zeros(2, 15, 8, 8, dtype=torch.bool)
    mask[0, 2:13] = True
    found = axial_profile(mask, 0.5, 1.5)
    assert found[0, 7] == 1
    assert torch.allclose(found[0], found[0].flip(0))
    assert (found[0, 7:13].diff() < 0).all()
    assert float(found[0, 7 + 3]) == pytest.approx(0.46, abs=0.03)  # near the end of the slab, half of its middle
    assert (found[1] == 1).all()  # no cell, nothing to divide by
    assert (axial_profile(mask, 0.5, 0.0) == 1).all()
    assert axial_profile(mask, 0.2, 0.3).min() > 0


def test_the_profile_dims_light_and_leaves_labels_alone(monkeypatch):
    block, seen = slices(1, planes=13), []
    cells = TextureDiffusion(small(32, latent_size=8, axial_extent=0.5, axial_sigma=1.5)).eval()
    noise = cells.draw(keys(1), 13)

    def flat(sdf, brightness, latent):
        seen.append(brightness)
        return (sdf < 0).float()

    monkeypatch.setattr(cells, "_texture", flat)
    made = cells(block, noise)
    assert torch.equal(made.sdf, block.sdf)
    profile = axial_profile(block.mask, 0.5, 1.5)
    assert torch.allclose(made.image, block.mask * profile[:, :, None, None])
    held = block.mask.flatten(2).any(2)[0]
    # a dim plane is asked for as one
    assert torch.allclose(seen[0][: int(held.sum())], block.brightness[0] * profile[0, held])
