"""Does it help? The paper's Table 1a and its ablations: the same segmenter trained on different mixtures, scored on real data.

Every arm of a budget and seed sees the same annotations, takes the same number of steps on batches of the same size with the
same augmentation, and starts from the same weights:

    none             a given pretrained segmenter, not trained
    real             the annotated real images
    real+copy-paste  beside them, populations of the same real cells cut out
    synthetic        populations of the cascade alone
    both             the real images and the populations of the cascade
    real-2d          volumes: a 2D network on the annotated planes, its planes linked along z
    real-dense       volumes: all labels of the same volumes, the upper reference

The cascade is fitted to exactly those annotations. Everything is kept in files, one for each cascade and each training, so
that an interrupted experiment goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from synthaug.errors import CheckpointError
from synthaug.evaluation.experiment_config import NEED_CASCADE, ExperimentConfig, Run
from synthaug.evaluation.experiment_run import Log, Task, fit_cascade, train_arm
from synthaug.generators.stage import write_atomic

__all__ = ["ExperimentConfig", "run_experiment"]


def run_experiment(
    real: str | Path,
    test: str | Path,
    out: str | Path,
    config: ExperimentConfig,
    *,
    device: str = "cpu",
    jobs: int = 1,
    log: Log = print,
) -> list[dict[str, Any]]:
    """Train and score all arms; what is done already is not done again.

    Args:
        real: Folder of real images with labels, from which the budgets are taken.
        test: Folder of held-out real images with labels.
        out: Folder of cascades, results and report.
        config: See `ExperimentConfig`.
        device: Of networks, "cpu" or "cuda".
        jobs: Processes side by side.
        log: Called with lines of progress.

    Returns:
        The result of every run, as in its file `runs/NAME.json`.

    Raises:
        InputError, DataError: Arguments or images do not fit.
        CheckpointError: `out` holds another experiment.
    """
    out = Path(out)
    task = Task(str(real), str(test), str(out), config, device)
    _open(out, task)
    runs = [run for run in config.runs() if not (out / "runs" / f"{run.name}.json").is_file()]
    names = sorted(
        {run.cascade for run in runs if run.arm in NEED_CASCADE}, key=lambda n: [r.cascade for r in runs].index(n)
    )
    fits = [name for name in names if not (out / "cascades" / name / "model_index.json").is_file()]
    log(f"{len(config.runs())} runs, {len(runs)} to do; {len(fits)} cascades to fit")
    if jobs == 1:
        for name in fits:
            fit_cascade(task, name, log)
        for run in runs:
            log(_line(train_arm(task, run, log)))
    else:
        _side_by_side(task, fits, runs, jobs, log)
    return [json.loads((out / "runs" / f"{run.name}.json").read_text()) for run in config.runs()]


def _open(out: Path, task: Task) -> None:
    """Make the folder, or check that what is there belongs to the same experiment (more arms, budgets, seeds may be added)."""
    note = out / "experiment.json"
    may_differ = {"arms", "num_patches", "seeds"}
    asked: dict[str, Any] = json.loads(json.dumps(asdict(task.config))) | {"real": task.real, "test": task.test}
    if note.is_file():
        before = json.loads(note.read_text())
        changed = {k for k in asked if before.get(k) != asked[k]} - may_differ
        if changed:
            raise CheckpointError(
                str(out),
                expected=f"the experiment it was begun with ({', '.join(f'{k} {before.get(k)}' for k in sorted(changed))})",
                got=", ".join(f"{k} {asked[k]}" for k in sorted(changed)),
                remedy="Choose another --out; arms, budgets and seeds may be added.",
            )
    for folder in ("runs", "cascades"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    write_atomic(note, (json.dumps(asked, indent=2) + "\n").encode())


def _side_by_side(task: Task, fits: Sequence[str], runs: Sequence[Run], jobs: int, log: Log) -> None:
    """In several processes: trainings that need a cascade follow its fit."""
    waiting = {name: [r for r in runs if r.arm in NEED_CASCADE and r.cascade == name] for name in fits}
    ready = [r for r in runs if not any(r in later for later in waiting.values())]
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_one_thread) as pool:
        pending: dict[Future[Any], str] = {pool.submit(fit_cascade, task, name): name for name in fits}
        pending |= {pool.submit(train_arm, task, run): "" for run in ready}
        failed: list[BaseException] = []
        try:
            while pending:
                done = next(as_completed(pending))
                name = pending.pop(done)
                error = done.exception()
                if error is not None:
                    # The others go on: what they find out is kept.
                    log(f"{name or 'a training'} failed: {error}")
                    failed.append(error)
                    continue
                log(f"cascade {name} fitted" if name else _line(done.result()))
                pending |= {pool.submit(train_arm, task, run): "" for run in waiting.pop(name, [])}
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise
    if failed:
        raise failed[0]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['arm']}, {result['budget']} annotated, seed {result['seed']}: SEG {result['seg']:.3f}, "
        f"AP@0.5 {result['ap50']:.3f}; {result['seconds']:.0f} s"
    )
