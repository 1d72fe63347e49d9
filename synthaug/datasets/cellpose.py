"""`cellpose_data`: a stream as the two sequences that `cellpose.train.train_seg` takes, with a fresh pair at every draw.

`train_seg` knows lists and files only (cellpose#350, #410). `cellpose_draws.py` says how it uses them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from synthaug.datasets.cellpose_draws import Draws, Images, Labels, Pair
from synthaug.datasets.cellpose_source import StreamSource
from synthaug.datasets.loader import SynthLoader
from synthaug.datasets.mixing import read_real
from synthaug.datasets.synth import SynthDataset, dataset_of
from synthaug.errors import InputError
from synthaug.randomness import SampleKey

NUM_CHANNELS = {3: 2, 4: 3}
"""Channels of an image by Cellpose's major version: CPnet takes cytoplasm and nuclei, Cellpose-SAM colours."""

BATCHES_OF_AN_EPOCH = 8
"""Batches of an endless stream that make an epoch of Cellpose's."""


def cellpose_data(
    stream: SynthDataset | SynthLoader,
    num_slots: int | None = None,
    *,
    min_masks: int = 0,
    num_channels: int | None = None,
    flow_device: torch.device | str | None = None,
) -> tuple[Any, Any]:
    """A stream as `train_data` and `train_labels` of Cellpose's `train_seg`, 3.1 (CPnet) and 4.x (Cellpose-SAM).

        images, labels = cellpose_data(stream, num_slots=64)
        train.train_seg(model.net, train_data=images, train_labels=labels, normalize=False, batch_size=8)

    Every image that Cellpose draws is the next one of the stream, however often it draws the same slot. With the stream's
    `batch_size` in `train_seg`, and a number of slots that it divides, every step has the stream's mix. The next batch of the
    stream, its flows included, is made while Cellpose trains on the present one, so `stream.stats()` is a batch ahead.

    At `synthetic_ratio=0` without a `transform` they are plain lists of the real samples, whole: slot i is `real[i]`, and
    training gives what it gives without this library.

    What `train_seg` must and need not be told:
      - `normalize=False`, and no `channels`: images come normalised (`normalise`), with the channels they need.
      - `n_epochs`: an epoch is `num_slots` draws, or `nimg_per_epoch`; the learning rate rises from 0 over ten of them.
      - `min_train_masks` has no effect, as Cellpose sees all cells of some frames in every slot; `min_masks` has.
      - `train_probs` has no effect: which samples come, the stream decides.
      - `rescale=True` (the default in 3.1) brings the stream's median diameter to the network's, one factor for all frames.

    Args:
        stream: A stream of frames, or its `loader(num_workers=...)`. Of volumes only if a `transform` makes planes of them.
        num_slots: Length of the two sequences; by default the samples of an epoch of the stream, or 8 batches of an endless
            one. At ratio 0 the number of real samples.
        min_masks: Fewest cells of a frame; one with fewer is an error. With 0 frames without cells are trained on as well, as
            sparse data have them; only more than 32 of them in a row are an error.
        num_channels: C; by default 2 with Cellpose 3 and 3 with Cellpose 4.
        flow_device: Where flows are computed; by default where the stream's cascade is.

    Returns:
        Two sequences for `train_seg`, of images [C, Y, X] and labels [4, Y, X] (label, cell, flow along Y and X). They
        serve it and nobody else: their items cannot be looked at as arrays. A thread works ahead until both are gone, or
        `train_data.close()`.

    Raises:
        InputError: Cellpose is missing or of another version, or an argument or sample is not what it has to be. Faults of
            the stream are raised in `train_seg`, by the draw that meets them.
        ProducerError: Making cells failed.
    """
    major = import_cellpose()
    data = dataset_of(stream)
    for name, value, least in (
        ("num_slots", num_slots, 1),
        ("min_masks", min_masks, 0),
        ("num_channels", num_channels, 1),
    ):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise InputError(name, expected=f"a whole number >= {least}", got=repr(value))
    channels = NUM_CHANNELS[major] if num_channels is None else num_channels
    device = torch.device(data.cascade.device if flow_device is None else flow_device)
    if data.config.synthetic_ratio == 0 and data.transform is None and len(data.config.size) == 2:
        if num_slots not in (None, len(data.real)):
            raise InputError(
                "num_slots",
                expected=f"{len(data.real)} or None at synthetic_ratio=0, where slot i is real[i]",
                got=num_slots,
                remedy="nimg_per_epoch of train_seg sets the samples of an epoch.",
            )
        return real_lists(data.real, channels, device)
    source = StreamSource(stream, functools.partial(_pair, channels, device), channels, min_masks, device)
    if num_slots is None:
        try:
            num_slots = len(data) * source.batch_size
        except TypeError:  # endless
            num_slots = BATCHES_OF_AN_EPOCH * source.batch_size
    draws = Draws(source)
    return Images(draws, num_slots), Labels(draws, num_slots)


