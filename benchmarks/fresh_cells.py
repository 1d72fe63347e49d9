"""Fresh cells a second: this library's blocks against a plain diffusers loop with the same weights.

The plain loop is what a user would write from the diffusers documentation: one cell at a time, DDIM-50 for mask and texture.
Both run in one process, alternately, on the same keys. Run: python benchmarks/fresh_cells.py [CASCADE] [--cells N]
"""

from __future__ import annotations

import argparse
import statistics
import time

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
        control = texture.condition(sdf, masks.attributes[row, 1:].exp())
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
    plain_cell(cascade, 0)
    cascade.cells([SampleKey(0, ("warm", i)) for i in range(8)])
    ours, plain = [], []
    for repeat in range(options.repeats):
        begun = time.perf_counter()
        cascade.cells([SampleKey(repeat, ("cell", i)) for i in range(options.cells)])
        ours.append(options.cells / (time.perf_counter() - begun))
        begun = time.perf_counter()
        few = max(options.cells // 8, 1)
        for i in range(few):
            plain_cell(cascade, i)
        plain.append(few / (time.perf_counter() - begun))
    stages = time_stages(cascade)
    write_result(
        "fresh_cells",
        {
            "cascade": options.cascade,
            "cells_per_s": round(statistics.median(ours), 2),
            "plain_diffusers_cells_per_s": round(statistics.median(plain), 3),
            "ratio": round(statistics.median(ours) / statistics.median(plain), 1),
            "steps": [cascade.masks.config.num_inference_steps, cascade.texture.config.num_inference_steps],
            "plain_steps": PLAIN_STEPS,
            "ms_per_cell_by_stage": stages,
            "rejected_share": round(
                1 - (cascade.rejects["drawn"] - rejected(cascade)) / max(cascade.rejects["drawn"], 1), 4
            ),
        },
    )


def rejected(cascade: Cascade) -> int:
    """Masks that had to be redrawn."""
    return sum(n for why, n in cascade.rejects.items() if why != "drawn")


def time_stages(cascade: Cascade, block: int = 8) -> dict[str, float]:
    """Milliseconds a cell of each part of the costly half, in blocks."""
    keys = [SampleKey(9, ("stage", i)) for i in range(block)]
    noise = cascade.masks.draw(keys)
    begun = time.perf_counter()
    masks, _ = cascade.masks(noise)
    mask_s = time.perf_counter() - begun
    latent = cascade.texture.draw(keys)
    begun = time.perf_counter()
    cascade.texture(masks, latent)
    texture_s = time.perf_counter() - begun
    begun = time.perf_counter()
    with torch.no_grad():
        cascade.texture.decode_raw(latent["latent"][:, 0])
    decode_s = time.perf_counter() - begun
    parts = {"masks": mask_s, "texture denoising": texture_s - decode_s, "texture decoding": decode_s}
    return {name: round(1e3 * seconds / block, 2) for name, seconds in parts.items()}


if __name__ == "__main__":
    main()
