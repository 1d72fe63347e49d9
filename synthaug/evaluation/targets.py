"""What the networks of this package learn to say about every pixel: background, interior or border of a cell.

Three classes as in Caicedo et al., Cytometry A 2019: the border is what keeps touching nuclei apart. All of it is made of
max-pooling, so that a whole batch is done at once, on whatever device it lies; frames and volumes go the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from synthaug.errors import InputError

BACKGROUND, INTERIOR, BORDER = 0, 1, 2

TOUCH_RADIUS = 2
"""Pixels of a cell so close to another cell are border too; the outline itself is one pixel thick."""

SEAM_RADIUS, SEAM_WEIGHT = 3, 5.0
"""Pixels that have two cells so close weigh so much more than others in the loss. They are few, and all that decides
whether neighbours are parted: without this, a short training on images where few cells touch merges those that do."""


def frame_targets(labels: Tensor) -> Tensor:
    """Background, interior and border of frames.

    Border are the outermost pixels of a cell and those within `TOUCH_RADIUS` of another cell; only pixels of a cell can
    be border, so that interior and border together are the cell. Where an image ends, there is no border. Every cell
    keeps some interior, however small it is.

    Args:
        labels: integer [B, Y, X], 0 = background; negative counts as background.

    Returns:
        int64 [B, Y, X] of `BACKGROUND`, `INTERIOR` and `BORDER`.

    >>> frame_targets(torch.tensor([[[0, 0, 1, 1, 1, 1, 2, 2, 2, 2]]]))
    tensor([[[0, 0, 2, 1, 2, 2, 2, 2, 1, 1]]])
    """
    ids = _exact(labels, 3)
    cell = ids > 0
    target = torch.where(cell, INTERIOR, BACKGROUND)
    target[cell & (_outline(ids) | _near_two(ids, TOUCH_RADIUS))] = BORDER
    return _with_interior(target, ids)


def volume_targets(labels: Tensor) -> Tensor:
    """Background, interior and border of volumes; the same for planes annotated alone and for whole volumes.

    Border are the outermost voxels of a cell within its plane, and those that meet another cell in the next plane. A
    cell's own upper and lower side is no border: where planes are annotated alone, nobody knows it.

    Args:
        labels: integer [B, Z, Y, X], 0 = background, `UNLABELLED` = not annotated.

    Returns:
        int64 [B, Z, Y, X] of `BACKGROUND`, `INTERIOR` and `BORDER`; `BACKGROUND` where not annotated.

    >>> volume_targets(torch.tensor([[[[0, 0, 1, 1, 1, 2, 2, 2]]]]))
    tensor([[[[0, 0, 2, 1, 2, 2, 1, 1]]]])
    """
    ids = _exact(labels, 4)
    cell = ids > 0
    meets = torch.zeros_like(cell)
    differ = (ids[:, 1:] != ids[:, :-1]) & cell[:, 1:] & cell[:, :-1]
    meets[:, 1:] |= differ
    meets[:, :-1] |= differ
    target = torch.where(cell, INTERIOR, BACKGROUND)
    target[cell & (_outline(ids.flatten(0, 1)).view_as(cell) | meets)] = BORDER
    return target


def loss_weights(labels: Tensor) -> Tensor:
    """How much every pixel weighs in the loss: `SEAM_WEIGHT` between close cells, 1 elsewhere, 0 where not annotated.

    A box in place of the two distances of Ronneberger et al., MICCAI 2015, equation 2; much cheaper, same purpose. The
    annotated planes of a volume together weigh what all of its planes would: beside a volume that is annotated throughout, as
    synthetic ones are, one plane in 24 would hardly count.

    Args:
        labels: integer [B, (Z,) Y, X], 0 = background, negative = not annotated.

    Returns:
        float32 of the same shape.
    """
    ids = _exact(labels, labels.ndim)
    annotated = labels >= 0
    share = annotated.float().flatten(1).mean(1).view(-1, *[1] * (labels.ndim - 1))
    return torch.where(_near_two(ids, SEAM_RADIUS), SEAM_WEIGHT, 1.0) * annotated / share.clamp_min(1e-6)


def _exact(labels: Tensor, ndim: int) -> Tensor:
    """The ids as float32, which max-pooling takes, negative ones as 0."""
    if labels.ndim != ndim or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        axes = "[B, Y, X]" if ndim == 3 else "[B, Z, Y, X]"
        raise InputError("labels", expected=f"integers {axes}", got=f"{labels.dtype} {tuple(labels.shape)}")
    ids = labels.clamp_min(0)
    if ids.numel() and int(ids.max()) >= 2**24:
        raise InputError("labels", expected="ids below 2^24, which float32 holds exactly", got=int(ids.max()))
    return ids.float()


def _largest(values: Tensor, radius: tuple[int, ...]) -> Tensor:
    """Maximum over a box of that radius along each of the last axes, [B, (Z,) Y, X]; outside the image is ignored."""
    for axis, reach in enumerate(radius, start=1):  # a box's maximum is that of its axes, one after the other
        flat = values.movedim(axis, -1)
        pooled = F.max_pool1d(flat.reshape(-1, 1, flat.shape[-1]), 2 * reach + 1, stride=1, padding=reach)
        values = pooled.view(flat.shape).movedim(-1, axis)
    return values


def _outline(ids: Tensor) -> Tensor:
    """Pixels of [N, Y, X] with a pixel of another number above, below, left or right of them."""
    differ = torch.zeros_like(ids, dtype=torch.bool)
    for axis in (1, 2):
        change = ids.diff(dim=axis) != 0
        length = ids.shape[axis]
        differ.narrow(axis, 1, length - 1).logical_or_(change)
        differ.narrow(axis, 0, length - 1).logical_or_(change)
    return differ


def _near_two(ids: Tensor, radius: int) -> Tensor:
    """Where the box of that radius around a pixel holds pixels of more than one cell."""
    box = (radius,) * (ids.ndim - 1)
    largest = _largest(ids, box)
    smallest = -_largest(torch.where(ids > 0, -ids, -torch.inf), box)
    return (largest > 0) & (smallest < largest)


def _with_interior(target: Tensor, ids: Tensor) -> Tensor:
    """The deepest pixels of every cell without interior become interior."""
    width = int(ids.max()) + 1 if ids.numel() else 1
    cell = (ids.long() + width * torch.arange(len(ids), device=ids.device)[:, None, None]).flatten()

    def most(values: Tensor) -> Tensor:
        """The largest value in the cell of every pixel."""
        table = torch.zeros(width * len(ids), device=ids.device)
        return table.scatter_reduce(0, cell, values.flatten().float(), "amax")[cell].view_as(ids)

    lost = (most(target == INTERIOR) == 0) & (ids > 0)
    if not bool(lost.any()):
        return target
    depth, inner = torch.zeros_like(ids), lost
    while bool(inner.any()):
        depth += inner
        padded = F.pad(ids * inner, (1, 1, 1, 1))[:, None]
        # Deeper are pixels whose whole 3 x 3 surroundings are of their own cell; where the image ends, it is cut.
        around = [sign * F.max_pool2d(sign * padded, 3, stride=1)[:, 0] for sign in (1, -1)]
        inner = inner & (around[0] == ids) & (around[1] == ids)
    return torch.where(lost & (depth == most(depth)), INTERIOR, target)
