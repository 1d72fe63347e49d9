"""What a few annotations cannot tell is borrowed from where there were many: how widely frames and cells differ.

Whoever annotates one frame of ten cells shows how bright, dense and large cells are, but hardly how much that varies. So
beside the own rows of a table stand rows around their middle that deviate from it as the rows of another data set deviate
from theirs (shrinkage towards a prior, as in empirical Bayes). The more own rows there are, the less the borrowed ones weigh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from synthaug.errors import InputError
from synthaug.generators.background import Background
from synthaug.generators.frame_fit import NAMES, POSITIVE, fit_jitter
from synthaug.generators.masks import MaskDDPM
from synthaug.generators.population import PopulationSynthesis
from synthaug.generators.volume_fit import VOLUME_NAMES, VOLUME_POSITIVE

Centre = Callable[[Tensor], Tensor]
"""From a table to what its rows lie around."""

PRIOR_FRAMES, PRIOR_CELLS = 4.0, 40.0
"""Own frames and cells that the borrowed ones weigh as much as."""

MOST = 128
"""Borrowed rows at most."""

ENOUGH = 10
"""Nothing is borrowed where there are so many times more own rows than the borrowed ones would weigh."""

LEAST_SPREAD = {"density": 0.5, "brightness": 0.35}
"""Standard deviation between frames of the logarithm of the cells' density, and between volumes of the logarithm of their
brightness, too, at least: few data sets are as even as one frame suggests."""

EMPTY = 0.04
"""Share of frames without cells beside the others: a network that never saw one finds cells in the noise of the first."""

CROWDED = 0.5
"""Clustering probability, at least, where few frames are annotated: what a network needs many examples of is cells that touch.
From four frames of BBBC039 in which 9 % did, networks merged a fifth of all cells (`benchmarks/evidence.md`)."""

TOUCHING, DEEPEST = 2 / 3, 0.4
"""Share of close neighbours that are pressed together where few frames are annotated, at least, and how far the first of them
are, in radii of the usual cell; the others evenly less. About that is in three annotated data sets of nuclei, and half as much
was in the stream from four frames of BBBC039 in which no two cells touch: networks merged 143 of 2,457 cells instead of 121."""

ODD_RATE = 0.09
"""Share of very dim and very bright cells where no frame tells. In three annotated data sets of nuclei 5 % have less than .42
to .60 of the contrast usual in their frame and 5 % more than 1.4 to 1.7, 1 % of crops one of three times as much; streams of
cascades adapted to four patches had .60 to .71 and 1.4 to 1.6, and networks trained on them missed the dim ones."""

LENT = 0.3
"""Share of the cells, at most, that the cascade adapted makes as it was. Half of the cells in four patches of DSB2018-256 were
the quarters of dividing nuclei: networks split round nuclei with a little texture, which the patches did not show, until a
third of the stream's cells came from elsewhere. A half is too much where the own cells are alike (`benchmarks/evidence.md`)."""

CYTOPLASM = 0.45
"""Share of frames with light of the cytoplasm where no frame tells. Networks that knew none drew its edges as nuclei: 227 false
cells beside 2,129 true ones (DSB2018-256, one patch)."""

MOTTLED = 1.0
"""Share of the lent cells that are mottled (`mottle_of_lent`): networks cut nuclei with clumps of chromatin that no annotated
cell showed. To mottle the own cells as well made them merge neighbours where cells are alike (`benchmarks/evidence.md`)."""

SMALL = 1.25
"""Factor by which the data's cells are larger than the lent ones, from which on these are no longer mottled."""

FRAGMENTS = 0.15
"""Groups of fragments for each cell where no frame tells. In DSB2018-360 17 % of what is annotated has under .15 of the area
of a usual cell (slivers at the border included), in BBBC039 5 %, in DSB2018-256 3 %."""

SMALLEST_LENT, LARGEST_LENT = 0.25, 2.0
"""Factors of size between which cells of another cascade are lent."""

USUAL = 2.0
"""See `usual_rows`: of another data set's cells only those are borrowed and lent. A third of the rows of `nuclei-2d-large` are
beyond; cells as odd as those taught networks to merge."""

WIDEST = 1.4
"""Deviations are cut there: on logarithms, a factor of 4."""


def median_of_columns(table: Tensor) -> Tensor:
    """The median of each column [K] of a table [N, K], NaN left out."""
    return table.nanquantile(0.5, dim=0)


def mean_of_columns(table: Tensor) -> Tensor:
    """The mean of each column [K] of a table [N, K], NaN left out.

    What volumes borrow lies around means: planes cut cells anywhere, so that their outlines are small as specks are, and
    smaller than the cells. Around medians, without odd rows, four of five trainings on BBBC050 ended lower, .015 in the mean.
    """
    return table.nanmean(0)


