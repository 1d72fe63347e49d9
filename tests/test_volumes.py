"""The third axis from single planes: where cells' middles lie, how long and how many cells are; nothing 3D is read."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthaug.datasets.volumes import (
    annotated_planes,
    axial_run,
    extract_slice_crops,
    fit_axial,
    slice_pairs,
    thin_annotations,
)
from synthaug.errors import DataError, InputError
from synthaug.types import UNLABELLED

SIZE = (44, 110, 110)


@lru_cache(maxsize=16)
def embryo(seed: int = 0, elongation: float = 1.5, light: float = 1.0, num: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Image and dense labels of ellipsoids of 7 to 9 px; `light` is the length of their light over that of their labels."""
    rng = np.random.default_rng(seed)
    z, y, x = np.ogrid[: SIZE[0], : SIZE[1], : SIZE[2]]
    labels, image = np.zeros(SIZE, np.int32), np.zeros(SIZE, np.float32)
    for _ in range(1000):
        if labels.max() == num:
            break
        radius = rng.uniform(7, 9)
        depth = radius * elongation
        centre = rng.uniform([depth + 2, 20, 20], [SIZE[0] - depth - 2, 90, 90])
        flat = ((y - centre[1]) ** 2 + (x - centre[2]) ** 2) / radius**2
        distance = flat + ((z - centre[0]) / depth) ** 2
        if (labels[distance < 1.5] > 0).any():
            continue
        labels[distance < 1] = labels.max() + 1
        image[flat + ((z - centre[0]) / (depth * light)) ** 2 < 1] += rng.uniform(0.8, 1.2)
    assert labels.max() == num
    blurred = ndimage.gaussian_filter(image, (1.0, 0.7, 0.7))
    return (100 + 300 * blurred + rng.normal(0, 3, SIZE)).astype(np.float32), labels


def thinned(step: int, **options: float) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(image, thin_annotations(labels, step)) for image, labels in (embryo(s, **options) for s in (0, 1))]


def true_middles(labels: np.ndarray) -> np.ndarray:
    return np.array(ndimage.center_of_mass(labels > 0, labels, range(1, labels.max() + 1)))


# -------------------------------------------------------------------------------------------------------------- planes


def test_thinned_labels_know_nothing_of_the_third_axis() -> None:
    _, dense = embryo()
    thin = thin_annotations(dense, 5)
    assert annotated_planes(thin) == list(range(2, 44, 5))
    assert (np.delete(thin, annotated_planes(thin), axis=0) == UNLABELLED).all()
    seen: set[int] = set()
    for z in annotated_planes(thin):
        np.testing.assert_array_equal(thin[z] > 0, dense[z] > 0)
        ids = set(np.unique(thin[z]).tolist()) - {0}
        assert not ids & seen  # a cell met again has another id
        seen |= ids
        for cell in ids:
            assert len(np.unique(dense[z][thin[z] == cell])) == 1
    assert seen == set(range(1, len(seen) + 1))


def test_parts_of_one_cell_in_one_plane_are_outlines_of_their_own() -> None:
    labels = np.zeros((3, 10, 10), np.int32)
    labels[1, 2:4, 2:4] = labels[1, 6:8, 6:8] = 7
    thin = thin_annotations(labels, 3)
    assert sorted(np.unique(thin[1]).tolist()) == [0, 1, 2]
    assert annotated_planes(thin_annotations(labels, 2, first=0)) == [0, 2]


def test_thinning_again_keeps_what_is_unlabelled() -> None:
    _, dense = embryo()
    assert annotated_planes(thin_annotations(thin_annotations(dense, 2, first=0), 3, first=0)) == list(range(0, 44, 6))


@pytest.mark.parametrize(("step", "first"), [(0, 0), (3, -1), (3, 44), (100, None)])
def test_planes_that_do_not_exist(step: int, first: int | None) -> None:
    with pytest.raises(InputError, match="first from 0 to 43"):
        thin_annotations(embryo()[1], step, first=first)


def test_slices_are_frames_that_know_where_they_lie() -> None:
    volumes = thinned(10)
    slices = slice_pairs(volumes)
    assert [(s.volume, s.z) for s in slices] == [(v, z) for v in (0, 1) for z in (5, 15, 25, 35)]
    for s in slices:
        np.testing.assert_array_equal(s.image, volumes[s.volume][0][s.z])
        np.testing.assert_array_equal(s.labels > 0, volumes[s.volume][1][s.z] > 0)
        np.testing.assert_array_equal(np.unique(s.labels), np.arange(s.labels.max() + 1))


