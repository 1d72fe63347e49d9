"""Crops: centred, alone, normalised, and nothing lost uncounted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthaug.datasets.crops import crop_size_for, enclosing_circle, extract_crops
from synthaug.errors import DataError
from synthaug.generators.texture import HALO
from tests.shapes import ellipse_frame


def disc_frame(radii, centres, size=(128, 128), level=50.0, gain=200.0):
    yy, xx = np.mgrid[: size[0], : size[1]]
    labels = np.zeros(size, np.int32)
    image = np.full(size, level, np.float32)
    for i, (r, (cy, cx)) in enumerate(zip(radii, centres), start=1):
        distance = np.hypot(yy - cy, xx - cx)
        labels[(distance <= r) & (labels == 0)] = i
        image += (gain / (1 + np.exp((distance - r) * 1.5))).astype(np.float32)
    return image, labels


def test_a_crop_is_centred_and_normalised():
    crops = extract_crops([disc_frame([12], [(40, 70)])], crop_size=64)
    assert crops.image.shape == (1, 64, 64)
    mask = crops.sdf[0] < 0
    assert float(crops.image[0][mask].mean()) == pytest.approx(1.0, abs=0.05)
    yy, xx = torch.where(mask)
    assert abs(float(yy.float().mean()) - 31.5) <= 1
    assert abs(float(xx.float().mean()) - 31.5) <= 1
    far = crops.sdf[0] > HALO
    assert float(crops.image[0][far].abs().max()) == 0.0
    assert float(crops.radius[0]) == pytest.approx(12.5, abs=0.6)


def test_light_outside_the_mask_is_kept_as_the_blur_of_the_border():
    crops = extract_crops([disc_frame([12], [(40, 70)])], crop_size=64)
    near = (crops.sdf[0] > 0.5) & (crops.sdf[0] < 1.5)
    assert 0.05 < float(crops.image[0][near].mean()) < 0.6
    profile = crops.profile
    assert (profile[HALO:].diff() <= 0).all()
    assert float(profile[0]) > 0.8


def test_a_neighbours_light_does_not_enter_the_crop():
    frame = disc_frame([12, 12], [(50, 40), (50, 66)])
    crops = extract_crops([frame], crop_size=64)
    neighbour = torch.zeros(64, 64, dtype=torch.bool)
    neighbour[:, 52:] = True  # where the second disc lies in the crop of the first
    assert float(crops.image[0][neighbour & (crops.sdf[0] > 4)].max()) < 0.1


def test_large_cells_are_rescaled_never_cut():
    crops = extract_crops([disc_frame([40], [(64, 64)])], crop_size=64)
    mask = crops.sdf[0] < 0
    edge = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    assert not edge.any()
    scale = float(crops.scale[0])
    assert scale > 1.2
    assert float(mask.sum()) * scale**2 == pytest.approx(np.pi * 40**2, rel=0.05)


def test_what_is_left_out_is_counted():
    image, labels = disc_frame([12, 12, 1], [(0, 40), (60, 60), (100, 100)])
    crops = extract_crops([(image, labels)], crop_size=64, min_area=20)
    assert crops.counts["cut by the border"] == 1
    assert crops.counts["speck"] == 1
    assert crops.counts["kept"] == len(crops) == 1


def test_no_cell_left_is_an_error_that_says_why():
    image, labels = disc_frame([12], [(0, 40)])
    with pytest.raises(DataError, match="cut by the border"):
        extract_crops([(image, labels)], crop_size=64)


def test_brightness_is_relative_to_the_frame():
    bright = disc_frame([12, 10], [(40, 40), (90, 90)], gain=2000.0)
    dim = disc_frame([12, 10], [(40, 40), (90, 90)], gain=200.0)
    crops = extract_crops([bright, dim], crop_size=64)
    torch.testing.assert_close(crops.brightness[:2], crops.brightness[2:], atol=0.03, rtol=0)
    assert crops.frame.tolist() == [0, 0, 1, 1]


def test_brightness_is_relative_to_a_given_contrast():
    frame = disc_frame([12, 10], [(40, 40), (90, 90)], gain=200.0)
    own, given = extract_crops([frame], crop_size=64), extract_crops([frame], crop_size=64, references=[800.0])
    torch.testing.assert_close(given.image, own.image)
    assert given.brightness.tolist() == pytest.approx([0.2, 0.2], abs=0.06)  # the mask holds the blur of the border
    dim = extract_crops([frame, frame], crop_size=64, references=[4000.0, 200.0])
    assert (dim.counts["without contrast"], dim.frame.tolist()) == (2, [1, 1])


def test_crops_know_their_label_and_can_be_chosen():
    image, labels = disc_frame([12, 12, 12], [(0, 40), (60, 60), (100, 100)])
    crops = extract_crops([(image, labels)], crop_size=64)
    assert crops.label.tolist() == [2, 3]
    chosen = crops.select(torch.tensor([1]))
    assert (chosen.label.tolist(), chosen.profile.shape) == ([3], crops.profile.shape)


def test_camera_range_does_not_matter():
    image, labels = ellipse_frame(0)
    a, b = extract_crops([(image, labels)]), extract_crops([(image * 13 + 77, labels)])
    torch.testing.assert_close(a.image, b.image, atol=1e-3, rtol=1e-3)


def test_crop_size_follows_the_cells():
    assert crop_size_for(np.full(10, 18, np.float32)) == 32 * round(2 * 23 / 32)
    assert crop_size_for(np.full(10, 500, np.float32)) == 128
    assert crop_size_for(np.full(10, 2, np.float32)) == 32


def test_enclosing_circle_encloses():
    points = np.random.default_rng(0).normal(size=(200, 2)) * [9, 3]
    centre, radius = enclosing_circle(points)
    assert (np.hypot(*(points - centre).T) <= radius + 1e-9).all()
    assert radius < 1.05 * np.ptp(points[:, 0]) / 2 + 1.5
