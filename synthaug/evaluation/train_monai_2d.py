"""An example to start from: a MONAI UNet trained on a stream of synthetic images mixed with real ones.

    python -m synthaug.evaluation.train_monai_2d --real DIR --val DIR --cascade nuclei-2d --steps 400

Three classes (background, interior, border) and a watershed, see `segmenter.py`. `--ratio 0` is the same training on the
real images alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import monai.transforms as mt
from torch import nn

from synthaug.cascade import Cascade
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import InputError
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
from synthaug.evaluation.segmenter import CHANNELS, MIN_AREA, TrainingReport, build_segmenter, predict_instances

STRIDE = 2 ** (len(CHANNELS) - 1)
"""Of the deepest level of the network; `--size` has to be a multiple of it."""


def training_transform(size: Sequence[int]) -> mt.Compose:
    """MONAI's own augmentations and the targets; the stream seeds it before every sample."""
    both = ["image", "label"]
    turns = [mt.RandRotate90d(both, prob=0.75)] if size[0] == size[1] else []
    return mt.Compose(
        [
            mt.Lambdad("image", normalise_image),
            *[mt.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(2)],
            *turns,
            mt.RandScaleIntensityd("image", factors=0.25, prob=0.5),
            mt.RandShiftIntensityd("image", offsets=0.05, prob=0.5),
            mt.RandGaussianNoised("image", prob=0.5, std=0.04),
            WithTargets(),
        ]
    )


def train(
    cascade: Any,
    real: Any,
    val: Sequence[Pair],
    *,
    steps: int = 400,
    ratio: float = 0.5,
    size: Sequence[int] = (128, 128),
    batch_size: int = 8,
    num_workers: int = 0,
    max_reuse: int = 48,
    min_area: int = MIN_AREA,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> tuple[nn.Module, TrainingReport, Validation]:
    """Train on the stream, then validate.

    Args:
        cascade: A 2D cascade.
        real: Map-style data set of real images, see `SynthDataset`.
        val: Images and labels to score on.
        steps: Optimizer steps.
        ratio: Share of synthetic images.
        size: (Y, X) of the images in a batch, multiples of `STRIDE`.
        batch_size: Images in a batch.
        num_workers: Processes that make batches; 0 for a cascade on CUDA.
        max_reuse: Uses of a synthetic cell.
        min_area: Pixels of the smallest instance kept.
        seed: Of weights, stream and augmentation.
        log: Gets lines of text.

    Returns:
        The network, how the training went, and the scores.

    Raises:
        InputError: An argument is not what it has to be.
    """
    if len(size) != 2 or any(n % STRIDE for n in size):
        raise InputError("size", expected=f"(Y, X), multiples of {STRIDE}", got=tuple(size))
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
    network, report = train_on_stream(stream, build_segmenter(seed), steps, num_workers, "images", log)
    result = validate_instances(lambda image: predict_instances(network, image, min_area=min_area), val)
    log(f"SEG {result.scores.seg:.3f}, Dice {result.dice:.3f} on {len(val)} images")
    return network, report, result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = command_line(
        "synthaug.evaluation.train_monai_2d", __doc__, cascade="nuclei-2d", size=(128, 128), batch_size=8
    )
    options = parser.parse_args(arguments)
    real, val = read_real_and_val(options.real, options.val, MIN_AREA, "image")
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
