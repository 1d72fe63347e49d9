"""A small segmenter to judge training data by: a MONAI UNet for background, interior and border, then a watershed.

The marker-based watershed is the usual way back from the three classes of `targets.py` to instances. It trains in minutes on
a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from synthaug.errors import InputError
from synthaug.evaluation.instances import MIN_AREA, instances_from_probabilities
from synthaug.evaluation.metrics import SegmentationScores, segmentation_scores
from synthaug.evaluation.targets import frame_targets, loss_weights
from synthaug.randomness import SampleKey

CHANNELS = (16, 32, 64, 96)
"""Of the levels of the network, each at half the resolution of the one before: 0.3 million parameters. On a CPU, many steps
of a small network beat few of a larger one: after the same time on all of BBBC039's training set, one run of each, SEG was
0.89 with this one and 0.85 with one whose first level has full resolution."""

TILE = 1024
"""Larger images are segmented in overlapping tiles of this side."""

_STRIDE = 2 ** (len(CHANNELS) - 1)  # of the deepest level; image sides are padded to a multiple


def normalise(image: NDArray[Any]) -> NDArray[np.float32]:
    """Grey values with the 1st percentile at 0 and the 99.8th at 1, so that exposure and camera offset play no part.

    Args:
        image: [Y, X], any scale.

    Returns:
        float32 [Y, X]; all 0 where the two percentiles are equal. Values beyond them are kept, down to -1 and up to 4.
    """
    low, high = np.percentile(image, (1.0, 99.8))
    if high <= low:
        return np.zeros(image.shape, np.float32)
    # Bounded, because a crossing fibre or a hot pixel can be many times brighter than the cells.
    scaled: NDArray[np.float32] = np.clip((image - low) / (high - low), -1, 4).astype(np.float32)
    return scaled


def targets_from_labels(labels: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """What the network has to say about every pixel of a frame; see `targets.frame_targets`.

    Args:
        labels: integer [Y, X], 0 = background.

    Returns:
        int64 [Y, X] of `BACKGROUND`, `INTERIOR` and `BORDER`.

    >>> targets_from_labels(np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2]]))
    array([[0, 0, 2, 1, 2, 2, 2, 2, 1, 1]])
    """
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise InputError("labels", expected="integers [Y, X]", got=f"{labels.dtype} {labels.shape}")
    target: NDArray[np.int64] = frame_targets(torch.from_numpy(labels.astype(np.int64))[None])[0].numpy()
    return target


def weights_from_labels(labels: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
    """float32 [(Z,) Y, X], how much every pixel of integer labels weighs in the loss; see `targets.loss_weights`."""
    weights: NDArray[np.float32] = loss_weights(torch.from_numpy(labels.astype(np.int64))[None])[0].numpy()
    return weights


class TrainTransform:
    """Makes samples ready for `train_segmenter`: normalises, augments, adds target and weight. A transform for `SynthDataset`.

    Quarter turns and flips, contrast (x 0.8 to 1.25), offset (+-0.05), gamma (0.75 to 1.33) and white noise (sd up to
    0.04), the last four in units of the normalised image.

    Args:
        augment: False only normalises and adds target and weight.
        seed: Of the sequence of samples; `set_random_state` starts another one.
    """

    def __init__(self, augment: bool = True, seed: int = 0) -> None:
        self.augment = augment
        self.set_random_state(seed)

    def set_random_state(self, seed: int = 0) -> Self:
        """Start the random sequence that belongs to `seed`; a stream does so before every sample."""
        self._rng = SampleKey(seed, ("augment",)).numpy()
        return self

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        """The augmented sample.

        Args:
            sample: `image` [1, Y, X] in any scale and `label` integer [1, Y, X]; square, as quarter turns swap the axes.

        Returns:
            image float32 [1, Y, X] (see `normalise`), label int32 [1, Y, X], target int64 [Y, X], weight float32 [Y, X].
        """
        image = normalise(np.asarray(sample["image"])[0])
        label = np.asarray(sample["label"])[0].astype(np.int32)
        if self.augment:
            image, label = self._augment(image, label)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image, np.float32))[None],
            "label": torch.from_numpy(np.ascontiguousarray(label))[None],
            "target": torch.from_numpy(targets_from_labels(label)),
            "weight": torch.from_numpy(weights_from_labels(label)),
        }

    def _augment(
        self, image: NDArray[np.float32], label: NDArray[np.int32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        rng = self._rng
        turns, flip = int(rng.integers(4)), bool(rng.integers(2))
        image, label = np.rot90(image, turns), np.rot90(label, turns)
        if flip:
            image, label = image[:, ::-1], label[:, ::-1]
        log_contrast, offset, log_gamma, noise = rng.uniform((-0.22, -0.05, -0.29, 0.0), (0.22, 0.05, 0.29, 0.04))
        image = np.sign(image) * np.abs(image) ** np.exp(log_gamma) * np.exp(log_contrast) + offset
        return (image + noise * rng.standard_normal(image.shape)).astype(np.float32), label


def build_segmenter(seed: int = 0) -> nn.Module:
    """A fresh network: float32 [B, 1, Y, X] normalised images to logits [B, 3, Y, X]; the seed decides its weights."""
    from monai.networks.nets import UNet

    with torch.random.fork_rng(devices=[]):  # layers draw weights from the global state when built; ours replace them
        network: nn.Module = UNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=3,
            channels=CHANNELS,
            strides=(2,) * (len(CHANNELS) - 1),
            num_res_units=2,
            norm="batch",
        )
    generator = SampleKey(seed, ("segmenter",)).generator()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, a=0.25, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


@dataclass
class TrainingReport:
    """How a training went.

    Attributes:
        steps: Optimizer steps.
        samples: Image-label pairs seen.
        seconds: Wall time of all of it.
        wait_seconds: Wall time spent waiting for batches.
        first_wait_seconds: The part of it spent on the first batch, where workers start and the first cells are made.
        losses: Training loss at every step.
    """

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    first_wait_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    @property
    def stall_share(self) -> float:
        """Share of the time spent waiting for batches, in [0, 1]."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    @property
    def running_stall_share(self) -> float:
        """The same without the first batch."""
        rest = self.seconds - self.first_wait_seconds
        return (self.wait_seconds - self.first_wait_seconds) / rest if rest > 0 else 0.0

    @property
    def pairs_per_second(self) -> float:
        """Image-label pairs trained on a second."""
        return self.samples / self.seconds if self.seconds else 0.0


