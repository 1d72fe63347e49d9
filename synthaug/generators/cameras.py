"""Orthographic cameras: one along the optical axis, the others around the cell.

For a cell in a stack, the view along the optical axis is the annotated one. The other cameras are spread over the
hemisphere by default; SyncDreamer's ring (16 azimuths at 30 degrees of elevation, Liu et al. 2023, section 4.1) is kept as
a preset, though it leaves the poles unknown.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from synthaug.errors import InputError
from synthaug.types import Cameras

CameraPreset = Literal["hemisphere", "ring"]

VIEW_RADIUS = 0.6
"""Share of a view's half side that the enclosing circle of the annotated outline fills; a cell may be 1.67 times deeper."""

GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


def look_along(direction: Tensor) -> Tensor:
    """Rotation float32 [3, 3] of a camera that looks along `direction` (ZYX, any length).

    The optical axis itself gives the identity; otherwise the image's right axis lies in the plane of Y and X.
    """
    depth = direction / direction.norm()
    axis = torch.tensor([1.0, 0.0, 0.0])
    right = torch.linalg.cross(depth, axis)
    if right.norm() < 1e-6:
        return torch.eye(3)
    right = right / right.norm()
    down = torch.linalg.cross(right, depth)
    return torch.stack([depth, down, right])


def build_cameras(preset: CameraPreset = "hemisphere", num_views: int = 16) -> Cameras:
    """The cameras of a preset.

    Args:
        preset: "hemisphere": view 0 along the optical axis, `num_views` - 1 others evenly over the hemisphere around it
            (opposite directions see the same silhouette). "ring": view 0 and `num_views` - 1 azimuths at an elevation of
            30 degrees above the image plane; SyncDreamer's own is num_views = 17.
        num_views: At least 2.
    """
    if preset not in ("hemisphere", "ring"):
        raise InputError("preset", expected="'hemisphere' or 'ring'", got=repr(preset))
    if num_views < 2:
        raise InputError("num_views", expected="at least 2", got=num_views)
    others = num_views - 1
    directions = [torch.tensor([1.0, 0.0, 0.0])]
    for i in range(others):
        # Equal areas: the height over the plane is uniform. The cap around view 0 (its own share) is left out.
        height = (1 - 1 / num_views) * (i + 0.5) / others if preset == "hemisphere" else math.sin(math.radians(30))
        azimuth = i * GOLDEN_ANGLE if preset == "hemisphere" else 2 * math.pi * i / others
        flat = math.sqrt(1 - height**2)
        directions.append(torch.tensor([height, flat * math.sin(azimuth), flat * math.cos(azimuth)]))
    return Cameras(torch.stack([look_along(d) for d in directions]).float())
