"""An example to start from: a MONAI 3D UNet trained on a stream of synthetic volumes mixed with real ones.

    python -m synthaug.evaluation.train_monai_3d --real DIR --val DIR --cascade nuclei-3d --steps 400

Three classes (background, interior, border) and a watershed, as the 2D segmenter of `segmenter.py`. Real volumes may be
annotated in every plane or in a few: planes nobody annotated weigh nothing in the loss and in the scores. `--ratio 0` is
the same training on the real volumes alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet
from numpy.typing import NDArray
from torch import Tensor, nn

from synthaug.cascade import Cascade
from synthaug.datasets.readers import open_pairs
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError
from synthaug.evaluation.metrics import SegmentationScores, segmentation_scores
from synthaug.evaluation.segmenter import (
    TrainingReport,
    instances_from_probabilities,
    normalise,
    train_segmenter,
)
from synthaug.evaluation.targets import loss_weights, volume_targets
from synthaug.randomness import SampleKey
from synthaug.types import UNLABELLED

Volume = tuple[NDArray[np.float32], NDArray[np.int32]]
"""image float32 [Z, Y, X] in camera counts and labels int32 of its shape, 0 = background, `UNLABELLED` = not annotated."""

CHANNELS = (16, 32, 64)
"""Of the levels of the network, the first at half the resolution of the volume: 0.4 million parameters, for a CPU."""

STRIDE = 2 ** len(CHANNELS)
"""Of the deepest level; `--size` has to be a multiple of it."""

MIN_VOXELS = 50
"""Default size of the smallest instance that is kept."""


class WithTargets:
    """Adds `target` int64 and `weight` float32 [Z, Y, X] to a sample; the weight is 0 where nobody annotated."""

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """One sample with `label` [1, Z, Y, X], as `train_segmenter` takes it."""
        label = torch.as_tensor(sample["label"]).as_subclass(Tensor).long()
        return {**sample, "target": volume_targets(label)[0], "weight": loss_weights(label)[0]}


def training_transform(size: Sequence[int]) -> mt.Compose:
    """MONAI's own augmentations and the targets; the stream seeds it before every sample."""
    both = ["image", "label"]
    turns = [mt.RandRotate90d(both, prob=0.75, spatial_axes=(1, 2))] if size[1] == size[2] else []
    return mt.Compose(
        [
            mt.Lambdad("image", normalise_volume),
            *[mt.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)],
            *turns,
            mt.RandScaleIntensityd("image", factors=0.25, prob=0.5),
            mt.RandShiftIntensityd("image", offsets=0.05, prob=0.5),
            mt.RandGaussianNoised("image", prob=0.5, std=0.04),
            WithTargets(),
        ]
    )


def normalise_volume(image: Tensor) -> Tensor:
    """[1, Z, Y, X] in any scale as float32 with the 1st percentile at 0 and the 99.8th at 1."""
    return torch.from_numpy(normalise(np.asarray(image)))


