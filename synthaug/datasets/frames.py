"""Single frames by number, as `synthaug generate` and `preview` want them: no lanes, no mix, no loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from synthaug.randomness import SampleKey
from synthaug.types import Pair

if TYPE_CHECKING:
    from synthaug.cascade import Cascade
    from synthaug.generators.background import BackgroundMode

FRAMES_AT_ONCE = 4
"""Frames generated together; bounds memory."""

REUSE = 4
"""How often a cell is used (turned, flipped and rescaled in brightness every time)."""


def frames(
    cascade: Cascade,
    size: tuple[int, ...],
    seed: int,
    start: int,
    stop: int,
    *,
    num_cells: int | None = None,
    clustering: float | None = None,
    background: BackgroundMode = "model",
) -> Iterator[Pair]:
    """Pairs number `start` to `stop`; pair i depends on (cascade, settings, seed, i) alone.

    Frames are made in fixed groups. The fresh cells of a group serve all of its frames, each `REUSE` times at the most.
    """
    for group in range(start // FRAMES_AT_ONCE, -(-stop // FRAMES_AT_ONCE)):
        first = group * FRAMES_AT_ONCE
        keys = [SampleKey(seed, ("frame", first + i)) for i in range(FRAMES_AT_ONCE)]
        asked = cascade.num_cells(keys, size, num_cells=num_cells)
        # At least as many fresh cells as the fullest frame needs, so that no frame shows a cell twice.
        fresh = max(-(-sum(asked) // REUSE), *asked, 1)
        cells = cascade.cells([SampleKey(seed, ("group", group, "cell", i)) for i in range(fresh)])
        made = cascade.populate(cells, keys, size, num_cells=num_cells, clustering=clustering, background=background)
        for i in range(FRAMES_AT_ONCE):
            if start <= first + i < stop:
                yield made.image[i, 0].numpy(), made.labels[i, 0].numpy()