def borrow_spread(
    own: Tensor, source: Tensor, prior: float, middle: Tensor | None = None, *, centre: Centre = median_of_columns
) -> Tensor:
    """A table in which rows that deviate as those of another table do stand beside the own rows.

    Args:
        own: float [N, K], N >= 1, on scales on which deviations add up (logarithms of what varies by factors); NaN where a
            row cannot tell.
        source: float [M, K], the same of the other data set.
        prior: Own rows that all of the borrowed ones weigh as much as.
        middle: float [K], what the borrowed rows lie around; default: the `centre` of the own ones.
        centre: Of `source`, too. By default medians: specks of debris among cells pull the mean so far down that cells came
            out half as large again.

    Returns:
        float [N * r + m, K]: every own row `r` times, then m borrowed ones; `own` itself where it is large enough.

    >>> borrow_spread(torch.tensor([[5.0]]), torch.tensor([[1.0], [2.0], [3.0]]), prior=3)[:, 0].tolist()
    [5.0, 4.0, 5.0, 6.0]
    """
    if len(own) >= ENOUGH * prior or not len(source):
        return own
    some = source[torch.linspace(0, len(source) - 1, min(MOST, len(source))).long()]
    deviation = torch.nan_to_num((some - centre(source)).clamp(-WIDEST, WIDEST), nan=0.0)
    borrowed = (centre(own) if middle is None else middle) + deviation
    return torch.cat([own.repeat(max(round(len(some) / prior), 1), 1), borrowed])


def borrow_placement(population: PopulationSynthesis, source: PopulationSynthesis, num_frames: int) -> None:
    """Bring clustering and gaps that `num_frames` frames show nearer to those of `source`; in place.

    A single frame may well be one clump, of cells that elsewhere lie apart, or show no two cells that touch. And hardly
    any cell of a few frames is out of focus, in mitosis or dying: a share of `ODD_RATE` is. Besides, cells touch more often
    than they do anywhere (`CROWDED`), for the sake of who learns from them.
    """
    own, there = population.config, source.config
    weight = _own_weight(num_frames)
    larger = own.reach / there.reach if own.reach > 0 and there.reach > 0 else 1.0
    theirs = [gap * larger for gap in there.gaps]
    weights = [weight / len(own.gaps)] * len(own.gaps) + [(1 - weight) / len(theirs)] * len(theirs)
    clustering = weight * own.clustering + (1 - weight) * there.clustering
    population.config = replace(
        own,
        clustering=max(clustering, CROWDED) if _are_few(num_frames) else clustering,
        gaps=_quantiles([*own.gaps, *theirs], weights),
        clearance=round(weight * own.clearance + (1 - weight) * there.clearance * larger),
        odd_rate=(1 - weight) * ODD_RATE,
    )


def lend_cells(own: MaskDDPM, source: MaskDDPM, num_frames: int) -> tuple[float, float]:
    """Share of the cells that another cascade makes beside what `num_frames` frames taught, and the `lent_zoom` of them.

    They come in every size between its own cells' and those of the data: nobody knows which size the other cells of the data
    have, which no annotated frame shows.
    """
    if not _are_few(num_frames):
        return 0.0, 1.0
    larger = float((own.attributes[:, 0].median() - source.attributes[:, 0].median()).exp())
    share = LENT * min(2 * PRIOR_FRAMES / (num_frames + PRIOR_FRAMES), 1)
    return share, min(max(larger, SMALLEST_LENT), LARGEST_LENT)


def mottle_of_lent(lent_zoom: float) -> float:
    """Share of the lent cells that are mottled: none where they are small beside the data's.

    A small cell in bright clumps is what a dying one looks like, and the pieces of those are annotated one by one, not as the
    one cell it would be labelled as.

    >>> mottle_of_lent(0.6), mottle_of_lent(1.8)
    (1.0, 0.0)
    """
    return MOTTLED if lent_zoom < SMALL else 0.0


def _own_weight(num_frames: int) -> float:
    """Of what so many frames show, beside what is known from elsewhere, in [0, 1)."""
    return num_frames / (num_frames + PRIOR_FRAMES)


def _are_few(num_frames: int) -> bool:
    """Whether so many frames leave anything to be told from elsewhere."""
    return num_frames < ENOUGH * PRIOR_FRAMES


def _untold(num_frames: int) -> float:
    """Share that so many frames leave to what none of them shows."""
    return 1 - _own_weight(num_frames) if _are_few(num_frames) else 0.0


