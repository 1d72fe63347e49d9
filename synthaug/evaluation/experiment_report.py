"""The outcome of an experiment as a table, in Markdown and as one self-contained HTML page with curves and pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from synthaug.evaluation.demo import draw_predictions
from synthaug.evaluation.metrics import seg
from synthaug.generators.stage import write_atomic
from synthaug.types import Pair

Result = dict[str, Any]

METRICS = {"seg": "SEG", "ap50": "AP@0.5", "ap": "AP@0.5:0.95", "f1": "F1@0.5"}

SHOWN = 4
"""Held-out images in the report: those that the arm with the most annotations does worst on."""

LOOKS = {
    "none": ("#111827", "x"),
    "real": ("#6b7280", "o"),
    "real+copy-paste": ("#d97706", "s"),
    "synthetic": ("#059669", "^"),
    "both": ("#1d4ed8", "D"),
    "real-2d": ("#9ca3af", "v"),
    "real-dense": ("#7c3aed", "*"),
}
"""Colour and marker of an arm's scores."""

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:left}"
    "img{max-width:100%}.soft{color:#666}"
)


def order_of(budget: str) -> float:
    """Budgets in order, all last."""
    return float("inf") if budget == "all" else float(budget)


def summary(results: Sequence[Result], metric: str = "seg") -> dict[tuple[str, str], tuple[float, float, int]]:
    """Mean, standard deviation over seeds (0 for one) and number of seeds by (arm, budget)."""
    found: dict[tuple[str, str], list[float]] = {}
    for result in results:
        found.setdefault((result["arm"], result["budget"]), []).append(result[metric])
    return {
        key: (float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, len(v)) for key, v in found.items()
    }


