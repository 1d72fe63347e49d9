"""Networks small enough to be trained by Cellpose in a test, for whichever major version is installed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from synthaug.datasets.cellpose import import_cellpose

if "CELLPOSE" not in os.environ:  # doctests are looked for in this file as well
    pytest.importorskip("cellpose", reason="Cellpose is not installed here")

MAJOR = import_cellpose()


def tiny_net(seed: int = 0) -> Any:
    """CPnet with few features for Cellpose 3; for Cellpose 4 what train_seg needs of Cellpose-SAM (300 million parameters)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if MAJOR == 3:
            from cellpose.resnet_torch import CPnet

            return CPnet([2, 8, 16], 3, sz=3)
        return _tiny_vit()


def _tiny_vit() -> Any:
    from cellpose import vit

    class TinyViT(vit.BaseModel):
        """Patches of 8 x 8 to tokens and back, as Cellpose-SAM does, without attention between them."""

        backbone = "tiny"

        def __init__(self) -> None:
            super().__init__(dtype=torch.float32)
            self.encoder = nn.Sequential(nn.Conv2d(3, 48, 8, stride=8), nn.GELU(), nn.Conv2d(48, 48, 3, padding=1))
            self.out = nn.ConvTranspose2d(48, 3, 8, stride=8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.out(self.encoder(x))
            return y, torch.zeros(len(x), 256)

    return TinyViT()


def train(net: Any, images: Any, labels: Any, folder: Path, **settings: Any) -> list[float]:
    """`train_seg`, as a user calls it, on small crops; the loss of every epoch."""
    from cellpose.train import train_seg

    settings = {"normalize": False, "batch_size": 4, "n_epochs": 3, "bsize": 64, "learning_rate": 0.01} | settings
    _, losses, _ = train_seg(
        net, train_data=images, train_labels=labels, save_path=folder, model_name="model", **settings
    )
    return [float(loss) for loss in losses]
