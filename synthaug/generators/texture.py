"""Cell textures by mask-conditioned latent diffusion (paper, §2 "Cell Texture Generation" and eq. 2).

One class for both scales, on diffusers' `AutoencoderKL`, `UNet2DConditionModel` and `ControlNetModel`: the `tiny` preset is
small enough to be trained from scratch on a CPU, Stable Diffusion folders load into the same class. The UNet is finetuned
together with the control branch, as in the paper; sampling is DDIM with eta = 0, a deterministic map from noise to texture,
so that noise correlated over slices gives textures correlated over slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthaug.generators.camera import gaussian_blur
from synthaug.generators.diffusion import build_scheduler, denoise
from synthaug.generators.mottle import draw_mottle, mottled
from synthaug.generators.stage import Noise, Stage
from synthaug.randomness import SampleKey, normal
from synthaug.types import CellMasks, Cells, Slices

HALO = 10
"""Pixels around the outline in which a cell's light fades to nothing, in training crops and in what is generated."""

FADE_START = 5
"""Distance from the outline, in pixels, up to which light is kept unchanged."""

CONDITION_CHANNELS = 3
"""What the control branch sees: signed distance near the outline, the mask itself, log brightness."""

PLANES = 16
"""Planes of stacks denoised together. Always this many, so that a plane's bits never depend on its company."""

SLOPE_RANGE = 1.0
"""E-folds of brightness up to which outlines follow it."""


@dataclass(frozen=True)
class TextureConfig:
    """Everything that rebuilds an untrained texture stage (the `tiny` preset by default).

    Attributes:
        crop_size: Side of the crops, pixels.
        patch_size: Pixels folded into channels on each side before the VAE (1 for Stable Diffusion).
        vae_channels: Widths of the VAE, finest level first; each further level halves the resolution.
        latent_channels: Channels of the latent (4 in Stable Diffusion).
        block_out_channels: Widths of the UNet.
        layers_per_block: Residual blocks a level.
        num_inference_steps: DDIM steps.
        noise_scale: Factor on the noise that sampling starts from. A few DDIM steps lose a tenth of the texture's contrast;
            the factor gives it back and is fitted (`recipes.calibrate_contrast`). The map stays deterministic, and
            correlations between slices stay those of eq. 2.
        controlnet_conditioning_scale: Weight of the control branch.
        rho: Strength of the texture's consistency over slices, eq. 2; 0 = independent slices.
        slice_sigma: Stacks: Gaussian blur of the unique noise of eq. 2 over slices, slices; 0 = none, as in the paper, where
            slices far apart are as alike as neighbours.
        schedule: Noise schedule, see `build_scheduler`.
        prediction_type: `v_prediction` (tiny) or `epsilon` (Stable Diffusion 1.5).
        image_range: Light that maps to -1 and 1 before the VAE; values beyond are kept, not clipped.
        outline_shift: How far inside the outline the light ends, crop pixels, compared with what the networks have learned;
            negative: outside. Some annotators draw outlines wide, others tight.
        outline_slope: What is added to it for each e-fold by which a cell is brighter than usual in its frame, up to
            `SLOPE_RANGE`: annotators draw bright cells wide and dim ones tight.
        blur: Standard deviation of a Gaussian blur of the light, crop pixels: a few annotated cells do not teach the networks
            a microscope less sharp than the one they have learned from.
        mottle_rate: Of frames: share of the cells, in [0, 1], with clumps or holes beyond what was learned (`mottle.py`).
        axial_extent: Stacks: length of a cell's light along z over that of its mask (`axial.axial_extent`); 1 where masks
            end at half the light, less where annotations include the blur.
        axial_sigma: Stacks: standard deviation of the microscope's blur along z, planes (`axial.axial_sigma`).
    """

    crop_size: int = 64
    patch_size: int = 2
    vae_channels: tuple[int, ...] = (32, 64)
    latent_channels: int = 8
    block_out_channels: tuple[int, ...] = (32, 64, 96)
    layers_per_block: int = 1
    num_inference_steps: int = 12
    noise_scale: float = 1.0
    controlnet_conditioning_scale: float = 1.0
    rho: float = 0.7
    slice_sigma: float = 0.0
    schedule: str = "scaled_linear"
    prediction_type: str = "v_prediction"
    image_range: tuple[float, float] = (-0.25, 2.25)
    outline_shift: float = 0.0
    outline_slope: float = 0.0
    blur: float = 0.0
    mottle_rate: float = 0.0
    axial_extent: float = 1.0
    axial_sigma: float = 0.0


