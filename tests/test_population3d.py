"""Populations in volumes: the same contracts as in frames, clustering, regions, and a fit from annotated planes."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial import cKDTree
from torch import Tensor

from synthaug.errors import InputError
from synthaug.generators import layout
from synthaug.generators.population import PopulationSynthesis
from synthaug.generators.population_config import PopulationConfig
from synthaug.generators.region import Region
from synthaug.kernels.compositing import resample, resample_stacks
from synthaug.randomness import SampleKey
from synthaug.training.population_fit import fit_population
from synthaug.types import UNLABELLED, Cells, Scenes

pytestmark = pytest.mark.usefixtures("untouched_random_state")


def ellipsoids(n: int = 10, slices: int = 7, side: int = 16, scale: float = 1.0) -> Cells:
    """Smooth ellipsoids of 2-3 planes and 3-5 px half-axes, brighter towards the last slice."""
    random = np.random.default_rng(0)
    c, a, b = random.uniform(1.8, 2.8, (n, 1, 1, 1)), *random.uniform(3, 5, (2, n, 1, 1, 1))
    z, y, x = np.mgrid[:slices, :side, :side] - (np.array([slices, side, side]) - 1)[:, None, None, None] / 2
    sdf = (np.sqrt((z / c) ** 2 + (y / a) ** 2 + (x / b) ** 2) - 1) * np.minimum(a, b)
    light = np.clip(1 - (sdf + 1) / 3, 0, 1) * (1 + 0.2 * z / slices)
    tensors = [torch.from_numpy(v.astype(np.float32)) for v in (light, sdf)]
    return Cells(tensors[0], tensors[1], torch.linspace(0.5, 1.5, n), torch.full((n,), scale))


CONFIG = PopulationConfig(min_area=12, clustering=0.4, gaps=(0, 0, 1, 3), clearance=4, z_spacing=2.0)
STAGE = PopulationSynthesis(CONFIG)
CELLS = Cells.cat([ellipsoids(), ellipsoids(2, scale=1.4)])
REGION = Region(
    semi_axes=((7.0, 20.0, 16.0), (8.0, 18.0, 18.0)), counts=(14.0, 20.0), radii=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
)
CONFINED = PopulationSynthesis(replace(CONFIG, region=REGION, frame_size=(20, 60, 60), reach=6.0, reach_z=3.0))


def scenes_of(
    keys: list[SampleKey],
    counts: list[int],
    size: tuple[int, int, int],
    stage: PopulationSynthesis = STAGE,
    **more: object,
) -> Scenes:
    picks = [torch.from_numpy(k.child("picks").numpy().integers(0, len(CELLS), n)) for k, n in zip(keys, counts)]
    return stage(CELLS, picks, stage.draw(keys, size, counts), size, **more)


def middles_of(labels: Tensor) -> np.ndarray:
    """Middles of the instances' boxes."""
    boxes = ndimage.find_objects(labels.numpy())
    return np.array([[(s.start + s.stop - 1) / 2 for s in box] for box in boxes])


@pytest.mark.parametrize("stage", [STAGE, CONFINED], ids=["free", "confined"])
def test_500_volumes_keep_the_rules_of_labels(stage: PopulationSynthesis) -> None:
    """250 of either kind."""
    placed, requested = 0, 0
    for start in range(0, 250, 50):
        keys = [SampleKey(3, (start + i,)) for i in range(50)]
        counts = [i % 12 for i in range(50)]
        scenes = scenes_of(keys, counts, (10, 32, 40), stage)
        assert scenes.num_requested.tolist() == counts
        assert scenes.light.shape == scenes.labels.shape == (50, 1, 10, 32, 40)
        assert scenes.labels.dtype == torch.int32
        for light, labels, n in zip(scenes.light[:, 0].numpy(), scenes.labels[:, 0].numpy(), scenes.num_placed):
            volumes = np.bincount(labels.ravel(), minlength=1)[1:]
            assert len(volumes) == int(n)  # contiguous from 1
            assert volumes.min(initial=99) >= 12
            for i, box in enumerate(ndimage.find_objects(labels), start=1):
                assert ndimage.label(labels[box] == i)[1] == 1
            assert np.isfinite(light).all()
            assert n == 0 or light[labels > 0].min() > 0.1  # light lies where the labels are
        placed, requested = placed + int(scenes.num_placed.sum()), requested + sum(counts)
    assert placed > 0.8 * requested


