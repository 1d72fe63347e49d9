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

RESULTS = Path(__file__).parent / "results"

CONDITIONS = {
    "BBBC039": ("bbbc039_1500_steps", "bbbc039_fitted_anew", "bbbc039_all_frames"),
    "DSB2018-256": ("dsb2018_256_1500_steps", "dsb2018_256_fitted_anew", "dsb2018_256_all_frames"),
    "DSB2018-360": ("dsb2018_360_1500_steps", "dsb2018_360_fitted_anew", "dsb2018_360_all_frames"),
    "DSB2018-256, 15 photons": ("dsb2018_256_dim_1500_steps", "dsb2018_256_dim_fitted_anew"),
    "DSB2018-256, beside all of BBBC039": ("dsb2018_256_beside_bbbc039_1500_steps",),
    "BBBC039, Cellpose": ("bbbc039_cellpose_narrow",),
}
"""Titles of rows, and the files they come from (`experiment_NAME.json`)."""
ARMS = ("real", "both", "real+copy-paste", "synthetic")
BUDGETS = {"1": "1 patch", "4": "4", "16": "16", "all": "all frames"}

HEADROOM = {"BBBC039": ("bbbc039",), "DSB2018-256": ("dsb2018_256",), "DSB2018-360": ("dsb2018_360",)}
HEADROOM_BUDGETS = {"1": "1 patch", "4": "4", "16": "16", "64": "64", "all": "all frames"}

VOLUMES = {"BBBC050": ("bbbc050_planes_1000_steps",)}
VOLUME_ARMS = ("real", "synthetic", "both", "real-dense")
VOLUME_BUDGETS = {"1": "1 plane", "4": "4"}

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

Scores = dict[int, tuple[float, float | None]]
"""SEG and AP@0.5 (None where it was not kept) by seed."""


def scores_of(names: tuple[str, ...]) -> dict[tuple[str, str], Scores]:
    """Scores of every arm and budget."""
    out: dict[tuple[str, str], Scores] = {}
    for name in names:
        cells: dict[tuple[str, str], Scores] = {}
        for run in json.loads((RESULTS / f"experiment_{name}.json").read_text())["runs"]:
            cells.setdefault((run["arm"], run["budget"]), {})[run["seed"]] = (run["seg"], run.get("ap50"))
        out |= {cell: scores for cell, scores in cells.items() if len(scores) >= 3}
    return out


def results_table(conditions: dict[str, tuple[str, ...]], arms: tuple[str, ...], budgets: dict[str, str]) -> str:
    """Mean and standard deviation of SEG over the seeds, AP@0.5 in brackets; the best of a budget's arms in bold."""
    lines = [_row("", "trained on", *budgets.values()), "|---" * (2 + len(budgets)) + "|"]
    for title, names in conditions.items():
        scores = scores_of(names)
        means = {cell: mean(seg for seg, _ in values.values()) for cell, values in scores.items()}
        for arm in arms:
            texts = []
            for budget in budgets:
                values = scores.get((arm, budget))
                if values is None:
                    texts.append("")
                    continue
                rivals = [means[a, b] for a, b in means if b == budget and a in arms and a != REFERENCE]
                seg = _spread([seg for seg, _ in values.values()], "")
                is_best = len(rivals) > 1 and arm != REFERENCE and means[arm, budget] == max(rivals)
                texts.append((f"**{seg}**" if is_best else seg) + _bracket([ap for _, ap in values.values()], ""))
            if any(texts):
                lines.append(_row(title if arm == arms[0] else "", arm, *texts))
    return "\n".join(lines)


def paired_table() -> str:
    """Differences of SEG seed by seed, mean and standard deviation, that of AP@0.5 in brackets."""
    lines = [_row("", *PAIRS), "|---" * (1 + len(PAIRS)) + "|"]
    for title, names in CONDITIONS.items():
        scores = scores_of(names)
        texts = []
        for one, other in PAIRS.values():
            first, second = scores.get(one, {}), scores.get(other, {})
            seeds = sorted(first.keys() & second.keys())
            if not seeds:
                texts.append("")
                continue
            segs = [first[seed][0] - second[seed][0] for seed in seeds]
            aps = [(first[seed][1], second[seed][1]) for seed in seeds]
            gains = [None if a is None or b is None else a - b for a, b in aps]
            texts.append(_spread(segs, "+") + _bracket(gains, "+"))
        lines.append(_row(title, *texts))
    return "\n".join(lines)


def _row(*texts: str) -> str:
    return "| " + " | ".join(texts) + " |"


def _spread(values: list[float], sign: str) -> str:
    return f"{_short(mean(values), 3, sign)} ± {_short(stdev(values), 3)}"


def _bracket(values: list[float | None], sign: str) -> str:
    known = [value for value in values if value is not None]
    return f" ({_short(mean(known), 2, sign)})" if len(known) == len(values) else ""


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
        results_table(HEADROOM, ("real",), HEADROOM_BUDGETS),
        results_table(VOLUMES, VOLUME_ARMS, VOLUME_BUDGETS),
    ]


def plot(file: Path) -> None:
    """SEG over annotated patches, a panel a condition; bars are standard deviations over the seeds."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    styles = {"real": ("#6b7280", "o"), "real+copy-paste": ("#d97706", "s"), "both": ("#1d4ed8", "D")}
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharex=True, layout="constrained")
    for axis, (title, names) in zip(axes.flat, CONDITIONS.items()):
        scores = scores_of(names)
        for shift, (arm, (colour, marker)) in enumerate(styles.items()):
            places = [i for i, budget in enumerate(BUDGETS) if (arm, budget) in scores]
            segs = [[seg for seg, _ in scores[arm, list(BUDGETS)[i]].values()] for i in places]
            axis.errorbar(
                [i + 0.06 * (shift - 1) for i in places],
                [mean(values) for values in segs],
                [stdev(values) for values in segs],
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.5,
                capsize=3,
                label={"real": "real images alone", "both": "real and synthetic (synthaug)"}.get(arm, arm),
            )
        axis.set_title(title, fontsize=11)
        axis.set_xticks(range(len(BUDGETS)), BUDGETS)
        axis.grid(axis="y", color="#e5e7eb")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("SEG on held-out real images")
    for axis in axes[1]:
        axis.set_xlabel("annotated 192² patches")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    options = parser.parse_args()
    print(*tables(), sep="\n\n")
    if options.plot:
        plot(options.plot)
