"""Signed distances to outlines."""

from __future__ import annotations

import numpy as np
import pytest

from synthaug.generators.distance import signed_distance


def ellipse(a: float, b: float, size: int = 64) -> np.ndarray:
    yy, xx = np.mgrid[:size, :size] - size // 2
    return (xx / a) ** 2 + (yy / b) ** 2 < 1


def test_signed_distance_is_negative_inside_and_metric() -> None:
    sdf = signed_distance(ellipse(20, 20))
    assert sdf[32, 32 + 10] == pytest.approx(-10, abs=1)
    assert sdf[32, 32 + 26] == pytest.approx(6, abs=1)


def test_signed_distance_keeps_the_area() -> None:
    for mask in (ellipse(20, 9), ellipse(4, 3), np.pad(np.ones((3, 3), bool), 10)):
        assert (signed_distance(mask) < 0).sum() == mask.sum()