def build_network(seed: int = 0) -> nn.Module:
    """A fresh UNet: float32 [B, 1, Z, Y, X] normalised volumes to logits [B, 3, Z, Y, X]; the seed decides its weights."""
    with torch.random.fork_rng(devices=[]):  # layers draw weights from the global state when built; ours replace them
        network: nn.Module = UNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=3,
            channels=(*CHANNELS, CHANNELS[-1]),
            strides=(2,) * len(CHANNELS),
            num_res_units=1,
            norm="instance",  # batches of two volumes are too few for batch statistics
        )
    generator = SampleKey(seed, ("monai-3d",)).generator()
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(layer.weight, a=0.25, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


@torch.no_grad()
def predict(network: nn.Module, image: NDArray[Any], size: Sequence[int]) -> NDArray[np.float32]:
    """Probabilities float32 [3, Z, Y, X] of background, interior and border, in windows of `size`."""
    volume = torch.from_numpy(normalise(image))[None, None]
    logits = sliding_window_inference(
        volume, tuple(size), sw_batch_size=1, predictor=network, overlap=0.25, mode="gaussian"
    )
    assert isinstance(logits, Tensor)
    probabilities: NDArray[np.float32] = logits.softmax(1)[0].numpy()
    return probabilities


@dataclass(frozen=True)
class Validation:
    """How good a network is on whole volumes.

    Attributes:
        scores: SEG, AP and F1 of the instances.
        dice: Foreground Dice over the annotated voxels of all volumes, in [0, 1].
    """

    scores: SegmentationScores
    dice: float


def validate(
    network: nn.Module, volumes: Sequence[Volume], size: Sequence[int], min_voxels: int = MIN_VOXELS
) -> Validation:
    """Segment the volumes and compare; planes nobody annotated are left out."""
    instances, both, sum_of_parts = [], 0, 0
    for image, labels in volumes:
        found = instances_from_probabilities(predict(network, image, size), min_voxels)
        instances.append(found)
        known = labels != UNLABELLED
        both += int(((found > 0) & (labels > 0)).sum())
        sum_of_parts += int((found > 0)[known].sum()) + int((labels > 0).sum())
    scores = segmentation_scores(instances, [labels for _, labels in volumes])
    return Validation(scores, 2 * both / sum_of_parts if sum_of_parts else 1.0)


def train(
    cascade: Any,
    real: Any,
    val: Sequence[Volume],
    *,
    steps: int = 400,
    ratio: float = 0.5,
    size: Sequence[int] = (32, 96, 96),
    batch_size: int = 2,
    num_workers: int = 0,
    max_reuse: int = 48,
    min_voxels: int = MIN_VOXELS,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> tuple[nn.Module, TrainingReport, Validation]:
    """Train on the stream, then validate.

    Args:
        cascade: A 3D cascade.
        real: Map-style data set of real volumes, see `SynthDataset`.
        val: Volumes to score on.
        steps: Optimizer steps.
        ratio: Share of synthetic volumes.
        size: (Z, Y, X) of the volumes in a batch, multiples of `STRIDE`.
        batch_size: Volumes in a batch.
        num_workers: Processes that make batches; 0 for a cascade on CUDA.
        max_reuse: Uses of a synthetic cell.
        min_voxels: Smallest instance kept.
        seed: Of weights, stream and augmentation.
        log: Gets lines of text.

    Returns:
        The network, how the training went, and the scores.

    Raises:
        InputError: An argument is not what it has to be.
    """
    if len(size) != 3 or any(n % STRIDE for n in size):
        raise InputError("size", expected=f"(Z, Y, X), multiples of {STRIDE}", got=tuple(size))
    stream = SynthDataset(
        cascade,
        size=size,
        batch_size=batch_size,
        real=real,
        synthetic_ratio=ratio,
        seed=seed,
        max_reuse=max_reuse,
        transform=training_transform(size),
        num_lanes=max(num_workers, 1),  # every lane has cells of its own to make before the first batch
        num_batches=steps,
    )
    loader = stream.loader(num_workers=num_workers)
    network, report = train_segmenter(loader, steps, seed=seed, model=build_network(seed), log=log)
    stats = loader.stats()
    log(
        f"{stats.synthetic} synthetic and {stats.real} real volumes, {stats.fresh_cells} fresh cells used "
        f"{stats.mean_reuse:.1f} times each; {report.seconds:.0f} s, {report.stall_share:.0%} of it waiting for batches"
    )
    result = validate(network, val, size, min_voxels)
    log(f"SEG {result.scores.seg:.3f}, Dice {result.dice:.3f} on {len(val)} volumes")
    return network, report, result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m synthaug.evaluation.train_monai_3d", description=__doc__)
    parser.add_argument("--real", required=True, help="folder of annotated volumes to train on")
    parser.add_argument("--val", help="folder of annotated volumes to score on; default: the last fifth of --real")
    parser.add_argument("--cascade", default="nuclei-3d")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of synthetic volumes; 0 for real ones alone")
    parser.add_argument("--size", type=int, nargs=3, default=(32, 96, 96), metavar=("Z", "Y", "X"))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    volumes = open_pairs(options.real, min_area=MIN_VOXELS).read_all()
    if options.val:
        real, val = volumes, open_pairs(options.val, min_area=MIN_VOXELS).read_all()
    else:
        num_train = len(volumes) - max(len(volumes) // 5, 1)
        real, val = volumes[:num_train], volumes[num_train:]
    if not real:
        raise InputError("--real", expected="two volumes or more, or --val", got=f"{len(volumes)} volume")
    train(
        Cascade.from_pretrained(options.cascade),
        real,
        val,
        steps=options.steps,
        ratio=options.ratio,
        size=options.size,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
