"""MaskDDPM (paper, §2 "Mask Synthesis in 2D"): outlines of single cells, with their size and brightness.

A mask is represented by its truncated signed distance on a small grid, scaled so that every cell fills the grid alike: a
small network then gives smooth, sub-pixel outlines for small and large cells. Size, brightness, elongation and solidity are
drawn first, jointly, from a kernel density over the real cells (the paper's code codes brightness as the mask's grey value),
and condition the shape: concave cells then come as often as in the data, also from a network that is trained for minutes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import regionprops
from torch import Tensor, nn
from torch.nn import functional as F

from synthaug.errors import InputError
from synthaug.generators.diffusion import build_scheduler, denoise
from synthaug.generators.distance import signed_distance
from synthaug.generators.stage import Noise, Stage
from synthaug.randomness import SampleKey, normal, uniform
from synthaug.types import CellMasks

ATTRIBUTES = ("radius", "brightness", "aspect", "solidity")
"""What is drawn before a cell's shape, in this order."""


@dataclass(frozen=True)
class MaskConfig:
    """Everything that rebuilds an untrained MaskDDPM.

    Attributes:
        crop_size: Side of the crops the masks are returned on, pixels.
        margin: Pixels kept free between the cell's enclosing circle and the crop's edge.
        least_scale: Image pixels per crop pixel of cells that fit the crop; below 1 small cells are drawn enlarged.
        grid_size: Side of the grid the network sees.
        grid_radius: Radius of the enclosing circle on that grid, grid pixels.
        truncation: Distances beyond this many grid pixels are cut off.
        patch_size: Grid pixels folded into channels on each side (pixel unshuffle), to save time.
        block_out_channels: Widths of the UNet, finest level first.
        layers_per_block: Residual blocks a level.
        num_inference_steps: DDIM steps.
        eta: 0 for deterministic DDIM, 1 for DDPM noise (the paper's code).
        outline_smoothing: Standard deviation, in grid pixels, of a Gaussian over sampled distances: rounds off the last
            wobble of a small network. Real outlines keep their circularity at this width.
        bandwidth: Kernel width of the density of the attributes, in units of `MaskDDPM.spread`.
        attributes: What the shape is conditioned on, some of `ATTRIBUTES` in its order, "radius" and "brightness" first.
        usual: Only real cells are varied of which no attribute is farther from the median than so many robust standard
            deviations, see `usual_rows`; None takes all.
    """

    crop_size: int = 64
    margin: float = 5.0
    least_scale: float = 1.0
    grid_size: int = 32
    grid_radius: float = 13.0
    truncation: float = 4.0
    patch_size: int = 2
    block_out_channels: tuple[int, ...] = (48, 96)
    layers_per_block: int = 1
    num_inference_steps: int = 10
    eta: float = 0.0
    outline_smoothing: float = 0.7
    bandwidth: float = 0.15
    attributes: tuple[str, ...] = ATTRIBUTES
    usual: float | None = None

    def __post_init__(self) -> None:
        if self.attributes[:2] != ATTRIBUTES[:2] or not set(self.attributes) <= set(ATTRIBUTES):
            raise InputError(
                "attributes", expected=f"{ATTRIBUTES[:2]}, and others of {ATTRIBUTES}", got=self.attributes
            )


def measure_attributes(mask: Tensor, radius: Tensor, brightness: Tensor, names: Sequence[str] = ATTRIBUTES) -> Tensor:
    """The attributes of real cells, on scales on which their distributions are about symmetric; float32 [B, len(names)].

    Args:
        mask: bool [B, S, S].
        radius: float32 [B], radius of the enclosing circle in image pixels; its logarithm is taken.
        brightness: float32 [B], > 0; its logarithm is taken.
        names: Which; "aspect" is the log ratio of the principal axes, "solidity" log(1.005 - area / area of the convex hull).
    """
    columns = {"radius": radius.log(), "brightness": brightness.log()}
    if set(names) - set(columns):
        regions = [regionprops(m.astype(np.uint8))[0] for m in mask.cpu().numpy()]
        ratios = [(r.axis_major_length + 1) / (r.axis_minor_length + 1) for r in regions]
        columns["aspect"] = torch.tensor(ratios).log()
        columns["solidity"] = (1.005 - torch.tensor([r.solidity for r in regions])).log()
    return torch.stack([columns[name].float().to(radius.device) for name in names], 1)


def robust_spread(table: Tensor) -> Tensor:
    """Interquartile range of each column [K] of a table [N, K] as a standard deviation."""
    low, high = torch.quantile(table, torch.tensor([0.25, 0.75], device=table.device), dim=0)
    return (high - low) / 1.349


def usual_rows(table: Tensor, most: float | None) -> Tensor:
    """The rows [N, K] of which no column is farther than `most` from the median, in robust standard deviations.

    Specks of debris, cells in mitosis and misdrawn outlines are what a data set has of its own. All rows, if none is usual.
    """
    if most is None:
        return table
    usual = ((table - table.quantile(0.5, dim=0)).abs() <= most * robust_spread(table)).all(1)
    return table[usual] if bool(usual.any()) else table


