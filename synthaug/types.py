"""What flows between the stages: plain frozen dataclasses of tensors, each checked when it is built.

Axes are ZYX, channel first. `sdf` is a signed distance, negative inside, in pixels of the grid it is stored on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthaug.errors import InputError

T = TypeVar("T", bound="Batch")

UNLABELLED = -1
"""Value of all pixels of a plane nobody annotated, in the labels of a real volume (int32 [Z, Y, X])."""

Pair = tuple[NDArray[np.float32], NDArray[np.int32]]
"""Image in camera counts and labels, [(Z,) Y, X] both; 0 = background, `UNLABELLED` = not annotated."""


def _check(owner: str, name: str, value: Any, ndim: int, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{owner}.{name}", expected="a torch.Tensor", got=type(value).__name__)
    if value.ndim != ndim or value.dtype != dtype:
        raise InputError(
            f"{owner}.{name}",
            expected=f"{ndim} axes of {dtype}",
            got=f"shape {tuple(value.shape)} of {value.dtype}",
        )
    # NaN spreads to both ends, and finding them is many times faster than a test of every element.
    if value.is_floating_point() and value.numel() and not all(math.isfinite(float(end)) for end in value.aminmax()):
        raise InputError(f"{owner}.{name}", expected="finite values", got="NaN or infinity")


def _check_size_and_brightness(owner: str, half_side: Tensor, brightness: Tensor) -> None:
    _check(owner, "half_side", half_side, 1, torch.float32)
    _check(owner, "brightness", brightness, 1, torch.float32)
    if len(half_side) and (half_side.min() <= 0 or (len(brightness) and brightness.min() <= 0)):
        raise InputError(owner, expected="half_side > 0 and brightness > 0", got="others")


@dataclass(frozen=True)
class Batch:
    """Common to all: the first axis of every tensor counts the samples, all tensors live on one device."""

    def __post_init__(self) -> None:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        lengths = {name: t.shape[0] for name, t in tensors.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(type(self).__name__, expected="the same number of samples in every tensor", got=lengths)
        devices = {str(t.device) for t in tensors.values()}
        if len(devices) > 1:
            raise InputError(type(self).__name__, expected="all tensors on one device", got=sorted(devices))

    def __len__(self) -> int:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                return value.shape[0]
        return 0

    def select(self: T, index: Tensor | slice) -> T:
        """The samples at `index` (LongTensor or slice), in that order."""
        return replace(
            self, **{f.name: v[index] for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        )

    def to(self: T, device: str | torch.device) -> T:
        """The same batch on another device."""
        moved = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **moved)

    @classmethod
    def cat(cls: type[T], batches: Sequence[T]) -> T:
        """Several batches as one, in order."""
        if not batches:
            raise InputError(f"{cls.__name__}.cat", expected="at least one batch", got="none")
        names = [f.name for f in fields(cls) if isinstance(getattr(batches[0], f.name), Tensor)]
        return replace(batches[0], **{name: torch.cat([getattr(b, name) for b in batches]) for name in names})


@dataclass(frozen=True)
class CellMasks(Batch):
    """Outlines of single cells, each centred in a square crop.

    Attributes:
        sdf: float32 [B, H, W], signed distance to the outline in crop pixels, negative inside; truncated at some distance.
        brightness: float32 [B], > 0; mean intensity over background, relative to the median cell of its frame.
        scale: float32 [B], > 0; image pixels per crop pixel. 1 unless the cell is too large for the crop, or the cascade was
            adapted to cells much smaller than those it was first trained on.
    """

    sdf: Tensor
    brightness: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check(name, "sdf", self.sdf, 3, torch.float32)
        _check(name, "brightness", self.brightness, 1, torch.float32)
        _check(name, "scale", self.scale, 1, torch.float32)
        super().__post_init__()
        if len(self) and (self.brightness.min() <= 0 or self.scale.min() <= 0):
            raise InputError(
                name,
                expected="brightness > 0 and scale > 0",
                got=f"brightness from {self.brightness.min():.3g}, scale from {self.scale.min():.3g}",
            )

    @property
    def mask(self) -> Tensor:
        """bool [B, H, W], True inside the cell."""
        return self.sdf < 0


@dataclass(frozen=True)
class Cameras:
    """Orthographic cameras around a cell, the same for every cell.

    The world is the cube [-1, 1]^3 in ZYX, z along the optical axis of the microscope. A camera's image covers [-1, 1]^2
    of the plane spanned by its down and right axes; a point p of the world lies at (depth, down, right) = rotation @ p.

    Attributes:
        rotation: float32 [N, 3, 3], orthonormal; rows are the depth, down and right axes in ZYX. The first camera looks
            along the optical axis: its rotation is the identity.
    """

    rotation: Tensor

    def __post_init__(self) -> None:
        _check("Cameras", "rotation", self.rotation, 3, torch.float32)
        product = self.rotation @ self.rotation.transpose(1, 2)
        if self.rotation.shape[1:] != (3, 3) or not torch.allclose(product, torch.eye(3).expand_as(product), atol=1e-4):
            raise InputError("Cameras.rotation", expected="orthonormal [N, 3, 3]", got=tuple(self.rotation.shape))

    def __len__(self) -> int:
        return self.rotation.shape[0]


@dataclass(frozen=True)
class Views(Batch):
    """What N cameras see of single cells.

    Attributes:
        sdf: float32 [B, N, H, H], signed distance to the silhouette's outline in pixels of the view, negative inside,
            possibly truncated; a view covers the square [-1, 1]^2 of its camera.
        half_side: float32 [B], > 0; image pixels (in Y and X) from the centre of that square to its side.
        brightness: float32 [B], > 0; relative to the median cell of its frame.
    """

    sdf: Tensor
    half_side: Tensor
    brightness: Tensor

    def __post_init__(self) -> None:
        _check("Views", "sdf", self.sdf, 4, torch.float32)
        _check_size_and_brightness("Views", self.half_side, self.brightness)
        super().__post_init__()

    @property
    def silhouette(self) -> Tensor:
        """bool [B, N, H, H], True inside."""
        return self.sdf < 0


@dataclass(frozen=True)
class Surface(Batch):
    """Closed surfaces of single cells.

    Attributes:
        sdf: float32 [B, D, D, D] (ZYX), signed distance in voxels at the centres of D^3 equal voxels that fill the cube
            [-1, 1]^3; negative inside.
        half_side, brightness: As in `Views`.
    """

    sdf: Tensor
    half_side: Tensor
    brightness: Tensor

    def __post_init__(self) -> None:
        _check("Surface", "sdf", self.sdf, 4, torch.float32)
        _check_size_and_brightness("Surface", self.half_side, self.brightness)
        super().__post_init__()

    @property
    def mask(self) -> Tensor:
        """bool [B, D, D, D], True inside."""
        return self.sdf < 0


@dataclass(frozen=True)
class Slices(Batch):
    """Outlines of single cells in S planes across the optical axis.

    Attributes:
        sdf: float32 [B, S, H, W], signed distance to the outline within its own plane, crop pixels, negative inside; in
            a plane the cell does not reach, positive everywhere.
        brightness: float32 [B], > 0.
        scale: float32 [B], > 0; image pixels per crop pixel.
    """

    sdf: Tensor
    brightness: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        _check("Slices", "sdf", self.sdf, 4, torch.float32)
        _check("Slices", "brightness", self.brightness, 1, torch.float32)
        _check("Slices", "scale", self.scale, 1, torch.float32)
        super().__post_init__()

    @property
    def mask(self) -> Tensor:
        """bool [B, S, H, W], True inside the cell."""
        return self.sdf < 0


@dataclass(frozen=True)
class Cells(Batch):
    """Single cells with texture; S slices along z (1 in 2D).

    Attributes:
        image: float32 [B, S, H, W], light of the cell alone: about 0 in the background, mean 1 inside the mask. The soft
            border and its halo are part of it; it fades to 0 before the crop's inscribed circle ends.
        sdf: float32 [B, S, H, W], signed distance to the outline in crop pixels, negative inside.
        brightness: float32 [B], > 0; relative to the median cell of a frame.
        scale: float32 [B], > 0; image pixels per crop pixel.
    """

    image: Tensor
    sdf: Tensor
    brightness: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check(name, "image", self.image, 4, torch.float32)
        _check(name, "sdf", self.sdf, 4, torch.float32)
        _check(name, "brightness", self.brightness, 1, torch.float32)
        _check(name, "scale", self.scale, 1, torch.float32)
        super().__post_init__()
        if self.image.shape != self.sdf.shape:
            raise InputError(
                name, expected="image and sdf of one shape", got=f"{self.image.shape} and {self.sdf.shape}"
            )

    @property
    def mask(self) -> Tensor:
        """bool [B, S, H, W], True inside the cell."""
        return self.sdf < 0


@dataclass(frozen=True)
class FrameStyles(Batch):
    """How whole frames look, one row a frame, every property drawn jointly from those of real frames.

    Attributes:
        values: float32 [B, K].
        names: the K properties; always among them `level` (background, camera counts), `brightness` (median over the
            cells of mean intensity over background, camera counts) and `density` (cells per pixel).
    """

    values: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        _check("FrameStyles", "values", self.values, 2, torch.float32)
        super().__post_init__()
        missing = {"level", "brightness", "density"} - set(self.names)
        if missing or self.values.shape[1] != len(self.names):
            raise InputError(
                "FrameStyles",
                expected="one name a column, level, brightness and density among them",
                got=f"{self.values.shape[1]} columns named {self.names}",
            )

    def __getitem__(self, name: str) -> Tensor:
        """float32 [B], the property of that name."""
        return self.values[:, self.names.index(name)]


@dataclass(frozen=True)
class Scenes(Batch):
    """Placed cells before background and camera.

    Attributes:
        light: float32 [B, 1, (Z,) Y, X], sum of the placed cells' light; 1 is the median cell of the frame.
        labels: int32 [B, 1, (Z,) Y, X], contiguous from 1 in every sample, 0 = background.
        num_requested: int64 [B], cells that were to be placed.
        num_placed: int64 [B], cells that found a free position and kept the minimum area inside the canvas; their labels come
            first, those of fragments follow.
    """

    light: Tensor
    labels: Tensor
    num_requested: Tensor
    num_placed: Tensor

    def __post_init__(self) -> None:
        _check("Scenes", "light", self.light, self.light.ndim if self.light.ndim in (4, 5) else 4, torch.float32)
        _check("Scenes", "labels", self.labels, self.light.ndim, torch.int32)
        super().__post_init__()


@dataclass(frozen=True)
class Population(Batch):
    """Finished image-label pairs.

    Attributes:
        image: float32 [B, C, (Z,) Y, X], camera counts of the data set the cascade was fitted to.
        labels: int32 [B, 1, (Z,) Y, X], contiguous from 1 in every sample, 0 = background.
        num_requested: int64 [B].
        num_placed: int64 [B].
        voxel_size_um: (Z, Y, X) in micrometres, or None where the real data carry none.
    """

    image: Tensor
    labels: Tensor
    num_requested: Tensor
    num_placed: Tensor
    voxel_size_um: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        _check("Population", "image", self.image, self.image.ndim if self.image.ndim in (4, 5) else 4, torch.float32)
        _check("Population", "labels", self.labels, self.image.ndim, torch.int32)
        super().__post_init__()
        if self.image.shape[2:] != self.labels.shape[2:]:
            raise InputError(
                "Population", expected="image and labels of one size", got=f"{self.image.shape} and {self.labels.shape}"
            )
