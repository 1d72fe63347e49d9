"""The network of the multiview stage: SyncDreamer (Liu et al. 2023, section 4) at the scale of a silhouette.

Noisy views -> features -> one spatial volume -> each view attends to the volume along its own rays. What makes it cheap on a
CPU: the features of all views are unprojected, concatenated and mixed by a linear layer in one step, which is the sum over
views of fixed sparse matrices (the cameras never move) times linearly mapped features; almost all of the 3D network works at
half resolution and below; keys and values are the volume's own channels, so that nothing is computed for every sample of
every ray but two products with them; and one view after the other looks at the volume, which then stays in the cache.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthaug.generators.cameras import CameraPreset, build_cameras


@dataclass(frozen=True)
class ViewNetConfig:
    """Sizes of the network.

    Attributes:
        cameras: Preset of `build_cameras`.
        num_views: Views, the first being the known one.
        channels: Channels of a (folded) view.
        side: Pixels on a side of a folded view, and voxels of the volume.
        depth: Samples along each ray.
        feature_channels: Features of each view before they are mixed.
        volume_channels: Channels of the volume at three levels, finest first.
        view_channels: Widths of the UNet of a view, finest level first.
        embedding: Width of the embedding of time and camera.
        volume_attention: False leaves the volume out: every view is denoised from the known view alone.
    """

    cameras: CameraPreset = "hemisphere"
    num_views: int = 16
    channels: int = 4
    side: int = 16
    depth: int = 12
    feature_channels: int = 16
    volume_channels: tuple[int, int, int] = (16, 32, 48)
    view_channels: tuple[int, int] = (32, 64)
    embedding: int = 64
    volume_attention: bool = True


class _Splat(torch.autograd.Function):
    """A fixed sparse matrix times a dense one; the matrix gets no gradient."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, transposed: Tensor, x: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.transposed @ grad.contiguous()


def unprojection(rotation: Tensor, side: int) -> Tensor:
    """Sparse matrix from the pixels of all views to the voxels of the volume (bilinear), float32 CSR [V^3, N V^2].

    Args:
        rotation: float32 [N, 3, 3], of `Cameras`.
        side: Pixels, and voxels, on a side.
    """
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    world = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    rows, columns, values = [], [], []
    for view, turn in enumerate(rotation):
        place = ((world @ turn[1:].T + 1) / 2 * side - 0.5).clamp(0, side - 1)
        low = place.floor().clamp(max=side - 2)
        share = place - low
        for dy in (0, 1):
            for dx in (0, 1):
                weight = (share[:, 0] if dy else 1 - share[:, 0]) * (share[:, 1] if dx else 1 - share[:, 1])
                rows.append(torch.arange(len(world)))
                columns.append(view * side**2 + (low[:, 0].long() + dy) * side + low[:, 1].long() + dx)
                values.append(weight)
    index = torch.stack([torch.cat(rows), torch.cat(columns)])
    shape = (side**3, len(rotation) * side**2)
    return _compressed(torch.sparse_coo_tensor(index, torch.cat(values), shape, check_invariants=True).coalesce())