# ------------------------------------------------------------------------------------------------------- light along z


def slab(first: int, last: int, length: int = 40, height: float = 100.0) -> np.ndarray:
    profile = np.zeros(length)
    profile[first : last + 1] = height
    return 20 + ndimage.gaussian_filter1d(profile, 1.5)


@pytest.mark.parametrize("plane", [12, 16, 21])
def test_the_middle_of_the_light_is_found_from_any_plane_of_it(plane: int) -> None:
    middle, length, cut = axial_run(slab(11, 22), plane)
    assert (middle, length) == pytest.approx((16.5, 12.0), abs=0.15)
    assert not cut


def test_neighbours_along_z_are_cut_off() -> None:
    far = slab(5, 12) + slab(24, 33) - 20  # light falls to the background between them
    assert axial_run(far, 8)[:2] == pytest.approx((8.5, 8.0), abs=0.2)
    near = slab(5, 14) + 0.8 * slab(16, 28) - 16  # it does not fall to half
    middle, length, cut = axial_run(near, 10)
    assert middle == pytest.approx(9.75, abs=1.0)
    assert 9 < length < 12
    assert not cut
    assert axial_run(near, 24)[0] == pytest.approx(22, abs=1.0)


def test_light_cut_by_the_stacks_end_is_flagged() -> None:
    assert axial_run(slab(0, 9), 5)[2]
    assert axial_run(slab(30, 39), 35)[2]
    assert not axial_run(slab(4, 9), 5)[2]


def test_no_light_has_no_length() -> None:
    assert axial_run(np.full(20, 7.0), 9)[1] == 0


# ----------------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("step", [3, 8])
@pytest.mark.parametrize("elongation", [1.0, 1.5])
def test_stretch_from_single_planes(elongation: float, step: int) -> None:
    fit = fit_axial(thinned(step, elongation=elongation))
    assert fit.z_spacing == 1
    assert fit.stretch == pytest.approx(elongation, rel=0.12)


def test_outlines_longer_than_the_light() -> None:
    """Annotators who follow the blur outline cells where there is hardly light: both lengths are told apart."""
    fit = fit_axial(thinned(3, elongation=1.5, light=0.6))
    assert fit.stretch == pytest.approx(1.5, rel=0.12)
    assert fit.light_stretch == pytest.approx(0.9, rel=0.15)


def test_stretch_is_of_lengths_not_of_voxels() -> None:
    volumes = thinned(4)
    plain, spaced = fit_axial(volumes), fit_axial(volumes, (2.0, 0.8, 0.8))
    assert spaced.z_spacing == pytest.approx(2.5)
    assert spaced.stretch == pytest.approx(2.5 * plain.stretch)
    assert spaced.counts == plain.counts


def test_middle_planes_alone_are_as_long_as_their_light() -> None:
    """A flat layer annotated in its middle plane shows no outline far from a middle."""
    _, y, x = np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij")
    image, labels = np.full(SIZE, 50.0, np.float32), np.full(SIZE, UNLABELLED, np.int32)
    labels[20] = 0
    for i, centre in enumerate([(25, 25), (25, 75), (75, 25), (75, 75)], start=1):
        disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 64
        image[14:27][disc[14:27]] += 200
        labels[20][disc[20]] = i
    fit = fit_axial([(ndimage.gaussian_filter(image, 1.0), labels)])
    assert fit.stretch == fit.light_stretch == pytest.approx(13 / 16, rel=0.1)
    assert (fit.central_share, fit.cut_share) == (1, 0)


@pytest.mark.parametrize("step", [1, 3, 8])
def test_cells_are_counted_and_found(step: int) -> None:
    volumes = thinned(step)
    fit = fit_axial(volumes)
    assert fit.counts == pytest.approx((12, 12), rel=0.15 if step < 8 else 0.35)
    for index, centres in enumerate(fit.centres):
        middles = true_middles(embryo(index)[1])
        nearest = ((centres[:, None] - middles[None]) ** 2).sum(2)
        assert len(set(nearest.argmin(1))) == len(centres)  # none twice, though several planes show it
        assert np.sqrt(nearest.min(1)).max() < 2
        assert len(centres) >= (11 if step < 8 else 4)