def build_unet(config: MaskConfig) -> nn.Module:
    """The untrained diffusers `UNet2DModel`: noisy grid + a plane for each attribute in, prediction out."""
    from diffusers import UNet2DModel

    channels = config.patch_size**2
    levels = len(config.block_out_channels)
    return UNet2DModel(
        sample_size=config.grid_size // config.patch_size,
        in_channels=channels + len(config.attributes),
        out_channels=channels,
        layers_per_block=config.layers_per_block,
        block_out_channels=config.block_out_channels,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        attention_head_dim=32,
        norm_num_groups=8,
    )


def load_unet(folder: Path) -> nn.Module:
    """Read the network back as float32."""
    from diffusers import UNet2DModel

    return UNet2DModel.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)


class MaskDDPM(Stage):
    """Draws single-cell outlines.

    Args:
        config: See `MaskConfig`.
        unet: The denoiser; default: untrained.

    Buffers:
        attributes: float32 [N, A]; those of the real cells, see `measure_attributes`.
    """

    config_class = MaskConfig
    component_loaders = {"unet": load_unet}  # noqa: RUF012  # read-only, declared ClassVar in the base
    config: MaskConfig
    attributes: Tensor

    def __init__(self, config: MaskConfig, unet: nn.Module | None = None) -> None:
        super().__init__(config)
        self.unet: Any = unet if unet is not None else build_unet(config)
        self.scheduler = build_scheduler("squaredcos_cap_v2", "v_prediction")
        self.register_buffer("attributes", torch.zeros(1, len(config.attributes)))

    @property
    def usual_radius(self) -> float:
        """The median of the real cells' radii, image pixels."""
        return float(self.attributes[:, 0].exp().median())

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the network denoises."""
        side = self.config.grid_size // self.config.patch_size
        return self.config.patch_size**2, side, side

    def to_grid(self, sdf: Tensor, radius: Tensor, angle: Tensor | None = None) -> Tensor:
        """Signed distances on crops as the network's clean samples.

        Args:
            sdf: float32 [B, S, S], crop pixels, centred on the cell's enclosing circle.
            radius: float32 [B], radius of that circle in crop pixels.
            angle: float32 [B], radians, by which each crop is turned; default: none.

        Returns:
            float32 [B, patch_size^2, G, G] in [-1, 1].
        """
        size, grid = sdf.shape[-1], self.config.grid_size
        zoom = radius / self.config.grid_radius  # crop pixels per grid pixel
        angle = torch.zeros_like(radius) if angle is None else angle
        # affine_grid works in [-1, 1]: a grid pixel is 2/G there, a crop pixel 2/S.
        factor = zoom * grid / size
        theta = torch.zeros(len(sdf), 2, 3)
        theta[:, 0, 0], theta[:, 0, 1] = factor * torch.cos(angle), -factor * torch.sin(angle)
        theta[:, 1, 0], theta[:, 1, 1] = factor * torch.sin(angle), factor * torch.cos(angle)
        where = F.affine_grid(theta, [len(sdf), 1, grid, grid], align_corners=False)
        out = F.grid_sample(sdf[:, None], where, mode="bicubic", padding_mode="border", align_corners=False)
        out = (out / zoom[:, None, None, None] / self.config.truncation).clamp(-1, 1)
        return F.pixel_unshuffle(out, self.config.patch_size)

    def from_grid(self, sample: Tensor, radius: Tensor, scale: Tensor) -> Tensor:
        """Samples as signed distances on crops.

        Args:
            sample: float32 [B, patch_size^2, G, G].
            radius: float32 [B], radius of the enclosing circle, image pixels.
            scale: float32 [B], image pixels per crop pixel.

        Returns:
            float32 [B, S, S], crop pixels; only the neighbourhood of the outline is metric (truncated elsewhere).
        """
        size = self.config.crop_size
        values = F.pixel_shuffle(sample, self.config.patch_size) * self.config.truncation
        zoom = radius / scale / self.config.grid_radius
        factor = size / self.config.grid_size / zoom
        theta = torch.zeros(len(sample), 2, 3, device=sample.device)
        theta[:, 0, 0] = theta[:, 1, 1] = factor
        where = F.affine_grid(theta, [len(sample), 1, size, size], align_corners=False)
        out = F.grid_sample(values, where, mode="bicubic", padding_mode="border", align_corners=False)
        return out[:, 0] * zoom[:, None, None]

    def condition(self, attributes: Tensor) -> Tensor:
        """Attributes standardised by the real cells' mean and spread, float32 [B, A]."""
        mean, std = self.attributes.mean(0), self.attributes.std(0, unbiased=False).clamp_min(1e-3)
        return ((attributes - mean) / std).clamp(-3, 3)

    def spread(self) -> Tensor:
        """Width of the main bulk of each attribute (interquartile range as a standard deviation), float32 [A].

        The standard deviation itself would smear the nuclei where specks of debris make a second, distant mode.
        """
        return robust_spread(self.attributes)

    def predict(self, sample: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """The network's velocity for `sample` [B, C, G, G] at `timesteps` [B], given `condition` [B, A]."""
        planes = condition[:, :, None, None].expand(-1, -1, *sample.shape[2:])
        return self.unet(torch.cat([sample, planes], 1), timesteps, return_dict=False)[0]

    def draw(self, keys: Sequence[SampleKey]) -> Noise:
        """Noise of the shape, and which real cell's attributes to vary by how much."""
        noise = {
            "shape": normal([k.child("shape") for k in keys], self.grid_shape),
            "row": uniform([k.child("row") for k in keys], (1,))[:, 0],
            "jitter": normal([k.child("jitter") for k in keys], (len(self.config.attributes),)),
        }
        if self.config.eta > 0:
            steps = normal([k.child("steps") for k in keys], (self.config.num_inference_steps, *self.grid_shape))
            noise["steps"] = steps
        return noise

    @torch.no_grad()
    def forward(self, noise: Noise) -> tuple[CellMasks, list[str | None]]:
        """Masks [B] and, for each, why it has to be redrawn, or None; see `why_rejected`."""
        config = self.config
        table = usual_rows(self.attributes, config.usual)
        row = (noise["row"] * len(table)).long().clamp(max=len(table) - 1)
        attributes = table[row] + config.bandwidth * self.spread() * noise["jitter"].to(self.device)
        radius, brightness = attributes.exp().unbind(1)[:2]
        condition = self.condition(attributes)
        steps = noise["steps"].transpose(0, 1).to(self.device) if config.eta > 0 else None
        sample = denoise(
            self.scheduler,
            lambda x, t: self.predict(x, t, condition),
            noise["shape"].to(self.device),
            config.num_inference_steps,
            config.eta,
            steps,
        ).clamp(-1, 1)
        grid = F.pixel_shuffle(sample, config.patch_size)[:, 0]
        inside = grid < 0
        edge = torch.cat([inside[:, 0], inside[:, -1], inside[:, :, 0], inside[:, :, -1]], 1).any(1)
        # The largest circle that fits keeps `margin` pixels; a larger cell is stored at a coarser scale, never cut.
        scale = (radius / (config.crop_size / 2 - config.margin)).clamp_min(config.least_scale)
        smooth = F.pixel_unshuffle(blur(grid[:, None], config.outline_smoothing), config.patch_size)
        outline = (self.from_grid(smooth, radius, scale) < 0).cpu().numpy()
        # Far from the outline the samples are truncated; the other stages need metric distances there.
        sdf = torch.from_numpy(np.stack([signed_distance(m) for m in outline])).to(self.device)
        rejects = [why_rejected(m, bool(e)) for m, e in zip(outline, edge.cpu())]
        return CellMasks(sdf=sdf, brightness=brightness, scale=scale), rejects


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `image` [B, 1, Y, X], its border repeated outwards."""
    if sigma <= 0:
        return image
    reach = math.ceil(3 * sigma)
    weight = torch.exp(-(torch.arange(-reach, reach + 1, device=image.device) ** 2) / (2 * sigma**2))
    kernel = weight[:, None] * weight / weight.sum() ** 2
    return F.conv2d(F.pad(image, (reach,) * 4, mode="replicate"), kernel[None, None])


def why_rejected(mask: NDArray[np.bool_], touches_edge: bool) -> str | None:
    """What is wrong with a drawn mask, or None: it has to be one part without holes, clear of the crop's edge."""
    if not mask.any():
        return "empty"
    if touches_edge:
        return "touching the crop's edge"
    if ndimage.label(mask)[1] > 1:
        return "several parts"
    if ndimage.label(~mask, structure=np.ones((3, 3)))[1] > 1:
        return "with a hole"
    return None


def principal_angle(mask: Tensor) -> Tensor:
    """Angle of each mask's long axis, radians, float32 [B]; turning the crop by it lays the axis along x.

    Args:
        mask: bool [B, S, S].
    """
    size = mask.shape[-1]
    axis = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    weight = mask.float() / mask.flatten(1).sum(1).clamp_min(1)[:, None, None]
    x, y = (weight * axis[None, None, :]).sum((1, 2)), (weight * axis[None, :, None]).sum((1, 2))
    dx, dy = axis[None, None, :] - x[:, None, None], axis[None, :, None] - y[:, None, None]
    xx, yy, xy = (weight * dx * dx).sum((1, 2)), (weight * dy * dy).sum((1, 2)), (weight * dx * dy).sum((1, 2))
    return 0.5 * torch.atan2(2 * xy, xx - yy)