@pytest.mark.parametrize("stage", [STAGE, CONFINED], ids=["free", "confined"])
def test_a_row_depends_on_its_key_alone(stage: PopulationSynthesis) -> None:
    keys, counts = [SampleKey(1, (i,)) for i in range(4)], [9, 0, 14, 4]
    together = scenes_of(keys, counts, (12, 40, 48), stage)
    again = scenes_of(keys[::-1], counts[::-1], (12, 40, 48), stage)
    for i, key in enumerate(keys):
        alone = scenes_of([key], [counts[i]], (12, 40, 48), stage)
        for name in ("light", "labels", "num_requested", "num_placed"):
            value = getattr(together, name)[i].numpy().tobytes()
            assert value == getattr(alone, name)[0].numpy().tobytes()
            assert value == getattr(again, name)[3 - i].numpy().tobytes()
    assert not torch.equal(together.labels[0], together.labels[2])


def test_no_volume_and_no_cell() -> None:
    assert len(scenes_of([], [], (8, 20, 20))) == 0
    for stage in (STAGE, CONFINED):
        scenes = scenes_of([SampleKey(0)], [0], (8, 20, 20), stage)
        assert int(scenes.labels.max()) == 0 == int(scenes.num_requested)
        assert float(scenes.light.abs().max()) == 0


@pytest.mark.parametrize("stage", [STAGE, CONFINED], ids=["free", "confined"])
def test_an_unreachable_density_ends_and_is_counted(stage: PopulationSynthesis) -> None:
    scenes = scenes_of([SampleKey(0)], [150], (10, 32, 32), stage)
    assert int(scenes.num_requested) == 150
    assert 5 < int(scenes.labels.max()) == int(scenes.num_placed) < 100
    assert int(scenes_of([SampleKey(0)], [5], (1, 2, 3), stage).num_placed) == 0  # no cell can keep 12 voxels there


def test_clustering_brings_neighbours_nearer() -> None:
    keys = [SampleKey(6, (i,)) for i in range(6)]
    nearest = []
    for p in (0.0, 0.5, 1.0):
        scenes = scenes_of(keys, [10] * 6, (24, 90, 90), clustering=p)
        places = [middles_of(labels) * [2, 1, 1] for labels in scenes.labels[:, 0]]
        nearest.append(np.mean([cKDTree(at).query(at, k=2)[0][:, 1].mean() for at in places]))
    assert nearest[0] > 1.3 * nearest[1] > 1.3 * nearest[2]


def test_a_region_confines_cells_and_windows_follow_their_number() -> None:
    keys = [SampleKey(7, (i,)) for i in range(12)]
    size = (20, 60, 60)
    for clustering in (0.0, 1.0):
        noise = CONFINED.draw(keys, size, [16] * 12)
        scenes = scenes_of(keys, [16] * 12, size, CONFINED, clustering=clustering)
        distances = []
        for labels, ellipsoid in zip(scenes.labels[:, 0], noise["region"].numpy()):
            middle = middles_of(labels)
            assert len(middle) >= 12
            distances.append(np.linalg.norm((middle - ellipsoid[0]) @ ellipsoid[4:].T, axis=1))
        distance = np.concatenate(distances)
        assert distance.max() < 1.12  # box middles on the canvas; rounded to whole voxels of 1/7 of the axis
        assert 0.4 < np.median(distance) < 0.95
        assert (distance < 0.4).mean() < 0.15  # a shell
    free = scenes_of(keys, [16] * 12, size, STAGE)
    spread = [np.std(middles_of(labels), axis=0)[1:].mean() for labels in free.labels[:, 0]]
    confined = [np.std(middles_of(labels), axis=0)[1:].mean() for labels in scenes.labels[:, 0]]
    assert np.mean(confined) < 0.8 * np.mean(spread)