def test_one_well_chosen_plane_does_not_stand_for_all() -> None:
    """Planes are no fair sample: only the fullest one is annotated. Its share of the light tells."""
    image, dense = embryo()
    fullest = int((dense > 0).sum((1, 2)).argmax())
    labels = np.full(SIZE, UNLABELLED, np.int32)
    labels[fullest] = dense[fullest]
    num_outlines = len(np.unique(dense[fullest])) - 1
    everywhere = num_outlines * SIZE[0] / (2 * 8 * 1.5)
    count = fit_axial([(image, labels), *thinned(3)]).counts[0]
    assert abs(count - 12) < abs(everywhere - 12)
    assert count == pytest.approx(12, rel=0.35)


def test_moments_are_those_of_the_cells() -> None:
    for index, (mean, covariance) in enumerate(fit_axial(thinned(8)).moments):
        voxels = np.argwhere(embryo(index)[1] > 0)
        np.testing.assert_allclose(mean, voxels.mean(0), atol=0.7)
        np.testing.assert_allclose(np.sqrt(np.diag(covariance)), voxels.std(0), rtol=0.05)


def test_a_volume_without_cells_counts_none() -> None:
    image, labels = embryo()
    empty = np.full_like(image, 100.0), np.zeros_like(labels)
    fit = fit_axial([empty, (image, thin_annotations(labels, 3))])
    assert (fit.counts[0], len(fit.centres[0])) == (0, 0)
    assert fit.counts[1] > 10
    np.testing.assert_allclose(fit.moments[0][0], (np.array(SIZE) - 1) / 2)


def test_nothing_to_learn_from_is_said() -> None:
    image, labels = embryo()
    for volume in ((image, np.full_like(labels, UNLABELLED)), (np.full_like(image, 9.0), thin_annotations(labels, 9))):
        with pytest.raises(DataError, match="light rises and falls along z"):
            fit_axial([volume])


# --------------------------------------------------------------------------------------------------------------- crops


def test_crops_know_their_plane_and_whether_it_is_central() -> None:
    volumes = thinned(3)
    crops = extract_slice_crops(volumes)
    assert crops.image.shape[1:] == (32, 32)
    slices = slice_pairs(volumes)
    for i in range(len(crops)):
        s = slices[int(crops.frame[i])]
        assert (s.volume, s.z) == (int(crops.volume[i]), int(crops.z[i]))
    sizes = {v: ndimage.find_objects(embryo(v)[1]) for v in (0, 1)}
    share = []
    for i in torch.arange(len(crops))[crops.central].tolist():
        s, volume, z = slices[int(crops.frame[i])], int(crops.volume[i]), int(crops.z[i])
        cell = np.bincount(embryo(volume)[1][z][s.labels == int(crops.label[i])]).argmax()
        areas = (embryo(volume)[1][sizes[volume][cell - 1]] == cell).sum((1, 2))
        share.append((s.labels == int(crops.label[i])).sum() / areas.max())
    assert min(share) > 0.85
    assert 0.2 < float(crops.central.float().mean()) < 0.5


def test_brightness_is_relative_to_the_volumes_cells() -> None:
    """A plane that shows caps alone does not make them as bright as cells."""
    image, dense = embryo()
    for volumes in ([(image, thin_annotations(dense, 3))], [(image * 3 + 50, thin_annotations(dense, 3))]):
        crops = extract_slice_crops(volumes)
        assert float(crops.brightness[crops.central].median()) == pytest.approx(1, abs=0.02)
        small = (crops.sdf < 0).sum((1, 2)) < 80
        assert small.any()
        assert float(crops.brightness[small].median()) < 0.9


def test_specks_and_choices_are_passed_on() -> None:
    volumes = thinned(6)
    crops = extract_slice_crops(volumes, crop_size=64, min_area=100)
    assert crops.image.shape[1:] == (64, 64)
    assert crops.counts["speck"] > 0
    assert int((crops.sdf < 0).sum((1, 2)).min()) >= 100
    chosen = crops.select(torch.nonzero(crops.central)[:, 0])
    assert bool(chosen.central.all())
    assert len(chosen) == len(chosen.volume) == len(chosen.z) == int(crops.central.sum())
