"""Fresh cells a second: this library's blocks against a plain diffusers loop with the same weights, and where the time goes.

The plain loop is what a user would write from the diffusers documentation: one cell at a time, DDIM-50 for mask and texture.
Both run in one process, alternately, on the same keys. In 3D there is no such plain loop, only the rows by stage. Run:

    python benchmarks/fresh_cells.py [CASCADE] [--cells N]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from results import write_result
from torch.nn import functional as F

from synthaug import Cascade, SampleKey

PLAIN_STEPS = 50


def plain_cell(cascade: Cascade, seed: int) -> torch.Tensor:
    """One cell by plain diffusers calls: schedulers' own loop, batch of one."""
    masks, texture = cascade.masks, cascade.texture
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        row = int(torch.randint(len(masks.attributes), (1,), generator=generator))
        condition = masks.condition(masks.attributes[row][None])
        planes = condition[:, :, None, None].expand(-1, -1, *masks.grid_shape[1:])
        scheduler = masks.scheduler
        scheduler.set_timesteps(PLAIN_STEPS)
        sample = torch.randn(1, *masks.grid_shape, generator=generator)
        for t in scheduler.timesteps:
            velocity = masks.unet(torch.cat([sample, planes], 1), t).sample
            sample = scheduler.step(velocity, t, sample).prev_sample
        radius = masks.attributes[row, :1].exp()
        scale = (radius / (masks.config.crop_size / 2 - masks.config.margin)).clamp_min(1)
        sdf = masks.from_grid(sample, radius, scale)
        control = texture.condition(sdf, masks.attributes[row, 1:2].exp())
        scheduler = texture.scheduler
        scheduler.set_timesteps(PLAIN_STEPS)
        latent = torch.randn(1, *texture.latent_shape, generator=generator)
        for t in scheduler.timesteps:
            down, mid = texture.controlnet(latent, t, texture.prompt, controlnet_cond=control, return_dict=False)
            velocity = texture.unet(
                latent, t, texture.prompt, down_block_additional_residuals=down, mid_block_additional_residual=mid
            ).sample
            latent = scheduler.step(velocity, t, latent).prev_sample
        mean, std = texture.latent_moments[:, :, None, None]
        pixels = texture.vae.decode(latent * std + mean).sample
        return F.pixel_shuffle(pixels, texture.config.patch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cascade", nargs="?", default="nuclei-2d")
    parser.add_argument("--cells", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    cascade = Cascade.from_pretrained(options.cascade)
    compare = cascade.ndim == 2
    if compare:
        plain_cell(cascade, 0)
    cascade.cells([SampleKey(0, ("warm", i)) for i in range(8)])
    ours, plain = [], []
    for repeat in range(options.repeats):
        begun = time.perf_counter()
        cascade.cells([SampleKey(repeat, ("cell", i)) for i in range(options.cells)])
        ours.append(options.cells / (time.perf_counter() - begun))
        if compare:
            begun = time.perf_counter()
            few = max(options.cells // 8, 1)
            for i in range(few):
                plain_cell(cascade, i)
            plain.append(few / (time.perf_counter() - begun))
    cells_per_s = statistics.median(ours)
    comparison: dict[str, float] = {}
    if compare:
        comparison = {
            "plain_diffusers_cells_per_s": round(statistics.median(plain), 3),
            "ratio": round(cells_per_s / statistics.median(plain), 1),
            "plain_steps": PLAIN_STEPS,
        }
    write_result(
        "fresh_cells" if compare else "fresh_cells_3d",
        {
            "cascade": options.cascade,
            "planes_of_a_cell": cascade.num_slices,
            "cells_per_s": round(cells_per_s, 2),
            **comparison,
            "steps": [cascade.masks.config.num_inference_steps, cascade.texture.config.num_inference_steps],
            "ms_per_cell_by_stage": time_stages(cascade),
            "rejected_share": round(
                1 - (cascade.rejects["drawn"] - rejected(cascade)) / max(cascade.rejects["drawn"], 1), 4
            ),
            "rejects": dict(cascade.rejects),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        },
    )


def rejected(cascade: Cascade) -> int:
    """Cells that had to be redrawn."""
    return sum(n for why, n in cascade.rejects.items() if why != "drawn")


def time_stages(cascade: Cascade, repeats: int = 3) -> dict[str, float]:
    """Milliseconds a cell of each part of the costly half, in blocks: the median of a few, after one to warm up.

    In a real block the parts run one after another as here; what is missing is the redrawing of rejected cells.
    """
    runs = []
    for repeat in range(repeats + 1):
        keys = [SampleKey(9, ("stage", repeat, i)) for i in range(cascade.block_size)]
        runs.append(time_one_block(cascade, keys))
    per_cell = 1e3 / cascade.block_size
    return {name: round(per_cell * statistics.median(run[name] for run in runs[1:]), 2) for name in runs[0]}


@torch.no_grad()
def time_one_block(cascade: Cascade, keys: list[SampleKey]) -> dict[str, float]:
    """Seconds of each stage on one block."""
    parts: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = function()
        parts[name] = time.perf_counter() - begun
        return result

    masks, _ = timed("masks", lambda: cascade.masks(cascade.masks.draw(keys)))
    shapes: Any = masks
    if cascade.slicing is not None:
        noise = cascade.slicing.draw(keys)
        if cascade.prior is not None:
            surface = timed("prior", lambda: cascade.prior(masks, cascade.prior.draw(keys)))
            outline = None
        else:
            views = timed("views", lambda: cascade.multiview(masks, cascade.multiview.draw(keys)))
            cameras = cascade.multiview.cameras
            surface = timed("surface", lambda: cascade.surface(views, cameras, cascade.surface.draw(keys)))
            outline = masks
        shapes, _ = timed("slicing", lambda: cascade.slicing(surface, outline, noise))
    latent = cascade.texture.draw(keys, cascade.num_slices)
    timed("texture denoising", lambda: cascade.texture(shapes, latent))
    planes = latent["latent"].flatten(0, 1)[
        shapes.mask.flatten(-2).any(-1).flatten()
    ]  # those that hold a part of a cell
    timed("texture decoding", lambda: cascade.texture.decode_raw(planes))
    parts["texture denoising"] -= parts["texture decoding"]  # the stage does both
    return parts


if __name__ == "__main__":
    main()