def test_occupied_voxels_are_left_alone_and_show_the_region() -> None:
    occupied = torch.zeros((2, 1, 20, 60, 60), dtype=torch.int32)
    occupied[0, :, 6:12, 4:12, 4:12] = 700  # a number with holes below it
    keys = [SampleKey(2, (i,)) for i in range(2)]
    scenes = scenes_of(keys, [8, 8], (20, 60, 60), occupied=occupied, clustering=1.0)
    assert int(scenes.labels[occupied > 0].max()) == 0
    assert int(scenes.num_placed.min()) >= 6
    touched = ndimage.binary_dilation(occupied[0, 0].numpy() > 0, iterations=2)
    assert (scenes.labels[0, 0].numpy()[touched] > 0).any()  # new cells also cluster next to what is there
    assert int(occupied.max()) == 700
    confined = scenes_of(keys, [8, 8], (20, 60, 60), CONFINED, occupied=occupied)
    assert int(confined.labels[occupied > 0].max()) == 0
    distance = np.abs(middles_of(confined.labels[0, 0]) - [8.5, 7.5, 7.5])
    assert (distance < [10, 24, 24]).all()  # around the cell that is there, in the corner


def test_light_adds_up_with_brightness_and_gain() -> None:
    keys, size = [SampleKey(5)], (30, 120, 120)
    noise = STAGE.draw(keys, size, [2])
    both = STAGE(CELLS, [torch.tensor([0, 9])], noise, size, clustering=0.0)
    assert int(both.num_placed) == 2
    for row, cell in enumerate((0, 9)):
        inside = both.light[both.labels == row + 1].mean()
        plain = CELLS.image[cell][CELLS.mask[cell]].mean() * CELLS.brightness[cell] * noise["gain"][0, row]
        assert inside == pytest.approx(float(plain), rel=0.07)


