"""Placement of 100 cells into 512 x 512 and 32 x 512 x 512: compiled rejection on crops against naive full-canvas tests.

Both sides get the same masks and random candidates and must return the same bits. Cells are about 40 px wide; in volumes
also 20 px, 13 planes long. Also timed: a whole frame of 20 cells on 256 x 256 and a whole volume of 20 cells on
48 x 128 x 128, rotation and light included. Writes results/placement.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

import synthaug
from synthaug.generators.population import PopulationSynthesis
from synthaug.generators.population_config import PopulationConfig
from synthaug.kernels.compositing import resample, resample_stacks
from synthaug.randomness import SampleKey
from synthaug.types import Cells

VOLUME = (32, 512, 512)

Z_SPACING = 2.3
"""Pixels of the image plane from plane to plane, as in BBBC050."""


def ellipses(n: int, side: int, radii: tuple[float, float]) -> Cells:
    """Textured ellipses; half-axes drawn from `radii`."""
    random = SampleKey(0, ("ellipses", n, side)).numpy()
    a, b = random.uniform(*radii, (2, n, 1, 1))
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    sdf = (np.hypot(y / a, x / b) - 1) * np.minimum(a, b)
    image = np.clip(0.5 - sdf / 4, 0, 1) * (1 + 0.2 * np.sin(x + y))
    values = [torch.from_numpy(v[:, None].astype(np.float32)) for v in (image, sdf)]
    return Cells(values[0], values[1], torch.ones(n), torch.ones(n))


def ellipsoids(n: int, slices: int, side: int, radii: tuple[float, float]) -> Cells:
    """Stacks of these ellipses, which get thinner towards both ends; 13 planes long on average."""
    flat, random = ellipses(n, side, radii), SampleKey(0, ("ellipsoids", n, side)).numpy()
    half_length = torch.from_numpy(random.uniform(5.5, 7.5, (n, 1, 1, 1)).astype(np.float32))
    height = (torch.arange(slices, dtype=torch.float32)[:, None, None] - (slices - 1) / 2) / half_length
    radius = sum(radii) / 2
    thinner = radius * (1 - torch.sqrt((1 - height**2).clamp(min=0)))
    return Cells(flat.image.repeat(1, slices, 1, 1), flat.sdf + thinner, flat.brightness, flat.scale)


def milliseconds(function: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Mean over `repeats` calls."""
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats * 1e3