def train_segmenter(
    batches: Iterable[Mapping[str, Tensor]],
    steps: int,
    *,
    seed: int = 0,
    model: nn.Module | None = None,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-4,
    log: Callable[[str], None] | None = None,
) -> tuple[nn.Module, TrainingReport]:
    """Train a segmenter for a fixed number of steps (AdamW, linear warm-up, cosine): same batches, same network.

    Args:
        batches: At least `steps` dicts with `image` float32 [B, 1, Y, X] normalised, `target` int64 [B, Y, X] and
            `weight` float32 [B, Y, X], as `TrainTransform` makes them; Y and X are multiples of 8.
        steps: Optimizer steps, >= 1.
        seed: Of the initial weights.
        model: Network to go on with, trained in place; default: a fresh one.
        learning_rate: Peak rate.
        weight_decay: Of AdamW.
        log: Called with a line of text ten times.

    Returns:
        The network, in evaluation mode, and how it went.

    Raises:
        InputError: There are fewer batches than steps, or a batch has no target or no weight.
        FloatingPointError: The loss became NaN or infinite.
    """
    if not isinstance(steps, int) or steps < 1:
        raise InputError("steps", expected="a whole number >= 1", got=repr(steps))
    network = build_segmenter(seed) if model is None else model
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    report = TrainingReport()
    network.train()
    begun = time.perf_counter()
    stream = iter(batches)
    for step in range(steps):
        asked = begun if step == 0 else time.perf_counter()
        batch = next(stream, None)
        waited = time.perf_counter() - asked
        report.wait_seconds += waited
        report.first_wait_seconds = waited if step == 0 else report.first_wait_seconds
        if batch is None:
            raise InputError("batches", expected=f"one for each of the {steps} steps", got=f"{step} batches")
        if not {"image", "target", "weight"} <= set(batch):
            got = f"a batch with {sorted(map(str, batch))}"
            raise InputError("batches", expected="image, target and weight", got=got, remedy="Use TrainTransform.")
        rate = min(1.0, (step + 1) / (0.05 * steps + 1)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        image, target, weight = (batch[key].to(device) for key in ("image", "target", "weight"))
        loss = (nn.functional.cross_entropy(network(image), target, reduction="none") * weight).sum() / weight.sum()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss became {value} at step {step}; lower learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        report.losses.append(value)
        report.steps += 1
        report.samples += len(image)
        if log and (step + 1) % max(steps // 10, 1) == 0:
            recent = report.losses[-max(steps // 10, 1) :]
            log(f"step {step + 1} of {steps}, loss {sum(recent) / len(recent):.4f}")
    report.seconds = time.perf_counter() - begun
    return network.eval(), report


@torch.no_grad()
def predict_probabilities(model: nn.Module, image: NDArray[Any]) -> NDArray[np.float32]:
    """Probability of background, interior and border.

    Args:
        model: A trained segmenter, in evaluation mode.
        image: [Y, X], any scale and size.

    Returns:
        float32 [3, Y, X], sums to 1.
    """
    from monai.inferers import sliding_window_inference

    if image.ndim != 2 or not np.isfinite(image).all():
        raise InputError("image", expected="finite grey values [Y, X]", got=f"shape {image.shape}")
    height, width = image.shape
    pad = [(0, -n % _STRIDE) for n in image.shape]
    x = torch.from_numpy(np.pad(normalise(image), pad, mode="symmetric"))[None, None]
    tile = [min(n, TILE) for n in x.shape[2:]]
    logits = sliding_window_inference(
        x.to(next(model.parameters()).device), tile, sw_batch_size=1, predictor=model, overlap=0.25, mode="gaussian"
    )
    assert isinstance(logits, Tensor)
    probabilities: NDArray[np.float32] = logits.softmax(1)[0, :, :height, :width].float().cpu().numpy()
    return probabilities


def predict_instances(model: nn.Module, image: NDArray[Any], *, min_area: int = MIN_AREA) -> NDArray[np.int32]:
    """The cells of an image.

    Args:
        model: A trained segmenter, in evaluation mode.
        image: [Y, X], any scale and size.
        min_area: Smallest instance that is kept, pixels.

    Returns:
        int32 [Y, X], contiguous from 1, 0 = background.
    """
    return instances_from_probabilities(predict_probabilities(model, image), min_area)


def score(
    model: nn.Module, pairs: Sequence[tuple[NDArray[Any], NDArray[np.integer[Any]]]], *, min_area: int = MIN_AREA
) -> SegmentationScores:
    """SEG, AP and F1 of a segmenter on image-label pairs, each [Y, X]."""
    predictions = [predict_instances(model, image, min_area=min_area) for image, _ in pairs]
    return segmentation_scores(predictions, [labels for _, labels in pairs])
