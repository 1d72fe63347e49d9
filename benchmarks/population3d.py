"""What a cell of a volume costs from 25 to 400 cells at one density: place, composite, background and camera, on one core.

Volumes of 32 planes grow in Y and X with the number of cells, which lie anywhere in them (no region), from one bank of 48
cells. Whole volumes are timed, the sizes taking turns. Writes results/population3d.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from dataclasses import replace

import torch
from results import write_result

from synthaug import Cascade, SampleKey

NUMBERS = (25, 100, 400)
DEPTH, VOXELS_A_CELL = 32, 16_000


def main() -> None:
    """Time all sizes in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cascade", nargs="?", default="nuclei-3d")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cascade = Cascade.from_pretrained(options.cascade)
    cascade.population.config = replace(cascade.population.config, region=None)
    cells = cascade.cells([SampleKey(0, ("cell", i)) for i in range(48)])

    def populate(number: int, i: int) -> int:
        side = round((number * VOXELS_A_CELL / DEPTH) ** 0.5)
        population = cascade.populate(cells, [SampleKey(0, ("volume", i))], (DEPTH, side, side), num_cells=number)
        return int(population.num_placed[0])

    times: dict[int, list[float]] = {number: [] for number in NUMBERS}
    placed = {number: populate(number, 0) for number in NUMBERS}
    for i in range(options.rounds):
        for number in NUMBERS:
            start = time.process_time()
            for repeat in range(400 // number):
                populate(number, 100 * i + repeat)
            times[number].append((time.process_time() - start) / 400 * 1e3)
    medians = {number: statistics.median(values) for number, values in times.items()}
    tracemalloc.start()
    populate(NUMBERS[-1], 0)
    peak = tracemalloc.get_traced_memory()[1]
    write_result(
        "population3d",
        {
            "core_ms_a_cell": {str(n): {"median": medians[n], "all": times[n]} for n in NUMBERS},
            "most_over_least": max(medians.values()) / min(medians.values()),
            "num_placed": {str(n): placed[n] for n in NUMBERS},
            "peak_numpy_MB_400_cells": peak / 1e6,
        },
    )


if __name__ == "__main__":
    main()
