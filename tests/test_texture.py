"""Texture: shapes, conditioning, eq. 2, keys, and the Stable Diffusion layout."""

from __future__ import annotations

import pytest
import torch

from synthaug.generators.masks import signed_distance
from synthaug.generators.texture import TextureConfig, TextureDiffusion, build_unet, tiny_config
from synthaug.randomness import SampleKey
from synthaug.types import CellMasks
from tests.test_masks import ellipse


def small(crop_size: int = 64, **changes) -> TextureConfig:
    changes = {"vae_channels": (8, 16), "block_out_channels": (8, 16), "num_inference_steps": 2} | changes
    return tiny_config(crop_size, **changes)


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
