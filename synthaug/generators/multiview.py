"""MultiviewDiffusion (paper, §2 "Mask Synthesis in 3D"): what a cell known by one outline looks like from all sides.

SyncDreamer's scheme (Liu et al. 2023) on silhouettes: all views are denoised together, at one timestep, and each sees the
others through a shared volume. Trained on random shapes alone (`shapes.py`); the annotated outline is view 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from synthaug.errors import InputError
from synthaug.generators.cameras import VIEW_RADIUS, CameraPreset, build_cameras
from synthaug.generators.diffusion import build_scheduler, denoise
from synthaug.generators.multiview_net import ViewNet, ViewNetConfig
from synthaug.generators.stage import Noise, Stage
from synthaug.randomness import SampleKey, normal
from synthaug.types import Cameras, CellMasks, Views


@dataclass(frozen=True)
class MultiviewConfig:
    """Everything that rebuilds an untrained MultiviewDiffusion.

    Attributes:
        cameras: "hemisphere" or "ring", see `build_cameras`.
        num_views: Views, the known one included.
        image_size: Side of the views the network sees, pixels.
        view_size: Side of the views returned, pixels.
        truncation: Distances beyond this many grid pixels are cut off.
        patch_size: Grid pixels folded into channels on each side.
        volume_channels, view_channels, volume_attention: See `ViewNetConfig`.
        num_inference_steps: DDIM steps.
    """

    cameras: CameraPreset = "hemisphere"
    num_views: int = 16
    image_size: int = 32
    view_size: int = 64
    truncation: float = 4.0
    patch_size: int = 2
    volume_channels: tuple[int, int, int] = (16, 32, 48)
    view_channels: tuple[int, int] = (32, 64)
    volume_attention: bool = True
    num_inference_steps: int = 10

    def __post_init__(self) -> None:
        if self.image_size % (2 * self.patch_size) or self.view_size % self.image_size:
            raise InputError(
                "MultiviewConfig",
                expected="image_size a multiple of 2 * patch_size, and view_size of image_size",
                got=f"{self.image_size}, {self.patch_size} and {self.view_size}",
            )


def build_network(config: MultiviewConfig) -> ViewNet:
    """The untrained network."""
    return ViewNet(
        ViewNetConfig(
            cameras=config.cameras,
            num_views=config.num_views,
            channels=config.patch_size**2,
            side=config.image_size // config.patch_size,
            volume_channels=config.volume_channels,
            view_channels=config.view_channels,
            volume_attention=config.volume_attention,
        )
    )


class MultiviewDiffusion(Stage):
    """Completes outlines to silhouettes from all sides.

    Args:
        config: See `MultiviewConfig`.
        network: The denoiser; default: untrained.
    """

    config_class = MultiviewConfig
    component_loaders = {"network": ViewNet.from_pretrained}  # noqa: RUF012  # read-only, declared ClassVar in the base
    config: MultiviewConfig

    def __init__(self, config: MultiviewConfig, network: ViewNet | None = None) -> None:
        super().__init__(config)
        self.network = network if network is not None else build_network(config)
        self.scheduler = build_scheduler("squaredcos_cap_v2", "v_prediction")

    @property
    def cameras(self) -> Cameras:
        """The cameras of the views, the first along the optical axis."""
        return build_cameras(self.config.cameras, self.config.num_views)

    @property
    def view_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a view as the network sees it."""
        side = self.config.image_size // self.config.patch_size
        return self.config.patch_size**2, side, side

    def encode(self, views: Tensor) -> Tensor:
        """Signed distances float32 [..., G, G] in grid pixels as clean samples in [-1, 1]."""
        return F.pixel_unshuffle((views / self.config.truncation).clamp(-1, 1).unsqueeze(-3), self.config.patch_size)

    def decode(self, samples: Tensor) -> Tensor:
        """Samples as signed distances float32 [..., G, G] in grid pixels, truncated."""
        return F.pixel_shuffle(samples.clamp(-1, 1), self.config.patch_size).squeeze(-3) * self.config.truncation

    def known_view(self, masks: CellMasks) -> tuple[Tensor, Tensor]:
        """View 0 of cells known by their outlines.

        Returns:
            float32 [B, V, V], signed distances in pixels of the view at `view_size`, and half_side float32 [B] in image
            pixels: the circle around the crop's centre that holds the outline has the radius VIEW_RADIUS * half_side.
        """
        size, view = masks.sdf.shape[-1], self.config.view_size
        axis = torch.arange(size, device=masks.sdf.device) - (size - 1) / 2
        distance = torch.hypot(axis[:, None], axis[None])
        radius = torch.where(masks.mask, distance, 0.0).amax((1, 2)) + 0.5
        half = radius / VIEW_RADIUS  # crop pixels
        theta = torch.zeros(len(masks), 2, 3, device=masks.sdf.device)
        theta[:, 0, 0] = theta[:, 1, 1] = half * (2 / size)
        where = F.affine_grid(theta, [len(masks), 1, view, view], align_corners=False)
        out = F.grid_sample(masks.sdf[:, None], where, mode="bilinear", padding_mode="border", align_corners=False)
        return out[:, 0] * (view / 2 / half)[:, None, None], half * masks.scale

    def predict(self, sample: Tensor, timesteps: Tensor, known: Tensor) -> Tensor:
        """Velocity of all views but the known one, [B, N - 1, c, s, s], given that one [B, c, s, s]."""
        views = torch.cat([known[:, None], sample], 1)
        targets = torch.arange(1, self.config.num_views, device=sample.device).expand(len(sample), -1)
        return self.network(views, timesteps, known, targets)

    def loss(self, clean: Tensor, noise: Tensor, view: Tensor, timesteps: Tensor) -> Tensor:
        """Squared error of the velocity of one view an item, while all views but the known one are noisy (their eq. 9).

        Args:
            clean: float32 [B, N, c, s, s], of `encode`.
            noise: float32 of the same shape, standard normal; that of view 0 is not used.
            view: int64 [B] in [1, N), the target views.
            timesteps: int64 [B], shared by the views of an item.
        """
        known, hidden, times = clean[:, 0], clean[:, 1:].flatten(0, 1), timesteps.repeat_interleave(clean.shape[1] - 1)
        noise = noise[:, 1:].flatten(0, 1)
        noisy = self.scheduler.add_noise(hidden, noise, times).unflatten(0, (len(clean), -1))
        velocity = self.scheduler.get_velocity(hidden, noise, times).unflatten(0, (len(clean), -1))
        views = torch.cat([known[:, None], noisy], 1)
        predicted = self.network(views, timesteps, known, view[:, None])[:, 0]
        return F.mse_loss(predicted, velocity[torch.arange(len(clean), device=clean.device), view - 1])

    def draw(self, keys: Sequence[SampleKey]) -> Noise:
        """Independent noise of all views but the known one."""
        return {"views": normal([k.child("views") for k in keys], (self.config.num_views - 1, *self.view_shape))}

    @torch.no_grad()
    def forward(self, masks: CellMasks, noise: Noise) -> Views:
        """Views [B, N] of cells known by their outlines [B]."""
        view0, half_side = self.known_view(masks)
        zoom = self.config.view_size // self.config.image_size
        known = self.encode(F.avg_pool2d(view0[:, None], zoom)[:, 0] / zoom)
        sample = denoise(
            self.scheduler,
            lambda x, t: self.predict(x, t, known),
            noise["views"].to(self.device),
            self.config.num_inference_steps,
        )
        fine = F.interpolate(self.decode(sample), size=view0.shape[1:], mode="bicubic", align_corners=False) * zoom
        limit = self.config.truncation * zoom
        return Views(
            sdf=torch.cat([view0[:, None].clamp(-limit, limit), fine], 1),
            half_side=half_side,
            brightness=masks.brightness,
        )