def test_stacks_are_turned_slice_by_slice_mirrored_along_z_and_scaled_in_plane() -> None:
    cells, angle = ellipsoids(3), torch.tensor([0.3, 1.0, 2.0])
    rotation, flip = torch.stack([angle.cos(), angle.sin()], -1), torch.tensor([1.0, -1.0, 1.0])
    image, mask = resample_stacks(cells, rotation, flip)
    for k in range(7):
        plane = Cells(cells.image[:, k : k + 1], cells.sdf[:, k : k + 1], cells.brightness, cells.scale)
        assert all(torch.equal(a[:, k], b) for a, b in zip((image, mask), resample(plane, rotation, flip)))
    mirrored, _ = resample_stacks(cells, rotation, flip, torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(mirrored[0], image[0])
    assert torch.equal(mirrored[1:], image[1:].flip(1))
    large = resample_stacks(replace(cells, scale=torch.full((3,), 2.0)), rotation, flip)[1]
    assert large.shape == (3, 7, 32, 32)
    assert torch.allclose(large.sum((1, 2, 3)) / mask.sum((1, 2, 3)), torch.full((3,), 4.0), rtol=0.1)


def test_mirroring_along_z_can_be_left_out() -> None:
    keys = [SampleKey(0, (i,)) for i in range(40)]
    mirror = STAGE.draw(keys, (8, 20, 20), [5] * 40)["mirror"]
    assert 0.3 < (mirror < 0).float().mean() < 0.7
    fixed = PopulationSynthesis(replace(CONFIG, mirror_z=False)).draw(keys, (8, 20, 20), [5] * 40)
    assert bool((fixed["mirror"] == 1).all())
    assert torch.allclose(fixed["direction"].norm(dim=-1), torch.ones(()))


def test_numbers_of_cells() -> None:
    keys = [SampleKey(0, (i,)) for i in range(400)]
    config = replace(CONFIG, reach=6.0, reach_z=3.0, frame_size=(20, 60, 60))
    stage, density = PopulationSynthesis(config), torch.full((400,), 2e-4)
    mean = 2e-4 * 20 * 60 * 60 * (13 * 36 * 36) / (23 * 66 * 66)
    assert np.mean(stage.num_cells(keys, (10, 30, 30), density)) == pytest.approx(mean, abs=0.1)
    assert stage.num_cells(keys[:2], (10, 30, 30), density[:2], num_cells=7) == [7, 7]
    whole = CONFINED.num_cells(keys, (20, 60, 60), density)
    assert np.mean(whole) == pytest.approx(2e-4 * 20 * 60 * 60, rel=0.05)
    part = CONFINED.num_cells(keys, (5, 14, 14), density)
    assert 0.5 < np.mean(part) < 0.5 * np.mean(whole)
    assert part[:3] == CONFINED.num_cells(keys[:3], (5, 14, 14), density[:3])


def thinned(labels: np.ndarray, step: int = 4) -> np.ndarray:
    out = np.full_like(labels, UNLABELLED)
    out[::step] = labels[::step]
    return out


def test_fit_tells_clustered_from_scattered_by_single_planes() -> None:
    fitted = {}
    for p in (0.0, 0.9):
        keys = [SampleKey(5, (i,)) for i in range(6)]
        scenes = scenes_of(keys, [18] * 6, (20, 70, 70), clustering=p)
        planes = [thinned(volume) for volume in scenes.labels[:, 0].numpy()]
        config = fit_population(planes, min_area=12, z_spacing=2.0, depth=4.5).config
        assert config.frame_size == (20, 70, 70)
        assert (config.min_area, config.z_spacing, config.region) == (12, 2.0, None)
        assert 1 < config.reach_z < 5 < config.reach < 11
        fitted[p] = config.clustering
    assert fitted[0.0] <= 0.3 < 0.5 <= fitted[0.9]


def test_fit_finds_a_region_which_explains_neighbours_without_clustering(tmp_path: Path) -> None:
    keys = [SampleKey(8, (i,)) for i in range(8)]
    scenes = scenes_of(keys, [16] * 8, (30, 90, 90), CONFINED, clustering=0.0)
    volumes = list(scenes.labels[:, 0].numpy())
    measured = {"centres": [layout.middles(v) for v in volumes], "moments": layout.moments(volumes)}
    sparse = [thinned(volume) for volume in volumes]
    confined = fit_population(sparse, min_area=12, z_spacing=2.0, depth=4.5, **measured)
    region = confined.config.region
    assert region is not None
    assert np.mean(region.semi_axes, axis=0) == pytest.approx([7.5, 19, 17], rel=0.2)
    assert np.mean(region.counts) == pytest.approx(np.mean(scenes.num_placed.numpy()), rel=0.25)  # told from planes
    free = fit_population(sparse, min_area=12, z_spacing=2.0, depth=4.5).config
    assert confined.config.clustering <= 0.3 < free.clustering
    confined.save_pretrained(tmp_path)
    back = PopulationSynthesis.from_pretrained(tmp_path)
    assert asdict(back.config) == asdict(confined.config)
    assert isinstance(back.config.region, Region)
    counts = [6, 7]
    for a, b in zip(
        confined.draw(keys[:2], (20, 60, 60), counts).values(), back.draw(keys[:2], (20, 60, 60), counts).values()
    ):
        assert torch.equal(a, b)


def test_fit_measures_wholly_annotated_volumes_itself() -> None:
    keys = [SampleKey(8, (i,)) for i in range(8)]
    scenes = scenes_of(keys, [16] * 8, (30, 90, 90), CONFINED, clustering=0.0)
    region = fit_population(list(scenes.labels[:, 0].numpy()), min_area=12, z_spacing=2.0).config.region
    assert region is not None
    assert region.counts == tuple(float(n) for n in scenes.num_placed)


def test_fit_with_little_to_see() -> None:
    labels = np.full((9, 40, 40), UNLABELLED, np.int32)
    labels[4] = 0
    labels[4, 10:20, 10:20] = 1
    config = fit_population([labels, np.full_like(labels, UNLABELLED)], min_area=30).config
    assert (config.clustering, config.gaps, config.region) == (0.0, (0,), None)
    with pytest.raises(InputError, match="not cut by the border"):
        fit_population([labels], min_area=2000)
    with pytest.raises(InputError, match=r"all \[Y, X\] or all \[Z, Y, X\]"):
        fit_population([labels, labels[4]], min_area=30)
    for name, value in (("centres", []), ("moments", []), ("counts_per_volume", [1.0, 2.0])):
        with pytest.raises(InputError, match=name):
            fit_population([labels], min_area=30, **{name: value})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"size": (40, 40)}, "one slice"),
        ({"size": (0, 5, 5)}, "size"),
        ({"size": (5,)}, "size"),
        ({"occupied": torch.zeros((1, 1, 3, 3), dtype=torch.int32)}, "occupied"),
        ({"cells": Cells(CELLS.image[:, :, :8], CELLS.sdf[:, :, :8], CELLS.brightness, CELLS.scale)}, "square"),
        ({"noise": STAGE.draw([SampleKey(0)], (40, 40), [3])}, "drawn for 3 axes"),
        ({"picks": [torch.tensor([99])]}, "indices of the 12 cells"),
    ],
)
def test_wrong_arguments_are_named(change: dict, match: str) -> None:
    noise = STAGE.draw([SampleKey(0)], (8, 40, 40), [3])
    arguments = {"cells": CELLS, "picks": [torch.tensor([0, 1])], "size": (8, 40, 40), "noise": noise} | change
    with pytest.raises(InputError, match=match):
        STAGE(**arguments)


