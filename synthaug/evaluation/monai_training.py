"""What the example trainings with MONAI in 2D and 3D have in common: targets, validation, and the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from synthaug.datasets.readers import open_pairs
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError
from synthaug.evaluation.metrics import SegmentationScores, segmentation_scores
from synthaug.evaluation.segmenter import TrainingReport, normalise, train_segmenter
from synthaug.evaluation.targets import frame_targets, loss_weights, volume_targets
from synthaug.types import UNLABELLED, Pair


class WithTargets:
    """Adds `target` int64 and `weight` float32 [(Z,) Y, X] to a sample; the weight is 0 where nobody annotated."""

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """One sample with `label` integer [1, (Z,) Y, X], as `train_segmenter` takes it."""
        label = torch.as_tensor(sample["label"]).as_subclass(Tensor).long()
        target = frame_targets(label) if label.ndim == 3 else volume_targets(label)
        return {**sample, "target": target[0], "weight": loss_weights(label)[0]}


def normalise_image(image: Tensor) -> Tensor:
    """[1, (Z,) Y, X] in any scale as float32 with the 1st percentile at 0 and the 99.8th at 1."""
    return torch.from_numpy(normalise(np.asarray(image)))


@dataclass(frozen=True)
class Validation:
    """How good a network is on whole images.

    Attributes:
        scores: SEG, AP and F1 of the instances.
        dice: Foreground Dice over the annotated pixels of all images, in [0, 1].
    """

    scores: SegmentationScores
    dice: float


def validate_instances(
    segment: Callable[[NDArray[np.float32]], NDArray[np.int32]], pairs: Sequence[Pair]
) -> Validation:
    """Segment the images and compare; planes nobody annotated are left out.

    Args:
        segment: Makes instances int32 of an image, both [(Z,) Y, X].
        pairs: Images and their true labels.
    """
    instances, both, sum_of_parts = [], 0, 0
    for image, labels in pairs:
        found = segment(image)
        instances.append(found)
        known = labels != UNLABELLED
        both += int(((found > 0) & (labels > 0)).sum())
        sum_of_parts += int((found > 0)[known].sum()) + int((labels > 0).sum())
    scores = segmentation_scores(instances, [labels for _, labels in pairs])
    return Validation(scores, 2 * both / sum_of_parts if sum_of_parts else 1.0)


def train_on_stream(
    stream: SynthDataset, network: nn.Module, steps: int, num_workers: int, noun: str, log: Callable[[str], None]
) -> tuple[nn.Module, TrainingReport]:
    """`train_segmenter` on a stream, and a line on what the stream did.

    Args:
        stream: Its batches have `target` and `weight`, see `WithTargets`.
        network: Trained in place.
        steps: Optimizer steps.
        num_workers: Processes that make batches; 0 for a cascade on CUDA.
        noun: What the samples are called in the line.
        log: Gets lines of text.
    """
    loader = stream.loader(num_workers=num_workers)
    network, report = train_segmenter(loader, steps, model=network, log=log)
    stats = loader.stats()
    log(
        f"{stats.synthetic} synthetic and {stats.real} real {noun}, {stats.fresh_cells} fresh cells used "
        f"{stats.mean_reuse:.1f} times each; {report.seconds:.0f} s, {report.stall_share:.0%} of it waiting for batches"
    )
    return network, report


def command_line(
    prog: str, description: str | None, *, cascade: str, size: Sequence[int], batch_size: int
) -> argparse.ArgumentParser:
    """The options both examples have; `size` is the default, ((Z,) Y, X)."""
    noun = "images" if len(size) == 2 else "volumes"
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", required=True, help=f"folder of annotated {noun} to train on")
    parser.add_argument("--val", help=f"folder of annotated {noun} to score on; default: the last fifth of --real")
    parser.add_argument("--cascade", default=cascade)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ratio", type=float, default=0.5, help=f"share of synthetic {noun}; 0 for real ones alone")
    parser.add_argument("--size", type=int, nargs=len(size), default=tuple(size), metavar=("Z", "Y", "X")[-len(size) :])
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def read_real_and_val(real: str, val: str | None, min_area: int, noun: str) -> tuple[list[Pair], list[Pair]]:
    """Images to train on and to score on; without a folder for these the last fifth of the others, at least one.

    Raises:
        InputError: There is but one image, and no folder to score on.
    """
    pairs = open_pairs(real, min_area=min_area).read_all()
    if val:
        return pairs, open_pairs(val, min_area=min_area).read_all()
    num_train = len(pairs) - max(len(pairs) // 5, 1)
    if not num_train:
        raise InputError("--real", expected=f"two {noun}s or more, or --val", got=f"{len(pairs)} {noun}")
    return pairs[:num_train], pairs[num_train:]
