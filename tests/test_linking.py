"""Sections of planes become cells of volumes."""

from __future__ import annotations

import numpy as np
import pytest

from synthaug.errors import InputError
from synthaug.evaluation.linking import link_planes
from synthaug.evaluation.metrics import seg
from tests.shapes import ellipsoid_volume


def test_true_sections_become_true_cells_again() -> None:
    _, labels = ellipsoid_volume(0)
    rng = np.random.default_rng(0)
    planes = []
    for plane in labels:
        numbers = np.zeros(labels.max() + 1, np.int32)
        numbers[1:] = 1 + rng.permutation(labels.max())  # another number in every plane
        planes.append(numbers[plane])
    linked = link_planes(planes)
    assert linked.dtype == np.int32
    assert np.array_equal(np.unique(linked), np.arange(linked.max() + 1))
    assert seg(linked, labels) > 0.9, "but for caps that hardly overlap the next section"


def test_a_cell_that_divides_keeps_its_number_on_the_larger_part() -> None:
    one = np.array([[1, 1, 1, 1, 1, 1]])
    two = np.array([[3, 3, 3, 3, 0, 9]])
    assert link_planes([one, two]).tolist() == [[[1, 1, 1, 1, 1, 1]], [[1, 1, 1, 1, 0, 2]]]


def test_what_hardly_overlaps_is_another_cell_and_gaps_part() -> None:
    one, two = np.array([[1, 1, 1, 1, 0, 0]]), np.array([[0, 0, 0, 5, 5, 5]])
    assert link_planes([one, two]).max() == 2
    empty = np.zeros_like(one)
    assert link_planes([one, empty, one])[:, 0, 0].tolist() == [1, 0, 2]
    assert not link_planes([empty, empty]).any()
    with pytest.raises(InputError, match="at least one"):
        link_planes([])
