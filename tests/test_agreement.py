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


def test_a_stack_counts_as_a_whole():
    image, inside = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    inside[:, 1] = square(4, 12)
    image[:, 1] = square(4, 12)
    image[1, 2] = square(4, 12)  # light in a plane that the cell does not reach
    assert mask_agreement(image, 0.5 - inside).tolist() == [1.0, 0.5]


def test_shapes_have_to_fit():
    for shapes in (((1, 8, 8), (1, 9, 9)), ((1, 8, 8), (1, 1, 8, 8)), ((8, 8), (8, 8)), ((0, 8, 8), (0, 8, 8))):
        with pytest.raises(InputError, match="one shape"):
            mask_agreement(*(torch.zeros(shape) for shape in shapes))
