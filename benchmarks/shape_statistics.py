"""Shapes in 3D: cells of a cascade, and of simple priors fitted to the same 2D masks, against real cells of held-out volumes.

For every statistic the Wasserstein-1 distance to the cells of the held-out volumes, in their standard deviations, beside that
of the real cells the cascade was fitted to; and the standard deviation of that distance over bootstrap samples of both sides.
The 3D labels serve to measure only. Run:

    python benchmarks/shape_statistics.py CASCADE --train DIR --val DIR [--cells N]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from results import write_result

from synthaug import Cascade, SampleKey
from synthaug.datasets.readers import open_pairs
from synthaug.errors import InputError
from synthaug.evaluation.shape_stats import SHAPES, cell_statistics, compare, pooled_statistics

PRIORS = ("ellipsoid", "spherical-harmonics", "bezier")

Table = Mapping[str, NDArray[np.float64]]


def generated(cascade: Cascade, count: int, seed: int, voxel_size_um: tuple[float, ...] | None) -> tuple[Table, Any]:
    """Statistics of `count` fresh cells, and the share of shapes that were drawn again, by reason."""
    cascade.rejects.clear()
    cells = cascade.cells([SampleKey(seed, ("shape statistics", i)) for i in range(count)])
    drawn = max(cascade.rejects["drawn"], 1)
    rejected = {why: n / drawn for why, n in cascade.rejects.items() if why != "drawn"}
    return cell_statistics(cells, voxel_size_um), rejected


def distances(real: Table, other: Table, seed: int, repeats: int = 50) -> dict[str, dict[str, float]]:
    """Distance and its bootstrap standard deviation for every statistic, and for their mean."""

    def measured(first: Table, second: Table) -> NDArray[np.float64]:
        found = compare(first, second)
        return np.array([*found.values(), np.mean(list(found.values()))])

    samples = []
    for repeat in range(repeats):
        rng = SampleKey(seed, ("bootstrap", repeat)).numpy()
        rows = [rng.integers(len(side["volume"]), size=len(side["volume"])) for side in (real, other)]
        drawn = [{name: side[name][row] for name in SHAPES} for side, row in zip((real, other), rows)]
        samples.append(measured(drawn[0], drawn[1]))
    sd = np.std(samples, axis=0)
    names = [*SHAPES, "mean"]
    return {name: {"w1": float(w1), "sd": float(s)} for name, w1, s in zip(names, measured(real, other), sd)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cascade", nargs="?", default="nuclei-3d")
    parser.add_argument("--train", type=Path, required=True, help="volumes with 3D labels the cascade was fitted to")
    parser.add_argument("--val", type=Path, required=True, help="held-out volumes with 3D labels")
    parser.add_argument("--cells", type=int, default=200, help="generated cells a row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = Cascade.from_pretrained(options.cascade)
    if model.ndim != 3:
        raise InputError("cascade", expected="a 3D cascade", got=f"a {model.ndim}D one")
    size = model.voxel_size_um

    train, val = (
        pooled_statistics([labels for _, labels in open_pairs(folder).read_all()], size)
        for folder in (options.train, options.val)
    )
    tables: dict[str, Table] = {"real (train)": train}
    rejected: dict[str, Any] = {}
    for name, cascade in [(options.cascade, model), *((prior, model.with_prior(prior)) for prior in PRIORS)]:
        tables[name], rejected[name] = generated(cascade, options.cells, options.seed, size)

    to_val = {name: distances(val, table, options.seed) for name, table in tables.items()}
    columns = [*SHAPES, "mean"]
    print(f"{'distance to real (val)':24}" + "".join(column.replace("_", " ").rjust(18) for column in columns))
    for name, row in to_val.items():
        cells = "".join(f"{row[column]['w1']:.2f} ± {row[column]['sd']:.2f}".rjust(18) for column in columns)
        print(f"{name:24}{cells}")
    quantiles = {
        name: {key: np.quantile(values, (0.1, 0.5, 0.9)).tolist() for key, values in table.items()}
        for name, table in {"real (val)": val, **tables}.items()
    }
    write_result(
        "shape_statistics",
        {
            "cascade": options.cascade,
            "fingerprint": model.fingerprint(),
            "voxel_size_um": size,
            "num_cells": {name: len(table["volume"]) for name, table in {"real (val)": val, **tables}.items()},
            "distance_to_val_in_sd": to_val,
            "quantiles_10_50_90": quantiles,
            "rejected": rejected,
        },
    )


if __name__ == "__main__":
    main()
