"""The demo: a small network on a 50:50 stream, the same network on the real images alone, side by side."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from synthaug.cascade import Cascade
from synthaug.datasets.readers import open_pairs
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError
from synthaug.evaluation.metrics import SegmentationScores, segmentation_scores
from synthaug.evaluation.segmenter import TrainingReport, TrainTransform, predict_instances, train_segmenter
from synthaug.generators.stage import write_atomic
from synthaug.hub import PRETRAINED
from synthaug.randomness import SampleKey
from synthaug.types import Pair

DEMO_IMAGES = PRETRAINED / "demo_images"
"""Folder of `train` and `val`, each with images and labels; its README says where they come from."""

STEPS_PER_MINUTE = 280
"""Optimizer steps that a minute of `minutes` stands for: about two thirds of what one core does in one. Fixed, so that the
result depends on no clock."""

SIZE = (128, 128)
BATCH_SIZE = 8
NUM_LANES = 2
"""Parts of the stream, each with cells of its own: few, as there is one worker, so that less must be made beforehand."""

MAX_REUSE = 48
"""Uses of a cell: one core then makes cells faster than this small network, on another one, uses them up."""

SHEET_FRAMES = 4
NUM_PICTURES = 4
ARMS = {"real only": 0.0, "50:50 mix": 0.5}

CAVEAT = (
    "The embedded cascade was trained on the whole BBBC039 training set, many more annotations than these few images, so "
    "this shows the plumbing and what a good cascade gives, not the proof; for that see `synthaug evaluate`. It is also "
    "one run of each: another seed moves the scores."
)


def run_demo(
    out: Path,
    *,
    minutes: float = 2.5,
    seed: int = 0,
    log: Callable[[str], None] = print,
    cascade: Any = "nuclei-2d",
    steps: int | None = None,
    images: Path = DEMO_IMAGES,
    num_workers: int = 1,
) -> dict[str, Any]:
    """Train on bundled real images with and without synthetic ones, and score both on held-out real images.

    Both networks start from the same weights and take the same number of steps, on batches of the same size with the same
    augmentation; only what is in the batches differs.

    Args:
        out: Folder for `sheet.html`, `predictions.png` and `results.json`; created if missing.
        minutes: Training time a network on two cores, roughly and generously: it stands for a fixed number of steps.
        seed: Every number comes from it.
        log: Called with every line of progress and result.
        cascade: Name or folder of a cascade, or a loaded one.
        steps: Optimizer steps a network, instead of `minutes`.
        images: Folder with `train` and `val`, each of which `open_pairs` can read.
        num_workers: Processes that make batches.

    Returns:
        What is in results.json.

    Raises:
        InputError: `minutes` is not positive, or there are no images of the size the stream needs.
        CheckpointError: There is no such cascade.
    """
    if steps is None:
        if not minutes > 0:
            raise InputError("minutes", expected="a number > 0", got=minutes)
        steps = max(round(minutes * STEPS_PER_MINUTE), 1)
    begun = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    real, held_out = (open_pairs(images / split).read_all() for split in ("train", "val"))
    model = Cascade.from_pretrained(cascade) if isinstance(cascade, str | Path) else cascade
    log(
        f"{_describe(real)} to train on, {_describe(held_out)} held out; {steps} steps of {BATCH_SIZE} for each network"
    )

    networks: dict[str, nn.Module] = {}
    results: dict[str, Any] = {"seed": seed, "steps": steps, "batch_size": BATCH_SIZE, "size": list(SIZE)}
    results |= {"cascade": model.fingerprint(), "num_real": len(real), "num_held_out": len(held_out), "arms": {}}
    predictions: dict[str, list[NDArray[np.int32]]] = {}
    truths = [labels for _, labels in held_out]
    threads = torch.get_num_threads()
    torch.set_num_threads(max((os.cpu_count() or 1) - num_workers, 1))  # the workers take the other cores
    try:
        for name, ratio in ARMS.items():
            log(f"training on {name}")
            networks[name], report, stream = _train(model, real, ratio, steps, seed, num_workers, log)
            predictions[name] = [predict_instances(networks[name], image) for image, _ in held_out]
            scores = segmentation_scores(predictions[name], truths)
            results["arms"][name] = _summary(scores, report, stream, ratio)
    finally:
        torch.set_num_threads(threads)

    lines = _table(results["arms"])
    for line in [*lines, CAVEAT]:
        log(line)
    log("drawing the sheet and the predictions")
    draw_predictions(out / "predictions.png", held_out[:NUM_PICTURES], predictions)
    _write_sheet(out / "sheet.html", model, real, seed, lines)
    results |= {"caveat": CAVEAT, "seconds": round(time.perf_counter() - begun, 1)}
    write_atomic(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    log(f"{results['seconds']:.0f} s in all; look at {out / 'predictions.png'} and {out / 'sheet.html'}")
    return results


def _describe(pairs: Sequence[Pair]) -> str:
    return f"{len(pairs)} real images with {sum(int(labels.max()) for _, labels in pairs)} nuclei"


def _train(
    cascade: Any, real: list[Pair], ratio: float, steps: int, seed: int, num_workers: int, log: Callable[[str], None]
) -> tuple[nn.Module, TrainingReport, dict[str, Any]]:
    dataset = SynthDataset(
        cascade,
        size=SIZE,
        batch_size=BATCH_SIZE,
        real=real,
        synthetic_ratio=ratio,
        seed=seed,
        max_reuse=MAX_REUSE,
        num_lanes=NUM_LANES,
        num_batches=steps,
        transform=TrainTransform(),
    )
    # The generator seeds the workers' global state, which would else be drawn from the caller's.
    settings: dict[str, Any] = {"generator": SampleKey(seed, ("loader",)).generator(), "persistent_workers": False}
    if num_workers:
        settings["prefetch_factor"] = 8
    loader = dataset.loader(num_workers, **settings)
    try:
        network, report = train_segmenter(loader, steps, seed=seed, log=log)
    finally:
        dataset.close()
    stats = loader.stats()
    stream = {
        "synthetic": stats.synthetic,
        "real": stats.real,
        "fresh_cells": stats.fresh_cells,
        "mean_reuse": stats.mean_reuse,
        "max_reuse": stats.max_reuse,
        "starved_batches": stats.starved_batches,
    }
    return network, report, stream


def _summary(
    scores: SegmentationScores, report: TrainingReport, stream: dict[str, Any], ratio: float
) -> dict[str, Any]:
    return {
        "synthetic_ratio": ratio,
        "seg": scores.seg,
        "ap50": scores.at(0.5)[0],
        "ap75": scores.at(0.75)[0],
        "num_truth": scores.num_truth,
        "num_pred": scores.num_pred,
        "pairs_per_second": report.pairs_per_second,
        "stall_share": report.stall_share,
        "stall_share_after_first_batch": report.running_stall_share,
        "first_batch_seconds": report.first_wait_seconds,
        "training_seconds": report.seconds,
        "final_loss": float(np.mean(report.losses[-20:])),
        **stream,
    }


def _table(arms: dict[str, dict[str, Any]]) -> list[str]:
    """The results as lines of text, one column a network."""
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("SEG", lambda a: f"{a['seg']:.3f}"),
        ("AP@0.5", lambda a: f"{a['ap50']:.3f}"),
        ("AP@0.75", lambda a: f"{a['ap75']:.3f}"),
        ("pairs/s", lambda a: f"{a['pairs_per_second']:.1f}"),
        ("stall share", lambda a: f"{a['stall_share']:.1%}"),
        ("  after the first batch", lambda a: f"{a['stall_share_after_first_batch']:.1%}"),
        ("fresh cells", lambda a: str(a["fresh_cells"])),
        ("mean reuse", lambda a: f"{a['mean_reuse']:.1f}" if a["fresh_cells"] else "-"),
    ]
    lines = [" " * 24 + "".join(name.rjust(12) for name in arms)]
    return lines + [title.ljust(24) + "".join(show(arm).rjust(12) for arm in arms.values()) for title, show in rows]


def draw_predictions(path: Path, pairs: Sequence[Pair], predictions: dict[str, list[NDArray[np.int32]]]) -> None:
    """A PNG of one row an image: the image, the outlines of the truth, and those of every prediction.

    Args:
        path: PNG to write.
        pairs: Image [Y, X] and true labels.
        predictions: For every column beyond the truth its title and the labels of at least as many images.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot, which keeps a global list of figures
    from skimage.segmentation import find_boundaries

    columns = 2 + len(predictions)
    figure = Figure(figsize=(3.2 * columns, 3.4 * len(pairs)), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(pairs), columns, squeeze=False)
    for row, (image, truth) in zip(range(len(pairs)), pairs):
        low, high = np.percentile(image, (1, 99.8))
        # A square root lifts dim nuclei, whose outlines could not be judged otherwise; white is left to no pixel, so that
        # outlines stand out.
        grey = 0.75 * np.sqrt(np.clip((image - low) / max(high - low, 1e-9), 0, 1))
        panels = {"image": None, "truth": truth} | {name: labels[row] for name, labels in predictions.items()}
        for axis, (title, labels) in zip(axes[row], panels.items()):
            shown = np.repeat(grey[..., None], 3, axis=-1)
            if labels is not None:
                shown[find_boundaries(labels, mode="inner")] = (1.0, 0.8, 0.0) if title == "truth" else (0.2, 0.9, 1.0)
                count = len(np.unique(labels[labels > 0]))
                title = f"{title}: {count} cells"
                if labels is not truth:
                    title += f", SEG {segmentation_scores(labels, truth).seg:.3f}"
            axis.imshow(shown, interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.set_axis_off()
    figure.savefig(path, dpi=140)


def _write_sheet(path: Path, cascade: Any, real: list[Pair], seed: int, lines: list[str]) -> None:
    """Synthetic frames of the size of the real ones beside these, and the table of results."""
    from synthaug.evaluation.sheet import write_sheet

    size = (min(image.shape[0] for image, _ in real), min(image.shape[1] for image, _ in real))
    synthetic = []
    for i in range(SHEET_FRAMES):
        made = cascade.generate([SampleKey(seed, ("sheet", i))], size)
        synthetic.append((made.image[0, 0].numpy(), made.labels[0, 0].numpy()))
    write_sheet(
        path, real, synthetic, title="synthaug demo: real beside synthetic", extra="\n".join([*lines, "", CAVEAT])
    )
