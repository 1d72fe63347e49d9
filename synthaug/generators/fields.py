"""Signed-distance fields of single cells, fitted to silhouettes by NeuS (Wang et al., NeurIPS 2021).

Two fields behind one interface: a grid, started from the visual hull, and the paper's network, for reference. Both are
rendered with the full discrete alpha of NeuS and its learned slope; the loss is the cross entropy on the accumulated opacity
plus the eikonal loss. Silhouettes leave a surface free between the curves where the rays touch it, and of all surfaces
they allow the visual hull is the largest, with an edge wherever two views meet. So the grid has two more terms: bending,
which rounds the edges, and volume, which draws inwards what no ray holds.

Every cell is fitted by itself, so its bits do not depend on its companions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from scipy import fft
from torch import Tensor, nn
from torch.nn import functional

from synthaug.generators.stage import Noise

VOLUME_SLOPE = 2.0
"""Slope of the logistic function by which voxels count as inside, per voxel."""

BAND = 3.0
"""Voxels from the surface within which the eikonal and volume terms count."""

SLOPE_RATE = 1.0
"""Learning rate of log(inv_s) of the grid, by the mean over the rays."""

MLP_SKIP = 4
"""Layer of the network that sees its input once more."""


@dataclass(frozen=True)
class Rays:
    """Rays through a grid of voxels, a sample a voxel.

    Attributes:
        origin: float32 [A, 3] (ZYX), voxels; where sample 0 lies.
        along: float32 [A, 3], unit vectors.
        span: int32 [A, 2], first sample and the one after the last.
        distance: float32 [A], signed distance of the ray's pixel to the silhouette's outline, voxels.
    """

    origin: Tensor
    along: Tensor
    span: Tensor
    distance: Tensor

    def __getitem__(self, index: Tensor) -> Rays:
        return Rays(self.origin[index], self.along[index], self.span[index], self.distance[index])


def camera_rays(rotation: Tensor, size: int) -> Rays:
    """The rays of all pixels of all views; `distance` is 0.

    Args:
        rotation: float32 [N, 3, 3], of `Cameras`.
        size: Voxels on a side of the cube, and pixels on a side of a view.
    """
    pixel = torch.arange(size, dtype=torch.float64) + 0.5 - size / 2
    down, right = (p.reshape(1, -1, 1) for p in torch.meshgrid(pixel, pixel, indexing="ij"))
    depth_axis, down_axis, right_axis = rotation.double()[:, :, None].unbind(1)
    middle = (down * down_axis + right * right_axis).reshape(-1, 3) + (size - 1) / 2
    along = depth_axis.expand(-1, size * size, -1).reshape(-1, 3)
    origin = middle - math.ceil(size * math.sqrt(3) / 2) * along
    low, high = 0.001, size - 1.001  # between the outermost voxel centres; the margin is for float32
    crossing = torch.stack([(edge - origin) / along for edge in (low, high)])
    # An axis along which the ray does not move allows everything or nothing.
    still, free = along.abs() < 1e-6, (origin > low) & (origin < high)
    enter = torch.where(still, torch.where(free, -math.inf, math.inf), crossing.amin(0)).amax(1)
    leave = torch.where(still, torch.where(free, math.inf, -math.inf), crossing.amax(0)).amin(1)
    first = enter.clamp(0, 4 * size).ceil()
    end = torch.maximum(leave.clamp(-1, 4 * size).floor() + 1, first)
    return Rays(origin.float(), along.float(), torch.stack([first, end], 1).int(), torch.zeros(len(origin)))


def select_rays(rays: Rays, views: Tensor, start: Tensor, margin: float = 3.0, reach: float = 4.0) -> Rays:
    """The rays of one cell that matter, cut to where the surface can be.

    Args:
        rays: Of `camera_rays`, D pixels on a side.
        views: float32 [N, D, D], signed distances to the outlines, voxels.
        start: float32 [D, D, D], signed distance to the hull, voxels.
        margin: Rays farther than this outside the silhouette are left out. Those inside all stay: they hold the surface.
        reach: Samples farther than this outside the hull are left out.
    """
    from synthaug.kernels.rendering import trim_rays

    distance = views.flatten()
    chosen = replace(rays, distance=distance)[distance < margin]
    span = trim_rays(start, chosen.origin, chosen.along, chosen.span, reach)
    return replace(chosen, span=span)[span[:, 1] - span[:, 0] > 1]


class Field(Protocol):
    """What can be fitted to rays."""

    def fit(self, start: Tensor, rays: Rays, noise: Noise) -> Tensor:
        """The field of one cell.

        Args:
            start: float32 [D, D, D], where the fit begins: signed distance to the hull, voxels.
            rays: Of `select_rays`.
            noise: The cell's row of what the stage drew.

        Returns:
            float32 [D, D, D], about the signed distance in voxels near the surface.
        """


@dataclass(frozen=True)
class GridField:
    """Signed distances at the voxels of a grid, by accelerated proximal gradient steps (Beck and Teboulle 2009).

    A step follows the gradient of the rendering, eikonal and volume terms, then solves for the quadratic bending term
    exactly, in the space of the cosine transform, where its operator is diagonal. So the few voxels that rays touch move
    their surroundings along, and some dozens of steps are enough.

    Attributes:
        num_iterations, step, bending, volume, eikonal, sharpness: As in `SurfaceConfig`, for one cell.
    """

    num_iterations: int
    step: float
    bending: float
    volume: float
    eikonal: float
    sharpness: float

    def fit(self, start: Tensor, rays: Rays, noise: Noise) -> Tensor:
        from synthaug.kernels.rendering import mask_loss, shape_loss

        # Outside a body the lowest distance on a ray is that of its pixel to the outline: with this target the body
        # itself is a perfect fit.
        target = torch.sigmoid(-self.sharpness * rays.distance)
        frequency = 2 - 2 * np.cos(np.pi * np.arange(len(start)) / len(start))
        laplacian = frequency[:, None, None] + frequency[:, None] + frequency
        damping = (1 / (1 + self.step * self.bending * laplacian**2)).astype(np.float32)
        inv_s = self.sharpness / 2
        field = last = start.clone()
        for i in range(self.num_iterations):
            ahead = field + i / (i + 3) * (field - last)
            totals, gradient = mask_loss(ahead, rays.origin, rays.along, rays.span, target, inv_s)
            gradient += shape_loss(ahead, self.eikonal, self.volume, VOLUME_SLOPE, BAND)[1]
            moved = (ahead - self.step * gradient).numpy()
            last, field = field, torch.from_numpy(fft.idctn(fft.dctn(moved, norm="ortho") * damping, norm="ortho"))
            # A step on log(inv_s), bounded, since without any surface the slope has no meaning.
            slope = inv_s * float(totals[1]) / max(len(target), 1)
            inv_s *= math.exp(-SLOPE_RATE * max(-1.0, min(1.0, slope)))
        return field


@dataclass(frozen=True)
class MLPField:
    """The network of NeuS: a multilayer perceptron of a point's coordinates and their sines, by Adam.

    Geometric initialisation (Atzmon and Lipman 2020, as in NeuS) makes it a ball at first: the one with the hull's
    volume and centre. It sees the hull nowhere else, except that rays are cut to its surroundings.

    Attributes:
        width, depth, frequencies, num_iterations, num_rays, num_samples, learning_rate, eikonal, sharpness: As
            `mlp_...` in `SurfaceConfig`.
    """

    width: int
    depth: int
    frequencies: int
    num_iterations: int
    num_rays: int
    num_samples: int
    learning_rate: float
    eikonal: float
    sharpness: float

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out, in) of each layer."""
        inputs = 3 + 6 * self.frequencies
        ins = [inputs] + [self.width + (inputs if i == MLP_SKIP else 0) for i in range(1, self.depth + 1)]
        return [(1 if i == self.depth else self.width, n) for i, n in enumerate(ins)]

    def initial(self, weights: Tensor) -> list[nn.Parameter]:
        """Weights and biases in turns, from standard normal numbers: about the distance to the middle."""
        layers, used = [], 0
        for i, (n_out, n_in) in enumerate(self.shapes):
            normal = weights[used : used + n_out * n_in].reshape(n_out, n_in)
            used += n_out * n_in
            if i == self.depth:
                weight, bias = math.sqrt(math.pi / n_in) + 1e-4 * normal, torch.zeros(1)
            else:
                weight, bias = normal * math.sqrt(2 / n_out), torch.zeros(n_out)
                if i == 0:
                    weight[:, 3:] = 0
                elif i == MLP_SKIP:
                    weight[:, self.width + 3 :] = 0
            layers += [nn.Parameter(weight.clone()), nn.Parameter(bias)]
        return layers

    def evaluate(self, layers: list[nn.Parameter], points: Tensor) -> Tensor:
        """Signed distance [...] at points [..., 3], in half sides of the cube."""
        waves = [points * 2.0**k for k in range(self.frequencies)]
        inputs = torch.cat([points, *(f(w) for w in waves for f in (torch.sin, torch.cos))], -1)
        hidden = inputs
        for i in range(self.depth + 1):
            if i == MLP_SKIP and i > 0:
                hidden = torch.cat([hidden, inputs], -1) / math.sqrt(2)
            hidden = functional.linear(hidden, layers[2 * i], layers[2 * i + 1])
            if i < self.depth:
                hidden = functional.softplus(hidden, beta=100)
        return hidden[..., 0]

    def fit(self, start: Tensor, rays: Rays, noise: Noise) -> Tensor:
        from synthaug.kernels.rendering import LEAST_OPACITY, accumulated_opacity

        size = len(start)
        inside = start < 0
        if not bool(inside.any()) or not len(rays.span):
            return start
        centre = torch.nonzero(inside).float().mean(0)
        with torch.inference_mode(False), torch.enable_grad():
            layers = self.initial(noise["weights"].clone())
            # The ball of the hull's volume: exactly so, also for a network too narrow for the theory of its first weights.
            values = self.on_grid(layers, size, centre).flatten()
            layers[-1].data -= values.kthvalue(int(inside.sum())).values
            # inv_s = exp(10 v) per half side, the factor 10 as in NeuS: the slope learns faster than the network.
            log_slope = nn.Parameter(torch.tensor(math.log(self.sharpness / 2 * size / 2) / 10))
            optimizer = torch.optim.Adam([*layers, log_slope], lr=self.learning_rate)
            share = torch.linspace(0, 1, self.num_samples)
            for row in noise["rays"]:
                batch = rays[(row * len(rays.span)).long().clamp(max=len(rays.span) - 1)]
                first, last = batch.span[:, :1], batch.span[:, 1:] - 1
                t = (first + share * (last - first))[..., None]
                points = ((batch.origin[:, None] + t * batch.along[:, None] - centre) * (2 / size)).requires_grad_()
                values = self.evaluate(layers, points)
                (slope,) = torch.autograd.grad(values.sum(), points, create_graph=True)
                opacity = accumulated_opacity(values, (10 * log_slope).exp()).clamp(LEAST_OPACITY, 1 - LEAST_OPACITY)
                target = torch.sigmoid(-self.sharpness * batch.distance)
                loss = functional.binary_cross_entropy(opacity, target)
                loss = loss + self.eikonal * (slope.norm(dim=-1) - 1).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return self.on_grid(layers, size, centre) * (size / 2)

    @torch.no_grad()
    def on_grid(self, layers: list[nn.Parameter], size: int, centre: Tensor) -> Tensor:
        """Signed distance [size, size, size] at all voxels, in half sides of the cube; `centre` [3] is the origin."""
        grid = torch.stack(torch.meshgrid(*[torch.arange(size, dtype=torch.float32)] * 3, indexing="ij"), -1)
        return torch.stack([self.evaluate(layers, (plane - centre) * (2 / size)) for plane in grid])
