"""Augmentation of batches: image and target stay together, what lies beyond a sample weighs nothing, keys decide."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from synthaug.errors import InputError
from synthaug.evaluation.augment import AugmentConfig, normalise_batch, training_batch
from synthaug.evaluation.segmenter import normalise
from synthaug.evaluation.targets import frame_targets, loss_weights
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED
from tests.shapes import ellipse_frame, ellipsoid_volume

STILL = AugmentConfig((96, 96), rotation=0, zoom=1, contrast=1, offset=0, gamma=1, noise=0, blur=0)
KEY = SampleKey(0, ("test",))


def frames(num: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [ellipse_frame(seed, (96, 96)) for seed in range(num)]
    return tuple(torch.stack([torch.from_numpy(p[i])[None] for p in pairs]) for i in range(2))  # type: ignore[return-value]


def test_without_changes_it_only_normalises_and_mirrors() -> None:
    image, label = frames()
    out = training_batch(image, label, STILL, KEY)
    plain = normalise_batch(image)
    mirrored = 0
    for i in range(len(image)):
        flipped = not torch.allclose(out["image"][i], plain[i], atol=1e-4)
        mirrored += flipped
        same = (lambda x: x.flip(-1)) if flipped else (lambda x: x)
        assert torch.allclose(out["image"][i], same(plain[i]), atol=1e-4)
        assert torch.equal(out["target"][i], same(frame_targets(label[i])[0]))
        assert torch.equal(out["weight"][i], same(loss_weights(label[i])[0]))
    assert 0 < mirrored < len(image), "else the case of either is not tested; choose another key"


def test_normalisation_is_that_of_prediction() -> None:
    image, _ = frames(2)
    for one, whole in zip(image, normalise_batch(image)):
        assert np.allclose(whole[0].numpy(), normalise(one[0].numpy()), atol=0.02)
    assert not normalise_batch(torch.full((1, 1, 8, 8), 7.0)).any()


def test_turned_and_zoomed_cells_stay_under_their_targets() -> None:
    image, label = frames()
    out = training_batch(image, label, AugmentConfig((64, 64), noise=0, blur=0), KEY)
    assert out["image"].shape == (4, 1, 64, 64)
    assert out["target"].shape == out["weight"].shape == (4, 64, 64)
    seen = out["weight"] > 0
    for grey, target, known in zip(out["image"][:, 0], out["target"], seen):
        assert grey[known & (target > 0)].median() > grey[known & (target == 0)].median() + 0.3
        assert known.float().mean() > 0.5
    assert not (out["target"][~seen] > 0).any(), "what lies beyond the sample is neither cell nor weighs"


def test_the_key_decides() -> None:
    image, label = frames(2)
    config = AugmentConfig((64, 64))
    one, two = (training_batch(image, label, config, KEY) for _ in range(2))
    other = training_batch(image, label, config, KEY.child(1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["image"], other["image"])


def test_blur_and_noise_are_of_the_size_asked_for() -> None:
    image = torch.randn(64, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(64, 1, 64, 64, dtype=torch.int32)
    still = dataclasses.replace(STILL, size=(64, 64))
    plain = training_batch(image, label, still, KEY)["image"].std((1, 2, 3))
    blurred = training_batch(image, label, dataclasses.replace(still, blur=2.0), KEY)["image"].std((1, 2, 3))
    assert 0.2 < float((blurred < 0.9 * plain).float().mean()) < 0.7, "about every second one"
    noisy = training_batch(torch.zeros_like(image), label, dataclasses.replace(still, noise=0.1), KEY)["image"]
    assert 0.03 < float(noisy.std()) < 0.08


def test_volumes_are_turned_in_plane_and_keep_what_nobody_annotated() -> None:
    image, labels = ellipsoid_volume(0)
    sparse = labels.copy()
    sparse[np.arange(len(labels)) != 12] = UNLABELLED
    batch = [torch.from_numpy(np.stack([x, x]))[:, None] for x in (image, sparse)]
    out = training_batch(batch[0], batch[1], AugmentConfig((48, 48), noise=0, blur=0), KEY)
    assert out["image"].shape == (2, 1, 24, 48, 48)
    for grey, target, weight in zip(out["image"][:, 0], out["target"], out["weight"]):
        planes = weight.flatten(1).any(1).nonzero()[:, 0].tolist()
        assert planes in ([12], [11]), "the annotated plane alone, also where z is flipped"
        z = planes[0]
        known = weight[z] > 0
        assert grey[z][known & (target[z] > 0)].median() > grey[z][known & (target[z] == 0)].median() + 0.3


def test_what_does_not_fit_is_refused() -> None:
    image, label = frames(1)
    with pytest.raises(InputError, match="at least"):
        training_batch(image, label, AugmentConfig((128, 128)), KEY)
    with pytest.raises(InputError, match="of one shape"):
        training_batch(image, label[..., :50], AugmentConfig((32, 32)), KEY)