def summary(values: list[float]) -> dict[str, Any]:
    """Median, range and every measurement."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def processor() -> str:
    """Name of the processor."""
    path = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def frame_inputs(cells: Cells, p: float, key: SampleKey) -> tuple[Any, ...]:
    """Arguments of `place_cells` for 100 cells on 512 x 512."""
    stage = PopulationSynthesis(PopulationConfig(min_area=30, clustering=p))
    drawn = {name: value[0] for name, value in stage.draw([key], (512, 512), [100]).items()}
    zeros = torch.zeros((100, stage.config.num_tries), dtype=torch.int64)
    masks = resample(cells, drawn["rotation"], drawn["flip"])[1]
    return (
        *(masks, torch.tensor([100]), drawn["position"], drawn["direction"], zeros, zeros, drawn["cluster"] < p),
        *(torch.zeros((1, 512, 512), dtype=torch.int32), 30),
    )


def volume_inputs(cells: Cells, p: float, key: SampleKey) -> tuple[Any, ...]:
    """Arguments of `place_cells_3d` for 100 cells in 32 x 512 x 512."""
    stage = PopulationSynthesis(PopulationConfig(min_area=30, clustering=p, z_spacing=Z_SPACING))
    drawn = {name: value[0] for name, value in stage.draw([key], VOLUME, [100]).items()}
    zeros = torch.zeros((100, stage.config.num_tries), dtype=torch.int64)
    masks = resample_stacks(cells, drawn["rotation"], drawn["flip"], drawn["mirror"])[1]
    return (
        *(masks, torch.tensor([100]), drawn["position"], drawn["direction"], drawn["choice"], zeros, zeros),
        *(drawn["cluster"] < p, torch.zeros((1, 7, 3), dtype=torch.float64), torch.zeros(0, dtype=torch.float64)),
        *(None, list(VOLUME), 30, Z_SPACING),
    )


def compare(
    compiled: Callable[..., Any], naive: Callable[..., Any], inputs: tuple[Any, ...], rounds: int, naive_rounds: int
) -> dict[str, Any]:
    """Times of both sides, in turns, on the wall and on the core; they must return the same bits."""
    out, reference = compiled(*inputs), naive(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(out, reference)), "the two sides differ"
    times: dict[str, list[float]] = {"compiled_ms": [], "naive_ms": [], "compiled_cpu_ms": [], "naive_cpu_ms": []}
    for i in range(rounds):
        times["compiled_cpu_ms"].append(milliseconds(lambda: compiled(*inputs), 20, time.process_time))
        times["compiled_ms"].append(milliseconds(lambda: compiled(*inputs), 20))
        if i < naive_rounds:
            start = time.process_time()
            times["naive_ms"].append(milliseconds(lambda: naive(*inputs), 1))
            times["naive_cpu_ms"].append((time.process_time() - start) * 1e3)
    row: dict[str, Any] = {name: summary(values) for name, values in times.items()}
    row["ratio_cpu"] = row["naive_cpu_ms"]["median"] / row["compiled_cpu_ms"]["median"]
    row["ratio"] = row["naive_ms"]["median"] / row["compiled_ms"]["median"]
    row["num_placed"] = int(out[0].max())
    return row


def main() -> None:
    """Run both sides in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "placement.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    from synthaug.kernels.placement import place_cells, place_cells_reference

    start_up = time.perf_counter() - start
    from synthaug.kernels.placement3d import place_cells_3d, place_cells_3d_reference

    results: dict[str, Any] = {}
    key = SampleKey(0, ("benchmark",))
    for p in (0.0, 0.2, 1.0):
        inputs = frame_inputs(ellipses(100, 64, (16, 24)), p, key)
        results[f"clustering={p}"] = compare(place_cells, place_cells_reference, inputs, options.rounds, options.rounds)
    for name, cells in (
        ("40 px", ellipsoids(100, 16, 64, (16, 24))),
        ("20 px", ellipsoids(100, 16, 32, (8, 12))),
    ):
        for p in (0.0, 0.2, 1.0):
            inputs = volume_inputs(cells, p, key)
            # One naive run takes seconds
            results[f"3d, cells of {name}, clustering={p}"] = compare(
                place_cells_3d, place_cells_3d_reference, inputs, options.rounds, 1
            )

    stage, size = PopulationSynthesis(PopulationConfig(min_area=30, clustering=0.2, clearance=8)), (256, 256)
    bank, picks = ellipses(20, 64, (12, 18)), [torch.arange(20)]

    def frame() -> None:
        stage(bank, picks, stage.draw([key], size, [20]), size)

    frame()
    results["frame_ms"] = summary([milliseconds(frame, 20) for _ in range(options.rounds)])
    # On a busy machine the time on the core tells more than that on the wall; both are written down
    results["frame_cpu_ms"] = summary([milliseconds(frame, 20, time.process_time) for _ in range(options.rounds)])

    thick, box = ellipsoids(20, 16, 32, (8, 12)), (48, 128, 128)
    stage_3d = PopulationSynthesis(replace(stage.config, z_spacing=Z_SPACING))

    def volume() -> None:
        stage_3d(thick, picks, stage_3d.draw([key], box, [20]), box)

    volume()
    results["volume_ms"] = summary([milliseconds(volume, 5) for _ in range(options.rounds)])
    results["volume_cpu_ms"] = summary([milliseconds(volume, 5, time.process_time) for _ in range(options.rounds)])

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    report = {
        "question": __doc__.splitlines()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads_used": 1, "gpu": None},
        "load_average": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numba": numba.__version__,
            "synthaug": getattr(synthaug, "__version__", "0.1.0"),
        },
        "configuration": {
            "cells": 100,
            "canvas": [512, 512],
            "volume": list(VOLUME),
            "half_axes_px": [16, 24],
            "z_spacing": Z_SPACING,
            "tries": 64,
            "min_area": 30,
        },
        "start_up_s": start_up,
        "results": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, row in results.items():
        if "ratio" in row:
            print(
                f"{name}: compiled {row['compiled_ms']['median']:.2f} ms, naive {row['naive_ms']['median']:.1f} ms, "
                f"{row['ratio']:.0f} times (on the core {row['compiled_cpu_ms']['median']:.2f} and "
                f"{row['naive_cpu_ms']['median']:.1f} ms, {row['ratio_cpu']:.0f} times); {row['num_placed']} placed"
            )
    wall, core = results["frame_ms"]["median"], results["frame_cpu_ms"]["median"]
    print(f"frame of 20 cells on 256 x 256: {wall:.2f} ms (on the core {core:.2f}); import and load {start_up:.2f} s")
    wall, core = results["volume_ms"]["median"], results["volume_cpu_ms"]["median"]
    print(f"volume of 20 cells on 48 x 128 x 128: {wall:.1f} ms (on the core {core:.1f})")
    if os.getloadavg()[0] > 1.5:
        print(f"load average {os.getloadavg()[0]:.1f}: other processes ran meanwhile, do not quote these times")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
