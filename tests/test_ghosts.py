"""Dim blobs nobody annotated: how many there are, and what they look like in volumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from synthaug.generators.ghosts import LEAST, MOST, PRIOR, draw_ghosts, fit_ghosts, ghost_light
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED

SIZE = (24, 72, 72)


def lit(seed: int = 0, num: int = 12, size: tuple[int, ...] = SIZE) -> torch.Tensor:
    """Light of balls of 100 counts."""
    rng = np.random.default_rng(seed)
    zyx = np.indices(size) * np.array([2, 1, 1])[:, None, None, None]
    volume = np.zeros(size, np.float32)
    for _ in range(num):
        middle = rng.random(3) * (np.array(size) * [2, 1, 1])
        volume[sum((a - c) ** 2 for a, c in zip(zyx, middle)) < 8**2] = 100
    return torch.from_numpy(volume)[None, None]


def one_row(seed: int) -> dict[str, torch.Tensor]:
    return draw_ghosts([SampleKey(0, (seed,))], SIZE)


def test_blobs_are_dim_cells_elsewhere() -> None:
    light = lit()
    shares = []
    for rate in (0.0, 0.1, 0.3):
        blobs = [ghost_light(light, one_row(i), rate, 0.25) for i in range(12)]
        for blob in blobs:
            assert blob.shape == light.shape
            assert float(blob.min()) >= 0
            assert float(blob.max()) <= MOST * 100
        shares.append(float(torch.stack([(b > 5).float().mean() for b in blobs]).mean()))
        if rate:
            bright = torch.cat([b[b > 5] for b in blobs])
            assert 15 < float(bright.quantile(0.95)) < 50  # 25 in the middle of a blob, half more or less
    assert shares[0] == 0
    assert 0.01 < shares[1] < shares[2] < 0.5
    # not the shadow of the very cells they come from
    overlap = float(((blobs[0] > 5) & (light > 0)).sum() / (blobs[0] > 5).sum())
    assert overlap < 0.6


def test_a_key_decides_its_blobs() -> None:
    keys = [SampleKey(0, (i,)) for i in range(3)]
    together, alone = draw_ghosts(keys, SIZE), draw_ghosts(keys[1:2], SIZE)
    for name, value in alone.items():
        assert torch.equal(together[name][1:2], value)
    light = lit()
    first = ghost_light(light, alone, 0.3, 0.25)
    assert torch.equal(first, ghost_light(light, alone, 0.3, 0.25))
    assert not torch.equal(first, ghost_light(light, draw_ghosts(keys[2:], SIZE), 0.3, 0.25))


def planes(blobs: float, num: int = 6, seed: int = 0) -> tuple[list[NDArray[np.float64]], list[NDArray[np.int32]]]:
    """Volumes with 10 annotated discs of 100 counts in one plane, and so many unannotated ones of `LEAST` * 250 counts."""
    rng = np.random.default_rng(seed)
    volumes, labels = [], []
    for _ in range(num):
        places = [(y, x) for y in range(15, 190, 30) for x in range(15, 190, 30)]
        chosen = rng.permutation(len(places))
        seen, own = np.zeros((200, 200)), np.zeros((200, 200), np.int32)
        for i, place in enumerate(chosen[: 10 + int(blobs)]):
            inside = np.hypot(*(np.indices(seen.shape) - np.array(places[place])[:, None, None])) < 7
            seen[inside] = 100 if i < 10 else 250 * LEAST
            own[inside & (i < 10)] = i + 1
        volume = 100 + np.stack([ndimage.gaussian_filter(seen, 1.0)] * 5) + rng.normal(0, 5, (5, 200, 200))
        label = np.full(volume.shape, UNLABELLED, np.int32)
        label[2] = own
        volumes.append(volume)
        labels.append(label)
    return volumes, labels


@pytest.mark.parametrize("blobs", [0, 3, 6])
def test_they_are_counted_in_the_annotated_planes(blobs: int) -> None:
    volumes, labels = planes(blobs)
    rate, contrast = fit_ghosts(volumes, labels, [100.0] * len(volumes))
    assert rate == pytest.approx((6 * blobs + PRIOR[0]) / (60 + PRIOR[1]), abs=0.04)
    # a little less than it is, as blobs are part of what surrounds them
    assert 1.6 * LEAST < contrast < 2.6 * LEAST


def test_nothing_to_tell_from_leaves_the_usual() -> None:
    volumes, labels = planes(3, num=1)
    assert fit_ghosts(volumes, labels, [0.0]) == pytest.approx((PRIOR[0] / PRIOR[1], PRIOR[2]))
    assert fit_ghosts([], [], []) == pytest.approx((PRIOR[0] / PRIOR[1], PRIOR[2]))
