"""Cells of volumes out of planes that were segmented one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from synthaug.errors import InputError
from synthaug.evaluation.metrics import overlaps

LEAST_IOU = 0.25
"""Overlap from which sections in neighbouring planes are of one cell; Cellpose's default for stitching."""


def link_planes(planes: Sequence[NDArray[np.int32]], least_iou: float = LEAST_IOU) -> NDArray[np.int32]:
    """Give sections the number of the section in the plane before that they overlap most.

    The rule of Cellpose's `stitch3D` (Stringer et al., Nature Methods 2021): IoU of at least `least_iou`, one to one.

    Args:
        planes: int32 [Y, X] each, 0 = background, in their order along z.
        least_iou: In (0, 1].

    Returns:
        int32 [Z, Y, X], contiguous from 1.

    >>> link_planes([np.array([[1, 1, 0, 0]]), np.array([[2, 2, 0, 1]])]).tolist()
    [[[1, 1, 0, 0]], [[1, 1, 0, 2]]]
    """
    if not len(planes):
        raise InputError("planes", expected="at least one", got="none")
    out = [np.asarray(planes[0], np.int32)]
    highest = int(out[0].max(initial=0))
    for plane in planes[1:]:
        found = overlaps(plane, out[-1])
        names = np.zeros(int(plane.max(initial=0)) + 1, np.int32)
        taken: set[int] = set()
        pairs = np.argwhere(found.iou >= least_iou)
        for before, now in sorted(pairs.tolist(), key=lambda pair: -found.iou[pair[0], pair[1]]):
            old, new = int(found.truth_ids[before]), int(found.pred_ids[now])
            if not names[new] and old not in taken:
                names[new] = old
                taken.add(old)
        for new in found.pred_ids:
            if not names[new]:
                highest += 1
                names[new] = highest
        out.append(names[plane])
    volume = np.stack(out)
    numbers = np.zeros(highest + 1, np.int32)
    present = np.unique(volume)
    numbers[present[present > 0]] = np.arange(1, (present > 0).sum() + 1)
    return numbers[volume]
