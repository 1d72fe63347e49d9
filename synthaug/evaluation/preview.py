"""Real beside synthetic, with the numbers: what `synthaug preview` and the end of `fit` write."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from synthaug.datasets.frames import frames
from synthaug.errors import InputError
from synthaug.evaluation.realism import realism_report
from synthaug.evaluation.sheet import write_contact_sheet, write_sheet
from synthaug.generators.stage import write_atomic
from synthaug.types import Pair

if TYPE_CHECKING:
    from synthaug.cascade import Cascade

PREVIEW_FRAMES = {2: 40, 3: 12}
"""Synthetic frames made, by the dimensions of the cascade."""


def write_preview(
    cascade: Cascade,
    real: Sequence[Pair],
    held_out: Sequence[Pair] | None,
    out: Path,
    seed: int,
    log: Callable[[str], None],
) -> None:
    """sheet.html, sheet.png and realism.json: real beside synthetic frames, numbers against `held_out`.

    Args:
        cascade: What makes the synthetic frames.
        real: Real pairs.
        held_out: Real pairs the cascade was not fitted to, or None: `real` is split in two halves for the numbers.
        out: Folder, made if it is not there.
        seed: Of the synthetic frames.
        log: Gets a line at a time.
    """
    out.mkdir(parents=True, exist_ok=True)
    num = PREVIEW_FRAMES[cascade.ndim]
    log(f"generating {num} synthetic frames")
    synthetic = list(frames(cascade, common_size([*real, *(held_out or [])]), seed, 0, num))
    report = None
    train, val = (real, held_out) if held_out else (real[::2], real[1::2])
    try:
        report = realism_report(train, val, synthetic, voxel_size_um=cascade.voxel_size_um)
    except InputError as error:  # a handful of small images: the pictures matter all the same
        log(f"no realism numbers: {error}")
    else:
        write_atomic(out / "realism.json", (json.dumps(report.as_dict(), indent=2) + "\n").encode())
        log(report.table())
    shown = held_out or real
    title = f"{cascade.config.name}: real beside synthetic"
    voxel = cascade.voxel_size_um
    write_sheet(out / "sheet.html", shown, synthetic, title=title, report=report, voxel_size_um=voxel)
    write_contact_sheet(out / "sheet.png", shown, synthetic, voxel_size_um=voxel)


def common_size(pairs: Sequence[Pair]) -> tuple[int, ...]:
    """Size that every pair has, at most 256 pixels along Y and X."""
    smallest = [min(p[0].shape[axis] for p in pairs) for axis in range(pairs[0][0].ndim)]
    return (*smallest[:-2], *(min(256, n) for n in smallest[-2:]))
