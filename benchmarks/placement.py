"""Placement of 100 cells of about 40 px into 512 x 512: compiled rejection on crops against naive full-canvas tests.

Both sides get the same masks and random candidates and must return the same bits. Also timed: a whole frame of 20 cells
on 256 x 256, rotation and light included. Writes results/placement.json.
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
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

import synthaug
from synthaug.generators.population import PopulationConfig, PopulationSynthesis
from synthaug.kernels.compositing import resample
from synthaug.randomness import SampleKey
from synthaug.types import Cells


def ellipses(n: int, side: int, radii: tuple[float, float]) -> Cells:
    """Textured ellipses; half-axes drawn from `radii`."""
    random = SampleKey(0, ("ellipses", n, side)).numpy()
    a, b = random.uniform(*radii, (2, n, 1, 1))
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    sdf = (np.hypot(y / a, x / b) - 1) * np.minimum(a, b)
    image = np.clip(0.5 - sdf / 4, 0, 1) * (1 + 0.2 * np.sin(x + y))
    values = [torch.from_numpy(v[:, None].astype(np.float32)) for v in (image, sdf)]
    return Cells(values[0], values[1], torch.ones(n), torch.ones(n))


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
    results: dict[str, Any] = {}
    cells, key = ellipses(100, 64, (16, 24)), SampleKey(0, ("benchmark",))
    for p in (0.0, 0.2, 1.0):
        stage = PopulationSynthesis(PopulationConfig(min_area=30, clustering=p))
        drawn = {name: value[0] for name, value in stage.draw([key], (512, 512), [100]).items()}
        zeros = torch.zeros((100, stage.config.num_tries), dtype=torch.int64)
        masks = resample(cells, drawn["rotation"], drawn["flip"])[1] < 0
        inputs = (
            *(masks, torch.tensor([100]), drawn["position"], drawn["direction"], zeros, zeros, drawn["cluster"] < p),
            *(torch.zeros((1, 512, 512), dtype=torch.int32), 30),
        )
        compiled, reference = place_cells(*inputs), place_cells_reference(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(compiled, reference)), "the two sides differ"
        times: dict[str, list[float]] = {"compiled_ms": [], "naive_ms": [], "compiled_cpu_ms": [], "naive_cpu_ms": []}
        for _ in range(options.rounds):
            times["compiled_cpu_ms"].append(milliseconds(lambda: place_cells(*inputs), 20, time.process_time))  # noqa: B023
            times["naive_cpu_ms"].append(
                milliseconds(lambda: place_cells_reference(*inputs), 1, time.process_time)  # noqa: B023
            )
            times["compiled_ms"].append(milliseconds(lambda: place_cells(*inputs), 20))  # noqa: B023
            times["naive_ms"].append(milliseconds(lambda: place_cells_reference(*inputs), 1))  # noqa: B023
        row: dict[str, Any] = {name: summary(values) for name, values in times.items()}
        row["ratio_cpu"] = row["naive_cpu_ms"]["median"] / row["compiled_cpu_ms"]["median"]
        row["ratio"] = row["naive_ms"]["median"] / row["compiled_ms"]["median"]
        row["num_placed"] = int(compiled[0].max())
        results[f"clustering={p}"] = row

    stage, size = PopulationSynthesis(PopulationConfig(min_area=30, clustering=0.2, clearance=8)), (256, 256)
    bank, picks = ellipses(20, 64, (12, 18)), [torch.arange(20)]

    def frame() -> None:
        stage(bank, picks, stage.draw([key], size, [20]), size)

    frame()
    results["frame_ms"] = summary([milliseconds(frame, 20) for _ in range(options.rounds)])
    # On a busy machine the time on the core tells more than that on the wall; both are written down
    results["frame_cpu_ms"] = summary([milliseconds(frame, 20, time.process_time) for _ in range(options.rounds)])

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
        "configuration": {"cells": 100, "canvas": [512, 512], "half_axes_px": [16, 24], "tries": 64, "min_area": 30},
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
    if os.getloadavg()[0] > 1.5:
        print(f"load average {os.getloadavg()[0]:.1f}: other processes ran meanwhile, do not quote these times")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
