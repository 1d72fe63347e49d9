"""What a few annotations cannot tell is borrowed from where there were many: how widely frames and cells differ.

Whoever annotates one frame of ten cells shows how bright, dense and large cells are, but hardly how much that varies. So
beside the own rows of a table stand rows around their mean that deviate from it as the rows of another data set deviate
from theirs (shrinkage towards a prior, as in empirical Bayes). The more own rows there are, the less the borrowed ones weigh.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from synthaug.errors import InputError
from synthaug.generators.background import NAMES, Background
from synthaug.generators.frame_fit import POSITIVE, fit_jitter
from synthaug.generators.population import PopulationSynthesis
from synthaug.generators.volume_fit import VOLUME_NAMES, VOLUME_POSITIVE

PRIOR_FRAMES, PRIOR_CELLS = 4.0, 40.0
"""Own frames and cells that the borrowed ones weigh as much as."""

MOST = 128
"""Borrowed rows at most."""

ENOUGH = 10
"""Nothing is borrowed where there are so many times more own rows than the borrowed ones would weigh."""

WIDEST = 1.4
"""Deviations are cut there: on logarithms, a factor of 4."""


def borrow_spread(own: Tensor, source: Tensor, prior: float, mean: Tensor | None = None) -> Tensor:
    """A table in which rows that deviate as those of another table do stand beside the own rows.

    Args:
        own: float [N, K], N >= 1, on scales on which deviations add up (logarithms of what varies by factors); NaN where a
            row cannot tell.
        source: float [M, K], the same of the other data set.
        prior: Own rows that all of the borrowed ones weigh as much as.
        mean: float [K], what the borrowed rows lie around; default: the mean of the own ones.

    Returns:
        float [N * r + m, K]: every own row `r` times, then m borrowed ones; `own` itself where it is large enough.

    >>> borrow_spread(torch.tensor([[5.0]]), torch.tensor([[1.0], [2.0], [3.0]]), prior=3)[:, 0].tolist()
    [5.0, 4.0, 5.0, 6.0]
    """
    if len(own) >= ENOUGH * prior or not len(source):
        return own
    some = source[torch.linspace(0, len(source) - 1, min(MOST, len(source))).long()]
    deviation = torch.nan_to_num((some - source.nanmean(0)).clamp(-WIDEST, WIDEST), nan=0.0)
    borrowed = (own.nanmean(0) if mean is None else mean) + deviation
    return torch.cat([own.repeat(max(round(len(some) / prior), 1), 1), borrowed])


def borrow_clustering(population: PopulationSynthesis, source: PopulationSynthesis, num_frames: int) -> None:
    """Bring the clustering probability that `num_frames` frames show nearer to that of `source`; in place.

    A single frame may well be one clump, of cells that elsewhere lie apart.
    """
    own = num_frames / (num_frames + PRIOR_FRAMES)
    clustering = own * population.config.clustering + (1 - own) * source.config.clustering
    population.config = replace(population.config, clustering=clustering)


def borrow_styles(background: Background, source: Background) -> None:
    """Let frames differ as much as those of `source` do, where there are too few own ones to tell; in place.

    Of haze and texture that no own frame shows there is as much, for the brightness of the cells, as in `source`.
    """
    names, positive_names = (NAMES, POSITIVE) if background.config.ndim == 2 else (VOLUME_NAMES, VOLUME_POSITIVE)
    if background.names != source.names:
        raise InputError("source", expected=f"one of {background.config.ndim}D data", got=f"{source.config.ndim}D")
    positive = torch.tensor([name in positive_names for name in names])

    def additive(table: Tensor) -> Tensor:
        rows = table.detach().cpu().double()
        return torch.where(positive, torch.where(rows > 0, rows.clamp_min(1e-12).log(), torch.nan), rows)

    own, other = additive(background.table), additive(source.table)
    mean, there = own.nanmean(0), other.nanmean(0)
    brighter = mean[names.index("brightness")] - there[names.index("brightness")]
    for i, name in enumerate(names):
        if name.startswith(("haze", "texture")) and mean[i].isnan():
            # Texture is in counts, as brightness is; haze is relative to it.
            mean[i] = there[i] + (brighter if name.startswith("texture") else 0.0)
        if name in ("height", "width"):
            other[:, i] = there[i]  # the size of frames is no property of what they show
    table = borrow_spread(own, other, PRIOR_FRAMES, mean)
    if table is not own:
        values = torch.where(positive, table.exp(), table)
        background.table = torch.nan_to_num(values, nan=0.0).float().to(background.device)
        jitter = fit_jitter(background.table.cpu().numpy(), background.config.bandwidth, names, positive_names)
        background.jitter = torch.from_numpy(jitter).to(background.device)
