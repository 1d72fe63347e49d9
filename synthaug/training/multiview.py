"""How the multiview stage is trained: on views of random spherical-harmonic bodies alone, no real data (paper, §2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from synthaug.generators.diffusion import NUM_TRAIN_TIMESTEPS
from synthaug.generators.multiview import MultiviewConfig, MultiviewDiffusion
from synthaug.generators.shapes import (
    SMOOTH,
    ShapeConfig,
    StarShapes,
    draw_star_shapes,
    frame_by_outline,
    silhouettes,
    view_distance,
    voxelise,
)
from synthaug.generators.stage import untouched_generator
from synthaug.randomness import SampleKey, uniform
from synthaug.training.loop import LoopConfig, LoopResult, train
from synthaug.training.recipes import Log, StageRecipe, initialise
from synthaug.types import Cameras

RECIPE = StageRecipe(batch_size=16, learning_rate=1e-3, ema_decay=0.998, share=1.0)
"""From random weights."""

SHAPES: tuple[ShapeConfig, ...] = (
    *(replace(SMOOTH, amplitude=a) for a in (0.3, 0.6, 1.0, 1.6)),
    *(replace(SMOOTH, power=p) for p in (-4.5, -4.0, -3.5)),
)
"""From nearly round to lumpy; as many bodies of each."""

SHAPE_GRID = 48
"""Voxels on a side of the bodies that are looked at."""

SHAPES_PER_SECOND = 3.0
"""Bodies drawn for each second of the budget, in [512, 6000]; drawing them takes about a tenth of it."""

NUM_HELD_OUT = 96
CHUNK = 64


def frame_loosely(shapes: StarShapes, keys: Sequence[SampleKey]) -> StarShapes:
    """Framed by the outline, up to 6 % smaller or 2 % larger and up to 2 % of the half side off centre.

    The enclosing circles of drawn outlines, found on pixels and not quite the smallest, are as inexact.
    """
    shapes = frame_by_outline(shapes)
    one, down, right = uniform([k.child("frame") for k in keys], (3,)).unbind(1)
    factor = (0.94 + 0.08 * one)[:, None]
    shift = torch.stack([torch.zeros_like(one), 0.04 * down - 0.02, 0.04 * right - 0.02], 1)
    return replace(shapes, origin=shapes.origin * factor + shift, scale=shapes.scale * factor)


def draw_views(
    keys: Sequence[SampleKey], configs: Sequence[ShapeConfig], cameras: Cameras, view_size: int, image_size: int
) -> Tensor:
    """Views of random bodies, those of `keys[i]` from `configs[i % len(configs)]`.

    Returns:
        float32 [len(keys), N, image_size, image_size], signed distance in pixels.
    """
    out = torch.empty(len(keys), len(cameras), image_size, image_size)
    for offset, config in enumerate(configs):
        for start in range(offset, len(keys), CHUNK * len(configs)):
            rows = range(start, min(start + CHUNK * len(configs), len(keys)), len(configs))
            own = [keys[i] for i in rows]
            shapes = frame_loosely(draw_star_shapes(own, config), own)
            seen = silhouettes(voxelise(shapes, SHAPE_GRID), cameras, view_size)
            out[list(rows)] = view_distance(seen, pool=view_size // image_size)
    return out


class ViewPool:
    """Views of bodies, kept as bytes; drawn once, used many times.

    Args:
        stage: Whose cameras look and whose images they become.
        keys: One a body.
    """

    def __init__(self, stage: MultiviewDiffusion, keys: Sequence[SampleKey]) -> None:
        config = stage.config
        parts = []
        for i in range(0, len(keys), CHUNK * len(SHAPES)):
            some = keys[i : i + CHUNK * len(SHAPES)]
            distance = draw_views(some, SHAPES, stage.cameras, config.view_size, config.image_size)
            parts.append((stage.encode(distance) * 127).round().to(torch.int8))
        self.views = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.views)

    def take(self, index: Tensor, mirrored: Tensor, patch_size: int) -> Tensor:
        """Clean samples float32 [B, N, P, G, G] of the bodies at `index` [B], point-reflected where `mirrored` [B].

        Every view of the reflected body is the old one turned by 180 degrees.
        """
        samples = self.views[index].float() / 127
        turned = functional.pixel_unshuffle(functional.pixel_shuffle(samples, patch_size).flip((-2, -1)), patch_size)
        return torch.where(mirrored[:, None, None, None, None], turned, samples)


def fit_multiview(
    budget_s: float,
    seed: int,
    checkpoint: Path,
    log: Log = lambda line: None,
    start: MultiviewDiffusion | None = None,
    *,
    config: MultiviewConfig | None = None,
    max_steps: int = 1_000_000,
    num_shapes: int | None = None,
) -> tuple[MultiviewDiffusion, LoopResult]:
    """Train the views on spherical-harmonic bodies, one random target view an item.

    Args:
        budget_s: Wall-clock seconds, drawing the bodies included.
        seed: Of weights, bodies and noise.
        checkpoint: As in `loop.train`.
        log: Called with lines of text.
        start: Goes on from there; default: from random weights.
        config: Of a new stage.
        max_steps: Upper bound on steps.
        num_shapes: Bodies to train on; default: by the budget.
    """
    begun = time.monotonic()
    key = SampleKey(seed, ("multiview",))
    if start is None:
        with untouched_generator():
            stage = MultiviewDiffusion(config or MultiviewConfig())
        initialise(stage.network, key.child("weights"))
        if stage.config.volume_attention:
            with torch.no_grad():
                bound = (stage.config.num_views * stage.network.mix.shape[2]) ** -0.5
                stage.network.mix.uniform_(-bound, bound, generator=key.child("mix").generator())
    else:
        stage = start
    num = num_shapes or int(min(max(SHAPES_PER_SECOND * budget_s, 512), 6000))
    pool = ViewPool(stage, [key.child("body", i) for i in range(num)])
    log(f"{num} bodies in {time.monotonic() - begun:.0f} s")
    held_out = ViewPool(stage, [key.child("held out", i) for i in range(NUM_HELD_OUT)])

    def loss(step: SampleKey) -> Tensor:
        return _batch_loss(stage, pool, step.child("multiview").generator(), RECIPE.batch_size)

    loop = LoopConfig(
        budget_s=max(budget_s - (time.monotonic() - begun), 0.5 * budget_s),
        max_steps=max_steps,
        learning_rate=RECIPE.learning_rate,
        ema_decay=RECIPE.ema_decay,
        seed=seed,
    )
    result = train([stage.network], loss, _validation(stage, held_out, key), loop, checkpoint, log)
    return stage.eval(), result


def _batch_loss(stage: MultiviewDiffusion, pool: ViewPool, g: torch.Generator, batch_size: int) -> Tensor:
    index = torch.randint(len(pool), (batch_size,), generator=g)
    mirrored = torch.rand(batch_size, generator=g) < 0.5
    view = torch.randint(1, stage.config.num_views, (batch_size,), generator=g)
    # One timestep in each of equal strata: the same mean loss at less variance.
    timesteps = (torch.arange(batch_size) + torch.rand(batch_size, generator=g)) / batch_size * NUM_TRAIN_TIMESTEPS
    timesteps = timesteps.long().clamp(max=NUM_TRAIN_TIMESTEPS - 1)  # 15 + a draw just under 1 rounds to 16
    clean = pool.take(index, mirrored, stage.config.patch_size)
    noise = torch.randn(clean.shape, generator=g)
    return stage.loss(clean, noise, view, timesteps)


def _validation(stage: MultiviewDiffusion, pool: ViewPool, key: SampleKey) -> Callable[[], float]:
    """The loss on held-out bodies, at the same targets, noise and timesteps every time it is called."""
    g = key.child("validation").generator()
    num = len(pool)
    clean = pool.take(torch.arange(num), torch.zeros(num, dtype=torch.bool), stage.config.patch_size)
    noise = torch.randn(clean.shape, generator=g)
    view = torch.randint(1, stage.config.num_views, (num,), generator=g)
    timesteps = ((torch.arange(num) + 0.5) / num * NUM_TRAIN_TIMESTEPS).long()

    @torch.no_grad()
    def validate() -> float:
        parts = [slice(i, i + 16) for i in range(0, num, 16)]
        losses = [stage.loss(clean[p], noise[p], view[p], timesteps[p]) * len(view[p]) for p in parts]
        return float(torch.stack(losses).sum()) / num

    return validate