def gain(results: Sequence[Result], arm: str, over: str, metric: str = "seg") -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over seeds of `arm` minus `over`, by budget; both saw the same annotations."""
    scores = {(r["arm"], r["budget"], r["seed"]): r[metric] for r in results}
    out = {}
    for budget in sorted({r["budget"] for r in results}, key=order_of):
        pairs = [
            (value, scores[over, budget, seed])
            for (name, own, seed), value in scores.items()
            if name == arm and own == budget and (over, budget, seed) in scores
        ]
        if pairs:
            differences = np.subtract(*np.transpose(pairs))
            spread = float(differences.std(ddof=1)) if len(pairs) > 1 else 0.0
            out[budget] = (float(differences.mean()), spread)
    return out


def markdown(results: Sequence[Result], metric: str = "seg") -> str:
    """One row an arm, one column a budget: mean ± standard deviation over seeds."""
    cells = summary(results, metric)
    arms = list(dict.fromkeys(r["arm"] for r in results))
    budgets = sorted({r["budget"] for r in results}, key=order_of)
    lines = [f"| {METRICS[metric]} | " + " | ".join(budgets) + " |", "|---|" + "---|" * len(budgets)]
    for arm in arms:
        row = [f"{cells[arm, b][0]:.3f} ± {cells[arm, b][1]:.3f}" if (arm, b) in cells else "" for b in budgets]
        lines.append(f"| {arm} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def write_report(out: Path, results: Sequence[Result], test: Sequence[Pair]) -> None:
    """`results.json`, `table.md` and `report.html` in the folder of an experiment.

    Args:
        out: Its folder.
        results: Of `run_experiment`.
        test: The held-out images, in the order in which they were segmented.
    """
    request = json.loads((out / "experiment.json").read_text())
    tables = {metric: markdown(results, metric) for metric in METRICS}
    write_atomic(out / "results.json", (json.dumps({"experiment": request, "runs": results}, indent=1) + "\n").encode())
    write_atomic(out / "table.md", "\n".join(tables.values()).encode())
    about = ", ".join(f"{k} {v}" for k, v in request.items() if v not in (None, []))
    page = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>synthaug experiment</title>',
        f"<style>{STYLE}</style></head><body><h1>Does it help?</h1><p class='soft'>{escape(about)}</p>",
        "<p>Mean ± standard deviation over seeds. Columns: annotations granted.</p>",
        *(_table(text) for text in tables.values()),
        _picture(_scores(results)),
        _differences(results),
        "<h2>Training loss</h2>",
        _picture(_curves(results)),
        "<h2>Where it fails</h2><p class='soft'>The held-out images on which the scores are lowest; seed 0.</p>",
        _picture(_failures(out, results, test)),
        f"<p class='soft'>{sum(r['seconds'] for r in results) / 60:.0f} minutes of training and scoring in all.</p>",
        "</body></html>\n",
    ]
    write_atomic(out / "report.html", "".join(page).encode())


def _table(text: str) -> str:
    rows = [line.strip("|").split("|") for line in text.strip().split("\n") if not line.startswith("|---")]
    tags = ["th"] + ["td"] * (len(rows) - 1)
    body = "".join(
        f"<tr>{''.join(f'<{tag}>{escape(cell.strip())}</{tag}>' for cell in row)}</tr>" for tag, row in zip(tags, rows)
    )
    return f"<table>{body}</table>"


def _differences(results: Sequence[Result]) -> str:
    arms = {r["arm"] for r in results}
    lines = []
    for arm in ("both", "synthetic"):
        for over in ("real", "real+copy-paste"):
            if {arm, over} <= arms:
                found = gain(results, arm, over)
                text = ", ".join(f"{b}: {mean:+.3f} ± {sd:.3f}" for b, (mean, sd) in found.items())
                lines.append(f"<li>{arm} minus {over}, SEG by annotations, paired by seed: {text}</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def draw_scores(
    axis: Any, results: Sequence[Result], metric: str = "seg", budgets: Sequence[str] | None = None
) -> None:
    """A line an arm over the budgets, the mean of its seeds; bars are their standard deviations.

    Args:
        axis: Of matplotlib.
        results: Of `run_experiment`.
        metric: Of `METRICS`.
        budgets: What the axis shows; by default those that there are.
    """
    cells = summary(results, metric)
    shown = sorted({b for _, b in cells}, key=order_of) if budgets is None else list(budgets)
    arms = [arm for arm in LOOKS if any((arm, b) in cells for b in shown)]
    for i, arm in enumerate(arms):
        colour, marker = LOOKS[arm]
        places = [k for k, b in enumerate(shown) if (arm, b) in cells]
        means, spreads, _ = np.transpose([cells[arm, shown[k]] for k in places])
        # side by side, so that bars do not hide each other
        x = np.array(places) + 0.06 * (i - (len(arms) - 1) / 2)
        axis.errorbar(x, means, spreads, color=colour, marker=marker, markersize=5, linewidth=1.5, capsize=3, label=arm)
    axis.set_xticks(range(len(shown)), shown)
    axis.set_xlim(-0.4, len(shown) - 0.6)
    axis.grid(axis="y", color="#e5e7eb")
    axis.spines[["top", "right"]].set_visible(False)


def _scores(results: Sequence[Result]) -> bytes:
    from matplotlib.figure import Figure

    shown = ("seg", "ap50")
    figure = Figure(figsize=(5 * len(shown), 3.5), layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(shown)), shown):
        draw_scores(axis, results, metric)
        axis.set_title(METRICS[metric], fontsize=10)
        axis.set_xlabel("annotations")
    axis.legend(fontsize=8)
    return _png(figure)


def _curves(results: Sequence[Result]) -> bytes:
    from matplotlib.figure import Figure

    trained = [r for r in results if r["loss"]]
    arms = list(dict.fromkeys(r["arm"] for r in trained))
    figure = Figure(figsize=(4 * max(len(arms), 1), 3), layout="tight")
    for axis, arm in zip(figure.subplots(1, max(len(arms), 1), squeeze=False)[0], arms):
        for result in (r for r in trained if r["arm"] == arm):
            axis.plot(result["loss"], linewidth=0.8, label=result["budget"] if result["seed"] == 0 else None)
        axis.set_yscale("log")
        axis.set_title(arm, fontsize=9)
        axis.legend(fontsize=7)
    return _png(figure)


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    return buffer.getvalue()


def _failures(out: Path, results: Sequence[Result], test: Sequence[Pair]) -> bytes:
    """Truth and predictions of the held-out images that the last arm at its largest budget does worst on."""
    first = [r for r in results if r["seed"] == 0]
    budget = max((r["budget"] for r in first), key=order_of)
    kept = {}
    for result in first:
        if result["budget"] == budget:
            with np.load(out / "runs" / f"{result['arm']}-{budget}-0.npz") as stored:  # allow_pickle is off by default
                kept[result["arm"]] = {int(name): stored[name].astype(np.int32) for name in stored.files}
    truths = {}
    for index in next(iter(kept.values())):
        image, labels = test[index]
        if image.ndim == 3:
            image, labels = image[len(image) // 2], labels[len(labels) // 2]
        truths[index] = (image, np.maximum(labels, 0))
    last = list(kept)[-1]
    scores = {i: seg(kept[last][i], labels) for i, (_, labels) in truths.items() if labels.any()}
    worst = sorted(scores, key=lambda i: scores[i])[:SHOWN]
    path = out / "failures.png"
    draw_predictions(path, [truths[i] for i in worst], {arm: [found[i] for i in worst] for arm, found in kept.items()})
    return path.read_bytes()


def _picture(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
