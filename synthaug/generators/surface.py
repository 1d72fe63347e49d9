"""From silhouettes to closed surfaces: NeuS (paper, §2; Wang et al., NeurIPS 2021), one fit a cell.

The fit starts from the visual hull of the silhouettes, on a coarse grid: a surface as smooth as a cell's loses nothing
there, since its distances are interpolated. The finest grid is read off at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from synthaug.errors import InputError
from synthaug.generators.fields import Field, GridField, MLPField, camera_rays, select_rays
from synthaug.generators.stage import Noise, Stage
from synthaug.randomness import SampleKey, normal, uniform
from synthaug.types import Cameras, Surface, Views

FieldKind = Literal["grid", "mlp"]

MOST_DENTS = 0.3
"""More inward curvature than this does not raise the weight of the volume any further, or it would win over the views."""


@dataclass
class SurfaceConfig:
    """How surfaces are fitted. Weights are those of sums over rays (a pixel each) and voxels of the grid fitted on.

    Attributes:
        field: "grid", or "mlp" for the network of NeuS, hundreds of times slower (benchmarks/surface.py).
        grid_size: Voxels on a side of the surfaces returned.
        levels: Voxels on a side of the grids fitted on, coarse to fine; the network uses the last one's rays.
        num_iterations: Steps on each level.
        step: Length of a gradient step.
        bending: Weight of half the squared Laplacian of the field.
        volume: Weight of the volume.
        volume_dents: How much that weight grows with the share of inward curvature in the silhouettes' outlines (0 for
            convex ones): a cell with dents where views show them has dents where none does.
        eikonal: Weight of (|gradient| - 1)^2; it also keeps the volume from wearing the field away.
        sharpness: Slope of the logistic function that softens the silhouettes, per voxel. The learned slope starts from
            half of it.
        mlp_width, mlp_depth, mlp_frequencies: Of the network.
        mlp_iterations, mlp_rays, mlp_samples: Steps, rays a step, and samples a ray.
        mlp_rate: Learning rate of Adam.
        mlp_eikonal: Weight of the mean of (|gradient| - 1)^2 against the mean over rays.
    """

    field: FieldKind = "grid"
    grid_size: int = 64
    levels: tuple[int, ...] = (32,)
    num_iterations: tuple[int, ...] = (60,)
    step: float = 0.15
    bending: float = 0.04
    volume: float = 0.04
    volume_dents: float = 0.28
    eikonal: float = 1.0
    sharpness: float = 4.0
    mlp_width: int = 256
    mlp_depth: int = 8
    mlp_frequencies: int = 6
    mlp_iterations: int = 300
    mlp_rays: int = 512
    mlp_samples: int = 32
    mlp_rate: float = 5e-4
    mlp_eikonal: float = 0.1

    def __post_init__(self) -> None:
        if self.field not in ("grid", "mlp"):
            raise InputError("field", expected="'grid' or 'mlp'", got=repr(self.field))
        if not self.levels or len(self.levels) != len(self.num_iterations):
            raise InputError("num_iterations", expected=f"a number for each of {self.levels}", got=self.num_iterations)
        if min(*self.levels, self.grid_size) < 8:
            raise InputError("levels and grid_size", expected="at least 8", got=(self.levels, self.grid_size))


class NeuSSurface(Stage):
    """Closed surfaces that look like given silhouettes from every camera."""

    config_class = SurfaceConfig

    def __init__(self, config: SurfaceConfig) -> None:
        super().__init__(config)

    def draw(self, keys: Sequence[SampleKey]) -> Noise:
        """Nothing for the grid; initial weights and choices of rays for the network."""
        if self.config.field == "grid":
            return {}
        config = self.config
        weights = sum(n_out * n_in for n_out, n_in in self.build_mlp().shapes)
        return {
            "weights": normal([k.child("weights") for k in keys], (weights,)),
            "rays": uniform([k.child("rays") for k in keys], (config.mlp_iterations, config.mlp_rays)),
        }

    def build_mlp(self) -> MLPField:
        """The network field of this config."""
        c = self.config
        return MLPField(
            *(c.mlp_width, c.mlp_depth, c.mlp_frequencies, c.mlp_iterations, c.mlp_rays, c.mlp_samples),
            *(c.mlp_rate, c.mlp_eikonal, c.sharpness),
        )

    @torch.no_grad()
    def forward(self, views: Views, cameras: Cameras, noise: Noise) -> Surface:
        """Fit a surface to each cell's views.

        Args:
            views: N silhouettes a cell. They need not agree: the surface is a compromise of them, in which a view that
                shows no cell at all has no say.
            cameras: The N cameras that took them.
            noise: Of `draw`, a row a cell.

        Returns:
            One surface a cell, of one part and without cavities; without any inside where the silhouettes are empty.
        """
        from synthaug.kernels.hull import hull_distance

        config = self.config
        if views.sdf.shape[1] != len(cameras):
            raise InputError("views", expected=f"one view for each of {len(cameras)} cameras", got=views.sdf.shape[1])
        rotation = cameras.rotation.cpu()
        levels = config.levels if config.field == "grid" else config.levels[-1:]
        rays = {size: camera_rays(rotation, size) for size in levels}
        out = torch.empty((len(views), *[config.grid_size] * 3))
        for b, sdf in enumerate(views.sdf.cpu()):
            row = {name: value[b].cpu() for name, value in noise.items()}
            seeing = (sdf < 0).flatten(1).any(1)
            start: Tensor | None = None
            for size, num_iterations in zip(levels, config.num_iterations[-len(levels) :]):
                # Views may be truncated, and then so is the hull's distance; the fit needs it whole.
                carved = hull_distance(sdf[None, seeing], rotation[seeing], size)[0] if seeing.any() else None
                hull = torch.full([size] * 3, float(size)) if carved is None else redistance(carved)
                images = resize(sdf, size).masked_fill(~seeing[:, None, None], float("inf"))
                field = self.build_field(num_iterations, dents(images))
                chosen = select_rays(rays[size], images, hull)
                start = field.fit(hull if start is None else enlarge(start, size), chosen, row)
            assert start is not None
            out[b] = one_part(enlarge(redistance(one_part(start)), config.grid_size))
        device = views.sdf.device
        return Surface(out.to(device), views.half_side, views.brightness)

    def build_field(self, num_iterations: int, dents: float) -> Field:
        """The field for a cell whose outlines have that share of `dents`."""
        c = self.config
        if c.field == "mlp":
            return self.build_mlp()
        volume = c.volume + c.volume_dents * min(dents, MOST_DENTS)
        return GridField(num_iterations, c.step, c.bending, volume, c.eikonal, c.sharpness)


def resize(views: Tensor, size: int) -> Tensor:
    """Signed distances [N, H, H] in pixels on [N, size, size], in pixels of that size."""
    side = views.shape[-1]
    mode = "area" if size < side else "bilinear"
    return functional.interpolate(views[:, None], (size, size), mode=mode)[:, 0] * (size / side)


def dents(views: Tensor) -> float:
    """Inward over outward curvature of the outlines: 0 for balls, about 0.1 for smooth shapes, 0.3 for lumpy ones.

    Args:
        views: float32 [N, D, D], signed distances, pixels; their Laplacian is the curvature of the outline beneath.
    """
    inner = views[:, 1:-1, 1:-1]
    laplacian = views[:, 2:, 1:-1] + views[:, :-2, 1:-1] + views[:, 1:-1, 2:] + views[:, 1:-1, :-2] - 4 * inner
    bent = laplacian[inner.abs() < 1.5]
    outward = float(bent.clamp_min(0).sum())
    return float(-bent.clamp_max(0).sum()) / outward if outward > 0 else 0.0


@functools.cache
def _spline(size_in: int, size_out: int) -> NDArray[np.float32]:
    """Cubic spline interpolation of `size_in` voxel centres at those of `size_out` voxels on the same length."""
    matrix = ndimage.zoom(np.eye(size_in), (size_out / size_in, 1), order=3, mode="nearest", grid_mode=True)
    return matrix.astype(np.float32)


def enlarge(sdf: Tensor, size: int) -> Tensor:
    """Signed distances [D, D, D] in voxels on a grid of [size, size, size], in that grid's voxels."""
    if len(sdf) == size:
        return sdf
    matrix, values = _spline(len(sdf), size), sdf.numpy()
    for _ in range(3):  # each turn takes the last axis to the front, so that three of them restore the order
        values = np.tensordot(matrix, values, (1, 2))
    return torch.from_numpy(np.ascontiguousarray(values)) * (size / len(sdf))


