"""Random closed shapes without weights: spherical harmonics, ellipsoids, shapes along Bézier curves.

Training data of the multiview stage (paper, §2: SyncDreamer is trained on spherical-harmonic shapes) and the priors of the
related work: ellipsoids (Fu et al. 2018), Bézier-deformed nuclei (Chen et al. 2021).

Every shape is a radial function: the distance from an inner point to the surface, in all directions. The directions are
the nodes of an octahedral map (the sphere unfolded to a square, Praun and Hoppe 2003), which needs no trigonometry to look
up. So every shape is star-shaped: one part, not hollow.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from synthaug.errors import InputError
from synthaug.generators.cameras import VIEW_RADIUS
from synthaug.generators.distance import signed_distance
from synthaug.randomness import SampleKey, normal, uniform
from synthaug.types import Batch, Cameras

ShapeKind = Literal["spherical-harmonics", "ellipsoid", "bezier"]
KINDS: tuple[ShapeKind, ...] = ("spherical-harmonics", "ellipsoid", "bezier")

Frame = Literal["volume", "outline"]

NODES = 65
"""Nodes on a side of the octahedral map, about 2.5 degrees apart; degree 20 has a period of 18."""

REACH = 0.94
"""No shape goes beyond this share of the cube's half side."""

BALLS = 33
"""Balls along a Bézier curve whose hull is the shape."""

TANGENTS = 64
"""Directions in the plane in which the outermost points of an outline are looked for."""

_PYSHTOOLS = threading.Lock()


@dataclass(frozen=True)
class ShapeConfig:
    """A distribution of shapes.

    Attributes:
        kind: "spherical-harmonics", "ellipsoid" or "bezier".
        radius: Least and largest radius of the ball of a shape's volume, in half sides of the cube (frame "volume").
        order: Highest degree of the spherical harmonics.
        power: Power of degree l is amplitude * l ** power for a mean radius of 1, shared by its 2 l + 1 coefficients.
            Degree 1 is left out: it moves a shape more than it deforms it.
        amplitude: See `power`.
        least: Share of its mean radius that no radius falls under; a draw that would is flattened as a whole.
        spread: Standard deviation of the log axes of ellipsoids and of Bézier shapes.
        bend: Standard deviation of the inner control points of a Bézier curve about the straight line, in half lengths;
            half of that for the ends.
        taper: Standard deviation of the change in thickness from the middle of a Bézier shape to its ends.
    """

    kind: ShapeKind = "spherical-harmonics"
    radius: tuple[float, float] = (0.4, 0.6)
    order: int = 20
    power: float = -5.0
    amplitude: float = 1.0
    least: float = 0.3
    spread: float = 0.2
    bend: float = 0.4
    taper: float = 0.2

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError("kind", expected=f"one of {KINDS}", got=repr(self.kind))
        low, high = self.radius
        if not 0 < low <= high < 1:
            raise InputError("radius", expected="0 < least <= largest < 1", got=self.radius)
        if self.order < 2 or not 0 < self.least < 1 or min(self.amplitude, self.spread, self.bend, self.taper) < 0:
            raise InputError("ShapeConfig", expected="order >= 2, 0 < least < 1 and no negative width", got=repr(self))


SMOOTH = ShapeConfig()
"""Spherical harmonics of order 20 with power l^-5, as the paper's group draws them."""

LUMPY = replace(SMOOTH, power=-3.5)
"""Spherical harmonics with more power in the high degrees."""

ELLIPSOID = ShapeConfig("ellipsoid")
BEZIER = ShapeConfig("bezier", spread=0.3)


@dataclass(frozen=True)
class StarShapes(Batch):
    """Closed surfaces around an inner point each, in the world (ZYX, the cube [-1, 1]^3).

    Attributes:
        radii: float32 [B, NODES, NODES], > 0; radial function at the nodes of the octahedral map.
        origin: float32 [B, 3], where the inner point lies.
        scale: float32 [B, 3], world units per unit of the radial function along Z, Y and X.
    """

    radii: Tensor
    origin: Tensor
    scale: Tensor

    def points(self) -> Tensor:
        """The surface at the nodes, float32 [B, NODES^2, 3]."""
        return self.origin[:, None] + self.scale[:, None] * self.radii.flatten(1)[..., None] * directions()


@functools.cache
def directions() -> Tensor:
    """Unit vectors (ZYX) at the nodes of the octahedral map, float32 [NODES^2, 3]; first axis Y, second X."""
    return functional.normalize(_octahedron(), dim=1).float()


