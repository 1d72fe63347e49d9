"""Background and camera: known parameters are found again, and a generated frame shows them."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthaug.errors import InputError
from synthaug.generators.background import Background, BackgroundConfig
from synthaug.generators.camera import (
    autocovariance,
    correlate_noise,
    filter_correlation,
    high_pass,
    noise_kernel,
    random_texture,
    skew,
    tail_of,
    texture_grid,
    wide_blur,
)
from synthaug.generators.frame_fit import NAMES, cell_contrasts
from synthaug.generators.volume_fit import VOLUME_NAMES, annotated_planes
from synthaug.randomness import SampleKey
from synthaug.training.background_fit import fit_background
from synthaug.types import UNLABELLED, FrameStyles

LEVEL, BRIGHTNESS, FLAT, GAIN, HAZE = 140.0, 400.0, 16.0, 0.4, 0.06
SIZE = (224, 288)
CORRELATED = np.array([[0.05, 0.2, 0.05], [0.25, 1.0, 0.25], [0.05, 0.2, 0.05]])
CORRELATED = CORRELATED / np.sqrt((CORRELATED**2).sum())


def scene(seed: int, cells: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Light and labels of separate discs with blurred borders."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(size, np.int32)
    y, x = np.indices(size)
    for _ in range(400):
        cy, cx, r = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(9, 14)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < r * r
        if labels.max() < cells and not labels[disc].any():
            labels[disc] = labels.max() + 1
    light = ndimage.gaussian_filter((labels > 0).astype(np.float64), 1.2)
    return light, labels


def frame(seed: int, cells: int = 22, kernel: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A camera frame with the parameters above; the background is 5 % of the level brighter at the bottom."""
    light, labels = scene(seed, cells)
    rng = np.random.default_rng(1000 + seed)
    slope = 1 + 0.05 * ((np.arange(SIZE[0])[:, None] + 0.5) / SIZE[0] * 2 - 1)
    haze = HAZE * ndimage.gaussian_filter(light * (labels > 0), 25, mode="reflect")
    expected = LEVEL * slope + BRIGHTNESS * (light + haze)
    white = rng.standard_normal(SIZE)
    noise = ndimage.convolve(white, kernel, mode="wrap") if kernel is not None else white
    variance = FLAT + GAIN * (expected - LEVEL)
    return np.clip(np.round(expected + np.sqrt(variance) * noise), 0, 4095).astype(np.float32), labels


@pytest.fixture(scope="module")
def frames() -> tuple[list[np.ndarray], list[np.ndarray]]:
    pairs = [frame(seed) for seed in range(4)] + [frame(9, cells=0)]
    # an unlabelled bright fibre and a saturated speck that must not ruin the fit
    pairs[0][0][60:75, 20:200] += 900
    pairs[1][0][100:110, 100:110] = 4095
    return [p[0] for p in pairs], [p[1] for p in pairs]


@pytest.fixture(scope="module")
def stage(frames) -> Background:
    return fit_background(*frames, tile_size=128, num_tiles=3)


def column(stage: Background, name: str) -> np.ndarray:
    return stage.table[:, NAMES.index(name)].numpy()


