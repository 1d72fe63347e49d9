"""Cellpose's network and training as the segmenter to judge training data by: CPnet of Cellpose 3, from scratch and offline.

Everything but the data is Cellpose's: `train_seg` with its augmentation, schedule and losses, `CellposeModel.eval` for the
way back to instances (Stringer et al. 2021; Pachitariu and Stringer 2022).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from synthaug.datasets.cellpose import cellpose_data, import_cellpose, real_lists
from synthaug.datasets.cellpose_draws import Images
from synthaug.datasets.loader import SynthLoader
from synthaug.datasets.mixing import relabel
from synthaug.datasets.synth import SynthDataset
from synthaug.errors import CheckpointError, InputError
from synthaug.evaluation.segmenter import MIN_AREA, TrainingReport
from synthaug.randomness import SampleKey

NBASE = (2, 32, 64, 128, 256)
"""Features of Cellpose's CPnet, the two channels of the input first: 6.6 million parameters, about 10 s for a step of 8 crops
on 2 CPU cores. (2, 16, 32, 64) has 0.4 million."""


def build_cpnet(
    nbase: Sequence[int] = NBASE,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    pretrained: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """A CPnet: float32 [B, 2, Y, X] to flow along Y, along X and the logit of a cell, [B, 3, Y, X] (first of a tuple).

    Args:
        nbase: Features of its levels, the 2 channels of the input first; the image halves from one to the next.
        seed: Decides its weights, drawn as PyTorch does by default.
        device: Where it lies.
        pretrained: File with the weights of such a network, as Cellpose saves them or as .safetensors.

    Raises:
        InputError: Cellpose 3.1 is missing, or `nbase` is no such list.
        CheckpointError: `pretrained` is missing or holds the weights of another network.
    """
    _import_cellpose_3()
    from cellpose.resnet_torch import CPnet

    if len(nbase) < 2 or nbase[0] != 2 or not all(isinstance(n, int) and n > 0 for n in nbase):
        raise InputError("nbase", expected="the input's 2 channels and features of every level, (2, 16, 32)", got=nbase)
    with torch.random.fork_rng(devices=[]):  # layers draw weights from the global state when built; ours replace them
        network: nn.Module = CPnet(list(nbase), 3, sz=3)
    generator = SampleKey(seed, ("cpnet",)).generator()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    if pretrained is not None:
        _load(network, Path(pretrained), nbase)
    return network.to(device).eval()


def train_cellpose(
    data: SynthDataset | SynthLoader | Sequence[Any],
    steps: int,
    *,
    batch_size: int = 8,
    seed: int = 0,
    nbase: Sequence[int] = NBASE,
    device: torch.device | str = "cpu",
    pretrained: str | os.PathLike[str] | None = None,
    learning_rate: float = 0.005,
    weight_decay: float = 1e-5,
    min_masks: int = 0,
    bsize: int = 224,
    log: Callable[[str], None] | None = None,
) -> tuple[nn.Module, TrainingReport]:
    """Train a CPnet with Cellpose's `train_seg` for a fixed number of steps: same data, same network.

    An epoch of Cellpose's is one step here, so its learning rate rises over the first 10 steps, and of more than 100 steps it
    falls in the last 50, of more than 300 in the last 100. Cellpose's augmentation is the same for every seed, as it seeds
    numpy's global state with the number of the epoch (and leaves it so).

    Args:
        data: A stream of frames (or its loader), or real samples as in `SynthDataset`: pairs of image and label, whole, each
            equally likely in every draw, with as few cells as they have.
        steps: Optimizer steps, >= 1.
        batch_size: Frames a step. For the stream's mix in every step take the stream's.
        seed: Of the initial weights.
        nbase: See `build_cpnet`.
        device: Where it is trained.
        pretrained: Weights to start from.
        learning_rate: Peak rate of AdamW.
        weight_decay: Of AdamW.
        min_masks: Fewest cells of a frame of a stream, see `cellpose_data`.
        bsize: Side of the crops it is trained on, pixels, after cells have been brought to a diameter of 30.
        log: Called with a line of text about ten times.

    Returns:
        The network, in evaluation mode, and how it went.

    Raises:
        InputError: Cellpose 3.1 is missing, or an argument or a sample is not what it has to be.
        ProducerError: Making cells failed.
        FloatingPointError: The loss became NaN or infinite.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise InputError(name, expected="a whole number >= 1", got=repr(value))
    network = build_cpnet(nbase, seed=seed, device=device, pretrained=pretrained)
    from cellpose.train import train_seg

    begun = time.perf_counter()
    stream = data.dataset if isinstance(data, SynthLoader) else data
    if isinstance(stream, SynthDataset):
        images, labels = cellpose_data(data, None if _is_plain(stream) else batch_size, min_masks=min_masks)  # type: ignore[arg-type]
    elif len(stream) == 0:
        raise InputError("data", expected="a stream, or at least one pair", got="none")
    else:
        images, labels = real_lists(stream, nbase[0], device)
    report = TrainingReport(steps=steps, samples=steps * batch_size)
    report.first_wait_seconds = getattr(images, "wait_seconds", 0.0)
    with tempfile.TemporaryDirectory() as folder, _forwarded(log, steps), contextlib.ExitStack() as stack:
        if isinstance(images, Images):
            stack.callback(images.close)
        _, losses, _ = train_seg(
            network,
            train_data=images,
            train_labels=labels,
            normalize=False,
            batch_size=batch_size,
            nimg_per_epoch=batch_size,
            n_epochs=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            min_train_masks=0,
            bsize=bsize,
            save_path=folder,
            save_every=steps + 1,
        )
    report.losses = [float(loss) for loss in losses]
    report.wait_seconds = getattr(images, "wait_seconds", 0.0)
    report.seconds = time.perf_counter() - begun
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"the loss became {losses[~np.isfinite(losses)][0]}; lower learning_rate")
    return network.eval(), report


