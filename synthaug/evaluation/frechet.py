"""Fréchet distance of Inception features by torchmetrics, where the user has weights on disk; nothing is downloaded.

Two distances go by the name of Fréchet here, and neither is the FID of the literature:

- `frechet_texture43`, in every realism report: 43 computed texture features (`texture_features.py`), no network;
- `frechet_inception_v3_torchvision`, this file: torchvision's Inception v3 with the ImageNet weights it is published with.
  FID proper (Heusel et al. 2017) is defined by another set of weights and another pooling, those of the TensorFlow graph of
  2015-12-05, so its numbers do not compare with these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from synthaug.errors import InputError
from synthaug.evaluation.realism import Distance
from synthaug.evaluation.tiles import (
    MIN_TILE,
    TEXTURE_TILE,
    Pair,
    check_sets,
    common_shape,
    cut_tiles,
    draw_tiles,
    planes,
)
from synthaug.randomness import SampleKey

TEXTURE43 = "frechet_texture43"
INCEPTION = "frechet_inception_v3_torchvision"

NUM_CLASSES = 1000
"""Of torchvision's weights. Those of the FID network have 1008."""

SIDE = 299
"""Pixels a side that Inception v3 was trained on."""

TILES_AT_ONCE = 16


class InceptionFeatures(nn.Module):
    """What torchvision's Inception v3 says of an image before its last layer.

    Args:
        state: Its weights, as torchvision publishes them.

    Raises:
        InputError: torchvision is not installed, or the weights are not this network's.
    """

    num_features = 2048  # torchmetrics asks for it

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        inception_v3 = _inception_v3()
        # Without memory and without drawing weights from the global random state: all come from the file.
        with torch.device("meta"):
            network = inception_v3(weights=None, init_weights=False, aux_logits=False, num_classes=NUM_CLASSES)
        wanted = {name: value for name, value in state.items() if not name.startswith("AuxLogits.")}
        counters = {n: torch.zeros((), dtype=torch.long) for n in network.state_dict() if n.endswith("_tracked")}
        try:  # counters of batches, which older files lack, play no part in evaluation mode
            network.load_state_dict(counters | wanted, assign=True)
        except RuntimeError as error:
            got = str(error).splitlines()[1].strip()
            raise InputError("weights", expected="torchvision's inception_v3", got=got, remedy=REMEDY) from error
        network.fc = nn.Identity()
        self.network = network.float().eval().requires_grad_(False)

    def train(self, mode: bool = True) -> InceptionFeatures:
        """Stays in evaluation mode: a batch's own statistics would make features depend on their neighbours."""
        return super().train(False)

    def forward(self, image: Tensor) -> Tensor:
        """float32 [B, 2048] of grey images float32 [B, 1, Y, X] in [0, 1]."""
        image = nn.functional.interpolate(image, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        features: Tensor = self.network(image.expand(-1, 3, -1, -1) * 2 - 1)
        return features


REMEDY = (
    "Save torchvision.models.inception_v3(weights='IMAGENET1K_V1').state_dict(), or name torchvision's own file "
    "inception_v3_google-0cc3c7bd.pth."
)


def _make_importable() -> None:
    """torchmetrics imports torchvision where there is one, which fails beside a torch without CUDA."""
    from synthaug.datasets.cellpose import make_up_for_torchvision  # the one place that mends it

    make_up_for_torchvision()


def _inception_v3() -> Any:
    _make_importable()
    try:
        from torchvision.models import inception_v3
    except ImportError as error:
        raise InputError(
            "torchvision", expected="to be installed", got=str(error), remedy='pip install "synthaug[inception]".'
        ) from error
    return inception_v3


def _torchmetrics_fid() -> Any:
    _make_importable()
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise InputError(
            "torchmetrics", expected="to be installed", got=str(error), remedy='pip install "synthaug[inception]".'
        ) from error
    return FrechetInceptionDistance


def load_inception(path: str | Path) -> InceptionFeatures:
    """The extractor of `INCEPTION`.

    Args:
        path: State dict of torchvision's `inception_v3`, .safetensors or .pth; a .pth is read as weights only, so that it
            can run no code.

    Raises:
        InputError: The file is missing, is no state dict of that network, or torchvision or torchmetrics is not
            installed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights {path}", expected="a file", got="nothing there", remedy=REMEDY)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise half a dozen kinds for files that are something else
        got = f"a file that cannot be read as one ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise InputError(f"weights {path}", expected="a state dict of tensors", got=got, remedy=REMEDY) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"weights {path}", expected="a state dict of tensors", got=type(state).__name__, remedy=REMEDY)
    head = state.get("fc.weight")
    if head is not None and head.shape[0] != NUM_CLASSES:
        got = f"{head.shape[0]} classes" + (", the network of FID" if head.shape[0] == 1008 else "")
        remedy = f"That one pools in another way, which is not built here. {REMEDY}"
        raise InputError(f"weights {path}", expected=f"{NUM_CLASSES} classes", got=got, remedy=remedy)
    _torchmetrics_fid()  # no use without it, which is better known before the images are made
    return InceptionFeatures(state)


@dataclass(frozen=True)
class FrechetReport:
    """A Fréchet distance of features of a network.

    Attributes:
        name: Which one, see the module.
        distance: Real train and synthetic, each against real val.
        num_tiles: Tiles on each side.
        tile: Their side in pixels.
    """

    name: str
    distance: Distance
    num_tiles: int
    tile: int

    def __str__(self) -> str:
        d = self.distance
        return (
            f"{self.name}: r2r {d.r2r:.1f}, r2s {d.r2s:.1f}, r2s/r2r {d.ratio:.2f}; {self.num_tiles} tiles of {self.tile} px "
            "on each side. Not FID: compares only with itself, on the same images and as many tiles."
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON, under its own name."""
        numbers = {"r2r": self.distance.r2r, "r2s": self.distance.r2s}
        return {self.name: numbers | {"num_tiles": self.num_tiles, "tile": self.tile}}


def frechet_report(
    train: Sequence[Pair],
    val: Sequence[Pair],
    synthetic: Sequence[Pair],
    extractor: nn.Module,
    *,
    name: str = INCEPTION,
    seed: int = 0,
) -> FrechetReport:
    """Compare tiles of frames, or of xy planes of volumes, by the features of a network.

    All tiles are scaled alike, so that the 1st and 99.8th percentile of the train tiles become 0 and 1. As in
    `realism_report`, synthetic images are rounded where all training images hold whole numbers.

    Args:
        train: (image float32 [(Z,) Y, X], labels int32 of the same shape) of what the generator was fitted to.
        val: The same, real, that it has not seen.
        synthetic: The same that it made.
        extractor: Makes features float32 [B, F] of tiles float32 [B, 1, Y, X] in [0, 1]; has `num_features` = F. See
            `load_inception`.
        name: What the distance is called.
        seed: For the draw of tiles: at most `MAX_TILES`, the same number of each set, since the bias depends on it.

    Raises:
        InputError: A set is empty or has fewer than 4 tiles, or the sets do not fit.
    """
    ndim = check_sets({"train": train, "val": val, "synthetic": synthetic})
    sets = [train, val, synthetic]
    side = min(TEXTURE_TILE, *common_shape(sets)[-2:])
    if side < MIN_TILE:
        raise InputError("images", expected=f"sides of {MIN_TILE} px or more", got=f"{side} px")
    if all(np.array_equal(image, np.rint(image)) for image, _ in train):
        sets[2] = [(np.rint(image), labels) for image, labels in synthetic]
    if ndim == 3:
        sets = [planes(pairs, "xy") for pairs in sets]
    draw = SampleKey(seed, ("tiles",))
    tiles = [[image for image, _ in draw_tiles(cut_tiles(pairs, side), draw)] for pairs in sets]
    count = min(map(len, tiles))
    if count < 4:
        got = [len(group) for group in tiles]
        raise InputError("train, val, synthetic", expected=f"4 tiles of {side} px each", got=got)
    low, high = np.percentile(np.stack(tiles[0]), (1.0, 99.8))
    scaled = []
    for number, group in enumerate(tiles):
        picked = SampleKey(seed, ("inception", number)).numpy().choice(len(group), count, replace=False)
        stack = (np.stack([group[i] for i in picked]) - low) / max(high - low, 1e-6)
        scaled.append(np.clip(stack, 0, 1).astype(np.float32))
    return FrechetReport(name, feature_distance(scaled[0], scaled[1], scaled[2], extractor), count, side)


def feature_distance(
    train: NDArray[np.float32], val: NDArray[np.float32], synthetic: NDArray[np.float32], extractor: nn.Module
) -> Distance:
    """Fréchet distance of train and of synthetic tiles, float32 [N, Y, X], to val tiles, by torchmetrics.

    Raises:
        InputError: torchmetrics is not installed.
    """
    metric = _torchmetrics_fid()(feature=extractor.eval(), reset_real_features=False)

    def show(tiles: NDArray[np.float32], real: bool) -> None:
        for start in range(0, len(tiles), TILES_AT_ONCE):
            metric.update(torch.from_numpy(tiles[start : start + TILES_AT_ONCE])[:, None], real=real)

    show(val, real=True)
    found = []
    for tiles in (train, synthetic):
        show(tiles, real=False)
        found.append(float(metric.compute()))
        metric.reset()  # but for the features of val
    return Distance(*found)
