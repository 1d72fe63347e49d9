"""Background, interior and border of batches; frames one by one are tested with the segmenter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthaug.errors import InputError
from synthaug.evaluation.targets import (
    BACKGROUND,
    BORDER,
    INTERIOR,
    SEAM_WEIGHT,
    frame_targets,
    loss_weights,
    volume_targets,
)
from synthaug.types import UNLABELLED


def test_frames_of_a_batch_do_not_mix() -> None:
    labels = torch.zeros(2, 12, 12, dtype=torch.int32)
    labels[0, 2, 2:8] = 1  # one pixel thick, so that its border would be all of it
    labels[1, 2:11, 2:11] = 1
    together = frame_targets(labels)
    assert torch.equal(together[0], frame_targets(labels[:1])[0])
    assert torch.equal(together[1], frame_targets(labels[1:])[0])
    assert (together[0, 2, 2:8] == INTERIOR).all()
    assert (together[1, 2, 2:11] == BORDER).all()


def test_targets_of_volumes() -> None:
    label = np.zeros((5, 9, 12), int)
    label[1:4, 1:8, 1:6], label[1:3, 1:8, 6:11], label[3:5, 1:8, 7:11] = 7, 3, 2
    target = volume_targets(torch.from_numpy(label)[None])[0]
    assert (target.dtype, tuple(target.shape)) == (torch.int64, label.shape)
    assert np.array_equal(target.numpy() == BACKGROUND, label == 0)
    assert target[2, 4].tolist() == [0, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0], "3 meets 2 below it"
    assert target[1, 4].tolist() == [0, 2, 1, 1, 1, 2, 2, 1, 1, 1, 2, 0], "its own upper side is no border"
    assert (target[2, 1, 1:11] == BORDER).all()
    sparse = np.full_like(label, UNLABELLED)
    sparse[1] = label[1]
    alone = volume_targets(torch.from_numpy(sparse)[None])[0]
    assert torch.equal(alone[1], target[1]), "a plane alone says the same"
    assert not alone[2:].any()
    assert (volume_targets(torch.ones(1, 1, 4, 4, dtype=torch.int32)) == INTERIOR).all()


def test_what_nobody_annotated_weighs_nothing() -> None:
    label = torch.full((1, 3, 6, 6), UNLABELLED)
    label[0, 1] = 0
    label[0, 1, :3], label[0, 1, 3:] = 1, 2
    weight = loss_weights(label)
    assert torch.equal(weight == 0, label == UNLABELLED)
    assert (weight[0, 1] == 3 * SEAM_WEIGHT).all(), "one plane of three weighs what all three would"


@pytest.mark.parametrize("labels", [torch.zeros(1, 4, 4), torch.zeros(4, 4, dtype=torch.int32)])
def test_what_is_no_label_batch_is_refused(labels: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"integers \[B, Y, X\]"):
        frame_targets(labels)


def test_ids_that_float32_would_merge_are_refused() -> None:
    with pytest.raises(InputError, match="2\\^24"):
        frame_targets(torch.full((1, 4, 4), 2**24, dtype=torch.int64))
