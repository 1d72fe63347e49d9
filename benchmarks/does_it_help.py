"""Does it help? Prints the tables of the README, and draws its curves, from what `keep_experiment.py` kept of experiments.

A cell of a table comes from the last of a condition's files that has it for three seeds; `tests/test_readme.py` checks that
the README holds what is printed here.
Run: python benchmarks/does_it_help.py [--plot docs/does-it-help.png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from synthaug.evaluation.experiment_report import draw_scores, summary

RESULTS = Path(__file__).parent / "results"

CONDITIONS = {
    "BBBC039": ("bbbc039_1500_steps", "bbbc039_fitted_anew", "bbbc039_all_frames"),
    "DSB2018-256": ("dsb2018_256_1500_steps", "dsb2018_256_fitted_anew", "dsb2018_256_all_frames"),
    "DSB2018-360": ("dsb2018_360_1500_steps", "dsb2018_360_fitted_anew", "dsb2018_360_all_frames"),
    "DSB2018-256, 15 photons": ("dsb2018_256_dim_1500_steps", "dsb2018_256_dim_fitted_anew"),
    "DSB2018-256, beside all of BBBC039": ("dsb2018_256_beside_bbbc039_1500_steps",),
    "BBBC039, Cellpose": ("bbbc039_cellpose_narrow", "bbbc039_cellpose_narrow_fitted_anew"),
}
"""Titles of rows, and the files they come from (`experiment_NAME.json`)."""

ARMS = ("real", "both", "real+copy-paste", "synthetic")
BUDGETS = {"1": "1 patch", "4": "4", "16": "16", "64": "64", "all": "all frames"}

VOLUMES = {"BBBC050": ("bbbc050_planes_1000_steps",)}
VOLUME_ARMS = ("real", "real-2d", "synthetic", "both", "real-dense")
VOLUME_BUDGETS = {"1": "1 plane", "4": "4", "16": "16"}

REFERENCE = "real-dense"
"""All labels of the volumes: no rival, but what the others are to come near to."""

PAIRS = {
    "both at 1 − real at 4": (("both", "1"), ("real", "4")),
    "both at 4 − real at 16": (("both", "4"), ("real", "16")),
    "both − copy-paste at 1": (("both", "1"), ("real+copy-paste", "1")),
    "at 4": (("both", "4"), ("real+copy-paste", "4")),
    "both − real, all frames": (("both", "all"), ("real", "all")),
}
"""What is compared seed by seed."""

PLOTTED = {
    "real": "real images alone",
    "real+copy-paste": "real+copy-paste",
    "synthetic": "synthetic alone (synthaug)",
    "both": "real and synthetic (synthaug)",
}
"""Arms in the picture, and their words."""


def runs_of(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """All trainings of a condition."""
    out: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name in names:
        cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run in json.loads((RESULTS / f"experiment_{name}.json").read_text())["runs"]:
            cells.setdefault((run["arm"], run["budget"]), []).append(run)
        out |= {cell: runs for cell, runs in cells.items() if len(runs) >= 3}
    return [run for runs in out.values() for run in runs]


def results_table(conditions: dict[str, tuple[str, ...]], arms: tuple[str, ...], budgets: dict[str, str]) -> str:
    """Mean and standard deviation of SEG over the seeds, AP@0.5 in brackets; the best of a budget's arms in bold."""
    lines = [_row("", "trained on", *budgets.values()), "|---" * (2 + len(budgets)) + "|"]
    for title, names in conditions.items():
        runs = runs_of(names)
        means = {cell: value for cell, (value, _, _) in summary(runs).items() if cell[0] in arms}
        for arm in arms:
            texts = []
            for budget in budgets:
                own = [run for run in runs if (run["arm"], run["budget"]) == (arm, budget)]
                rivals = [value for (a, b), value in means.items() if b == budget and a != REFERENCE]
                is_best = arm != REFERENCE and len(rivals) > 1 and means.get((arm, budget)) == max(rivals)
                texts.append(_cell([run["seg"] for run in own], [run.get("ap50") for run in own], bold=is_best))
            if any(texts):
                lines.append(_row(title if arm == arms[0] else "", arm, *texts))
    return "\n".join(lines)


def paired_table() -> str:
    """Differences of SEG seed by seed, mean and standard deviation, that of AP@0.5 in brackets."""
    lines = [_row("", *PAIRS), "|---" * (1 + len(PAIRS)) + "|"]
    for title, names in CONDITIONS.items():
        runs = {(run["arm"], run["budget"], run["seed"]): run for run in runs_of(names)}
        texts = []
        for one, other in PAIRS.values():
            pairs = [
                (run, runs[*other, key[2]]) for key, run in runs.items() if key[:2] == one and (*other, key[2]) in runs
            ]
            scores = [(first.get("ap50"), second.get("ap50")) for first, second in pairs]
            gains = [None if a is None or b is None else a - b for a, b in scores]
            texts.append(_cell([first["seg"] - second["seg"] for first, second in pairs], gains, sign="+"))
        lines.append(_row(title, *texts))
    return "\n".join(lines)


def _row(*texts: str) -> str:
    return "| " + " | ".join(texts) + " |"


def _cell(segs: list[float], aps: list[float | None], *, bold: bool = False, sign: str = "") -> str:
    """Mean ± standard deviation of SEG, and the mean of AP@0.5 where all runs have it."""
    if not segs:
        return ""
    text = f"{_short(mean(segs), 3, sign)} ± {_short(stdev(segs), 3)}"
    text = f"**{text}**" if bold else text
    known = [ap for ap in aps if ap is not None]
    return text + (f" ({_short(mean(known), 2, sign)})" if len(known) == len(aps) else "")


def _short(value: float, digits: int, sign: str = "") -> str:
    """As .800 or +.048 or −.001; what rounds to 0 is +."""
    text = f"{abs(value):.{digits}f}".lstrip("0")
    if not sign:
        return text
    return ("−" if round(value, digits) < 0 else "+") + text


def tables() -> list[str]:
    """All tables, in the order of the README."""
    return [
        results_table(CONDITIONS, ARMS, BUDGETS),
        paired_table(),
        results_table(VOLUMES, VOLUME_ARMS, VOLUME_BUDGETS),
    ]


def plot(file: Path) -> None:
    """SEG over annotated patches, a panel a condition; bars are standard deviations over the seeds."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, sharex=True)
    for axis, (title, names) in zip(axes.flat, CONDITIONS.items(), strict=True):
        draw_scores(axis, [run for run in runs_of(names) if run["arm"] in PLOTTED], budgets=list(BUDGETS))
        axis.set_title(title, fontsize=11)
    for axis in axes[:, 0]:
        axis.set_ylabel("SEG on held-out real images")
    for axis in axes[1]:
        axis.set_xlabel("annotated 192² patches")
    lines, arms = axes.flat[0].get_legend_handles_labels()
    figure.legend(lines, [PLOTTED[arm] for arm in arms], loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    options = parser.parse_args()
    print(*tables(), sep="\n\n")
    if options.plot:
        plot(options.plot)