def redistance(field: Tensor) -> Tensor:
    """Signed distances with the zero level of `field` [D, D, D], voxels.

    Next to the surface the field divided by its slope; elsewhere the distance to the plane through the surface at the
    nearest voxel of the other side, or far away to the surface point there. A field without a surface is returned as it is.
    """
    values = field.numpy()
    inside = values < 0
    if inside.all() or not inside.any():
        return field
    gradient = np.stack(np.gradient(values))
    slope = np.maximum(np.sqrt(np.square(gradient).sum(0)), 0.5)
    near, normal = values / slope, gradient / slope
    where = np.indices(values.shape, dtype=np.float32)
    foot = where - np.clip(near, -1, 1) * normal
    out = near.copy()
    for side, sign in ((~inside, 1), (inside, -1)):
        distance, nearest = ndimage.distance_transform_edt(side, return_indices=True)
        beyond = side & (np.abs(near) > 0.7)
        index = (slice(None), *nearest[:, beyond])
        gap = where[:, beyond] - foot[index]
        plane, point = sign * (gap * normal[index]).sum(0), np.sqrt(np.square(gap).sum(0))
        share = np.clip((distance[beyond] - 2) / 2, 0, 1)
        out[beyond] = sign * np.maximum((1 - share) * plane + share * point, 0.5)
    return torch.from_numpy(out)


def one_part(sdf: Tensor) -> Tensor:
    """The largest part alone, and without cavities: elsewhere the sign of `sdf` [D, D, D] is turned."""
    values = sdf.numpy()
    inside = values < 0
    keep = largest_part(inside)
    keep = ndimage.binary_fill_holes(keep)
    if (keep == inside).all():
        return sdf
    least = np.float32(0.1)
    turned = np.where(keep, -1, 1) * np.maximum(np.abs(values), least)
    return torch.from_numpy(np.where(keep == inside, values, turned).astype(np.float32))


def largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest face-connected part of a mask, the first of equals."""
    parts, n = ndimage.label(mask)
    return mask if n < 2 else parts == np.bincount(parts.ravel())[1:].argmax() + 1
