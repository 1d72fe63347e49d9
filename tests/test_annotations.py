"""Budgets of annotations: nested, reproducible, nothing more than was granted; the dim camera."""

from __future__ import annotations

import numpy as np
import pytest

from synthaug.errors import DataError, InputError
from synthaug.evaluation.annotations import (
    BUSY,
    MIN_CELLS,
    choose_patches,
    choose_planes,
    dense_of,
    dimmed,
    planes_of,
)
from synthaug.types import UNLABELLED
from tests.shapes import ellipse_frame, ellipsoid_volume

FRAMES = [ellipse_frame(seed, (120, 130)) for seed in range(5)]
VOLUMES = [ellipsoid_volume(seed) for seed in range(4)]


def test_patches_are_nested_and_hold_cells() -> None:
    one, four = choose_patches(FRAMES, 1, (64, 64), 0), choose_patches(FRAMES, 4, (64, 64), 0)
    assert np.array_equal(one[0][0], four[0][0])
    assert len(four) == 4
    for image, labels in four:
        assert image.shape == labels.shape == (64, 64)
        assert labels.max() >= MIN_CELLS
        assert np.array_equal(np.unique(labels), np.arange(labels.max() + 1)), "contiguous from 1"
    assert not np.array_equal(one[0][0], choose_patches(FRAMES, 1, (64, 64), 1)[0][0])
    assert len(choose_patches(FRAMES, 12, (64, 64), 0)) == 12, "more patches than frames"
    assert choose_patches(FRAMES, None, (64, 64), 0)[3][0] is FRAMES[3][0]


def test_patches_are_cut_where_image_and_labels_belong_together() -> None:
    for image, labels in choose_patches(FRAMES, 4, (64, 64), 2):
        assert image[labels > 0].mean() > image[labels == 0].mean() + 100


def test_patches_that_cannot_be() -> None:
    with pytest.raises(InputError, match="smallest frame"):
        choose_patches(FRAMES, 1, (128, 128), 0)
    empty = [(np.zeros((64, 64), np.float32), np.zeros((64, 64), np.int32))]
    with pytest.raises(DataError, match=f"{MIN_CELLS} cells"):
        choose_patches(empty, 1, (32, 32), 0)


def test_one_plane_of_each_volume_is_annotated() -> None:
    two, three = choose_planes(VOLUMES, 2, 0), choose_planes(VOLUMES, 3, 0)
    assert all(a[0] is b[0] and np.array_equal(a[1], b[1]) for a, b in zip(two, three))
    known = {id(image): labels for image, labels in VOLUMES}
    for image, sparse in three:
        (z,) = np.flatnonzero((sparse != UNLABELLED).all((1, 2)))
        assert (np.delete(sparse, z, 0) == UNLABELLED).all()
        dense = known[id(image)]
        assert np.array_equal(sparse[z] > 0, dense[z] > 0)
        assert len(np.unique(dense[z])) - 1 >= BUSY * max(len(np.unique(plane)) - 1 for plane in dense)
    with pytest.raises(InputError, match="1 to 4 volumes"):
        choose_planes(VOLUMES, 5, 0)


def test_planes_as_frames_and_the_same_volumes_whole() -> None:
    chosen = choose_planes(VOLUMES, 3, 1)
    for (image, sparse), (frame, labels) in zip(chosen, planes_of(chosen), strict=True):
        z = int(np.flatnonzero((sparse != UNLABELLED).all((1, 2)))[0])
        assert np.array_equal(frame, image[z])
        assert np.array_equal(labels > 0, sparse[z] > 0)
        assert labels.max() == len(np.unique(labels)) - 1
    for (image, _), (same, dense) in zip(chosen, dense_of(VOLUMES, chosen), strict=True):
        assert same is image
        assert (dense != UNLABELLED).all()


def test_a_dim_camera_has_the_noise_of_few_photons() -> None:
    image = np.full((200, 200), 100.0, np.float32)
    image[:100] = 500
    labels = np.zeros(image.shape, np.int32)
    dim = dimmed([(image, labels)], 8.0, 0)[0][0]
    assert np.array_equal(dim, np.round(dim))
    # 10 counts an electron over an offset of 100; 2 electrons of background, 8 more where it is bright, 1.5 read noise
    for part, electrons in ((dim[:100], 10), (dim[100:], 2)):
        assert part.mean() == pytest.approx(100 + 10 * electrons, rel=0.02)
        assert part.std() == pytest.approx(10 * np.sqrt(electrons + 1.5**2), rel=0.05)
    assert np.array_equal(dim, dimmed([(image, labels)], 8.0, 0)[0][0])
    assert not np.array_equal(dim, dimmed([(image, labels)], 8.0, 1)[0][0])
    with pytest.raises(InputError, match="photons"):
        dimmed([(image, labels)], 0, 0)