def test_wrong_configurations_are_named() -> None:
    for fields in ({"z_spacing": 0.0}, {"reach_z": -1.0}, {"region": REGION}, {"region": REGION, "frame_size": (9, 9)}):
        with pytest.raises(InputError, match="PopulationConfig"):
            PopulationConfig(**fields)
    with pytest.raises(InputError, match="size"):
        CONFINED.draw([SampleKey(0)], (40, 40), [3])


def test_empty_slices_are_left_out_without_a_trace() -> None:
    cells, n = ellipsoids(4), 4
    padded = [
        torch.nn.functional.pad(v, (0, 0, 0, 0, 3, 2), value=fill) for v, fill in ((cells.image, 0), (cells.sdf, 9))
    ]
    padded[0][2, 1, 5, 5] = 0.5  # light beyond the mask counts, too
    tall, angle = Cells(*padded, cells.brightness, cells.scale), torch.linspace(0.2, 2, n)
    rotation, flip = torch.stack([angle.cos(), angle.sin()], -1), torch.tensor([1.0, -1.0, 1.0, -1.0])
    mirror, which = torch.tensor([1.0, -1.0, -1.0, 1.0]), torch.tensor([0, 3, 2, 3])
    light, masks = resample_stacks(tall, rotation, flip, mirror, which)
    for i, k in enumerate(which.tolist()):
        turned = slice(i, i + 1)
        for plane in range(tall.image.shape[1]):
            source = tall.image.shape[1] - 1 - plane if mirror[i] < 0 else plane
            one = Cells(
                *(v[k : k + 1, source : source + 1] for v in padded), cells.brightness[:1], cells.scale[k : k + 1]
            )
            image, mask = resample(one, rotation[turned], flip[turned])
            assert torch.equal(light[i, plane], image[0])
            assert torch.equal(masks[i, plane], mask[0])
