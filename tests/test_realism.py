"""Distances that must be small between like frames and rise clearly for every defect that is put in."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from synthaug.datasets.pictures import orthogonal_views, stretch_rows
from synthaug.errors import InputError
from synthaug.evaluation import shape_stats
from synthaug.evaluation.copies import near_copies, nearest_distances, polar_descriptors
from synthaug.evaluation.realism import PROPERTIES, RealismReport, cell_properties, realism_report
from synthaug.evaluation.texture_features import FEATURE_NAMES, TextureFeatures, frechet_distance
from synthaug.evaluation.tiles import (
    MAX_PLANES,
    Pair,
    check_pairs,
    cut_by_border,
    cut_tiles,
    planes,
)
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED
from tests.test_copies import volumes


def frame(key: SampleKey, size: int = 192, num_cells: int = 22) -> Pair:
    """Lumpy ellipses on a flat background, with texture and camera noise, as whole numbers."""
    rng = key.numpy()
    rows, columns = np.mgrid[:size, :size]
    labels = np.zeros((size, size), np.int32)
    light = np.zeros((size, size))
    for _ in range(num_cells):
        y, x, turn, lump, phase = rng.uniform((0, 0, 0, 0.05, 0), (size, size, np.pi, 0.25, 6.28))
        along, across = rng.uniform(9, 12), rng.uniform(6, 9)
        u = (rows - y) * np.cos(turn) + (columns - x) * np.sin(turn)
        v = (columns - x) * np.cos(turn) - (rows - y) * np.sin(turn)
        inside = np.hypot(u / along, v / across) < 1 + lump * np.sin(3 * np.arctan2(v, u) + phase)
        if inside.sum() < 60 or labels[inside].any():
            continue
        labels[inside] = labels.max() + 1
        light[inside] = rng.uniform(0.7, 1.3)
    texture = 1 + 1.2 * ndimage.gaussian_filter(rng.normal(size=light.shape), 2.5) * 4
    image = 100 + 400 * ndimage.gaussian_filter(light * texture, 1.0) + rng.normal(0, 6, light.shape)
    return np.rint(image).astype(np.float32), labels


@cache
def real(name: str, num: int = 10, num_cells: int = 22) -> list[Pair]:
    return [frame(SampleKey(0, ("test", name, i)), num_cells=num_cells) for i in range(num)]


def images(pairs: list[Pair], tile: int = 96) -> list[NDArray[np.float32]]:
    return [image for image, _ in cut_tiles(pairs, tile)]


def test_tiles_are_of_one_size_with_contiguous_labels() -> None:
    image = np.arange(200 * 130, dtype=np.float32).reshape(200, 130)
    labels = np.zeros((200, 130), np.int32)
    labels[5:100, 40:50] = 7
    labels[150:160, 60:70] = 3
    tiles = cut_tiles([(image, labels)], 64)
    assert [t[0].shape for t in tiles] == [(64, 64)] * 6
    assert np.array_equal(tiles[0][0], image[4:68, 1:65])  # centred: 8 rows and 2 columns are left over
    for _, own in tiles:
        ids = np.unique(own)
        assert own.dtype == np.int32
        assert np.array_equal(ids, np.arange(len(ids)))
    assert np.array_equal(tiles[0][1] > 0, labels[4:68, 1:65] > 0)
    assert cut_tiles([(image, labels)], 256) == []


def test_frechet_distance_of_known_gaussians() -> None:
    rng = SampleKey(0, ("gauss",)).numpy()
    x = rng.normal(size=(4000, 3))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + np.array([1.0, 2.0, 0.0])) == pytest.approx(5.0)
    assert frechet_distance(x, x * np.array([3.0, 1.0, 1.0])) == pytest.approx(
        4.0, rel=0.1
    )  # (3 - 1)² of the first feature
    y = rng.normal(size=(4000, 3)) * 2
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x))


def test_frechet_distance_of_few_samples_stays_finite() -> None:
    rng = SampleKey(1, ("gauss",)).numpy()
    few = [rng.normal(size=(6, 43)) for _ in range(2)]
    assert 0 < frechet_distance(*few) < 43 * 2


def test_features_do_not_depend_on_the_camera() -> None:
    tiles = images(real("train", 4))
    features = TextureFeatures(tiles)(tiles)
    assert features.shape == (len(tiles), len(FEATURE_NAMES))
    assert np.isfinite(features).all()
    other = [0.01 * tile - 3 for tile in tiles]
    assert TextureFeatures(other)(other) == pytest.approx(features, abs=0.1)  # float32 rounds
    assert np.abs(TextureFeatures(tiles)(other)).max() == 5.0  # another camera than the reference's shows


def test_features_of_flat_and_empty_tiles_are_finite() -> None:
    extract = TextureFeatures(images(real("train", 4)))
    flat = np.full((96, 96), 100, np.float32)
    noise = flat + SampleKey(0, ("flat",)).numpy().normal(0, 6, flat.shape).astype(np.float32)
    features = extract([flat, noise])
    assert np.isfinite(features).all()
    assert (np.abs(features) <= 5).all()
    constant = TextureFeatures([flat, flat])
    assert constant([flat]) == pytest.approx(np.zeros((1, 43)))


def defects(pairs: list[Pair]) -> dict[str, list[Pair]]:
    rng = SampleKey(0, ("defects",)).numpy()
    return {
        "noise": [(image + rng.normal(0, 6, image.shape).astype(np.float32), labels) for image, labels in pairs],
        "no noise": [(np.float32(100) + 400 * (labels > 0).astype(np.float32), labels) for _, labels in pairs],
        "blur": [(ndimage.gaussian_filter(image, 1.0), labels) for image, labels in pairs],
        "brightness": [(100 + 2 * (image - 100), labels) for image, labels in pairs],
        "half the density": real("half", len(pairs), 11),
    }


@pytest.mark.parametrize("defect", ["noise", "no noise", "blur", "brightness", "half the density"])
def test_frechet_distance_rises_with_every_defect(defect: str) -> None:
    train, val = real("train"), real("val")
    extract = TextureFeatures(images(train))
    reference, unseen = extract(images(train)), extract(images(val))
    made = extract(images(defects(real("other"))[defect]))
    assert frechet_distance(made, unseen) > 3 * frechet_distance(reference, unseen)
    like = extract(images(real("other")))
    assert frechet_distance(like, unseen) < 2 * frechet_distance(reference, unseen)


def test_properties_of_known_cells() -> None:
    rows, columns = np.mgrid[:128, :128]
    labels = np.zeros((128, 128), np.int32)
    labels[np.hypot(rows - 40, columns - 40) < 10] = 1
    labels[np.hypot(rows - 40, columns - 80) < 10] = 2
    labels[np.hypot((rows - 90) / 2, columns - 60) < 8] = 3
    labels[:12, 100:112] = 4  # cut by the border
    labels[127, 0] = 5  # a sliver
    image = 50 + 200 * (labels > 0) + 100 * (labels == 3)
    found = cell_properties([(image.astype(np.float32), labels)], min_piece=10)
    assert set(found) == set(PROPERTIES)
    assert found["area"].tolist() == [305, 305, (labels == 3).sum()]
    assert found["eccentricity"][:2] == pytest.approx([0, 0], abs=1e-6)
    assert found["eccentricity"][2] == pytest.approx(np.sqrt(1 - 0.25), abs=0.02)
    assert (found["solidity"] > 0.95).all()
    assert found["intensity"] == pytest.approx([200, 200, 300])
    assert found["density"] == pytest.approx([3.5 / 128**2 * 1e4])  # the cut cell counts half, the sliver not
    # the cut cell's centre (5.5, 105.5) is nearer to cell 2 than cell 1's
    assert found["nearest_neighbour"][:2] == pytest.approx([40, min(40, np.hypot(34.5, 25.5))])
    assert len(found["relative_intensity"]) == 0  # fewer than five whole cells say nothing about the median
    assert cut_by_border(labels).tolist() == [4, 5]


def test_properties_of_an_empty_tile() -> None:
    found = cell_properties([(np.zeros((64, 64), np.float32), np.zeros((64, 64), np.int32))])
    assert found["density"].tolist() == [0.0]
    assert all(len(values) == 0 for name, values in found.items() if name != "density")


def test_nearest_distance_ignores_rotation_mirror_and_brightness() -> None:
    train = real("train", 4)
    training = polar_descriptors(train, 1.0)
    assert training.shape[1:] == (24, 64)
    assert len(training) == sum(int(labels.max()) - len(cut_by_border(labels)) for _, labels in train)
    same = [(100 + 3 * (image[::-1].T - 100), labels[::-1].T) for image, labels in train]
    copies = polar_descriptors(same, 1.0)
    assert nearest_distances(copies, training).max() < 0.02
    mirrored = polar_descriptors([(image[:, ::-1], labels[:, ::-1]) for image, labels in train], 1.0)
    assert nearest_distances(mirrored, training).max() < 0.02
    assert np.median(nearest_distances(polar_descriptors(real("val", 4), 1.0), training)) > 0.06


def test_near_copies_are_found_and_fresh_cells_are_not() -> None:
    train, val = real("train"), real("val")
    rng = SampleKey(0, ("copies",)).numpy()
    turned = []
    for image, labels in train:
        whole = np.where(np.isin(labels, cut_by_border(labels)), 0, labels)
        noisy = ndimage.rotate(image, 20, order=1, mode="reflect")
        noisy = noisy + rng.normal(0, 3, noisy.shape).astype(np.float32)
        turned.append((noisy, ndimage.rotate(whole, 20, order=0)))
    copied = near_copies(train, val, turned)
    fresh = near_copies(train, val, real("other"))
    assert copied.synthetic_share > 0.9
    assert copied.control_share > 0.9
    assert fresh.synthetic_share < 0.1
    assert fresh.val_share < 0.1
    assert copied.threshold == fresh.threshold < fresh.val_median
    assert copied.synthetic_median < 0.5 * fresh.synthetic_median
    few = near_copies(train, val, real("other"), max_cells=10)
    assert (few.num_val, few.num_synthetic) == (10, 10)


@cache
def report() -> RealismReport:
    return realism_report(real("train"), real("val"), defects(real("other"))["blur"], num_repeats=5)


def test_report_of_a_defect() -> None:
    result = report()
    assert result.tile == 192
    assert result.texture_tile == 128
    assert result.num_tiles == 8
    assert result.num_frames == (10, 10, 10)
    assert result.frechet.ratio > 3
    assert result.frechet.r2r_sd > 0
    assert set(result.wasserstein) == set(result.ks) == set(PROPERTIES)
    # a blurred image has the right outlines
    assert result.wasserstein["area"].r2s < 3 * result.wasserstein["area"].r2r + 0.1
    worst = max(result.shifts, key=lambda name: result.shifts[name].r2s)
    assert result.shifts[worst].r2s > 2


def test_report_tells_shapes_apart() -> None:
    grown = [(image, ndimage.grey_dilation(labels, size=5)) for image, labels in real("other")]
    result = realism_report(real("train"), real("val"), grown, num_repeats=2)
    assert result.wasserstein["area"].ratio > 3
    assert result.ks["area"].r2s > 0.5


def test_report_is_repeatable_and_plain() -> None:
    few = real("train")[:4], real("val")[:4], real("other")[:4]
    first, again, other = (realism_report(*few, num_repeats=2, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert len(few[0]) == first.num_tiles == 4  # all tiles of four frames: another seed changes nothing
    assert other.frechet.r2s == pytest.approx(first.frechet.r2s)
    plain = report().as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["frechet"]["r2s"] == report().frechet.r2s


def test_report_as_text() -> None:
    text = report().table()
    assert text.splitlines()[0].split() == ["r2r", "r2s", "r2s/r2r"]
    assert f"{report().frechet.r2s:.2f} ± {report().frechet.r2s_sd:.2f}" in text
    for name in PROPERTIES:
        assert f"{name.replace('_', ' ')}, KS" in text
    assert "near-copies of training cells" in text
    assert len({len(line) for line in text.splitlines()[: len(report().rows()) + 1]}) == 1  # columns line up


def test_synthetic_floats_are_rounded_like_real_whole_numbers() -> None:
    rng = SampleKey(0, ("rounding",)).numpy()
    floats = [
        (image + rng.uniform(-0.49, 0.49, image.shape).astype(np.float32), labels) for image, labels in real("other")
    ]
    train, val = real("train")[:4], real("val")[:4]
    first, second = (realism_report(train, val, made, num_repeats=2) for made in (floats[:4], real("other")[:4]))
    assert first.frechet == second.frechet


def test_frames_of_other_sizes_are_cut_to_one() -> None:
    small = [(image[:128, :160], labels[:128, :160]) for image, labels in real("other")]
    result = realism_report(real("train"), real("val"), small, num_repeats=2)
    assert result.tile == result.texture_tile == 128


def test_sets_without_whole_cells() -> None:
    empty = [(image, np.zeros_like(labels)) for image, labels in real("other")]
    result = realism_report(real("train"), real("val"), empty, num_repeats=2)
    assert result.num_cells[2] == 0
    assert np.isnan(result.wasserstein["area"].r2s)
    assert np.isnan(result.copies.synthetic_share)
    assert result.wasserstein["density"].r2s > 1
    assert json.dumps(result.as_dict(), allow_nan=False)
    assert "nan" in result.table()


def test_bad_input() -> None:
    train = real("train")
    image, labels = train[0]
    with pytest.raises(InputError, match="val: expected at least one"):
        realism_report(train, [], train)
    with pytest.raises(InputError, match=r"synthetic\[0\]: expected image and labels of one shape"):
        realism_report(train, train, [(image, labels[:50])])
    with pytest.raises(InputError, match=r"synthetic\[1\]: expected integer labels, got float32"):
        realism_report(train, train, [train[0], (image, labels.astype(np.float32))])
    with pytest.raises(InputError, match="finite image"):
        realism_report(train, train, [(np.full_like(image, np.nan), labels)])
    with pytest.raises(InputError, match=r"tile: expected 64 px up to .* \(192 px\), got 200"):
        realism_report(train, train, train, tile=200)
    with pytest.raises(InputError, match=r"tile: expected 64 px .*got 50\. Leave out smaller frames"):
        realism_report(train, train, [(image[:50], labels[:50])])
    with pytest.raises(InputError, match="4 tiles of 128 px each, got"):
        realism_report(train, train, train[:3])


def thinned(pairs: list[Pair], step: int = 5) -> list[Pair]:
    """Only every so many-th plane annotated."""
    out = []
    for image, labels in pairs:
        sparse = np.full_like(labels, UNLABELLED)
        sparse[2::step] = labels[2::step]
        out.append((image, sparse))
    return out


def test_boxes_of_volumes_keep_what_is_not_annotated() -> None:
    image, labels = thinned(volumes("train"))[0]
    boxes = cut_tiles([(image, labels)], (10, 64, 64))
    assert [own.shape for own, _ in boxes] == [(10, 64, 64)] * 2
    assert np.array_equal(boxes[1][0], image[12:22, 8:72, 8:72])
    for (_, own), start in zip(boxes, (2, 12)):
        given = labels[start : start + 10, 8:72, 8:72]
        assert np.array_equal(own < 0, given == UNLABELLED)
        assert np.array_equal(own > 0, given > 0)
        assert np.array_equal(np.unique(own), np.arange(-1, own.max() + 1))
    labels = np.zeros((5, 6, 7), np.int32)
    labels[0, 2, 2], labels[2, 5, 3], labels[3, 3, 6], labels[2, 2, 2] = 4, 3, 2, 9
    assert cut_by_border(labels).tolist() == [2, 3, 4]


def test_planes_of_volumes_at_true_aspect() -> None:
    rng = SampleKey(0, ("planes",)).numpy()
    image = rng.normal(size=(20, 30, 40)).astype(np.float32)
    labels = rng.integers(0, 9, image.shape).astype(np.int32)
    across = planes([(image, labels)], "xy")
    assert len(across) == MAX_PLANES
    assert all(any(np.array_equal(own, plane) for plane in image) for own, _ in across)
    along = planes([(image, labels)], "xz", (2.0, 0.8, 0.8))
    assert {own.shape for own, _ in along} == {(50, 40)}
    assert [own.shape for own, _ in planes([(image, labels)], "xz")] == [(20, 40)] * MAX_PLANES
    sparse = labels.copy()
    sparse[np.arange(20) % 7 != 3] = UNLABELLED
    annotated = planes([(image, sparse)], "xy", annotated=True)
    assert [np.array_equal(own, image[z]) for (own, _), z in zip(annotated, (3, 10, 17))] == [True] * 3
    assert len(annotated) == 3

    ramp = np.arange(6, dtype=np.float32)[:, None].repeat(2, 1)
    tall = stretch_rows(ramp, 3.0)
    assert tall.shape == (18, 2)
    assert tall[:, 0] == pytest.approx(np.clip((np.arange(18) + 0.5) / 3 - 0.5, 0, 5))
    assert np.array_equal(stretch_rows(ramp.astype(np.int32), 3.0)[:, 0], np.arange(6).repeat(3))


def test_views_pass_through_the_cells() -> None:
    labels = np.zeros((10, 20, 30), np.int32)
    labels[1:4, 4:8, 20:29] = 1
    labels[2, 5, 1] = 2
    image = np.arange(labels.size, dtype=np.float32).reshape(labels.shape)
    views = orthogonal_views((image, labels), (3.0, 1.0, 1.0))
    assert {name: own.shape for name, (own, _) in views.items()} == {"xy": (20, 30), "xz": (30, 30), "yz": (20, 30)}
    assert np.array_equal(views["xy"][0], image[2])
    assert np.array_equal(views["xz"][1], labels[:, 5].repeat(3, 0))
    assert np.array_equal(views["yz"][1], labels[:, :, 20].repeat(3, 0).T)
    sparse = np.full_like(labels, UNLABELLED)
    sparse[3] = labels[3]
    assert np.array_equal(orthogonal_views((image, sparse))["xy"][0], image[3])
    assert min(own.min() for _, own in orthogonal_views((image, sparse)).values()) == 0
    middle = orthogonal_views((image, np.zeros_like(labels)))
    assert np.array_equal(middle["xy"][0], image[5])
    assert np.array_equal(middle["yz"][0], image[:, :, 15].T)


SIZE = (2.0, 1.0, 1.0)


@cache
def volume_report(defect: str) -> RealismReport:
    made = volumes("other")
    if defect == "shuffled planes":
        order = SampleKey(0, ("shuffle",)).numpy().permutation(24)
        made = [(image[order], labels) for image, labels in made]
    return realism_report(volumes("train"), volumes("val"), made, num_repeats=3, voxel_size_um=SIZE)


def test_report_of_like_volumes() -> None:
    result = volume_report("none")
    assert result.tile == (24, 80, 80)
    assert result.texture_tile == 80
    assert set(result.frechet_planes) == {"xy", "xz"}
    assert all(distance.ratio < 2 for distance in result.frechet_planes.values())
    assert set(result.wasserstein) == set(result.ks) == set(shape_stats.PROPERTIES)
    assert min(result.num_cells) > 15
    assert not result.sections
    assert result.copies.num_train > result.copies.num_val


def test_both_planes_of_texture_stand_alone_and_together() -> None:
    """The same planes in another order: nothing shows across the axis, everything along it."""
    result = volume_report("shuffled planes")
    xy, xz = (result.frechet_planes[kind] for kind in ("xy", "xz"))
    assert xy.ratio < 2
    assert xz.ratio > 5
    assert result.frechet.r2s == pytest.approx((xy.r2s + xz.r2s) / 2)
    assert result.frechet.r2r == pytest.approx((xy.r2r + xz.r2r) / 2)
    assert max(result.shifts, key=lambda name: result.shifts[name].r2s).startswith("xz ")
    assert set(result.shifts) == {f"{kind} {name}" for kind in ("xy", "xz") for name in FEATURE_NAMES}


def test_volume_report_tells_shapes_apart() -> None:
    """Cells of two thirds of the depth, in planes that look the same."""
    flat = []
    for image, labels in volumes("other"):
        kept = np.zeros_like(labels)
        for index in range(1, labels.max() + 1):
            depth = np.flatnonzero((labels == index).any((1, 2)))
            cut = len(depth) // 6
            kept[depth[cut : len(depth) - cut]] += index * (labels[depth[cut : len(depth) - cut]] == index)
        flat.append((image, kept))
    result = realism_report(volumes("train"), volumes("val"), flat, num_repeats=3, voxel_size_um=SIZE)
    assert result.frechet == volume_report("none").frechet
    assert result.wasserstein["z_extent"].r2s > 1
    assert result.wasserstein["z_extent"].ratio > 3
    assert result.wasserstein["equatorial_area"].r2s < 0.6


def test_volume_report_as_text_and_json() -> None:
    result = volume_report("none")
    text = result.table()
    for words in ("distance, xy", "distance, xz", "z extent, W1 / sd", "Volumes (train, val, synthetic): 4, 4, 4"):
        assert words in text
    assert "Tiles of 24 x 80 x 80 px" in text
    assert "mean of xy and xz" in text
    plain = result.as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["frechet_planes"]["xz"]["r2s"] == result.frechet_planes["xz"].r2s


def test_volumes_with_few_annotated_planes_are_compared_in_planes() -> None:
    train = thinned(volumes("train"))
    result = realism_report(train, volumes("val"), volumes("other"), num_repeats=3, voxel_size_um=SIZE)
    assert result.sections
    assert set(result.wasserstein) == set(PROPERTIES)
    assert result.frechet == volume_report("none").frechet  # needs no labels
    assert result.wasserstein["area"].ratio < 3
    assert result.num_cells[0] < result.num_cells[1]  # 5 planes a volume instead of 16
    assert "compared in planes" in result.table()


def test_shallow_volumes_are_measured_across_the_axis_only() -> None:
    sets = [[(image[8:16], labels[8:16]) for image, labels in volumes(name)] for name in ("train", "val", "other")]
    result = realism_report(*sets, num_repeats=2, voxel_size_um=SIZE)
    assert set(result.frechet_planes) == {"xy"}
    assert result.frechet == result.frechet_planes["xy"]
    assert "of xy alone" in result.table()


def test_bad_volumes() -> None:
    image, labels = volumes("train")[0]
    frames, stacks = real("train"), volumes("train")
    with pytest.raises(InputError, match="all frames or all volumes, got 2D train, 2D val, 3D synthetic"):
        realism_report(frames, frames, stacks)
    with pytest.raises(InputError, match=r"either frames \[Y, X\] or volumes"):
        check_pairs("train", [frames[0], stacks[0]])
    with pytest.raises(InputError, match="voxel_size_um"):
        realism_report(stacks, stacks, stacks, voxel_size_um=(1.0, 1.0, 0.0))
    with pytest.raises(InputError, match=r"tile: expected 64 px up to .* \(60 px\)"):
        realism_report(stacks, stacks, [(image[:, :60], labels[:, :60])])
    torn = labels.copy()
    torn[3, 0, 0] = UNLABELLED
    for wrong in (labels - 2, torn):
        with pytest.raises(InputError, match="-1 in whole planes of a volume, got minimum"):
            check_pairs("train", [(image, wrong)])
    with pytest.raises(InputError, match="-1 in whole planes of a volume"):
        check_pairs("train", [(image[0], labels[0] - 1)])
