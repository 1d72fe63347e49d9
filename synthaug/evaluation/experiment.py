"""Does it help? The paper's Table 1a and its ablations: the same segmenter trained on different mixtures, scored on real data.

Every arm of a budget and seed sees the same annotations, takes the same number of steps on batches of the same size with the
same augmentation, and starts from the same weights:

    none             a given pretrained segmenter, not trained
    real             the annotated real images
    real+copy-paste  beside them, populations of the same real cells cut out (`copy_paste.py`)
    synthetic        populations of the cascade alone
    both             the real images and the populations of the cascade
    real-2d          volumes: a 2D network on the annotated planes, its planes linked along z
    real-dense       volumes: all labels of the same volumes, the upper reference

The cascade is fitted to exactly those annotations. Everything is kept in files, one for each cascade and each training, so
that an interrupted experiment goes on where it was.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from synthaug.cascade import Cascade
from synthaug.datasets.readers import open_pairs
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import CheckpointError, InputError
from synthaug.evaluation.annotations import Pair, choose_patches, choose_planes, dense_of, dimmed, planes_of
from synthaug.evaluation.augment import AugmentConfig, training_batch
from synthaug.evaluation.copy_paste import CopyPaste
from synthaug.evaluation.linking import link_planes
from synthaug.evaluation.metrics import SegmentationScores, segmentation_scores
from synthaug.evaluation.segmenter import TrainingReport, build_segmenter, predict_instances, train_segmenter
from synthaug.generators.stage import save_tensors, write_atomic
from synthaug.randomness import SampleKey
from synthaug.training import fit as training
from synthaug.types import UNLABELLED

ARMS = ("none", "real", "real+copy-paste", "synthetic", "both", "real-2d", "real-dense")
NEED_CASCADE = ("real+copy-paste", "synthetic", "both")
VOLUME_ARMS = ("real-2d", "real-dense")
PRIORS = ("ellipsoid", "bezier", "spherical-harmonics")
WITHOUT = ("multiview", "pretraining")
SEGMENTERS = ("monai", "cellpose")

CUDA_BLOCK = {2: 64, 3: 16}
"""Cells made together on a GPU."""

PICTURES = 12
"""Held-out images whose predictions are kept for the report, spread over all."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class ExperimentConfig:
    """What is compared, and how long is trained.

    Attributes:
        arms: Of `ARMS`.
        num_patches: Budgets: annotated patches (of volumes: annotated planes, one a volume); None for all.
        seeds: How many; a seed decides annotations, cascade, weights, augmentation and stream.
        segmenter: "monai" (the UNet of `segmenter.py` or `train_monai_3d.py`) or "cellpose" (CPnet, 2D).
        start: Cascade to adapt (name, folder, hub id), or "scratch". It must not have seen the real images' data set.
        fit_minutes: Of each cascade.
        prior: Of `PRIORS`, in place of the cascade's shapes; None for its own.
        without: Of `WITHOUT`: "multiview" takes spherical harmonics in its place, "pretraining" fits from scratch.
        steps: Optimizer steps of every training.
        batch_size: Samples a step.
        size: ((Z,) Y, X) of patches and synthetic samples.
        crop: (Y, X) of what is cut out of them at random to train on, multiples of 8.
        ratio: Share of synthetic samples in `both` and `real+copy-paste`.
        max_reuse: Uses of a synthetic cell.
        learning_rate: Peak rate.
        min_area: Smallest instance that counts, in truth and prediction, pixels (voxels).
        photons: Of a dim camera, see `annotations.dimmed`; None leaves the images as they are.
        voxel_size_um: (Z, Y, X) of volumes in micrometres.
        pretrained: File of segmenter weights that every arm starts from; needed for `none`.
        nbase: Features of Cellpose's network, see `cellpose_segmenter.build_cpnet`.
    """

    arms: tuple[str, ...] = ("real", "real+copy-paste", "synthetic", "both")
    num_patches: tuple[int | None, ...] = (4,)
    seeds: int = 3
    segmenter: str = "monai"
    start: str = "nuclei-2d-u2os"
    fit_minutes: float = 3.0
    prior: str | None = None
    without: tuple[str, ...] = ()
    steps: int = 600
    batch_size: int = 8
    size: tuple[int, ...] = (192, 192)
    crop: tuple[int, int] = (128, 128)
    ratio: float = 0.5
    max_reuse: int = 64
    learning_rate: float = 3e-3
    min_area: int = 20
    photons: float | None = None
    voxel_size_um: tuple[float, float, float] | None = None
    pretrained: str | None = None
    nbase: tuple[int, ...] = (2, 32, 64, 128, 256)

    def __post_init__(self) -> None:
        for name, values, known in (("arms", self.arms, ARMS), ("without", self.without, WITHOUT)):
            if set(values) - set(known):
                raise InputError(name, expected=f"some of {', '.join(known)}", got=", ".join(values))
        if self.segmenter not in SEGMENTERS:
            raise InputError("segmenter", expected=f"one of {SEGMENTERS}", got=repr(self.segmenter))
        if self.prior is not None and self.prior not in PRIORS:
            raise InputError("prior", expected=f"one of {PRIORS}", got=repr(self.prior))
        if not self.arms or self.seeds < 1 or self.steps < 1 or not self.num_patches:
            raise InputError("experiment", expected="an arm, a seed, a step and a budget", got=asdict(self))
        if any(n % 8 or n > m for n, m in zip(self.crop, self.size[-2:])):
            raise InputError("crop", expected=f"multiples of 8, at most {self.size[-2:]}", got=self.crop)
        if set(self.arms) & set(VOLUME_ARMS) and self.ndim == 2:
            raise InputError("arms", expected="arms of frames", got=f"{VOLUME_ARMS} beside size {self.size}")
        if self.ndim == 3 and ("real+copy-paste" in self.arms or self.segmenter == "cellpose"):
            got = "volumes, of whose cells single planes are known"
            raise InputError("real+copy-paste, cellpose", expected="frames", got=got, remedy="Leave them out in 3D.")
        if "multiview" in self.without and self.ndim == 2:
            raise InputError("without", expected="multiview in 3D only", got="frames")
        if "none" in self.arms and not self.pretrained:
            raise InputError("arms", expected="pretrained weights beside the arm none", got="no --pretrained")

    @property
    def ndim(self) -> int:
        """2 for frames, 3 for volumes."""
        return len(self.size)

    def runs(self) -> list[Run]:
        """All trainings, those without a cascade first."""
        arms = sorted(self.arms, key=lambda arm: (arm in NEED_CASCADE, self.arms.index(arm)))
        return [Run(arm, num, seed) for arm in arms for num in self.num_patches for seed in range(self.seeds)]