def tensors(light: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(light).float()[None, None], torch.from_numpy(labels)[None, None]


def test_known_parameters_are_found_again(stage):
    haze = sum(column(stage, f"haze_{s}") for s in (10, 25, 60))
    assert column(stage, "flat_variance") == pytest.approx(FLAT, rel=0.08)
    assert column(stage, "gain") == pytest.approx(GAIN, rel=0.2)  # the first frame has a fibre across its cells
    assert column(stage, "gain")[1:] == pytest.approx(GAIN, rel=0.1)
    assert column(stage, "field_y") == pytest.approx(0.05, abs=0.012)
    assert column(stage, "field_x") == pytest.approx(0.0, abs=0.012)
    assert column(stage, "level") == pytest.approx(LEVEL, rel=0.03)
    assert haze[1:4] == pytest.approx(HAZE, rel=0.2)
    # a disc's mean is under its plateau by what its blurred border loses
    light, labels = scene(2, 22)
    assert column(stage, "brightness")[2] == pytest.approx(BRIGHTNESS * light[labels > 0].mean(), rel=0.05)
    assert stage.kernel.shape == (1, 1)
    assert stage.config.integer
    assert stage.config.saturation == 4095


def test_a_frame_without_cells_keeps_its_level_and_borrows_its_brightness(stage):
    assert column(stage, "density")[4] == 0
    assert column(stage, "level")[4] == pytest.approx(LEVEL, rel=0.01)
    assert column(stage, "brightness")[4] == pytest.approx(np.median(column(stage, "brightness")[:4]))
    alone = fit_background([frame(9, cells=0)[0]], [np.zeros(SIZE, np.int32)])
    assert np.isfinite(alone.table.numpy()).all()
    assert column(alone, "brightness")[0] > 0


def test_flat_areas_of_generated_frames_match_the_real_ones(stage, frames):
    real, labels = frames[0][2], frames[1][2]
    light, _ = scene(2, 22)
    scale = BRIGHTNESS / column(stage, "brightness")[2]
    row = FrameStyles(stage.table[2:3], NAMES)
    made = stage(*tensors(light * scale, labels), row, stage.draw([SampleKey(3)], SIZE))[0, 0].numpy()
    far = ndimage.distance_transform_edt(labels == 0) > 8
    inside = ndimage.minimum_filter(labels, 9) > 0
    lags = [(0, 0), (0, 1), (1, 0), (0, 3)]
    flat = []
    for image in (real.astype(np.float64), made.astype(np.float64)):
        covariance = autocovariance(image - image[far].mean(), far, lags)
        flat.append([image[far].mean(), covariance[0], *(covariance[1:] / covariance[0])])
    assert flat[1][0] == pytest.approx(flat[0][0], rel=0.01)
    assert flat[1][1] == pytest.approx(flat[0][1], rel=0.1)
    assert flat[1][2:] == pytest.approx(flat[0][2:], abs=0.05)
    sharp = [(high_pass(image.astype(np.float64)) ** 2)[inside].mean() for image in (real, made)]
    assert sharp[1] == pytest.approx(sharp[0], rel=0.12)


def test_correlated_noise_is_fitted_and_generated():
    pairs = [frame(seed, cells=6, kernel=CORRELATED) for seed in range(3)]
    stage = fit_background([p[0] for p in pairs], [p[1] for p in pairs], tile_size=64, num_tiles=1)
    lags = [(0, 1), (1, 0), (1, 1), (0, 2)]
    wanted = filter_correlation(CORRELATED, lags)
    assert wanted[0] > 0.3  # or the test would not test
    assert filter_correlation(stage.kernel.double().numpy(), lags) == pytest.approx(wanted, abs=0.05)
    assert column(stage, "flat_variance") == pytest.approx(FLAT, rel=0.15)
    empty = torch.zeros(1, 1, *SIZE)
    image = stage(empty, empty.int(), FrameStyles(stage.table[:1], NAMES), stage.draw([SampleKey(0)], SIZE))
    rest = image[0, 0].double().numpy()
    rest -= ndimage.gaussian_filter(rest, 12)
    covariance = autocovariance(rest, np.ones(SIZE, bool), [(0, 0), *lags])
    assert covariance[1:] / covariance[0] == pytest.approx(wanted, abs=0.06)


def test_row_bits_do_not_depend_on_the_batch(stage):
    size = (61, 77)  # no multiple of any vector length
    keys = [SampleKey(1, ("x", i)) for i in range(5)]
    pairs = [scene(i, 5, size) for i in range(5)]
    light = torch.stack([torch.from_numpy(p[0]).float()[None] for p in pairs])
    labels = torch.stack([torch.from_numpy(p[1])[None] for p in pairs])
    styles = stage.draw_styles(keys)
    for mode in ("model", "real"):
        whole = stage(light, labels, styles, stage.draw(keys, size), mode)
        for i in (0, 3, 4):
            at = slice(i, i + 1)
            assert torch.equal(stage.draw_styles([keys[i]]).values, styles.values[at])
            alone = stage(light[at], labels[at], styles.select(at), stage.draw([keys[i]], size), mode)
            assert torch.equal(alone, whole[at])
        back = torch.tensor([4, 2, 0])
        noise = stage.draw([keys[i] for i in back], size)
        assert torch.equal(stage(light[back], labels[back], styles.select(back), noise, mode), whole[back])
        assert not torch.equal(whole[0], whole[1])


def test_styles_stay_near_real_rows_without_repeating_them(stage):
    styles = stage.draw_styles([SampleKey(0, (i,)) for i in range(64)])
    assert len(set(styles["level"].tolist())) == 64
    assert styles["level"].numpy() == pytest.approx(LEVEL, rel=0.1)
    assert set(styles["height"].tolist()) == {float(SIZE[0])}
    densities = column(stage, "density")
    assert (styles["density"] == 0).any()
    assert styles["density"].max() < densities.max() * 1.5


def test_images_are_whole_counts_within_the_cameras_range(stage):
    light = torch.zeros(1, 1, 64, 64)
    light[..., :32] = 1000.0
    noise = stage.draw([SampleKey(0)], (64, 64))
    image = stage(light, (light > 0).int(), stage.draw_styles([SampleKey(0)]), noise)
    assert torch.equal(image, image.round())
    assert image.max() == 4095
    assert image.min() >= 0


def test_real_tiles_are_free_of_cells_and_cover_larger_canvases(stage):
    assert stage.tiles.dtype == torch.uint16
    assert stage.tiles.shape == (3, 128, 128)
    # cells, fibre and speck are gone: nothing is brighter than background, haze and noise allow
    assert stage.tiles.float().max() < LEVEL + 80
    styles = FrameStyles(stage.table[4:5], NAMES)
    for size in ((96, 128), (200, 300)):
        empty = torch.zeros(1, 1, *size)
        image = stage(empty, empty.int(), styles, stage.draw([SampleKey(5)], size), "real")
        assert image.shape == (1, 1, *size)
        assert float(image.mean()) == pytest.approx(LEVEL, rel=0.1)
        sharp = high_pass(image[0, 0].double().numpy()) ** 2
        assert sharp[4:-4, 4:-4].mean() == pytest.approx(FLAT, rel=0.3)


def test_adding_cells_changes_only_where_they_are_and_brings_their_shot_noise(stage):
    image = torch.from_numpy(frame(0)[0])[None, None]
    labels = torch.from_numpy(frame(0)[1])[None]
    styles = stage.styles_of(image[0], labels)
    assert styles["brightness"].item() == pytest.approx(column(stage, "brightness")[0], rel=0.01)
    light = torch.zeros_like(image)
    light[..., 100:200, 100:200] = 1.0
    made = stage.add_cells(image, light, styles, stage.draw([SampleKey(0)], SIZE))
    assert torch.equal(made[light == 0], image[light == 0])
    added = (made - image)[light > 0]
    assert added.mean().item() == pytest.approx(styles["brightness"].item(), rel=0.01)
    assert added.var().item() == pytest.approx((styles["gain"] * styles["brightness"]).item(), rel=0.1)
    unlabelled = stage.styles_of(image[0], torch.zeros_like(labels))
    assert unlabelled["brightness"].item() in column(stage, "brightness").tolist()


def test_round_trip_through_a_folder_is_exact(stage, tmp_path):
    stage.save_pretrained(tmp_path)
    again = Background.from_pretrained(tmp_path)
    assert again.config == stage.config
    for name, value in stage.named_buffers():
        assert torch.equal(getattr(again, name), value), name
    light, labels = tensors(*scene(1, 20))
    keys = [SampleKey(4)]
    for mode in ("model", "real"):
        one, two = (s(light, labels, s.draw_styles(keys), s.draw(keys, SIZE), mode) for s in (stage, again))
        assert torch.equal(one, two)


def test_float_frames_are_not_rounded():
    pairs = [frame(seed, cells=12) for seed in range(2)]
    stage = fit_background([p[0] / 4095 for p in pairs], [p[1] for p in pairs], tile_size=64, num_tiles=1)
    assert not stage.config.integer
    assert stage.tiles.dtype == torch.float32
    assert column(stage, "flat_variance") == pytest.approx(FLAT / 4095**2, rel=0.12)
    assert column(stage, "level") == pytest.approx(LEVEL / 4095, rel=0.02)


def test_mistakes_are_named(stage):
    image, labels = frame(0)
    with pytest.raises(InputError, match="frames"):
        fit_background([], [])
    with pytest.raises(InputError, match=r"frames\[0\]"):
        fit_background([image[:100]], [labels])
    with pytest.raises(InputError, match="NaN"):
        fit_background([np.where(labels == 1, np.nan, image)], [labels])
    with pytest.raises(InputError, match="fitted"):
        Background(BackgroundConfig()).draw_styles([SampleKey(0)])
    light = torch.zeros(1, 1, 32, 32)
    style, noise = stage.draw_styles([SampleKey(0)]), stage.draw([SampleKey(0)], (32, 32))
    with pytest.raises(InputError, match="background"):
        stage(light, light.int(), style, noise, "nothing")
    with pytest.raises(InputError, match="light and labels"):
        stage(light, light.int()[..., :16], style, noise)


def test_contrast_is_over_the_local_background():
    image = np.full((80, 80), 50.0, np.float32)
    labels = np.zeros((80, 80), np.int32)
    labels[30:45, 30:45] = 1
    image[30:45, 30:45] += 120
    contrast, local = cell_contrasts(image, labels)
    assert contrast.tolist() == [120.0]
    assert local.tolist() == [50.0]


def test_building_blocks():
    assert (high_pass(np.eye(1, 400, 210).reshape(20, 20)) ** 2).sum() == pytest.approx(1.0)
    assert noise_kernel(np.pad(np.ones((1, 1)), 3)).shape == (1, 1)
    point = torch.zeros(1, 1, 96, 96)
    point[..., 40:48, 40:48] = 1
    reference = ndimage.gaussian_filter(point[0, 0].numpy(), 10, mode="reflect", truncate=5)
    assert wide_blur(point, 10.0)[0, 0].numpy() == pytest.approx(reference, abs=float(0.06 * reference.max()))
    white = torch.randn(1, 1, 9, 9, generator=SampleKey(0).generator())
    kernel = torch.from_numpy(CORRELATED).float()
    expected = torch.nn.functional.conv2d(white, kernel[None, None])
    assert torch.allclose(correlate_noise(white, kernel), expected, atol=1e-5)
    for sigma in (1.5, 4.0, 12.0):
        grid = torch.randn(1, 1, *texture_grid((600, 600), sigma), generator=SampleKey(1).generator())
        assert random_texture(grid, (600, 600), sigma).var().item() == pytest.approx(1.0, abs=0.15)
    tail = torch.tensor(tail_of(2.0))
    skewed = skew(torch.randn(1, 1, 700, 700, generator=SampleKey(2).generator()), tail).double()
    assert skewed.mean().item() == pytest.approx(0.0, abs=0.01)
    assert (skewed**3).mean().item() == pytest.approx(2.0, rel=0.1)


# Stacks ---------------------------------------------------------------------------------------------------------------

DEPTH, SIGMA_Z, ONE = 36, 1.6, 10.0
WIDE = (DEPTH, 96, 104)


def ball_scene(seed: int, num: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """Light and labels of separate balls, before the axial blur."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(WIDE, np.int32)
    z, y, x = np.ogrid[tuple(slice(0, n) for n in WIDE)]
    light = np.zeros(WIDE)
    centres: list[np.ndarray] = []
    while len(centres) < num:
        centre = rng.uniform((7, 10, 10), (DEPTH - 7, WIDE[1] - 10, WIDE[2] - 10))
        if any((((centre - c) / (13, 19, 19)) ** 2).sum() < 1 for c in centres):
            continue
        centres.append(centre)
        ball = ((z - centre[0]) / 5) ** 2 + ((y - centre[1]) / 8) ** 2 + ((x - centre[2]) / 8) ** 2 < 1
        labels[ball] = len(centres)
        light[ball] = rng.uniform(0.8, 1.2)
    return ndimage.gaussian_filter(light, (0, 0.8, 0.8)), labels


def volume(seed: int, *, multiplied: bool, step: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A stack of known parameters, its labels of every fourth plane only, and all of its labels."""
    light, labels = ball_scene(seed)
    rng = np.random.default_rng(100 + seed)
    lit = 300 * ndimage.gaussian_filter1d(light, SIGMA_Z, axis=0)
    expected = 110 + lit + 0.3 * ndimage.gaussian_filter(lit, (24, 12, 12), mode="reflect")
    if multiplied:
        electrons = rng.poisson((expected - 100) / ONE)
        image = 100 + ONE * (rng.gamma(np.maximum(electrons, 1)) * (electrons > 0) + 0.2 * rng.standard_normal(WIDE))
    else:
        image = expected + np.sqrt(40 + 0.5 * (expected - 110)) * rng.standard_normal(WIDE)
    sparse = np.full(WIDE, UNLABELLED, np.int32)
    sparse[2::step] = labels[2::step]
    return np.clip(np.round(image), 0, 4095).astype(np.float32), sparse, labels


@pytest.fixture(scope="module")
def stacks() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return [volume(seed, multiplied=True) for seed in range(2)]


@pytest.fixture(scope="module")
def volume_stage(stacks) -> Background:
    return fit_background([s[0] for s in stacks], [s[1] for s in stacks], tile_size=64, num_tiles=2)


def volume_column(stage: Background, name: str) -> np.ndarray:
    return stage.table[:, VOLUME_NAMES.index(name)].numpy()


def test_parameters_of_stacks_are_found_from_a_few_annotated_planes(volume_stage):
    assert volume_stage.names == VOLUME_NAMES
    assert volume_stage.config.ndim == 3
    assert volume_column(volume_stage, "level") == pytest.approx(110, rel=0.03)
    assert volume_column(volume_stage, "gain") == pytest.approx(2 * ONE, rel=0.15)
    assert volume_column(volume_stage, "axial_sigma") == pytest.approx(SIGMA_Z, abs=0.4)
    # a ball's mean is under its plateau by what its blurred border loses
    assert volume_column(volume_stage, "brightness") == pytest.approx(260, rel=0.15)
    assert volume_column(volume_stage, "attenuation") == pytest.approx(0, abs=0.01)
    assert volume_column(volume_stage, "density") * np.prod(WIDE) == pytest.approx(14, rel=0.35)
    haze = sum(volume_column(volume_stage, f"haze_{s}") for s in (4, 12, 40))
    assert haze == pytest.approx(0.3, abs=0.12)
    assert 0 < volume_stage.config.read_noise < 0.6


def test_counts_of_cells_may_be_given(stacks):
    stage = fit_background([stacks[0][0]], [stacks[0][1]], num_tiles=1, tile_size=32, counts=[21.0])
    assert float(volume_column(stage, "density")[0]) * np.prod(WIDE) == pytest.approx(21)


def test_gaussian_noise_in_stacks_stays_gaussian():
    image, labels, _ = volume(7, multiplied=False)
    stage = fit_background([image], [labels], num_tiles=1, tile_size=32)
    assert stage.config.read_noise == 0
    assert not len(stage.noise_table)
    assert volume_column(stage, "flat_variance") == pytest.approx(40, rel=0.15)
    assert volume_column(stage, "gain") == pytest.approx(0.5, rel=0.3)


def test_generated_stacks_look_like_the_real_ones(volume_stage, stacks):
    light, labels = ball_scene(0)
    light = light * 300 / volume_column(volume_stage, "brightness")[0]
    style = FrameStyles(volume_stage.table[:1], VOLUME_NAMES)
    noise = volume_stage.draw([SampleKey(0)], WIDE)
    made = volume_stage(*tensors(light, labels), style, noise)[0, 0].numpy()
    real = stacks[0][0]
    far = ndimage.distance_transform_edt(labels == 0, sampling=(2, 1, 1)) > 9
    assert made[far].mean() == pytest.approx(real[far].mean(), rel=0.03)
    assert made[far].var() == pytest.approx(real[far].var(), rel=0.2)
    skewness = [float(((i[far] - i[far].mean()) ** 3).mean() / i[far].std() ** 3) for i in (real, made)]
    assert skewness[0] > 1  # or the test would not test
    assert skewness[1] == pytest.approx(skewness[0], rel=0.3)
    # light reaches beyond the ball's ends by the axial blur, and as far as in the real stack
    core = ndimage.binary_erosion(labels > 0, np.ones((1, 5, 5)))
    beyond = np.roll(core, 7, axis=0) & (labels == 0)
    assert made[beyond].mean() == pytest.approx(real[beyond].mean(), rel=0.1)
    assert made[core].mean() == pytest.approx(real[core].mean(), rel=0.1)


def test_bits_of_a_stack_do_not_depend_on_the_batch(volume_stage):
    size, keys = (9, 37, 45), [SampleKey(1, ("v", i)) for i in range(3)]
    light = torch.rand(3, 1, *size, generator=SampleKey(2).generator())
    labels = (light > 0.7).int()
    styles, noise = volume_stage.draw_styles(keys), volume_stage.draw(keys, size)
    for mode in ("model", "real"):
        whole = volume_stage(light, labels, styles, noise, mode)
        assert whole.shape == (3, 1, *size)
        assert torch.equal(whole, whole.round())
        for i in range(3):
            at = slice(i, i + 1)
            alone = volume_stage(light[at], labels[at], styles.select(at), volume_stage.draw([keys[i]], size), mode)
            assert torch.equal(alone, whole[at])


def test_tiles_of_stacks_are_small_and_free_of_cells(volume_stage):
    assert volume_stage.tiles.shape == (2, 16, 64, 64)
    assert volume_stage.tiles.dtype == torch.uint16
    smooth = ndimage.gaussian_filter(volume_stage.tiles.float().numpy(), (0, 1, 2, 2))
    assert smooth.max() < 110 + 100  # a cell has 300
    empty = torch.zeros(1, 1, 20, 80, 50)
    style = FrameStyles(volume_stage.table[:1], VOLUME_NAMES)
    image = volume_stage(empty, empty.int(), style, volume_stage.draw([SampleKey(0)], (20, 80, 50)), "real")
    assert float(image.mean()) == pytest.approx(float(volume_stage.tiles.float().mean()), rel=0.05)


def test_cells_added_to_a_stack_are_blurred_along_z_and_bring_shot_noise(volume_stage, stacks):
    image, sparse, _ = stacks[0]
    styles = volume_stage.styles_of(torch.from_numpy(image)[None], torch.from_numpy(sparse)[None])
    assert styles["brightness"].item() == pytest.approx(volume_column(volume_stage, "brightness")[0], rel=0.15)
    assert styles["level"].item() == pytest.approx(110, rel=0.05)
    light = torch.zeros(1, 1, *WIDE)
    light[:, :, 10:20, 20:50, 20:50] = 1.0
    before = torch.from_numpy(image)[None, None]
    made = volume_stage.add_cells(before, light, styles, volume_stage.draw([SampleKey(0)], WIDE))
    added = made - before
    assert torch.equal(made[:, :, 30:], before[:, :, 30:])
    assert float(added[:, :, 13:17, 20:50, 20:50].mean()) == pytest.approx(styles["brightness"].item(), rel=0.03)
    assert float(added[:, :, 20, 20:50, 20:50].mean()) > 0.2 * styles["brightness"].item()
    variance = float(added[:, :, 13:17, 20:50, 20:50].var())
    assert variance == pytest.approx((styles["gain"] * styles["brightness"]).item(), rel=0.15)


def test_a_stage_of_stacks_goes_to_a_folder_and_back(volume_stage, tmp_path):
    volume_stage.save_pretrained(tmp_path)
    again = Background.from_pretrained(tmp_path)
    assert again.config == volume_stage.config
    light = torch.rand(1, 1, 8, 24, 24, generator=SampleKey(0).generator())
    keys = [SampleKey(3)]
    one, two = (
        s(light, (light > 0.5).int(), s.draw_styles(keys), s.draw(keys, (8, 24, 24))) for s in (volume_stage, again)
    )
    assert torch.equal(one, two)


def test_mistakes_with_stacks_are_named(volume_stage, stacks):
    image, sparse, _ = stacks[0]
    assert annotated_planes(sparse) == list(range(2, DEPTH, 4))
    with pytest.raises(InputError, match="annotated plane"):
        fit_background([image], [np.full(WIDE, UNLABELLED, np.int32)])
    with pytest.raises(InputError, match=r"frames\[0\]"):
        fit_background([image[:3]], [sparse[:3]])
    with pytest.raises(InputError, match="counts"):
        fit_background([image], [sparse], counts=[1.0, 2.0])
    with pytest.raises(InputError, match="Z, Y, X"):
        volume_stage.draw([SampleKey(0)], (32, 32))
    with pytest.raises(InputError, match="Z, Y, X"):
        volume_stage.styles_of(torch.from_numpy(image[:1]), torch.from_numpy(sparse[:1]))
    light = torch.zeros(1, 1, 32, 32)
    with pytest.raises(InputError, match="light and labels"):
        volume_stage(light, light.int(), volume_stage.draw_styles([SampleKey(0)]), {})