def predict_cellpose(model: nn.Module, image: NDArray[Any], *, min_area: int = MIN_AREA) -> NDArray[np.int32]:
    """The cells of an image, with Cellpose's own thresholds and the diameter of the training.

    Args:
        model: A CPnet from `train_cellpose` or `build_cpnet`.
        image: [Y, X], any scale and size.
        min_area: Smallest instance that is kept, pixels.

    Returns:
        int32 [Y, X], contiguous from 1, 0 = background.

    Raises:
        InputError: Cellpose 3.1 is missing, or the image is none.
    """
    _import_cellpose_3()
    from cellpose.models import CellposeModel

    if image.ndim != 2 or not np.isfinite(image).all():
        raise InputError("image", expected="finite grey values [Y, X]", got=f"shape {image.shape}")
    with torch.random.fork_rng(devices=[]):  # it builds a network, which ours replaces
        cellpose = CellposeModel(device=next(model.parameters()).device, pretrained_model=False, mkldnn=False)
    cellpose.net = _WideStyle(model.eval())
    cellpose.diam_mean, cellpose.diam_labels = float(model.diam_mean), float(model.diam_labels)  # type: ignore[arg-type]
    masks, _, _ = cellpose.eval(np.asarray(image, np.float32), channels=[0, 0], min_size=min_area)
    return relabel(masks.reshape(image.shape))


class _WideStyle(nn.Module):
    """A CPnet whose style has 256 features whatever its `nbase`: Cellpose expects as many, and uses none for instances."""

    mkldnn = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.nout = network, network.nout

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, style, _ = self.network(x)
        return y, nn.functional.pad(style, (0, 256 - style.shape[1]))


def _import_cellpose_3() -> None:
    if import_cellpose() != 3:
        raise InputError(
            "cellpose",
            expected="version 3.1, whose CPnet can be built and trained from scratch",
            got="version 4",
            remedy='In an environment of its own: pip install "synthaug[cellpose3]".',
        )


def _load(network: nn.Module, file: Path, nbase: Sequence[int]) -> None:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: dict[str, Tensor] = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except FileNotFoundError:
        raise CheckpointError(str(file), expected="a file of weights", got="nothing there") from None
    except Exception as error:
        remedy = "Pass the nbase it was trained with."
        got = str(error).partition("\n")[0]
        raise CheckpointError(
            str(file), expected=f"weights of a CPnet {tuple(nbase)}", got=got, remedy=remedy
        ) from error


def _is_plain(stream: SynthDataset) -> bool:
    """Whether `cellpose_data` makes plain lists of it."""
    return stream.config.synthetic_ratio == 0 and stream.transform is None


@contextlib.contextmanager
def _forwarded(log: Callable[[str], None] | None, steps: int) -> Iterator[None]:
    """Cellpose's own lines on losses, every tenth of the way; it takes no callback."""
    if log is None:
        yield
        return
    tell, every, told = log, max(steps // 10, 1), -1
    logger = logging.getLogger("cellpose.train")

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            nonlocal told
            step, comma, rest = record.getMessage().partition(", train_loss=")
            if comma and int(step) // every > told:
                told = int(step) // every
                tell(f"step {int(step) + 1} of {steps}, loss {rest.split(',')[0]}")

    handler, level = Forward(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