@dataclass(frozen=True)
class Run:
    """One training: arm, budget, seed."""

    arm: str
    num: int | None
    seed: int

    @property
    def budget(self) -> str:
        """The budget as text."""
        return "all" if self.num is None else str(self.num)

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm}-{self.budget}-{self.seed}"

    @property
    def cascade(self) -> str:
        """Name of the cascade it needs."""
        return f"{self.budget}-{self.seed}"


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
    task = _Task(str(real), str(test), str(out), config, device)
    _open(out, task)
    runs = [run for run in config.runs() if not (out / "runs" / f"{run.name}.json").is_file()]
    names = sorted(
        {run.cascade for run in runs if run.arm in NEED_CASCADE}, key=lambda n: [r.cascade for r in runs].index(n)
    )
    fits = [name for name in names if not (out / "cascades" / name / "model_index.json").is_file()]
    log(f"{len(config.runs())} runs, {len(runs)} to do; {len(fits)} cascades to fit")
    if jobs == 1:
        for name in fits:
            _fit(task, name, log)
        for run in runs:
            log(_line(_train(task, run, log)))
    else:
        _side_by_side(task, fits, runs, jobs, log)
    return [json.loads((out / "runs" / f"{run.name}.json").read_text()) for run in config.runs()]


@dataclass(frozen=True)
class _Task:
    """What a process has to know."""

    real: str
    test: str
    out: str
    config: ExperimentConfig
    device: str

    def pairs(self, folder: str) -> list[Pair]:
        """All images of a folder, dimmed if that is asked for."""
        pairs = open_pairs(folder, min_area=self.config.min_area).read_all()
        ndim = pairs[0][0].ndim
        if ndim != self.config.ndim:
            raise InputError(
                "size", expected=f"{ndim} numbers, as the images of {folder} have axes", got=self.config.size
            )
        if self.config.photons is None:
            return pairs
        return dimmed(pairs, self.config.photons, seed=int(folder == self.test))

    def annotated(self, num: int | None, seed: int, arm: str = "real") -> list[Pair]:
        """The annotations of a budget, as an arm sees them."""
        pairs = self.pairs(self.real)
        if self.config.ndim == 2:
            return choose_patches(pairs, num, self.config.size, seed)
        chosen = choose_planes(pairs, num, seed)
        if arm == "real-dense":
            return dense_of(pairs, chosen)
        return planes_of(chosen) if arm == "real-2d" else chosen


def _open(out: Path, task: _Task) -> None:
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


