"""Lightning and accelerate, beyond the README's examples: workers, resumes, faults, and several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from synthaug.datasets.synth import SynthDataset
from synthaug.errors import ProducerError
from tests.fakes import FakeCascade
from tests.test_synth import dataset, digest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own advice

ONE_RANK = """
import json, sys
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from tests.test_synth import dataset

dispatch, folder = json.loads(sys.argv[1]), sys.argv[2]
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
stream = dataset(num_batches=3, num_shards=2)
network, loader = accelerator.prepare(torch.nn.Conv2d(1, 1, 3), stream.loader(num_workers=0))
sums = [batch["image"].double().sum((1, 2, 3)).tolist() for batch in loader]
accelerator.save_state(folder)
accelerator.wait_for_everyone()
again = accelerator.prepare(dataset(num_batches=3, num_shards=2).loader(num_workers=0))
accelerator._dataloaders.remove(loader)
accelerator.load_state(folder)
sums += [batch["image"].double().sum((1, 2, 3)).tolist() for batch in again]
print("RANK", json.dumps([accelerator.process_index, accelerator.num_processes, sums]))
"""
"""A rank takes an epoch, saves its state, and takes the next one with another loader that was told the state."""


def lightning_run(folder: Path, stream: SynthDataset, num_workers: int = 0, **settings: Any) -> Any:
    """Train with Lightning; returns the trainer, whose module's `seen` holds a hash of each batch."""
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed here; the extra dev brings it")

    class Network(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)
            self.seen: list[str] = []

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            self.seen.append(digest([batch]))
            return self.layer(batch["image"]).square().mean()

        def on_train_batch_end(self, *_: Any) -> None:
            if len(self.seen) == 3 and not checkpoint:
                self.trainer.save_checkpoint(folder / "after_3.ckpt")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-9)

    checkpoint = settings.pop("ckpt_path", None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(default_root_dir=folder, enable_checkpointing=False, **quiet, **settings)
    trainer.fit(Network(), stream.loader(num_workers=num_workers), ckpt_path=checkpoint)
    return trainer


@pytest.fixture(scope="module")
def expected() -> list[str]:
    return [digest([batch]) for _, batch in zip(range(12), dataset())]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lightning_gets_the_stream(tmp_path: Path, num_workers: int, expected: list[str]) -> None:
    epochs = lightning_run(tmp_path, dataset(num_batches=4), num_workers, max_epochs=3)
    assert epochs.lightning_module.seen == expected
    endless = lightning_run(tmp_path, dataset(), num_workers, max_steps=6)
    assert endless.lightning_module.seen == expected[:6]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lightning_resumes_with_its_checkpoint(tmp_path: Path, num_workers: int, expected: list[str]) -> None:
    first = lightning_run(tmp_path, dataset(num_batches=6), num_workers, max_epochs=2)
    assert first.lightning_module.seen == expected
    after_3 = tmp_path / "after_3.ckpt"
    second = lightning_run(tmp_path, dataset(num_batches=6), 0, max_epochs=2, ckpt_path=after_3)
    assert second.lightning_module.seen == expected[3:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_fault_reaches_lightning(tmp_path: Path, num_workers: int) -> None:
    with pytest.raises(ProducerError, match="went up in smoke"):
        lightning_run(tmp_path, dataset(cascade=FakeCascade(fail_at=20)), num_workers, max_steps=200)


@pytest.mark.parametrize("dispatch", ["false", "true", "null"])
def test_ranks_of_accelerate_share_a_batch_and_resume(tmp_path: Path, dispatch: str) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed here; the extra dev brings it")
    script = tmp_path / "one_rank.py"
    script.write_text(ONE_RANK)
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, script, dispatch, tmp_path / "state"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | settings,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = sorted(json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("RANK "))
    assert [rank[:2] for rank in ranks] == [[0, 2], [1, 2]]
    whole = [batch["image"].double().sum((1, 2, 3)).tolist() for _, batch in zip(range(6), dataset(num_shards=2))]
    assert [a + b for a, b in zip(ranks[0][2], ranks[1][2])] == whole
