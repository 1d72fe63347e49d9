"""One fit and one training of an experiment, each of which leaves its files."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from synthaug.cascade import Cascade
from synthaug.datasets.readers import open_pairs
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError
from synthaug.evaluation.annotations import choose_patches, choose_planes, dense_of, dimmed, planes_of
from synthaug.evaluation.augment import AugmentConfig, training_batch
from synthaug.evaluation.experiment_config import NEED_CASCADE, ExperimentConfig, Run
from synthaug.evaluation.instances import volume_instances, without_small
from synthaug.evaluation.linking import link_planes
from synthaug.evaluation.metrics import SegmentationScores, segmentation_scores
from synthaug.evaluation.segmenter import TrainingReport, build_segmenter, predict_instances, train_segmenter
from synthaug.generators.stage import save_tensors, write_atomic
from synthaug.randomness import SampleKey
from synthaug.training import fit as training
from synthaug.types import UNLABELLED, Pair

CUDA_BLOCK = {2: 64, 3: 16}
"""Cells made together on a GPU."""

PICTURES = 12
"""Held-out images whose predictions are kept for the report, spread over all."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class Task:
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

    def trained_on(self, annotated: list[Pair]) -> list[Pair]:
        """What a stream mixes in: the annotations, and as many or more images of the other data set where there is one."""
        if self.config.also is None:
            return annotated
        also = self.pairs(self.config.also)
        return also + annotated * max(len(also) // len(annotated), 1)


def fit_cascade(task: Task, name: str, log: Log = lambda line: None) -> None:
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


def _generator(task: Task, run: Run) -> Any:
    """What makes the synthetic samples of a run."""
    config = task.config
    if run.arm not in NEED_CASCADE:
        # A stream without synthetic samples asks a cascade for nothing but its number of axes.
        return Cascade.from_pretrained("nuclei-2d" if config.ndim == 2 or run.arm == "real-2d" else "nuclei-3d")
    cascade = Cascade.from_pretrained(Path(task.out) / "cascades" / run.cascade)
    if run.arm == "real+copy-paste":
        return cascade  # which places real cells and makes none
    prior = "spherical-harmonics" if "multiview" in config.without else config.prior
    if prior is not None:
        cascade = cascade.with_prior(prior)  # type: ignore[arg-type]  # one of PRIORS
    if torch.device(task.device).type == "cuda":
        # Small networks leave a GPU idle between their layers: many cells at once cost it no more than a few.
        cascade.config = replace(cascade.config, block_size=CUDA_BLOCK[config.ndim])
    return cascade.networks_to(task.device)


def train_arm(task: Task, run: Run, log: Log = lambda line: None) -> dict[str, Any]:
    """Train and score one arm, and write its files."""
    begun = time.perf_counter()
    config, folder = task.config, Path(task.out) / "runs"
    annotated = task.annotated(run.num, run.seed, run.arm)
    test = task.pairs(task.test)
    mixed = config.ratio_of(run.num)
    real_cells = {"both": config.share_of_real_cells, "real+copy-paste": 1.0}.get(run.arm, 0.0)
    ratio = {"synthetic": 1.0, "both": mixed, "real+copy-paste": mixed}.get(run.arm, 0.0)
    size = config.size[-2:] if run.arm == "real-2d" else config.size
    stream = SynthDataset(
        _generator(task, run),
        size=size,
        batch_size=config.batch_size,
        real=task.trained_on(annotated) if ratio < 1 else None,
        synthetic_ratio=ratio,
        seed=run.seed,
        max_reuse=config.max_reuse,
        num_lanes=1,  # one process makes all batches
        num_batches=config.steps,
        real_cells=real_cells,
    )
    model, report, stats = _learn(task, run, stream, log)
    predicted = [_predict(task, run, model, image) for image, _ in test]
    scores = segmentation_scores(predicted, [labels for _, labels in test])
    result = _record(run, scores, report, stats, annotated, time.perf_counter() - begun)
    save_tensors(folder / f"{run.name}.safetensors", {k: v.cpu() for k, v in model.state_dict().items()})
    _keep_pictures(folder / f"{run.name}.npz", predicted)
    write_atomic(folder / f"{run.name}.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def _learn(task: Task, run: Run, stream: SynthDataset, log: Log) -> tuple[nn.Module, TrainingReport, dict[str, Any]]:
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
    task: Task, run: Run, stream: SynthDataset, log: Log
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
        bsize=max(config.crop),
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
        "real_cells": made.real_cells,
        "mean_reuse": made.mean_reuse,
    }


def _build(config: ExperimentConfig, run: Run) -> nn.Module:
    if config.ndim == 2 or run.arm == "real-2d":
        return build_segmenter(run.seed)
    from synthaug.evaluation.train_monai_3d import build_network

    return build_network(run.seed)


def _predict(task: Task, run: Run, model: nn.Module, image: NDArray[np.float32]) -> NDArray[np.int32]:
    """Instances of one held-out image."""
    config = task.config
    if config.segmenter == "cellpose":
        from synthaug.evaluation.cellpose_segmenter import predict_cellpose

        return predict_cellpose(model, image, min_area=config.min_area)
    if config.ndim == 2:
        return predict_instances(model, image, min_area=config.min_area)
    if run.arm == "real-2d":
        volume = link_planes([predict_instances(model, plane, min_area=1) for plane in image])
        return without_small(volume, config.min_area)
    from synthaug.evaluation import train_monai_3d

    window = (config.size[0], *config.crop)
    return volume_instances(train_monai_3d.predict(model, image, window), config.min_area, config.voxel_size_um)


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