def _side_by_side(task: _Task, fits: Sequence[str], runs: Sequence[Run], jobs: int, log: Log) -> None:
    """In several processes: trainings that need a cascade follow its fit."""
    waiting = {name: [r for r in runs if r.arm in NEED_CASCADE and r.cascade == name] for name in fits}
    ready = [r for r in runs if not any(r in later for later in waiting.values())]
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_one_thread) as pool:
        pending: dict[Future[Any], str] = {pool.submit(_fit, task, name): name for name in fits}
        pending |= {pool.submit(_train, task, run): "" for run in ready}
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
                pending |= {pool.submit(_train, task, run): "" for run in waiting.pop(name, [])}
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise
    if failed:
        raise failed[0]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _fit(task: _Task, name: str, log: Log = lambda line: None) -> None:
    """Fit the cascade of a budget and seed to its annotations."""
    config = task.config
    run = next(r for r in config.runs() if r.cascade == name)
    out = Path(task.out) / "cascades" / name
    resume = (out.with_name(f"{out.name}.fit")).exists()
    training.fit(
        task.annotated(run.num, run.seed),
        out,
        start=training.SCRATCH if "pretraining" in config.without else config.start,
        budget_minutes=config.fit_minutes,
        seed=run.seed,
        resume=resume,
        voxel_size_um=config.voxel_size_um,
        device=task.device,
        log=lambda line: log(f"cascade {name}: {line}"),
    )


def _cascade(task: _Task, run: Run, annotated: Sequence[Pair]) -> Any:
    """What makes the synthetic samples of a run."""
    config = task.config
    if run.arm not in NEED_CASCADE:
        # A stream without synthetic samples asks a cascade for nothing but its number of axes.
        return Cascade.from_pretrained("nuclei-2d" if config.ndim == 2 or run.arm == "real-2d" else "nuclei-3d")
    cascade = Cascade.from_pretrained(Path(task.out) / "cascades" / run.cascade)
    if run.arm == "real+copy-paste":
        return CopyPaste(cascade, annotated)
    prior = "spherical-harmonics" if "multiview" in config.without else config.prior
    if prior is not None:
        cascade = cascade.with_prior(prior)  # type: ignore[arg-type]  # one of PRIORS
    if torch.device(task.device).type == "cuda":
        # Small networks leave a GPU idle between their layers: many cells at once cost it no more than a few.
        cascade.config = replace(cascade.config, block_size=CUDA_BLOCK[config.ndim])
    return cascade.networks_to(task.device)


def _train(task: _Task, run: Run, log: Log = lambda line: None) -> dict[str, Any]:
    """Train and score one arm, and write its files."""
    begun = time.perf_counter()
    config, folder = task.config, Path(task.out) / "runs"
    annotated = task.annotated(run.num, run.seed, run.arm)
    test = task.pairs(task.test)
    ratio = {"synthetic": 1.0, "both": config.ratio, "real+copy-paste": config.ratio}.get(run.arm, 0.0)
    size = config.size[-2:] if run.arm == "real-2d" else config.size
    stream = SynthDataset(
        _cascade(task, run, annotated),
        size=size,
        batch_size=config.batch_size,
        real=annotated if ratio < 1 else None,
        synthetic_ratio=ratio,
        seed=run.seed,
        max_reuse=config.max_reuse,
        num_lanes=1,  # one process makes all batches
        num_batches=config.steps,
    )
    model, report, stats = _learn(task, run, stream, log)
    predicted = [_predict(task, run, model, image) for image, _ in test]
    scores = segmentation_scores(predicted, [labels for _, labels in test])
    result = _record(run, scores, report, stats, annotated, time.perf_counter() - begun)
    save_tensors(folder / f"{run.name}.safetensors", {k: v.cpu() for k, v in model.state_dict().items()})
    _keep_pictures(folder / f"{run.name}.npz", predicted)
    write_atomic(folder / f"{run.name}.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def _learn(task: _Task, run: Run, stream: SynthDataset, log: Log) -> tuple[nn.Module, TrainingReport, dict[str, Any]]:
    """The trained segmenter, how it went, and what the stream did."""
    config = task.config
    if config.segmenter == "cellpose":
        return _learn_cellpose(task, run, stream, log)
    model = _build(config, run)
    if config.pretrained:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(config.pretrained))
    model.to(task.device)
    if run.arm == "none":
        return model.eval(), TrainingReport(), {}
    augment = AugmentConfig(config.crop)

    def batches() -> Iterator[dict[str, Tensor]]:
        for i, batch in enumerate(stream.loader(num_workers=0)):
            image, label = batch["image"].to(task.device), batch["label"].to(task.device)
            yield training_batch(image, label, augment, SampleKey(run.seed, ("augment", i)))

    model, report = train_segmenter(
        batches(),
        config.steps,
        seed=run.seed,
        model=model,
        learning_rate=config.learning_rate,
        log=lambda line: log(f"{run.name}: {line}"),
    )
    return model, report, _close(stream)


