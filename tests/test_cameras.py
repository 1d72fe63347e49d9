"""Cameras: view 0 along the optical axis, the presets, what they cover."""

from __future__ import annotations

import math

import pytest
import torch

from synthaug.errors import InputError
from synthaug.generators.cameras import build_cameras, look_along


@pytest.mark.parametrize(("preset", "num_views"), [("hemisphere", 16), ("hemisphere", 2), ("ring", 17)])
def test_rotations_and_the_optical_axis(preset, num_views):
    rotation = build_cameras(preset, num_views).rotation
    assert rotation.shape == (num_views, 3, 3)
    assert torch.equal(rotation[0], torch.eye(3))
    assert torch.allclose(rotation @ rotation.transpose(1, 2), torch.eye(3).expand_as(rotation), atol=1e-5)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(num_views), atol=1e-5)


def test_the_image_axes_of_a_camera():
    camera = look_along(torch.tensor([0.0, 2.0, 0.0]))
    assert torch.allclose(camera[0], torch.tensor([0.0, 1.0, 0.0]))
    assert float(camera[2, 0]) == 0  # right lies in the image plane of the microscope
    assert torch.equal(look_along(torch.tensor([-3.0, 0.0, 0.0])), torch.eye(3))


def test_the_hemisphere_is_covered_evenly():
    depth = build_cameras("hemisphere", 16).rotation[:, 0]
    angle = torch.rad2deg(torch.acos((depth @ depth.T).abs().clamp(max=1)))  # opposite directions see the same
    angle.fill_diagonal_(90)
    assert float(angle.amin(1).min()) > 15
    zenith, azimuth = torch.meshgrid(torch.linspace(0, 90, 31), torch.linspace(0, 360, 61), indexing="ij")
    zenith, azimuth = torch.deg2rad(zenith), torch.deg2rad(azimuth)
    anywhere = torch.stack([zenith.cos(), zenith.sin() * azimuth.sin(), zenith.sin() * azimuth.cos()], -1)
    nearest = torch.rad2deg(torch.acos((anywhere @ depth.T).abs().amax(-1).clamp(max=1)))
    assert float(nearest.max()) < 29


def test_the_ring_stands_at_30_degrees():
    depth = build_cameras("ring", 17).rotation[1:, 0]
    assert torch.allclose(depth[:, 0], torch.full((16,), math.sin(math.radians(30))), atol=1e-6)
    azimuth = torch.rad2deg(torch.atan2(depth[:, 1], depth[:, 2])) % 360
    assert torch.allclose(azimuth.sort().values, torch.arange(16) * 22.5, atol=1e-3)


def test_wrong_presets_are_refused():
    with pytest.raises(InputError, match="num_views"):
        build_cameras("hemisphere", 1)
    with pytest.raises(InputError, match="preset"):
        build_cameras("sphere", 16)  # type: ignore[arg-type]
