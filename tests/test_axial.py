"""The optical axis: blurs, and what outlines in single planes tell of length, blur and attenuation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthaug.generators.axial import (
    Section,
    attenuate,
    axial_extent,
    axial_sigma,
    blur_axis,
    expected_half_length,
    fit_attenuation,
    mask_half_length,
    measure_section,
    random_texture_volume,
    shrink,
    slab_profile,
    texture_grid_volume,
    wide_blur_volume,
)
from synthaug.generators.electrons import ELECTRONS, fit_read_noise, multiplied_noise, shape_noise
from synthaug.generators.volume_fit import pool_attenuation
from synthaug.randomness import SampleKey


def disc(radius: float = 7.0, size: int = 24) -> np.ndarray:
    y, x = np.indices((size, size)) - (size - 1) / 2
    return y**2 + x**2 < radius**2


def column(
    centre: float, half: float, sigma: float, depth: int = 40, amplitude: float = 300.0, seed: int = 0
) -> np.ndarray:
    """A cylinder over `disc`, blurred along z, on a level of 100 with noise."""
    profile = slab_profile(np.arange(depth, dtype=float), centre, half, sigma, 0.0, amplitude)
    noise = np.random.default_rng(seed).normal(0, 10, (depth, 24, 24))
    return 100 + profile[:, None, None] * disc() + noise


def test_blurs_match_a_reference():
    point = torch.zeros(1, 1, 24, 40, 48)
    point[..., 3, 20, 24] = 1.0
    for axis, sigmas in ((2, (1.7, 0, 0)), (4, (0, 0, 2.3))):
        sigma = max(sigmas)
        wanted = ndimage.gaussian_filter(
            point[0, 0].numpy(), sigmas, mode="reflect", truncate=np.ceil(3 * sigma) / sigma
        )
        assert blur_axis(point, sigma, axis)[0, 0].numpy() == pytest.approx(wanted, abs=1e-5)
    assert blur_axis(point, 0.0, 2) is point
    block = torch.zeros(1, 1, 30, 61, 77)
    block[..., 10:16, 24:36, 30:44] = 1.0
    wanted = ndimage.gaussian_filter(block[0, 0].numpy(), (8, 4, 4), mode="reflect", truncate=5)
    made = wide_blur_volume(block, (8.0, 4.0, 4.0))[0, 0].numpy()
    assert made.shape == (30, 61, 77)
    assert made == pytest.approx(wanted, abs=float(0.06 * wanted.max()))


def test_texture_in_volumes_has_unit_variance_and_the_wanted_reach():
    size, sigmas = (48, 160, 160), (2.0, 4.0, 4.0)
    white = torch.randn(1, 1, *texture_grid_volume(size, sigmas), generator=SampleKey(0).generator())
    field = torch.zeros(1, 1, *size)
    random_texture_volume(white, sigmas).add_to(field)
    assert field.var().item() == pytest.approx(1.0, abs=0.15)
    along = [float((field[:, :, d:] * field[:, :, : size[0] - d]).mean() / field.var()) for d in (2, 8)]
    assert along[0] == pytest.approx(np.exp(-1 / 4), abs=0.1)
    assert along[1] == pytest.approx(0.0, abs=0.1)


def test_attenuation_leaves_the_mean_plane_alone():
    light = torch.ones(2, 1, 11, 4, 4)
    light[1, :, 6:] = 0  # its mean plane is 2.5
    made = attenuate(light, 0.1)
    assert made[0, 0, 5, 0, 0].item() == pytest.approx(1.0)
    assert made[0, 0, 7, 0, 0].item() == pytest.approx(np.exp(-0.2))
    assert made[1, 0, 1, 0, 0].item() == pytest.approx(np.exp(0.15))


@pytest.mark.parametrize("plane", [14, 18, 23])
def test_one_outline_tells_length_blur_and_contrast(plane):
    section = measure_section(column(18.0, 5.0, 1.9), disc(), plane, 100.0, 300 * 0.7)
    assert section is not None
    assert section.centre == pytest.approx(18.0, abs=0.3)
    assert section.half_length == pytest.approx(5.0, abs=0.3)
    assert section.sigma == pytest.approx(1.9, abs=0.3)
    # in a plane at the cell's end half of the light is left
    expected = 210 / slab_profile(np.array([float(plane)]), 18.0, 5.0, 1.9, 0.0, 1.0)[0]
    assert section.contrast == pytest.approx(expected, rel=0.1)


def test_a_neighbour_above_is_not_part_of_the_cell():
    both = column(12.0, 4.0, 1.5) + column(25.0, 4.0, 1.5, seed=1) - 100
    section = measure_section(both, disc(), 11, 100.0, 300.0)
    assert section is not None
    assert section.centre == pytest.approx(12.0, abs=0.5)
    assert section.half_length == pytest.approx(4.0, abs=0.5)


def test_what_cannot_be_told_is_not_told():
    cut = column(0.0, 5.0, 1.5)  # half of the cell is beyond the stack
    assert measure_section(cut, disc(), 1, 100.0, 300.0) is None
    assert measure_section(column(18, 5, 1.9), disc(2.0), 18, 100.0, 300.0) is None  # too small
    assert measure_section(column(18, 5, 1.9, amplitude=0.0), disc(), 18, 100.0, 300.0) is None  # nothing there
    assert (axial_sigma([]), mask_half_length([]), axial_extent([])) == (0.0, 0.0, 1.0)
    assert fit_attenuation([]) == (0.0, np.inf)


def test_annotated_length_comes_from_where_outlines_lie_in_their_cells():
    """Cells of a half length of 4 planes of light, annotated over 7 planes to either side of their middle."""
    sections = []
    for cell in range(12):
        middle = 16.0 + 0.5 * cell
        volume = column(middle, 4.0, 1.8, amplitude=300 * np.exp(-0.05 * (middle - 18)), seed=cell)
        for plane in range(int(np.ceil(middle - 7)), int(middle + 7) + 1):
            seen = float(volume[plane][disc()].mean()) - 100
            section = measure_section(volume, disc(), plane, 100.0, seen)
            if section is not None:
                sections.append(section)
    assert len(sections) > 120
    assert axial_sigma(sections) == pytest.approx(1.8, abs=0.15)
    assert mask_half_length(sections) == pytest.approx(7.0, abs=0.4)
    assert axial_extent(sections) == pytest.approx(4 / 7, abs=0.05)
    slope, error = fit_attenuation(sections)
    assert slope == pytest.approx(0.05, abs=0.02)
    assert 0 < error < 0.05


def test_blur_is_told_by_outlines_near_the_ends_where_no_others_are():
    """One annotated plane: cells came out with sharp ends, and networks cut real ones off there."""
    near, far = Section(10, 10.0, 4.0, 1.0, 100.0, 100.0, 7.0), Section(10, 14.5, 4.0, 2.0, 100.0, 60.0, 7.0)
    assert axial_sigma([near] * 3 + [far] * 9) == 1.0
    assert axial_sigma([near] * 2 + [far] * 9) == 2.0
    assert axial_sigma([far] * 2) == 0.0


def test_few_outlines_are_pulled_towards_where_a_tenth_of_the_light_is_left():
    at_middle = [Section(10, 10.0, 4.0, 2.0, 100.0, 100.0, 7.0)] * 4  # by chance
    assert expected_half_length(at_middle) == pytest.approx(4.0 + 1.28 * 2.0)
    assert mask_half_length(at_middle) == pytest.approx(40 / 44 * 6.56, abs=0.01)
    assert mask_half_length(at_middle * 500) == pytest.approx(0.5)
    assert expected_half_length(at_middle[:2]) == 0.0
    assert shrink(3.0, 5, 0.0) == 3.0


def test_a_single_plane_tells_no_attenuation():
    apart = [Section(plane, 8.0 + i, 4.0, 2.0, 100.0 * 1.2**i, 80.0, 7.0) for i, plane in enumerate([10] * 8)]
    assert fit_attenuation(apart) == (0.0, np.inf)
    two = [replace(s, plane=8 + 4 * (i % 2)) for i, s in enumerate(apart)]
    assert fit_attenuation(two)[0] == pytest.approx(-np.log(1.2), abs=0.01)


def test_attenuation_is_shared_where_volumes_do_not_differ():
    assert pool_attenuation([(0.0, np.inf)] * 3) == [0.0] * 3
    alike = pool_attenuation([(0.04, 0.01), (0.05, 0.01), (0.0, np.inf)])
    assert alike == pytest.approx([0.045] * 3)
    assert pool_attenuation([(0.01, 0.02), (-0.01, 0.02)]) == [0.0, 0.0]  # chance
    different = pool_attenuation([(0.1, 0.005), (0.02, 0.005)])
    assert different[0] > 0.09
    assert different[1] < 0.03


def test_multiplied_noise_is_that_of_a_simulated_camera():
    rng = np.random.default_rng(0)
    table = torch.from_numpy(multiplied_noise(0.17))
    white = torch.randn(400_000, generator=SampleKey(1).generator())
    for electrons in (0.1, 0.7, 5.0, 80.0):
        made = shape_noise(white, torch.full_like(white, electrons), table).numpy()
        counts = rng.poisson(electrons, len(made))
        gamma = np.where(counts > 0, rng.gamma(np.maximum(counts, 1)), 0.0) + 0.17 * rng.standard_normal(len(made))
        wanted = (gamma - electrons) / np.sqrt(2 * electrons + 0.17**2)
        assert made.mean() == pytest.approx(0, abs=0.01)
        assert made.var() == pytest.approx(1, abs=0.03)
        q = (0.02, 0.2, 0.5, 0.8, 0.98)
        assert np.quantile(made, q) == pytest.approx(np.quantile(wanted, q), abs=0.06)
    beyond = shape_noise(white[:64], torch.full((64,), 10 * ELECTRONS[-1]), table)
    assert beyond.isfinite().all()


def test_gaussian_and_multiplied_noise_are_told_apart():
    rng = np.random.default_rng(0)
    n = rng.poisson(0.8, 20_000)
    flat = np.round(100 + 12 * (np.where(n > 0, rng.gamma(np.maximum(n, 1)), 0.0) + 0.2 * rng.standard_normal(len(n))))
    assert fit_read_noise(flat, float(flat.var()), 24.0) == pytest.approx(0.2, abs=0.1)
    normal = np.round(rng.normal(100, 14, 20_000))
    assert fit_read_noise(normal, float(normal.var()), 24.0) == 0.0
    assert fit_read_noise(flat, float(flat.var()), 0.0) == 0.0
