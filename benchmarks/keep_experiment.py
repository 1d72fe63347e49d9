"""What did an experiment find? Keeps the numbers of `synthaug evaluate experiment` as results/experiment_NAME.json.

All runs that are there, without curves and pictures; mean and standard deviation over the seeds of every arm and budget.
Run: python benchmarks/keep_experiment.py OUT NAME [--note TEXT]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from results import write_result

LEFT_OUT = ("loss", "ap_at")


def main() -> None:
    """Read the folder of an experiment and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = [
        json.loads(path.read_text()) for path in sorted((options.out / "runs").glob("*.json"))
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(f"{run['arm']} {run['budget']}", []).append(run)
    summary = {
        name: {
            "seeds": [run["seed"] for run in group],
            **{
                score: [
                    round(float(f([run[score] for run in group])), 4) for f in (np.mean, lambda v: np.std(v, ddof=1))
                ]
                if len(group) > 1
                else [round(group[0][score], 4)]
                for score in ("seg", "ap50")
            },
        }
        for name, group in groups.items()
    }
    rows = [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in run.items() if k not in LEFT_OUT} for run in runs
    ]
    experiment = json.loads((options.out / "experiment.json").read_text())
    write_result(
        f"experiment_{options.name}",
        {"note": options.note, "experiment": experiment, "mean_and_sd": summary, "runs": rows},
    )


if __name__ == "__main__":
    main()
