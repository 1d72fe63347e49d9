"""An example to start from: a MONAI 3D UNet trained on a stream of synthetic volumes mixed with real ones.

    python -m synthaug.evaluation.train_monai_3d --real DIR --val DIR --cascade nuclei-3d --steps 400

Three classes (background, interior, border) and a watershed, as the 2D segmenter of `segmenter.py`. Real volumes may be
annotated in every plane or in a few: planes nobody annotated weigh nothing in the loss and in the scores. `--ratio 0` is
the same training on the real volumes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet
from numpy.typing import NDArray
from torch import Tensor, nn

from synthaug.cascade import Cascade
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError
from synthaug.evaluation.instances import volume_instances
from synthaug.evaluation.monai_training import (
    Pair,
    Validation,
    WithTargets,
    command_line,
    normalise_image,
    read_real_and_val,
    train_on_stream,
    validate_instances,
)
from synthaug.evaluation.segmenter import TrainingReport, normalise
from synthaug.randomness import SampleKey

CHANNELS = (16, 32, 64)
"""Of the levels of the network, the first at half the resolution of the volume: 0.4 million parameters, for a CPU."""

STRIDE = 2 ** len(CHANNELS)
"""Of the deepest level; `--size` has to be a multiple of it."""

MIN_VOXELS = 50
"""Default size of the smallest instance that is kept."""


def training_transform(size: Sequence[int]) -> mt.Compose:
    """MONAI's own augmentations and the targets; the stream seeds it before every sample."""
    both = ["image", "label"]
    turns = [mt.RandRotate90d(both, prob=0.75, spatial_axes=(1, 2))] if size[1] == size[2] else []
    return mt.Compose(
        [
            mt.Lambdad("image", normalise_image),
            *[mt.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)],
            *turns,
            mt.RandScaleIntensityd("image", factors=0.25, prob=0.5),
            mt.RandShiftIntensityd("image", offsets=0.05, prob=0.5),
            mt.RandGaussianNoised("image", prob=0.5, std=0.04),
            WithTargets(),
        ]
    )


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
    volume = torch.from_numpy(normalise(image))[None, None].to(next(network.parameters()).device)
    logits = sliding_window_inference(
        volume, tuple(size), sw_batch_size=1, predictor=network, overlap=0.25, mode="gaussian"
    )
    assert isinstance(logits, Tensor)
    probabilities: NDArray[np.float32] = logits.softmax(1)[0].cpu().numpy()
    return probabilities


def validate(
    network: nn.Module,
    volumes: Sequence[Pair],
    size: Sequence[int],
    min_voxels: int = MIN_VOXELS,
    voxel_size_um: Sequence[float] | None = None,
) -> Validation:
    """Segment the volumes and compare; planes nobody annotated are left out."""
    return validate_instances(
        lambda image: volume_instances(predict(network, image, size), min_voxels, voxel_size_um), volumes
    )


def train(
    cascade: Any,
    real: Any,
    val: Sequence[Pair],
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
    network, report = train_on_stream(stream, build_network(seed), steps, num_workers, "volumes", log)
    result = validate(network, val, size, min_voxels, cascade.voxel_size_um)
    log(f"SEG {result.scores.seg:.3f}, Dice {result.dice:.3f} on {len(val)} volumes")
    return network, report, result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = command_line(
        "synthaug.evaluation.train_monai_3d", __doc__, cascade="nuclei-3d", size=(32, 96, 96), batch_size=2
    )
    options = parser.parse_args(arguments)
    real, val = read_real_and_val(options.real, options.val, MIN_VOXELS, "volume")
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