def _learn_cellpose(
    task: _Task, run: Run, stream: SynthDataset, log: Log
) -> tuple[nn.Module, TrainingReport, dict[str, Any]]:
    """The same with Cellpose's own network, training and augmentation."""
    from synthaug.evaluation.cellpose_segmenter import build_cpnet, train_cellpose

    config = task.config
    settings: dict[str, Any] = {"nbase": config.nbase, "seed": run.seed, "pretrained": config.pretrained}
    if run.arm == "none":
        return build_cpnet(device=task.device, **settings).eval(), TrainingReport(), {}
    model, report = train_cellpose(
        stream,
        config.steps,
        batch_size=config.batch_size,
        device=task.device,
        log=lambda line: log(f"{run.name}: {line}"),
        **settings,
    )
    return model, report, _close(stream)


def _close(stream: SynthDataset) -> dict[str, Any]:
    """What the stream has made; it is of no further use."""
    made = stream.stats()
    stream.close()
    return {
        "synthetic": made.synthetic,
        "real": made.real,
        "fresh_cells": made.fresh_cells,
        "mean_reuse": made.mean_reuse,
    }


def _build(config: ExperimentConfig, run: Run) -> nn.Module:
    if config.ndim == 2 or run.arm == "real-2d":
        return build_segmenter(run.seed)
    from synthaug.evaluation.train_monai_3d import build_network

    return build_network(run.seed)


def _predict(task: _Task, run: Run, model: nn.Module, image: NDArray[np.float32]) -> NDArray[np.int32]:
    """Instances of one held-out image."""
    config = task.config
    if config.segmenter == "cellpose":
        from synthaug.evaluation.cellpose_segmenter import predict_cellpose

        return predict_cellpose(model, image, min_area=config.min_area)
    if config.ndim == 2:
        return predict_instances(model, image, min_area=config.min_area)
    if run.arm == "real-2d":
        volume = link_planes([predict_instances(model, plane, min_area=1) for plane in image])
        small = np.bincount(volume.ravel()) < config.min_area
        volume[small[volume]] = 0
        return volume
    from synthaug.evaluation.instances import volume_instances
    from synthaug.evaluation.train_monai_3d import predict

    window = (config.size[0], *config.crop)
    return volume_instances(predict(model, image, window), config.min_area, config.voxel_size_um)


def _record(
    run: Run,
    scores: SegmentationScores,
    report: TrainingReport,
    stats: dict[str, Any],
    annotated: Sequence[Pair],
    seconds: float,
) -> dict[str, Any]:
    ap50, f1 = scores.at(0.5)
    every = max(len(report.losses) // 100, 1)
    return {
        "arm": run.arm,
        "budget": run.budget,
        "seed": run.seed,
        "seg": scores.seg,
        "ap50": ap50,
        "ap": float(np.mean(scores.ap)),
        "ap_at": dict(zip(map(str, scores.thresholds), scores.ap)),
        "f1": f1,
        "num_cells": int(sum((np.unique(labels) > 0).sum() for _, labels in annotated)),
        "num_planes": int(sum((labels != UNLABELLED).all((-2, -1)).sum() for _, labels in annotated)),
        "num_truth": scores.num_truth,
        "num_pred": scores.num_pred,
        "seconds": seconds,
        "train_seconds": report.seconds,
        "wait_share": report.stall_share,
        "loss": [float(np.mean(report.losses[i : i + every])) for i in range(0, len(report.losses), every)],
        **stats,
    }


def _keep_pictures(path: Path, predicted: Sequence[NDArray[np.int32]]) -> None:
    """The predictions of some held-out images (of volumes their middle planes), named by their numbers."""
    chosen = np.unique(np.linspace(0, len(predicted) - 1, PICTURES).astype(int)).tolist()
    planes = {str(i): predicted[i] if predicted[i].ndim == 2 else predicted[i][len(predicted[i]) // 2] for i in chosen}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: plane.astype(np.uint16) for name, plane in planes.items()})
    write_atomic(path, buffer.getvalue())


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['arm']}, {result['budget']} annotated, seed {result['seed']}: SEG {result['seg']:.3f}, "
        f"AP@0.5 {result['ap50']:.3f}; {result['seconds']:.0f} s"
    )