@functools.cache
def solid_angles() -> Tensor:
    """Share of the sphere that belongs to each node, float32 [NODES^2], 1 in sum."""
    edge = torch.ones(NODES, dtype=torch.float64)
    edge[0] = edge[-1] = 0.5
    # A point p of the octahedron covers du dv / |p|^3 of the sphere.
    weight = (edge[:, None] * edge).flatten() / _octahedron().norm(dim=1) ** 3
    return (weight / weight.sum()).float()


def _octahedron() -> Tensor:
    """Nodes on |z| + |y| + |x| = 1, float64 [NODES^2, 3]; the lower half is folded outwards."""
    v, u = torch.meshgrid(*[torch.linspace(-1, 1, NODES, dtype=torch.float64)] * 2, indexing="ij")
    z = 1 - v.abs() - u.abs()
    sign_v, sign_u = torch.where(v < 0, -1.0, 1.0), torch.where(u < 0, -1.0, 1.0)
    y = torch.where(z < 0, (1 - u.abs()) * sign_v, v)
    x = torch.where(z < 0, (1 - v.abs()) * sign_u, u)
    return torch.stack([z, y, x], -1).flatten(0, 1)


@functools.cache
def harmonics(order: int) -> Tensor:
    """Real spherical harmonics of degree 2 to `order` at the nodes, float32 [NODES^2, (order + 1)^2 - 4].

    4-pi normalised (the mean square of each over the sphere is 1), degree after degree, by pyshtools.
    """
    vectors = directions().double().numpy()
    height, place = np.unique(vectors[:, 0], return_inverse=True)
    with _PYSHTOOLS:  # two threads in pyshtools give silently wrong values
        from pyshtools.legendre import PlmBar

        legendre = np.stack([PlmBar(order, z) for z in height])[place]
    azimuth = np.arctan2(vectors[:, 1], vectors[:, 2])
    columns = []
    for degree in range(2, order + 1):
        for m in range(-degree, degree + 1):
            wave = np.sin(-m * azimuth) if m < 0 else np.cos(m * azimuth)
            columns.append(legendre[:, degree * (degree + 1) // 2 + abs(m)] * wave)
    return torch.from_numpy(np.stack(columns, 1).astype(np.float32))


def draw_star_shapes(keys: Sequence[SampleKey], config: ShapeConfig) -> StarShapes:
    """Random shapes of `config` at random orientation, one a key; centre of mass at 0, volume of the unit ball."""
    draw = {"spherical-harmonics": _draw_harmonics, "ellipsoid": _draw_ellipsoids, "bezier": _draw_bezier}[config.kind]
    radii = draw(keys, config) if len(keys) else torch.zeros(0, NODES**2)
    weight, where = solid_angles(), directions()
    radii = radii / (weight * radii**3).sum(1, keepdim=True) ** (1 / 3)
    # The cone of a direction has its centre of mass at 3/4 of the radius, and a volume of radius^3.
    centre = (0.75 * (weight * radii**4)[..., None] * where).sum(1)
    return StarShapes(radii.reshape(-1, NODES, NODES), -centre, torch.ones(len(keys), 3))


def _draw_harmonics(keys: Sequence[SampleKey], config: ShapeConfig) -> Tensor:
    degrees = torch.cat([torch.full((2 * n + 1,), float(n)) for n in range(2, config.order + 1)])
    width = (config.amplitude * degrees**config.power / (2 * degrees + 1)).sqrt()
    basis = harmonics(config.order)
    # One product a shape: the bits of a matrix product would depend on the number of its columns.
    wave = torch.stack([basis @ row for row in normal([k.child("harmonics") for k in keys], width.shape) * width])
    deepest = -wave.amin(1, keepdim=True)
    return 1 + wave * ((1 - config.least) / deepest.clamp_min(1e-6)).clamp_max(1)


def _draw_ellipsoids(keys: Sequence[SampleKey], config: ShapeConfig) -> Tensor:
    axes = (config.spread * normal([k.child("axes") for k in keys], (3,))).exp()
    local = torch.stack([directions() @ turn.T for turn in random_rotations(keys)])
    return ((local / axes[:, None]) ** 2).sum(2) ** -0.5


def _draw_bezier(keys: Sequence[SampleKey], config: ShapeConfig) -> Tensor:
    """Hulls of balls along cubic Bézier curves; a straight curve without taper gives an exact ellipsoid of revolution."""
    axes = (config.spread * normal([k.child("axes") for k in keys], (3,))).exp().sort(1, descending=True).values
    length, width, third = axes.unbind(1)
    t = torch.linspace(0, 1, BALLS)
    # Centres of the balls that touch an ellipsoid from inside: up to length - width^2 / length from the middle.
    ratio = (1 - (width / length) ** 2).clamp_min(1e-4)
    end = length * ratio
    control = torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]) * end[:, None]
    side = normal([k.child("bend") for k in keys], (4, 2)) * torch.tensor([0.5, 1.0, 1.0, 0.5])[:, None]
    points = torch.cat([control[..., None], side * (config.bend * length)[:, None, None]], 2)
    bernstein = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
    curve = (bernstein[None, :, :, None] * points[:, None]).sum(2)
    along = 2 * t - 1
    taper = config.taper * normal([k.child("taper") for k in keys], (1,)) * along
    thickness = width[:, None] * (1 - along**2 * ratio[:, None]).sqrt() * (1 + taper).clamp_min(0.3)
    curve = curve - curve[:, BALLS // 2 : BALLS // 2 + 1]
    flat = third / width
    radii = []
    for turn, centres, ball, squeeze in zip(random_rotations(keys), curve, thickness, flat):
        local = directions() @ turn.T / torch.stack([torch.ones(()), torch.ones(()), squeeze])
        long = local.norm(dim=1, keepdim=True)
        ahead = (local / long) @ centres.T
        under = ahead**2 - (centres**2).sum(1) + ball**2
        # The farthest exit out of any ball the ray meets; what a strong bend would hide from the middle is filled.
        exits = torch.where(under > 0, ahead + under.clamp_min(0).sqrt(), 0.0)
        radii.append(exits.amax(1) / long[:, 0])
    return torch.stack(radii)


def random_rotations(keys: Sequence[SampleKey]) -> Tensor:
    """Rotations, uniform over all orientations, float32 [len(keys), 3, 3] (unit quaternions, Shoemake 1992)."""
    w, x, y, z = functional.normalize(normal([k.child("turn") for k in keys], (4,)), dim=1).unbind(1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        *(2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        *(2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, 1).reshape(-1, 3, 3)


def frame_by_volume(shapes: StarShapes, radius: Tensor) -> StarShapes:
    """Scaled so that the ball of the same volume has `radius` [B], and smaller where that would leave the cube."""
    farthest = shapes.points().abs().amax((1, 2))
    factor = torch.minimum(radius, REACH / farthest)[:, None]
    return replace(shapes, origin=shapes.origin * factor, scale=shapes.scale * factor)


def frame_by_outline(shapes: StarShapes, num_iterations: int = 64) -> StarShapes:
    """Moved and scaled so that the enclosing circle of the view along the optical axis is centred and fills VIEW_RADIUS.

    The frame of a cell that is known by its outline alone; in depth it is centred by mass. Deeper than the cube it is
    compressed along z. The circle is the nearly smallest one (Badoiu and Clarkson 2003, within 2 %), as for crops.
    """
    surface = shapes.points()
    angle = torch.arange(TANGENTS) * (2 * math.pi / TANGENTS)
    ends = []
    for points in surface[..., 1:]:
        # Of thousands of points only those farthest out in some direction can lie on the circle.
        along = points[:, :1] * angle.sin() + points[:, 1:] * angle.cos()
        ends.append(points[along.argmax(0)])
    extreme = torch.stack(ends) if ends else surface[:, :TANGENTS, 1:]
    centre = (extreme.amin(1) + extreme.amax(1)) / 2
    for i in range(num_iterations):
        gap = extreme - centre[:, None]
        centre = centre + gap[torch.arange(len(gap)), gap.square().sum(2).argmax(1)] / (i + 2)
    factor = VIEW_RADIUS / (surface[..., 1:] - centre[:, None]).norm(dim=2).amax(1)
    depth = torch.minimum(factor, REACH / surface[..., 0].abs().amax(1))
    factors = torch.stack([depth, factor, factor], 1)
    origin = (shapes.origin - functional.pad(centre, (1, 0))) * factors
    return replace(shapes, origin=origin, scale=shapes.scale * factors)


def voxelise(shapes: StarShapes, size: int, exact: bool = False) -> Tensor:
    """Signed distances on a grid.

    Args:
        size: Voxels on a side of the cube.
        exact: False: the radial function's excess over its own slope, exact at the surface and approximate farther away.
            True: distances to the nearest surface voxel, corrected by its own distance; within about 0.2 voxels
            everywhere, and ten times slower.

    Returns:
        float32 [B, size, size, size], voxels, negative inside.
    """
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    out = torch.empty(len(shapes), size, size, size)
    for i in range(len(shapes)):  # one after the other: less memory, and no bits that depend on the others
        out[i] = _excess(shapes.radii[i], (grid - shapes.origin[i]) / shapes.scale[i])
        slope = torch.stack(torch.gradient(out[i])).square().sum(0).sqrt()
        # Near the inner point the slope means nothing; the floor keeps what is steeper than any distance.
        floor = float(2 / size / shapes.scale[i].max())
        out[i] /= slope.clamp(floor, 3 * floor)
        if exact:
            out[i] = _exact(out[i])
    return out


def _excess(radii: Tensor, points: Tensor) -> Tensor:
    """Distance from the inner point minus the radial function there, float32; points [..., 3]."""
    z, y, x = (points / points.abs().sum(-1, keepdim=True).clamp_min(1e-9)).unbind(-1)
    v = torch.where(z < 0, (1 - x.abs()) * torch.where(y < 0, -1.0, 1.0), y)
    u = torch.where(z < 0, (1 - y.abs()) * torch.where(x < 0, -1.0, 1.0), x)
    where = torch.stack([u, v], -1).reshape(1, 1, -1, 2)
    radius = functional.grid_sample(radii[None, None], where, align_corners=True, padding_mode="border")
    return points.norm(dim=-1) - radius.reshape(z.shape)


def _exact(sdf: Tensor) -> Tensor:
    """The distance to the nearest voxel of the other side, and on by that voxel's own distance to the surface."""
    values = sdf.numpy()
    inside = values < 0
    out = np.empty_like(values)
    for side, sign in ((~inside, 1), (inside, -1)):
        distance, nearest = ndimage.distance_transform_edt(side, return_indices=True)
        over = np.clip(values[tuple(nearest)], -1, 1)
        out[side] = (sign * distance + over)[side]
    near = np.abs(values) < 1
    out[near] = values[near]
    return torch.from_numpy(out)


def draw_shapes(
    keys: Sequence[SampleKey], config: ShapeConfig, size: int, *, frame: Frame = "volume", exact: bool = False
) -> Tensor:
    """Random closed shapes of one part at random orientation, wholly inside the cube.

    Args:
        keys: One a shape; a shape depends on its own key alone.
        config: Their distribution.
        size: Voxels on a side.
        frame: "volume": centre of mass at the cube's centre, size drawn from `config.radius`. "outline": as
            `frame_by_outline`, the frame in which a cell known by its outline is completed.
        exact: See `voxelise`.

    Returns:
        float32 [len(keys), size, size, size] (ZYX), signed distance in voxels, negative inside.
    """
    if frame not in ("volume", "outline"):
        raise InputError("frame", expected="'volume' or 'outline'", got=repr(frame))
    shapes = draw_star_shapes(keys, config)
    if frame == "outline":
        return voxelise(frame_by_outline(shapes), size, exact)
    low, high = config.radius
    radius = low + (high - low) * uniform([k.child("radius") for k in keys], (1,))[:, 0]
    return voxelise(frame_by_volume(shapes, radius), size, exact)


def silhouettes(sdf: Tensor, cameras: Cameras, size: int) -> Tensor:
    """What each camera sees of each shape.

    Args:
        sdf: float32 [B, D, D, D], signed distance in voxels (as of `draw_shapes`) on the cube [-1, 1]^3; or bool,
            occupied voxels, whose outline is then that of the voxels' distance map.
        size: Pixels on a side of the images.

    Returns:
        bool [B, N, size, size].
    """
    from synthaug.kernels.silhouettes import lowest_on_rays

    if sdf.dtype == torch.bool:
        sdf = torch.stack([_from_occupancy(volume) for volume in sdf])
    return lowest_on_rays(sdf, cameras.rotation, size) < 0


def _from_occupancy(volume: Tensor) -> Tensor:
    inside = volume.numpy()
    distance = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    return torch.from_numpy((distance - 0.5 * np.sign(distance)).astype(np.float32))


def view_distance(silhouette: Tensor, truncation: float = math.inf, pool: int = 1) -> Tensor:
    """Signed distance to the outline of binary images, as `signed_distance` has it of annotated cells.

    Args:
        silhouette: bool [..., H, W].
        truncation: Distances beyond this many (pooled) pixels are cut off.
        pool: The mean of pool x pool pixels becomes one; distances are then in the larger pixels.

    Returns:
        float32 [..., H / pool, W / pool], pixels, negative inside.
    """
    flat = silhouette.reshape(math.prod(silhouette.shape[:-2]), *silhouette.shape[-2:])
    out = torch.empty(flat.shape)
    for i, image in enumerate(flat.cpu().numpy()):
        out[i] = torch.from_numpy(signed_distance(image))
    out = functional.avg_pool2d(out[:, None], pool)[:, 0] / pool
    return out.clamp(-truncation, truncation).reshape(*silhouette.shape[:-2], *out.shape[1:])