def fade(distance: Tensor) -> Tensor:
    """Window on a cell's light: 1 up to `FADE_START` px outside the outline, then a half cosine to 0 at `HALO`."""
    t = ((distance - FADE_START) / (HALO - FADE_START)).clamp(0, 1)
    return 0.5 + 0.5 * torch.cos(t * torch.pi)


def tiny_config(crop_size: int, *, latent_size: int = 16, **changes: Any) -> TextureConfig:
    """The `tiny` preset for this crop size: the network always works on 32 x 32 patches and 16 x 16 latents.

    With four channels, as in Stable Diffusion, chromatin grains of 5 px are lost: a latent pixel covers 4 x 4 of the image.

    Args:
        crop_size: Pixels, a multiple of 32.
        latent_size: 8 folds twice as many pixels into channels: for stacks, which need a texture a plane. At crops of
            32 px a latent pixel then covers 4 x 4 of the image, as at 64 px otherwise, at a third of the cost.
        **changes: Other attributes of the config.
    """
    if crop_size % 32:
        raise ValueError(f"crop_size must be a multiple of 32, got {crop_size}")
    if latent_size not in (8, 16):
        raise ValueError(f"latent_size must be 8 or 16, got {latent_size}")
    patch = crop_size // (2 * latent_size)
    return TextureConfig(crop_size=crop_size, patch_size=patch, latent_channels=8 if patch < 3 else 16, **changes)


def build_vae(config: TextureConfig) -> Any:
    """The untrained `AutoencoderKL`."""
    from diffusers import AutoencoderKL

    levels = len(config.vae_channels)
    return AutoencoderKL(
        in_channels=config.patch_size**2,
        out_channels=config.patch_size**2,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=config.crop_size // config.patch_size,
        mid_block_add_attention=False,
    )


def build_unet(config: TextureConfig) -> Any:
    """The untrained `UNet2DConditionModel`, without cross-attention: there is no text."""
    from diffusers import UNet2DConditionModel

    levels = len(config.block_out_channels)
    return UNet2DConditionModel(
        sample_size=config.crop_size // config.patch_size // 2 ** (len(config.vae_channels) - 1),
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        mid_block_type="UNetMidBlock2D",
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=8,
        cross_attention_dim=8,
        attention_head_dim=8,
    )


def build_controlnet(config: TextureConfig, unet: Any) -> Any:
    """A control branch copied from `unet` (paper: "copying the UNet weights"), for `CONDITION_CHANNELS` channels."""
    from diffusers import ControlNetModel

    if unet.config.mid_block_type == "UNetMidBlock2D":
        # `from_unet` would build an attention block that this UNet does not have.
        net = ControlNetModel(
            in_channels=config.latent_channels,
            conditioning_channels=CONDITION_CHANNELS,
            down_block_types=unet.config.down_block_types,
            mid_block_type="UNetMidBlock2D",
            block_out_channels=unet.config.block_out_channels,
            layers_per_block=unet.config.layers_per_block,
            norm_num_groups=unet.config.norm_num_groups,
            cross_attention_dim=unet.config.cross_attention_dim,
            attention_head_dim=unet.config.attention_head_dim,
            conditioning_embedding_out_channels=(8, 16, 32),
        )
        own = net.state_dict()
        copied = {k: v for k, v in unet.state_dict().items() if k in own and v.shape == own[k].shape}
        net.load_state_dict({**own, **copied})
        return net
    return ControlNetModel.from_unet(unet, conditioning_channels=CONDITION_CHANNELS)


def _load(name: str) -> Any:
    def load(folder: Path) -> nn.Module:
        import diffusers

        return getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)

    return load