def _quantiles(values: Sequence[float], weights: Sequence[float], num: int = 32) -> tuple[int, ...]:
    """Weighted quantiles in the middle of `num` equal parts, whole numbers, ascending."""
    order = np.argsort(values, kind="stable")
    ends = np.cumsum(np.asarray(weights)[order])
    at = np.searchsorted(ends, (np.arange(num) + 0.5) / num * ends[-1])
    return tuple(int(v) for v in np.asarray(values)[order][at].round())


def add_cytoplasm(background: Background, radius: float, num_frames: int) -> None:
    """Let a share of frames have light of the cytoplasm, the more the fewer frames are annotated; in place.

    Args:
        background: Of frames.
        radius: Of the usual cell, pixels.
        num_frames: How many are annotated.
    """
    rate = CYTOPLASM * _untold(num_frames)
    background.config = replace(background.config, cytoplasm_rate=rate, cytoplasm_width=max(radius / 2, 1.5))


def add_fragments(population: PopulationSynthesis, radius: float, num_frames: int) -> None:
    """Let there be fragments of dead cells, the more the fewer frames are annotated; in place, arguments as of
    `add_cytoplasm`."""
    rate = FRAGMENTS * _untold(num_frames)
    population.config = replace(population.config, fragment_rate=rate, fragment_radius=radius)


def press_cells(population: PopulationSynthesis, radius: float, num_frames: int) -> None:
    """Press close neighbours together as far as cells usually are, where few frames are annotated; in place, arguments as of
    `add_cytoplasm`."""
    if not _are_few(num_frames):
        return
    gaps = population.config.gaps
    usual = [DEEPEST * radius * (1 - (i + 0.5) / len(gaps) / TOUCHING) for i in range(len(gaps))]
    pressed = tuple(min(gap, -round(depth)) if depth > 0 else gap for gap, depth in zip(gaps, usual))
    population.config = replace(population.config, gaps=pressed)


def borrow_styles(background: Background, source: Background) -> None:
    """Let frames differ as much as those of `source` do, where there are too few own ones to tell; in place.

    Of haze and texture that no own frame shows there is as much, for the brightness of the cells, as in `source`. Volumes
    borrow from frames only how many cells there are and how bright they are.

    Raises:
        InputError: frames are to borrow from volumes.
    """
    frames = background.config.ndim == 2
    names, positive_names = (NAMES, POSITIVE) if frames else (VOLUME_NAMES, VOLUME_POSITIVE)
    if frames and background.names != source.names:
        raise InputError("source", expected="one of 2D data", got=f"{source.config.ndim}D")
    positive = torch.tensor([name in positive_names for name in names])

    def additive(table: Tensor) -> Tensor:
        rows = table.detach().cpu().double()
        return torch.where(positive, torch.where(rows > 0, rows.clamp_min(1e-12).log(), torch.nan), rows)

    own, other = additive(background.table), _by_name(source, names)
    if background.names != source.names:
        other[:, [name not in ("density", "brightness") for name in names]] = torch.nan
    other = additive(other)
    centre = median_of_columns if frames else mean_of_columns
    middle, there = centre(own), centre(other)
    brighter = middle[names.index("brightness")] - there[names.index("brightness")]
    for i, name in enumerate(names):
        if name.startswith(("haze", "texture")) and middle[i].isnan():
            # Texture is in counts, as brightness is; haze is relative to it.
            middle[i] = there[i] + (brighter if name.startswith("texture") else 0.0)
        if name in ("height", "width"):
            other[:, i] = there[i]  # the size of frames is no property of what they show
    density = names.index("density")
    for name in ("density",) if frames else LEAST_SPREAD:
        i = names.index(name)
        spread = float(np.nanstd(other[:, i].numpy()))
        if spread > 0:
            other[:, i] = there[i] + (other[:, i] - there[i]) * max(LEAST_SPREAD[name] / spread, 1.0)
    table = borrow_spread(own, other, PRIOR_FRAMES, middle, centre=centre)
    if table is not own:
        if frames:
            empty = table[torch.linspace(0, len(table) - 1, math.ceil(EMPTY * len(table))).long()]
            empty[:, density] = torch.nan
            table = torch.cat([table, empty])
        values = torch.where(positive, table.exp(), table)
        background.table = torch.nan_to_num(values, nan=0.0).float().to(background.device)
        jitter = fit_jitter(background.table.cpu().numpy(), background.config.bandwidth, names, positive_names)
        background.jitter = torch.from_numpy(jitter).to(background.device)


def _by_name(source: Background, names: Sequence[str]) -> Tensor:
    """The table of `source` with these columns, NaN where it has none of that name."""
    table = source.table.detach().cpu()
    unknown = torch.full((len(table),), torch.nan)
    return torch.stack([table[:, source.names.index(n)] if n in source.names else unknown for n in names], 1)
