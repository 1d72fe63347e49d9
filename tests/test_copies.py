"""Near-copies among the cells of volumes: found in whatever plane and direction they come back, fresh cells are not."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy import ndimage

from synthaug.evaluation.copies import cell_planes, near_copies
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED, Pair


def volume(key: SampleKey, shape: tuple[int, int, int] = (24, 80, 80), num_cells: int = 14) -> Pair:
    """Lumpy ellipsoids on a flat background, textured, blurred along z more than across, with camera noise."""
    rng = key.numpy()
    where = np.mgrid[tuple(slice(n) for n in shape)]
    labels = np.zeros(shape, np.int32)
    light = np.zeros(shape)
    for _ in range(3 * num_cells):
        centre = rng.uniform((4, 8, 8), np.array(shape) - (5, 9, 9))
        axes, lump, phase = rng.uniform((4, 6, 5), (5, 9, 7)), rng.uniform(0.05, 0.25), rng.uniform(0, 6.28)
        z, y, x = (where[i] - centre[i] for i in range(3))
        around = np.arctan2(y, x)
        inside = (z / axes[0]) ** 2 + (y / axes[1]) ** 2 + (x / axes[2]) ** 2 < 1 + lump * np.sin(3 * around + phase)
        if labels.max() < num_cells and not labels[inside].any():
            labels[inside] = labels.max() + 1
            light[inside] = rng.uniform(0.7, 1.3)
    texture = 1 + 5 * ndimage.gaussian_filter(rng.normal(size=shape), (1.5, 2, 2))
    image = 100 + 400 * ndimage.gaussian_filter(light * texture, (1.5, 0.8, 0.8)) + rng.normal(0, 6, shape)
    return np.rint(image).astype(np.float32), labels


@cache
def volumes(name: str, num: int = 4, num_cells: int = 14) -> list[Pair]:
    return [volume(SampleKey(0, ("volumes", name, i)), num_cells=num_cells) for i in range(num)]


def test_every_cell_is_in_the_plane_where_it_is_largest() -> None:
    labels = np.zeros((7, 20, 20), np.int32)
    for z, half in enumerate((1, 2, 4, 4, 3, 0, 0)):
        labels[z, 10 - half : 10 + half, 5 - half : 5 + half] = 4
    labels[4:6, 3:9, 12:18] = 9
    image = SampleKey(0, ("planes",)).numpy().normal(size=labels.shape).astype(np.float32)
    first, second = cell_planes([(image, labels)])
    assert np.array_equal(first[0], image[2])
    assert np.array_equal(first[1], labels[2])
    assert np.array_equal(second[0], image[4])
    assert np.array_equal(second[1], np.where(labels[4] == 9, 9, 0))  # cell 4 has been smaller there than in plane 2
    half = cell_planes([(image, labels)], 0.5)
    assert [sorted(np.unique(own)[1:].tolist()) for _, own in half] == [[4], [4], [4, 9], [9]]
    assert cell_planes([(image, np.zeros_like(labels))]) == []


def test_annotated_planes_stand_for_cells() -> None:
    image, labels = volumes("train")[0]
    sparse = np.full_like(labels, UNLABELLED)
    for z in (8, 14):
        sparse[z] = labels[z] + 100 * z * (labels[z] > 0)
    planes = cell_planes([(image, sparse)])
    assert len(planes) == 2
    for z, (plane, own) in zip((8, 14), planes):
        assert np.array_equal(plane, image[z])
        assert np.array_equal(own, sparse[z])


def test_copies_of_cells_are_found_and_fresh_cells_are_not() -> None:
    train, val = volumes("train"), volumes("val")
    rng = SampleKey(0, ("copies",)).numpy()
    turned = []
    for image, labels in train:
        noisy = ndimage.rotate(image, 40, (1, 2), order=1, mode="reflect")
        own = ndimage.rotate(labels, 40, (1, 2), order=0)
        # one plane up and upside down: the cell's planes are not where they were
        noisy = np.roll(noisy, 1, 0)[::-1] + rng.normal(0, 3, noisy.shape).astype(np.float32)
        turned.append((noisy.astype(np.float32), np.roll(own, 1, 0)[::-1].astype(np.int32)))
    copied = near_copies(train, val, turned)
    fresh = near_copies(train, val, volumes("other"))
    assert copied.synthetic_share > 0.9
    assert copied.control_share > 0.9
    assert fresh.synthetic_share < 0.15
    assert fresh.val_share < 0.15
    assert copied.threshold == fresh.threshold < fresh.val_median
    assert fresh.num_synthetic == sum(int(labels.max()) for _, labels in volumes("other"))  # one section a cell
    assert fresh.num_train > 2 * sum(int(labels.max()) for _, labels in train)  # several


def test_copies_of_annotated_planes_are_found() -> None:
    train = []
    for image, labels in volumes("train"):
        sparse = np.full_like(labels, UNLABELLED)
        sparse[[6, 12, 18]] = labels[[6, 12, 18]]
        train.append((image, sparse))
    found = near_copies(train, volumes("val"), train)
    assert found.synthetic_share == 1.0
    assert found.num_train >= found.num_synthetic > 30


def test_volumes_without_cells_say_nothing() -> None:
    empty = [(image, np.zeros_like(labels)) for image, labels in volumes("train")]
    for sets in ((empty, empty, empty), (volumes("train"), volumes("val"), empty)):
        found = near_copies(*sets)
        assert np.isnan(found.synthetic_share)
        assert np.isnan(found.threshold)