def real_lists(
    real: Any, num_channels: int, device: torch.device | str = "cpu"
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Real samples as plain lists for `train_seg`, with `normalize=False`.

    Args:
        real: Map-style data set of frames, see `SynthDataset`.
        num_channels: C.
        device: Where flows are computed.

    Returns:
        Images float32 [C, Y, X] and labels float32 [4, Y, X], of every sample's own size.
    """
    images, labels = [], []
    for index in range(len(real)):
        item = real[index]
        image = item.get("image", 0) if isinstance(item, Mapping) else item[0] if isinstance(item, tuple | list) else 0
        size = (1, 1, *np.shape(image))[-2:]  # read_real has the words for what is no image
        grey, label = read_real({index: item}, index, size, SampleKey(0))
        pair = _pair(num_channels, torch.device(device), grey.numpy(), label[0].numpy())
        images.append(pair.image)
        labels.append(np.concatenate((label.numpy().astype(np.float32), pair.target)))
    return images, labels


def normalise(image: NDArray[Any]) -> NDArray[np.float32]:
    """Every channel with its 1st percentile at 0 and its 99th at 1, as Cellpose does by default; constant ones become 0.

    Args:
        image: [C, Y, X], any scale.

    Returns:
        float32 [C, Y, X]. Values beyond the percentiles are kept.
    """
    out: NDArray[np.float32] = np.array(image, dtype=np.float32)
    for channel in out:
        low, high = np.percentile(channel, 1), np.percentile(channel, 99)
        if high > low:
            channel -= low
            channel /= high - low
        else:
            channel[:] = 0
    return out


def import_cellpose() -> int:
    """Make sure that Cellpose can be imported, and say which major version it is.

    Raises:
        InputError: It is missing, or a version whose `train_seg` this module has not been written for.
    """
    version = _version()
    known = [int(part) if part.isdigit() else 0 for part in version.split(".")[:2]]
    if not [3, 1] <= known < [5, 0]:
        raise InputError(
            "cellpose",
            expected="version 3.1 or 4 in this environment",
            got=version,
            remedy='pip install "synthaug[cellpose]" brings Cellpose-SAM, "synthaug[cellpose3]" CPnet; an environment holds '
            "one of the two.",
        )
    return known[0]


def _version() -> str:
    try:
        return importlib.metadata.version("cellpose")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def make_up_for_torchvision() -> None:
    """Declare the operators of torchvision's compiled library where that cannot be loaded.

    The registry's torchvision for Linux is built for CUDA. Beside a torch without CUDA its library is not found to fit, which
    it passes over in silence, and then it fails to register the meta kernel of an operator that does not exist: neither
    torchvision nor Cellpose 4 can be imported, nor the networks of diffusers, which take torchvision if it is there. Nothing
    of these calls the operators, so their names suffice.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    for library in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(library)
            return
        except OSError:
            pass
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def flows(label: NDArray[np.integer[Any]], device: torch.device | str = "cpu") -> NDArray[np.float32]:
    """Cellpose's flows: in every pixel of a cell the direction to its centre (Stringer et al. 2021, Methods).

    Args:
        label: integer [Y, X], contiguous from 1, 0 = background; not changed.
        device: Where they are computed.

    Returns:
        float32 [2, Y, X], along Y and along X; unit vectors, or 0.
    """
    from cellpose import dynamics

    if np.count_nonzero(label) < 2:  # some versions fail on a single pixel, whose flow is 0 anyway
        return np.zeros((2, *label.shape), np.float32)
    # labels_to_flows, which all versions have, logs a line for every frame and writes into the label.
    compute = dynamics.masks_to_flows if hasattr(dynamics, "masks_to_flows") else dynamics.masks_to_flows_gpu
    found = compute(label.astype(int), device=torch.device(device))
    found = found[0] if isinstance(found, tuple) else found
    out: NDArray[np.float32] = found.astype(np.float32)
    return out


def _pair(num_channels: int, device: torch.device, image: NDArray[Any], label: NDArray[Any]) -> Pair:
    """The pair of an image [<= C, Y, X] and a label [Y, X], contiguous from 1."""
    padded = np.zeros((num_channels, *image.shape[1:]), np.float32)
    padded[: len(image)] = normalise(image)
    return Pair(padded, np.concatenate(((label > 0)[None].astype(np.float32), flows(label, device))))


# When this module is imported and not at its first use: by then a cascade or Cellpose would have failed to import.
if _version().startswith("4."):
    make_up_for_torchvision()
