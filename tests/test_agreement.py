"""Agreement of texture and label."""

from __future__ import annotations

import pytest
import torch

from synthaug.errors import InputError
from synthaug.evaluation.agreement import mask_agreement


def square(start: int, stop: int) -> torch.Tensor:
    inside = torch.zeros(1, 16, 16)
    inside[:, start:stop, start:stop] = 1
    return inside


def test_a_cell_that_fills_its_mask_agrees():
    assert mask_agreement(square(4, 12), 0.5 - square(4, 12)).tolist() == [1.0]


def test_a_cell_beside_its_mask_does_not():
    assert mask_agreement(square(0, 4), 0.5 - square(8, 12)).tolist() == [0.0]
    assert float(mask_agreement(square(4, 12), 0.5 - square(4, 8))) == pytest.approx(16 / 64)


def test_shapes_have_to_fit():
    with pytest.raises(InputError, match="one shape"):
        mask_agreement(torch.zeros(1, 8, 8), torch.zeros(1, 9, 9))
