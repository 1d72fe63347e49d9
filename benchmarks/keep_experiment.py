"""What did an experiment find? Keeps the numbers of `synthaug evaluate experiment` as results/experiment_NAME.json.

All runs that are there, without curves and pictures; mean and standard deviation over the seeds of every arm and budget.
Run: python benchmarks/keep_experiment.py OUT NAME [--note TEXT]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from results import write_result

from synthaug.evaluation.experiment_report import summary

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
    scores = {score: summary(runs, score) for score in ("seg", "ap50")}
    table = {
        f"{arm} {budget}": {
            "seeds": [run["seed"] for run in runs if (run["arm"], run["budget"]) == (arm, budget)],
            # of one seed there is no spread
            **{score: [round(v, 4) for v in cells[arm, budget][: min(num, 2)]] for score, cells in scores.items()},
        }
        for (arm, budget), (_, _, num) in scores["seg"].items()
    }
    rows = [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in run.items() if k not in LEFT_OUT} for run in runs
    ]
    experiment = json.loads((options.out / "experiment.json").read_text())
    write_result(
        f"experiment_{options.name}",
        {"note": options.note, "experiment": experiment, "mean_and_sd": table, "runs": rows},
    )


if __name__ == "__main__":
    main()