def _compressed(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return matrix.to_sparse_csr()


@functools.cache
def _matrices(cameras: CameraPreset, num_views: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`unprojection` and its transpose: no buffers of the network, since compressed matrices cannot be copied or pickled."""
    matrix = unprojection(build_cameras(cameras, num_views).rotation, side)
    return matrix.to(device), _compressed(matrix.to_sparse_coo().T.coalesce()).to(device)


def frustums(rotation: Tensor, side: int, depth: int) -> Tensor:
    """Where the samples of each view's rays lie in the volume, float32 [N, depth, side, side, 3] for `grid_sample`.

    Axes of a frustum: depth, down, right; the last axis is (x, y, z) in [-1, 1].
    """
    axis, along = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in (side, depth))
    own = torch.stack(torch.meshgrid(along, axis, axis, indexing="ij"), -1)
    return torch.einsum("dhwa,nab->ndhwb", own, rotation).flip(-1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)


class _Block(nn.Module):
    """Residual block of two convolutions in two or three dimensions, scaled and shifted by an embedding."""

    def __init__(self, inputs: int, outputs: int, embedding: int, ndim: int) -> None:
        super().__init__()
        conv = nn.Conv2d if ndim == 2 else nn.Conv3d
        self.first = nn.Sequential(_norm(inputs), nn.SiLU(), conv(inputs, outputs, 3, padding=1))
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.norm = _norm(outputs)
        self.second = conv(outputs, outputs, 3, padding=1)
        self.skip = conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding).reshape(len(x), -1, *(1,) * (x.ndim - 2)).chunk(2, 1)
        hidden = self.norm(self.first(x)) * (1 + scale) + shift
        return self.skip(x) + self.second(F.silu(hidden))


class _RayAttention(nn.Module):
    """Each pixel attends to the volume's samples along its own ray; the exit starts at zero.

    Linear maps to keys and values are part of the query's and the exit's: with as many channels a head as the volume has,
    the products are the same.
    """

    def __init__(self, channels: int, volume_channels: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _norm(channels)
        self.query = nn.Conv2d(channels, heads * volume_channels, 1)
        self.exit = nn.Conv2d(heads * volume_channels, channels, 1)
        nn.init.zeros_(self.exit.weight)
        if self.exit.bias is not None:
            nn.init.zeros_(self.exit.bias)

    def forward(self, x: Tensor, frustum: Tensor) -> Tensor:
        """x float32 [B, C, H, W], frustum float32 [B, C', D, H, W]."""
        found = []
        for query in self.query(self.norm(x)).chunk(self.heads, 1):
            score = (query[:, :, None] * frustum).sum(1, keepdim=True) / math.sqrt(frustum.shape[1])
            found.append((score.softmax(2) * frustum).sum(2))
        return x + self.exit(torch.cat(found, 1))


class _VolumeNet(nn.Module):
    """Mixed features of all views [B, C, V, V, V] -> the spatial volume, of the same shape."""

    def __init__(self, channels: tuple[int, int, int], embedding: int) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.down_middle = nn.Conv3d(fine, middle, 2, stride=2)
        self.enter = _Block(middle, middle, embedding, 3)
        self.down_coarse = nn.Conv3d(middle, coarse, 2, stride=2)
        self.coarse = _Block(coarse, coarse, embedding, 3)
        self.up_middle = nn.Conv3d(coarse, middle, 1)
        self.leave = _Block(middle, middle, embedding, 3)
        self.up_fine = nn.Conv3d(middle, fine, 1)
        self.norm = _norm(fine)
        self.out = nn.Conv3d(fine, fine, 3, padding=1)

    def forward(self, fine: Tensor, embedding: Tensor) -> Tensor:
        middle = self.enter(self.down_middle(F.silu(fine)), embedding)
        coarse = self.coarse(self.down_coarse(middle), embedding)
        middle = self.leave(middle + F.interpolate(self.up_middle(coarse), scale_factor=2.0), embedding)
        fine = fine + F.interpolate(self.up_fine(middle), scale_factor=2.0)
        return self.out(F.silu(self.norm(fine)))


class ViewNet(nn.Module):
    """Predicts the velocity of chosen views from all noisy views and the known one.

    Args:
        config: See `ViewNetConfig`.
    """

    rays: Tensor
    pose: Tensor

    def __init__(self, config: ViewNetConfig) -> None:
        super().__init__()
        self.config = config
        rotation = build_cameras(config.cameras, config.num_views).rotation
        self.register_buffer("rays", frustums(rotation, config.side, config.depth), persistent=False)
        self.register_buffer("pose", rotation.flatten(1), persistent=False)
        fine, coarse = config.view_channels
        width, channels, emb = config.volume_channels, config.channels, config.embedding
        self.time = nn.Sequential(nn.Linear(emb, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.camera = nn.Sequential(nn.Linear(9, emb), nn.SiLU(), nn.Linear(emb, emb))
        if config.volume_attention:
            features = config.feature_channels
            self.encode = nn.Conv2d(channels, features, 3, padding=1)
            self.encode_pose = nn.Linear(emb, features)
            self.encode_out = nn.Sequential(_norm(features), nn.SiLU(), nn.Conv2d(features, features, 3, padding=1))
            # One linear map a view: together, the first layer over the concatenated features of all views.
            self.mix = nn.Parameter(torch.zeros(config.num_views, width[0], features))
            self.volume_net = _VolumeNet(width, emb)
            self.attend_fine = _RayAttention(fine, width[0])
            self.attend_coarse = _RayAttention(coarse, width[0])
        self.enter = nn.Conv2d(2 * channels, fine, 3, padding=1)
        self.down_fine = _Block(fine, fine, emb, 2)
        self.down_coarse = _Block(fine, coarse, emb, 2)
        self.middle = _Block(coarse, coarse, emb, 2)
        self.up_coarse = _Block(2 * coarse, coarse, emb, 2)
        self.up_fine = _Block(coarse + fine, fine, emb, 2)
        self.leave = nn.Sequential(_norm(fine), nn.SiLU(), nn.Conv2d(fine, channels, 3, padding=1))

    def volume(self, views: Tensor, embedding: Tensor) -> Tensor:
        """The spatial volume float32 [B, C, V, V, V] of all views [B, N, c, s, s] at times embedded as [B, E]."""
        size, num, side = len(views), self.config.num_views, self.config.side
        pose = self.encode_pose(F.silu(embedding[:, None] + self.camera(self.pose)).flatten(0, 1))
        features = self.encode_out(self.encode(views.flatten(0, 1)) + pose[..., None, None]).unflatten(0, (size, num))
        mixed = torch.einsum("ncf,bnfhw->nhwbc", self.mix, features).reshape(num * side**2, -1)
        matrices = _matrices(self.config.cameras, num, side, mixed.device)
        lifted = _Splat.apply(*matrices, mixed).reshape(side, side, side, size, -1)
        return self.volume_net(lifted.permute(3, 4, 0, 1, 2).contiguous(), embedding)

    def forward(self, views: Tensor, timesteps: Tensor, known: Tensor, targets: Tensor) -> Tensor:
        """Velocity of the target views.

        Args:
            views: float32 [B, N, c, s, s], the known view clean, the others noisy.
            timesteps: int64 [B], shared by all views of an item.
            known: float32 [B, c, s, s], the known view.
            targets: int64 [B, T], which views.

        Returns:
            float32 [B, T, c, s, s].
        """
        from diffusers.models.embeddings import get_timestep_embedding

        time = self.time(get_timestep_embedding(timesteps, self.config.embedding, flip_sin_to_cos=True))
        volume = self.volume(views, time) if self.config.volume_attention else None
        rows = torch.arange(len(views), device=views.device)
        return torch.stack([self._denoise(views[rows, n], time, known, volume, n) for n in targets.unbind(1)], 1)

    def _denoise(self, noisy: Tensor, time: Tensor, known: Tensor, volume: Tensor | None, which: Tensor) -> Tensor:
        """Velocity [B, c, s, s] of one view an item, the `which`-th [B]."""
        emb = time + self.camera(self.pose)[which]
        fine = self.down_fine(self.enter(torch.cat([noisy, known], 1)), emb)
        coarse = self.down_coarse(F.avg_pool2d(fine, 2), emb)
        x = self.up_coarse(torch.cat([self.middle(coarse, emb), coarse], 1), emb)
        if volume is not None:
            frustum = F.grid_sample(volume, self.rays[which], padding_mode="border", align_corners=False)
            x = self.attend_coarse(x, F.avg_pool3d(frustum, (1, 2, 2)))
        x = self.up_fine(torch.cat([F.interpolate(x, scale_factor=2.0), fine], 1), emb)
        if volume is not None:
            x = self.attend_fine(x, frustum)
        return self.leave(x)

    def save_pretrained(self, folder: Path, safe_serialization: bool = True) -> None:
        """Weights and config, as diffusers' models are saved."""
        import json

        from synthaug.generators.stage import save_tensors, write_atomic

        assert safe_serialization
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_tensors(folder / "diffusion_pytorch_model.safetensors", weights)
        write_atomic(folder / "config.json", (json.dumps(asdict(self.config), indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder: Path) -> ViewNet:
        """Read the network back as float32."""
        import json

        from safetensors.torch import load_file

        stored = json.loads((folder / "config.json").read_text())
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        net = cls(ViewNetConfig(**values))
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        net.load_state_dict({name: value.float() for name, value in weights.items()})
        return net
