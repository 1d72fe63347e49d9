"""Populations: what is placed, how many, how they lie, and that a key alone decides."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from synthaug.errors import InputError
from synthaug.generators import layout
from synthaug.generators.population import ODD, PopulationSynthesis
from synthaug.generators.population_config import PopulationConfig
from synthaug.kernels.compositing import resample
from synthaug.randomness import SampleKey
from synthaug.training.population_fit import fit_population
from synthaug.types import Cells, Scenes

pytestmark = pytest.mark.usefixtures("untouched_random_state")


def ellipses(n: int = 12, side: int = 32, scale: float = 1.0) -> Cells:
    """Smooth textured ellipses of 5-10 px with a halo, which ends before the inscribed circle does."""
    random = np.random.default_rng(0)
    a, b = random.uniform(7, 10, (n, 1, 1)), random.uniform(5, 7, (n, 1, 1))
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    sdf = (np.hypot(y / a, x / b) - 1) * b
    light = np.clip(1 - (sdf + 1) / 4, 0, 1) * (1 + 0.2 * np.sin(x + y))
    return Cells(
        image=torch.from_numpy(light[:, None].astype(np.float32)),
        sdf=torch.from_numpy(sdf[:, None].astype(np.float32)),
        brightness=torch.linspace(0.5, 1.5, n),
        scale=torch.full((n,), scale),
    )


STAGE = PopulationSynthesis(PopulationConfig(min_area=12, clustering=0.4, gaps=(0, 0, 1, 3), clearance=4))
CELLS = Cells.cat([ellipses(), ellipses(2, scale=1.7), ellipses(2, scale=2.0)])


def picks_of(key: SampleKey, n: int) -> Tensor:
    return torch.from_numpy(key.child("picks").numpy().integers(0, len(CELLS), n))


def scenes_of(keys: list[SampleKey], counts: list[int], size: tuple[int, int], **more: object) -> Scenes:
    picks = [picks_of(key, n) for key, n in zip(keys, counts)]
    return STAGE(CELLS, picks, STAGE.draw(keys, size, counts), size, **more)


def test_many_frames_keep_the_rules_of_labels() -> None:
    keys = [SampleKey(3, (i,)) for i in range(60)]
    counts = [i % 25 for i in range(60)]
    scenes = scenes_of(keys, counts, (96, 80))
    assert scenes.num_requested.tolist() == counts
    assert scenes.light.shape == scenes.labels.shape == (60, 1, 96, 80)
    for light, labels, n in zip(scenes.light[:, 0].numpy(), scenes.labels[:, 0].numpy(), scenes.num_placed.tolist()):
        assert list(np.unique(labels)) == list(range(n + 1)) or (n and list(np.unique(labels)) == list(range(1, n + 1)))
        assert np.bincount(labels.ravel(), minlength=1)[1:].min(initial=99) >= 12
        assert all(ndimage.label(labels == i)[1] == 1 for i in range(1, n + 1))
        assert np.isfinite(light).all()
        assert n == 0 or light[labels > 0].min() > 0.1  # light lies where the labels are
        assert np.abs(light[ndimage.distance_transform_edt(labels == 0) > 12]).max(initial=0) < 0.1
    assert int(scenes.num_placed.sum()) > 0.95 * sum(counts)


def test_a_row_depends_on_its_key_alone() -> None:
    keys, counts = [SampleKey(1, (i,)) for i in range(5)], [9, 0, 30, 4, 17]
    together = scenes_of(keys, counts, (80, 96))
    again = scenes_of(keys[::-1], counts[::-1], (80, 96))
    for i, key in enumerate(keys):
        alone = scenes_of([key], [counts[i]], (80, 96))
        for name in ("light", "labels", "num_requested", "num_placed"):
            value = getattr(together, name)[i].numpy().tobytes()
            assert value == getattr(alone, name)[0].numpy().tobytes()
            assert value == getattr(again, name)[4 - i].numpy().tobytes()
    assert not torch.equal(together.labels[0], together.labels[2])


def test_no_frame_no_cell_and_an_empty_bank() -> None:
    assert len(scenes_of([], [], (40, 40))) == 0
    keys, empty = [SampleKey(0)], CELLS.select(slice(0, 0))
    scenes = STAGE(empty, [torch.empty(0, dtype=torch.int64)], STAGE.draw(keys, (40, 40), [0]), (40, 40))
    assert int(scenes.labels.max()) == 0 == int(scenes.num_requested)
    assert float(scenes.light.abs().max()) == 0


def test_too_many_cells_are_left_out_and_counted() -> None:
    scenes = scenes_of([SampleKey(0)], [300], (64, 64))
    assert int(scenes.num_requested) == 300
    assert int(scenes.labels.max()) == int(scenes.num_placed) < 60
    tiny = scenes_of([SampleKey(0)], [5], (2, 3))  # no cell can keep 12 px there
    assert int(tiny.num_placed) == 0


def test_occupied_pixels_are_left_alone() -> None:
    occupied = torch.zeros((2, 1, 90, 90), dtype=torch.int32)
    occupied[:, :, 30:60, 30:60] = 700  # a number with holes below it
    keys = [SampleKey(2, (i,)) for i in range(2)]
    scenes = scenes_of(keys, [12, 8], (90, 90), occupied=occupied, clustering=1.0)
    assert int(scenes.labels[occupied > 0].max()) == 0
    assert int(scenes.num_placed.min()) >= 5
    touched = ndimage.binary_dilation(occupied[0, 0].numpy() > 0, iterations=2)
    assert (scenes.labels[0, 0].numpy()[touched] > 0).any()  # new cells also cluster next to what is there
    assert int(occupied.max()) == 700


def test_a_share_of_the_cells_is_very_dim_or_very_bright() -> None:
    usual, key = PopulationSynthesis(PopulationConfig()), SampleKey(0, ("odd",))
    rare = PopulationSynthesis(PopulationConfig(odd_rate=0.3))
    gains = [stage.draw([key], (8, 8), [4000])["gain"][0] for stage in (usual, rare)]
    ratio = (gains[1] / gains[0]).log()
    assert float(gains[0].max()) < 1.2
    low, high = np.log(ODD)
    odd = ratio[ratio.abs() > 0.9 * low]
    assert set(ratio[ratio.abs() <= 0.9 * low].tolist()) == {0.0}
    assert len(odd) / 4000 == pytest.approx(0.3, abs=0.02)
    assert float((odd < 0).float().mean()) == pytest.approx(2 / 3, abs=0.04)
    assert float(odd.abs().max()) <= high + 0.01
    assert float(odd.abs().mean()) == pytest.approx((low + high) / 2, abs=0.04)
    with pytest.raises(InputError, match="odd_rate"):
        PopulationConfig(odd_rate=1.5)


def test_light_adds_up_with_brightness_and_gain() -> None:
    keys, size = [SampleKey(4)], (200, 200)
    noise = STAGE.draw(keys, size, [2])
    both = STAGE(CELLS, [torch.tensor([0, 11])], noise, size)
    assert int(both.num_placed) == 2
    for row, cell in enumerate((0, 11)):
        gain = float(noise["gain"][0, row])
        assert 0.6 < gain < 1.6
        inside = both.light[both.labels == row + 1].mean()
        plain = CELLS.image[cell][CELLS.mask[cell]].mean() * CELLS.brightness[cell] * gain
        assert inside == pytest.approx(float(plain), rel=0.05)


def test_resampling_turns_mirrors_and_scales() -> None:
    cells, ones = ellipses(3), torch.ones(3)
    turn = {0: torch.tensor([[1.0, 0.0]] * 3), 90: torch.tensor([[0.0, 1.0]] * 3)}
    image, mask = resample(cells, turn[0], ones)
    assert torch.allclose(image, cells.image[:, 0], atol=1e-4)
    assert torch.equal(mask, cells.mask[:, 0])
    image, _ = resample(cells, turn[90], ones)
    rotated = [torch.rot90(cells.image[:, 0], k, (1, 2)) for k in (1, 3)]
    assert min(float((image - r).abs().max()) for r in rotated) < 1e-4
    image, _ = resample(cells, turn[0], -ones)
    assert torch.allclose(image, cells.image[:, 0].flip(2), atol=1e-4)
    _, large = resample(replace(cells, scale=2 * ones), turn[0], ones)
    assert large.shape == (3, 64, 64)
    assert torch.allclose(large.sum((1, 2)) / cells.mask.sum((1, 2, 3)), 4 * ones, rtol=0.06)


def test_numbers_of_cells() -> None:
    keys, density = [SampleKey(0, (i,)) for i in range(400)], torch.full((400,), 0.0004)
    plain = STAGE.num_cells(keys, (256, 256), density)
    assert set(plain) == {26, 27}
    assert np.mean(plain) == pytest.approx(0.0004 * 256**2, abs=0.1)
    config = replace(STAGE.config, reach=20.0, frame_size=(512, 512), dispersion=1.0)
    spread = PopulationSynthesis(config).num_cells(keys, (256, 256), density)
    area, frame = 276**2, 532**2
    mean = 0.0004 * 512**2 * area / frame
    assert np.mean(spread) == pytest.approx(mean, abs=0.7)
    assert np.var(spread) == pytest.approx(mean * (1 - area / frame), rel=0.25)
    assert spread[:3] == PopulationSynthesis(config).num_cells(keys[:3], (256, 256), density[:3])
    assert STAGE.num_cells(keys[:2], (9, 9), density[:2], num_cells=7) == [7, 7]
    drawn = STAGE.num_cells(keys, (9, 9), density, num_cells=(3, 5))
    assert set(drawn) == {3, 4, 5}
    assert STAGE.num_cells(keys[:2], (256, 256), torch.zeros(2)) == [0, 0]


def test_fit_tells_clustered_from_scattered_and_survives_the_disk(tmp_path: Path) -> None:
    fitted = {}
    for p in (0.0, 0.8):
        keys = [SampleKey(5, (i,)) for i in range(4)]
        scenes = scenes_of(keys, [22] * 4, (160, 160), clustering=p)
        fitted[p] = fit_population(list(scenes.labels[:, 0].numpy()), min_area=12)
    assert fitted[0.0].config.clustering <= 0.2 < 0.5 <= fitted[0.8].config.clustering
    assert fitted[0.8].config.gaps[0] in (0, -1), "these cells touch, but are hardly pressed together"
    assert fitted[0.0].config.frame_size == (160, 160)
    assert 4 < fitted[0.0].config.reach < 16
    fitted[0.8].save_pretrained(tmp_path)
    assert asdict(PopulationSynthesis.from_pretrained(tmp_path).config) == asdict(fitted[0.8].config)


def test_fit_with_little_to_see() -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[10:20, 10:20] = 1
    config = fit_population([labels, np.zeros_like(labels)], min_area=5).config
    assert (config.clustering, config.gaps) == (0.0, (0,))
    with pytest.raises(InputError, match="not cut by the border"):
        fit_population([labels], min_area=101)
    with pytest.raises(InputError, match="min_area"):
        fit_population([labels], min_area=0)


@pytest.mark.parametrize("depth", [0, 2, 4, 6])
def test_fit_tells_how_far_cells_are_pressed_together(depth: int) -> None:
    stage = PopulationSynthesis(replace(STAGE.config, clustering=0.9, gaps=(-depth,), clearance=0))
    discs = torch.from_numpy(np.hypot(*np.mgrid[-19:20, -19:20]) - 12.0).float().expand(20, 1, -1, -1)
    cells = Cells(image=torch.sigmoid(-discs), sdf=discs, brightness=torch.ones(20), scale=torch.ones(20))
    keys = [SampleKey(0, ("pressed", i)) for i in range(4)]
    noise = stage.draw(keys, (160, 160), [14] * 4)
    frames = stage.forward(cells, [torch.arange(14)] * 4, noise, (160, 160))
    labels = list(frames.labels[:, 0].numpy())
    told = np.concatenate([layout.presses(frame) for frame in labels])
    assert len(told) > 12
    assert np.median(told) == pytest.approx(depth, abs=0.8)
    fitted = fit_population(labels, min_area=12).config
    assert fitted.gaps[4] == pytest.approx(-depth, abs=2)
    assert float(frames.light.max()) < 1.35, "light is not counted twice where cells are pressed together"


def test_layout_measures() -> None:
    labels = np.zeros((30, 40), np.int32)
    labels[2:6, 2:6], labels[2:6, 6:9], labels[9:12, 2:5], labels[20:24, 30:40] = 1, 2, 3, 9
    assert layout.neighbour_gaps(labels) == pytest.approx([0, 0, 3, np.hypot(22, 15) - 1])
    assert layout.neighbour_gaps(np.ones((4, 4), np.int32)).shape == (0,)
    assert list(np.unique(layout.drop_small(labels, 10))) == [0, 1, 2, 3]
    assert [m.shape for m in layout.whole_masks(labels)] == [(4, 4), (4, 3), (3, 3)]
    square = np.ones((9, 9), bool)
    assert layout.reach([square], 1) == 8  # centres on a canvas of Y rows: Y + 8 positions show a pixel
    assert layout.reach([square], 19) == 4  # three rows of nine are needed on either side
    grid = np.zeros((128, 128), np.int32)
    grid[2::8, 2::8] = np.arange(1, 257).reshape(16, 16)
    scattered = []
    for i in range(
        12
    ):  # a single frame holds few independent windows: the estimate's standard deviation is 0.2 with 12
        frame = np.zeros(128 * 128, np.int32)
        frame[SampleKey(i).numpy().permutation(len(frame))[:256]] = np.arange(1, 257)
        scattered.append(frame.reshape(128, 128))
    assert layout.dispersion([grid], 0.0, 1) < 0.2
    assert layout.dispersion(scattered, 0.0, 1) == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"picks": [torch.tensor([99])]}, "indices of the 16 cells"),
        ({"picks": [torch.tensor([1, 2, 3, 4])]}, "up to 3 cells"),
        ({"picks": []}, "as noise was drawn"),
        ({"clustering": 1.5}, "probability"),
        ({"size": (0, 5)}, "size"),
        ({"occupied": torch.zeros((1, 1, 3, 3), dtype=torch.int32)}, "occupied"),
        ({"cells": Cells(CELLS.image[:, :, :8], CELLS.sdf[:, :, :8], CELLS.brightness, CELLS.scale)}, "square"),
    ],
)
def test_wrong_arguments_are_named(change: dict, match: str) -> None:
    noise = STAGE.draw([SampleKey(0)], (40, 40), [3])
    arguments = {"cells": CELLS, "picks": [torch.tensor([0, 1])], "size": (40, 40), "noise": noise} | change
    with pytest.raises(InputError, match=match):
        STAGE(**arguments)


def test_wrong_numbers_are_named() -> None:
    keys = [SampleKey(0)]
    for wrong in (-1, (5, 3)):
        with pytest.raises(InputError, match="num_cells"):
            STAGE.num_cells(keys, (9, 9), torch.zeros(1), num_cells=wrong)
    with pytest.raises(InputError, match="density"):
        STAGE.num_cells(keys, (9, 9), torch.zeros(2))
    for fields in ({"clustering": 1.2}, {"min_area": 0}, {"gaps": ()}, {"reach": -1.0}, {"odd_rate": 2.0}):
        with pytest.raises(InputError, match="PopulationConfig"):
            PopulationConfig(**fields)


class _Frames(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return scenes_of([SampleKey(8, (index,))], [10], (64, 64)).light[0]


def test_workers_make_the_same_bits() -> None:
    alone = torch.stack([_Frames()[i] for i in range(4)])
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(
        _Frames(), batch_size=2, num_workers=2, multiprocessing_context="fork", generator=generator
    )
    assert torch.equal(alone, torch.cat(list(loader)))
