"""A stage comes back from disk as it was; a folder that is not one says so; a crash never leaves half a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from synthaug.errors import CheckpointError
from synthaug.generators.stage import Noise, Stage, save_tensors, write_atomic
from synthaug.randomness import SampleKey, normal


@dataclass(frozen=True)
class ToyConfig:
    size: int = 4
    channels: tuple[int, ...] = (8, 8)
    gain: float = 1.5
    name: str = "toy"


class Network(nn.Module):
    """What a stage needs of a diffusers model: saving to a folder, loading from one."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def save_pretrained(self, folder: Path, *, safe_serialization: bool) -> None:
        assert safe_serialization
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "weights.safetensors", {"weight": self.weight.detach()})

    @classmethod
    def load(cls, folder: Path) -> Network:
        return cls(load_file(folder / "weights.safetensors")["weight"].float())


class ToyStage(Stage):
    config_class = ToyConfig
    component_loaders = {"net": Network.load}  # noqa: RUF012 (declared as ClassVar in the base)
    table: torch.Tensor

    def __init__(self, config: ToyConfig, net: Network | None = None) -> None:
        super().__init__(config)
        self.net = net or Network(torch.zeros(4))
        self.register_buffer("table", torch.zeros(0))

    def draw(self, keys: list[SampleKey]) -> Noise:  # type: ignore[override]
        return {"noise": normal(keys, [self.config.size])}

    def forward(self, noise: Noise) -> torch.Tensor:
        return self.config.gain * noise["noise"] * self.net.weight + self.table.sum()


class OtherStage(ToyStage):
    pass


@pytest.fixture
def stage() -> ToyStage:
    made = ToyStage(ToyConfig(gain=1.25, channels=(4, 16)), Network(torch.tensor([1.0, 0.1, -3.0, 1e-3])))
    made.set_tables({"table": torch.tensor([0.1, 0.2, 0.3])})
    return made


def test_a_stage_comes_back_as_it_was(stage: ToyStage, tmp_path: Path) -> None:
    stage.train().save_pretrained(tmp_path / "new" / "stage")
    back = ToyStage.from_pretrained(tmp_path / "new" / "stage")
    assert back.config == stage.config
    assert isinstance(back.config.channels, tuple)
    assert not back.training
    assert torch.equal(back.table, stage.table)
    noise = stage.draw([SampleKey(0), SampleKey(1)])
    assert torch.equal(back(noise), stage(noise))


def test_the_folder_is_laid_out_as_documented(stage: ToyStage, tmp_path: Path) -> None:
    stage.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "net", "tables.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "ToyStage"
    assert list(load_file(tmp_path / "tables.safetensors")) == ["table"]


def test_half_precision_is_for_the_disk_only(stage: ToyStage, tmp_path: Path) -> None:
    stage.save_pretrained(tmp_path, half=True)
    assert load_file(tmp_path / "net" / "weights.safetensors")["weight"].dtype == torch.float16
    assert load_file(tmp_path / "tables.safetensors")["table"].dtype == torch.float32
    assert stage.net.weight.dtype == torch.float32
    back = ToyStage.from_pretrained(tmp_path)
    assert back.net.weight.dtype == torch.float32
    torch.testing.assert_close(back.net.weight, stage.net.weight, rtol=1e-3, atol=0)
    assert not torch.equal(back.net.weight, stage.net.weight)


def test_a_diffusers_network_comes_back_as_it_was(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    class Denoiser(Stage):
        config_class = ToyConfig
        component_loaders = {"unet": UNet2DModel.from_pretrained}  # noqa: RUF012

        def __init__(self, config: ToyConfig, unet: UNet2DModel) -> None:
            super().__init__(config)
            self.unet = unet

    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
    )  # fmt: skip
    Denoiser(ToyConfig(), unet).save_pretrained(tmp_path)
    assert not (tmp_path / "tables.safetensors").exists()
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    back = Denoiser.from_pretrained(tmp_path)
    assert not back.training
    before, after = unet.state_dict(), back.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    x = normal([SampleKey(0)], [1, 8, 8])
    with torch.no_grad():
        assert torch.equal(back.unet(x, 10).sample, unet.eval()(x, 10).sample)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing: expected a ToyStage folder with config\.json"):
        ToyStage.from_pretrained(tmp_path / "nothing")


def test_a_stage_of_another_kind_is_refused(stage: ToyStage, tmp_path: Path) -> None:
    stage.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="expected _class_name 'OtherStage', got 'ToyStage'"):
        OtherStage.from_pretrained(tmp_path)


def test_a_config_of_a_newer_version_is_refused(stage: ToyStage, tmp_path: Path) -> None:
    stage.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "colour": "red"}))
    with pytest.raises(CheckpointError, match=r"got unknown \['colour'\]\. Update synthaug\."):
        ToyStage.from_pretrained(tmp_path)


def test_a_config_of_an_older_version_gets_defaults(stage: ToyStage, tmp_path: Path) -> None:
    stage.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["name"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ToyStage.from_pretrained(tmp_path).config == stage.config


def test_tables_may_change_their_length_but_not_their_names(stage: ToyStage) -> None:
    stage.set_tables({"table": torch.arange(7.0)})
    assert stage.state_dict()["table"].tolist() == list(range(7))
    with pytest.raises(CheckpointError, match=r"ToyStage: expected tables \['table'\], got 'tabel'"):
        stage.set_tables({"tabel": torch.zeros(1)})


def test_a_row_of_noise_depends_on_its_own_key_alone(stage: ToyStage) -> None:
    keys = [SampleKey(0, (i,)) for i in range(4)]
    assert torch.equal(stage.draw(keys)["noise"][2:3], stage.draw(keys[2:3])["noise"])


def test_the_base_draws_nothing() -> None:
    with pytest.raises(NotImplementedError):
        Stage(ToyConfig()).draw([SampleKey(0)])
    assert Stage(ToyConfig()).device.type == "cpu"


@pytest.mark.gpu
def test_a_stage_knows_its_device(stage: ToyStage) -> None:
    stage.to("cuda").set_tables({"table": torch.zeros(2)})
    assert (stage.device.type, stage.table.device.type) == ("cuda", "cuda")


def test_a_crash_while_writing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_atomic(path, b"old")

    def crash(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"new, but only half of i")
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