class TextureDiffusion(Stage):
    """Paints light into masks.

    Args:
        config: See `TextureConfig`.
        vae, unet, controlnet: Trained networks; default: untrained ones of the config's sizes.

    Buffers:
        prompt: float32 [1, tokens, cross_attention_dim]; the text embedding given to both networks: that of the empty
            prompt for Stable Diffusion, zeros where there is no text.
        brightness_moments: float32 [2]; mean and standard deviation of the real cells' log brightness.
        latent_moments: float32 [2, C]; mean and standard deviation of each latent channel, by which latents are brought to
            mean 0 and variance 1 (Stable Diffusion: 0 and 1 / 0.18215).
    """

    config_class = TextureConfig
    component_loaders = {  # noqa: RUF012  # read-only, declared ClassVar in the base
        "vae": _load("AutoencoderKL"),
        "unet": _load("UNet2DConditionModel"),
        "controlnet": _load("ControlNetModel"),
    }
    config: TextureConfig
    prompt: Tensor
    brightness_moments: Tensor
    latent_moments: Tensor

    def __init__(
        self,
        config: TextureConfig,
        vae: Any = None,
        unet: Any = None,
        controlnet: Any = None,
    ) -> None:
        super().__init__(config)
        self.vae: Any = vae if vae is not None else build_vae(config)
        self.unet: Any = unet if unet is not None else build_unet(config)
        self.controlnet: Any = controlnet if controlnet is not None else build_controlnet(config, self.unet)
        self.scheduler = build_scheduler(config.schedule, config.prediction_type)
        self.register_buffer("prompt", torch.zeros(1, 1, self.unet.config.cross_attention_dim))
        self.register_buffer("brightness_moments", torch.tensor([0.0, 1.0]))
        channels, scale = self.vae.config.latent_channels, 1 / self.vae.config.scaling_factor
        self.register_buffer("latent_moments", torch.stack([torch.zeros(channels), torch.full((channels,), scale)]))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        factor = self.config.patch_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        side = self.config.crop_size // factor
        return self.vae.config.latent_channels, side, side

    # Images and latents -------------------------------------------------------------------------------------------

    def encode_moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents of `image` float32 [B, S, S], as the VAE has them."""
        low, high = self.config.image_range
        x = F.pixel_unshuffle((image[:, None] - low) * (2 / (high - low)) - 1, self.config.patch_size)
        x = x.expand(-1, self.vae.config.in_channels, -1, -1) if x.shape[1] == 1 else x  # grey as RGB
        posterior = self.vae.encode(x).latent_dist
        return posterior.mean, posterior.logvar

    def encode(self, image: Tensor) -> Tensor:
        """Normalised latents float32 [B, C, h, w] of `image` float32 [B, S, S]: what the denoiser works on."""
        mean, std = self.latent_moments[:, :, None, None]
        return (self.encode_moments(image)[0] - mean) / std

    def decode(self, latent: Tensor) -> Tensor:
        """Light float32 [B, S, S] of normalised latents."""
        mean, std = self.latent_moments[:, :, None, None]
        return self.decode_raw(latent * std + mean)

    def decode_raw(self, latent: Tensor) -> Tensor:
        """Light float32 [B, S, S] of latents as the VAE has them."""
        low, high = self.config.image_range
        x = self.vae.decode(latent, return_dict=False)[0]
        if self.config.patch_size == 1:
            x = x.mean(1, keepdim=True)
        return (F.pixel_shuffle(x, self.config.patch_size)[:, 0] + 1) * ((high - low) / 2) + low

    # The denoiser -------------------------------------------------------------------------------------------------

    def condition(self, sdf: Tensor, brightness: Tensor) -> Tensor:
        """What the control branch sees, float32 [B, 3, P, P], values about [-1, 1].

        Args:
            sdf: float32 [B, S, S], crop pixels.
            brightness: float32 [B], relative to the frame.
        """
        mean, std = self.brightness_moments
        plane = ((brightness.log() - mean) / std).clamp(-3, 3)[:, None, None].expand_as(sdf)
        planes = torch.stack([(sdf / 8).clamp(-1, 1), (sdf < 0).float() * 2 - 1, plane / 2], 1)
        # The control branch halves its input once for each further entry; bring it to the size that ends at the latent.
        halvings = len(self.controlnet.config.conditioning_embedding_out_channels) - 1
        side = self.latent_shape[-1] * 2**halvings
        if side == sdf.shape[-1]:
            return planes
        return F.interpolate(planes, size=(side, side), mode="bilinear", align_corners=False, antialias=False)

    def predict(self, latent: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Noise or velocity for latents [B, C, h, w] at `timesteps` [B] under `condition` [B, 3, P, P]."""
        prompt = self.prompt.expand(len(latent), -1, -1)
        down, mid = self.controlnet(
            latent,
            timesteps,
            prompt,
            controlnet_cond=condition,
            conditioning_scale=self.config.controlnet_conditioning_scale,
            return_dict=False,
        )
        return self.unet(
            latent,
            timesteps,
            prompt,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]

    # Stage --------------------------------------------------------------------------------------------------------

    def draw(self, keys: Sequence[SampleKey], num_slices: int = 1) -> Noise:
        """Latent noise by eq. 2: `latent` float32 [B, S, C, h, w].

        c_s = rho / sqrt(1 + rho^2) * c_cmn + 1 / sqrt(1 + rho^2) * c_unq: unit variance, correlation rho^2 / (1 + rho^2)
        between any two slices of a cell. With `slice_sigma`, c_unq is blurred over the slices, which keeps its variance:
        slices d apart then correlate by (rho^2 + r(d)) / (1 + rho^2), r being `slice_correlation`. Frames whose cells may be
        mottled have `mottle` as well, see `draw_mottle`.
        """
        taps = slice_taps(self.config.slice_sigma) if num_slices > 1 else [1.0]
        drawn = normal([k.child("unique") for k in keys], (num_slices + len(taps) - 1, *self.latent_shape))
        unique = drawn[:, :num_slices] * taps[0]
        for i, tap in enumerate(taps[1:], start=1):
            unique += tap * drawn[:, i : i + num_slices]
        if num_slices == 1:
            noise = {"latent": unique}  # with one slice eq. 2 is plain unit noise
            if self.config.mottle_rate > 0:
                noise["mottle"] = draw_mottle(keys, self.config.crop_size, self.config.mottle_rate)
            return noise
        common = normal([k.child("common") for k in keys], (1, *self.latent_shape))
        rho = self.config.rho
        return {"latent": (rho * common + unique) / (1 + rho**2) ** 0.5}

    @torch.no_grad()
    def forward(self, masks: CellMasks | Slices, noise: Noise) -> Cells:
        """Textured cells [B, 1, S, S] for masks [B, S, S], or [B, K, S, S] for slices [B, K, S, S].

        In a stack each plane that holds the cell is textured by its own outline and its own row of the noise, and dimmed as
        the blur along z dims it (`axial_profile`). What the network learned from are planes of real stacks: their texture
        and their borders are blurred already, and would be so twice if the light were blurred along z afterwards.
        """
        if isinstance(masks, Slices):
            return self._texture_stack(masks, noise["latent"])
        sdf = masks.sdf
        image = self._texture(sdf, masks.brightness, noise["latent"][:, 0], noise.get("mottle"))
        return Cells(image=image[:, None], sdf=sdf[:, None], brightness=masks.brightness, scale=masks.scale)

    def _texture(self, sdf: Tensor, brightness: Tensor, latent: Tensor, mottle: Tensor | None = None) -> Tensor:
        """Light float32 [B, S, S] of outlines [B, S, S], mean 1 inside, from noise [B, C, h, w] and of `draw_mottle`."""
        half_depth = -0.5 * sdf.flatten(1).amin(1)[:, None, None]  # however small, a cell keeps some light
        brighter = brightness.log().clamp(-SLOPE_RANGE, SLOPE_RANGE)[:, None, None]
        shift = torch.minimum(half_depth.clamp_min(0), self.config.outline_shift + self.config.outline_slope * brighter)
        condition = self.condition(sdf + shift, brightness)
        latent = denoise(
            self.scheduler,
            lambda x, t: self.predict(x, t, condition),
            latent.to(self.device) * self.config.noise_scale,
            self.config.num_inference_steps,
        )
        image = self.decode(latent)
        if mottle is not None:
            image = mottled(image, sdf, mottle.to(self.device))
        if self.config.blur:
            image = gaussian_blur(image[:, None], self.config.blur)[:, 0]
        mask = sdf < 0
        image = image * self.window(sdf)
        mean = (image * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp_min(1)
        return image / mean.clamp_min(0.1)[:, None, None]  # mean 1 by contract: brightness carries the rest

    def _texture_stack(self, slices: Slices, latent: Tensor) -> Cells:
        """The planes that hold the cells, packed into batches of `PLANES` whatever cells they belong to."""
        profile = axial_profile(slices.mask, self.config.axial_extent, self.config.axial_sigma)
        where = slices.mask.flatten(2).any(2).nonzero()
        image = torch.zeros_like(slices.sdf)
        for part in where.split(PLANES):
            # The last plane fills up a batch that is not full.
            cell, plane = torch.cat([part, part[-1:].expand(PLANES - len(part), 2)]).unbind(1)
            seen = profile[cell, plane]
            # Dim planes are conditioned on what they look like, as those that were learned from.
            light = self._texture(
                slices.sdf[cell, plane], slices.brightness[cell] * seen, latent.to(self.device)[cell, plane]
            )
            image[cell[: len(part)], plane[: len(part)]] = (light * seen[:, None, None])[: len(part)]
        return Cells(image=image, sdf=slices.sdf, brightness=slices.brightness, scale=slices.scale)

    def window(self, sdf: Tensor) -> Tensor:
        """Fade of a cell's light to 0 at `HALO` px from the outline and at the crop's inscribed circle."""
        size = sdf.shape[-1]
        axis = torch.arange(size, device=sdf.device) - (size - 1) / 2
        from_edge = size / 2 - torch.hypot(axis[:, None], axis[None, :])
        return fade(sdf) * (from_edge / 3).clamp(0, 1)


def slice_taps(sigma: float) -> list[float]:
    """Gaussian filter over slices that keeps the variance of white noise: its squares add up to 1."""
    if sigma <= 0:
        return [1.0]
    radius = math.ceil(3 * sigma)
    taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    energy = math.sqrt(sum(w * w for w in taps))
    return [w / energy for w in taps]


def slice_correlation(sigma: float, apart: int) -> float:
    """Correlation of white noise so filtered between slices `apart`; about exp(-(apart / (2 sigma))^2)."""
    taps = slice_taps(sigma)
    return sum(a * b for a, b in zip(taps, taps[apart:]))


LEAST_LIGHT = 0.02
"""Of a plane in the middle; less would not be told from nothing."""


def axial_profile(mask: Tensor, extent: float, sigma: float) -> Tensor:
    """Brightness of each plane of a cell over that of its middle: a slab of even light, blurred along z.

    Args:
        mask: bool [B, K, S, S].
        extent: Length of the slab over that of the mask, in (0, 1].
        sigma: Standard deviation of the blur, planes; 0 for none, which leaves every plane of the mask as bright.

    Returns:
        float32 [B, K], in [LEAST_LIGHT, 1].
    """
    held = mask.flatten(2).any(2)
    if sigma <= 0:
        return torch.ones(held.shape, device=mask.device)
    rows = []
    for planes in held:  # one after the other, so that no bits depend on the others
        index = planes.nonzero()[:, 0].double()
        if not len(index):
            rows.append(torch.ones(len(planes), device=mask.device))
            continue
        half = extent * (index[-1] - index[0] + 1) / 2
        z = torch.arange(len(planes), device=mask.device).double() - (index[0] + index[-1]) / 2
        inside = torch.special.ndtr((half - z) / sigma) + torch.special.ndtr((half + z) / sigma) - 1
        rows.append((inside / (2 * torch.special.ndtr(half / sigma) - 1)).clamp(LEAST_LIGHT, 1).float())
    return torch.stack(rows)
