"""The one contract all stages share: draw the noise first, then apply a pure fixed-shape function to it (DESIGN.md, 1).

A stage on disk is a folder: `config.json` (its typed config), `tables.safetensors` (its own buffers: fitted tables and
profiles), and a diffusers-style subfolder for each network.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from synthaug.errors import CheckpointError
from synthaug.randomness import SampleKey

Noise = dict[str, Tensor]
"""What `draw` returns: named tensors, the first axis counting the samples."""


class Stage(nn.Module):
    """Base of every stage.

    A subclass names its `config_class` (a dataclass of plain values), takes an instance of it as only required argument,
    registers fitted tables as buffers, and lists in `component_loaders` the networks that go to subfolders of their own:
    name -> function that loads a diffusers model from a folder.
    """

    config_class: ClassVar[type]
    component_loaders: ClassVar[dict[str, Callable[[Path], nn.Module]]] = {}

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the stage's tensors live."""
        for tensor in [*self.parameters(), *self.buffers()]:
            return tensor.device
        return torch.device("cpu")

    def draw(self, keys: Sequence[SampleKey]) -> Noise:
        """All random numbers of `forward`, one row a key; row i depends on `keys[i]` alone."""
        raise NotImplementedError  # every stage draws something different; the contract is the signature

    def save_pretrained(self, folder: str | Path, *, half: bool = False) -> None:
        """Write the stage to `folder`.

        Args:
            folder: Created if missing.
            half: Store network weights as float16 (they are read back as float32).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": type(self).__name__, **dataclasses.asdict(self.config)}
        write_atomic(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        prefixes = tuple(f"{name}." for name in self.component_loaders)
        tables = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items() if not k.startswith(prefixes)}
        if tables:
            save_tensors(folder / "tables.safetensors", tables)
        for name in self.component_loaders:
            save_network(getattr(self, name), folder / name, half=half)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a stage that `save_pretrained` wrote."""
        from safetensors.torch import load_file

        folder = Path(folder)
        path = folder / "config.json"
        if not path.is_file():
            raise CheckpointError(str(folder), expected=f"a {cls.__name__} folder with config.json", got="no such file")
        config = json.loads(path.read_text())
        name = config.pop("_class_name", None)
        if name != cls.__name__:
            raise CheckpointError(str(path), expected=f"_class_name {cls.__name__!r}", got=repr(name))
        known = {f.name: f for f in dataclasses.fields(cls.config_class)}
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise CheckpointError(
                str(path), expected=f"fields {sorted(known)}", got=f"unknown {unknown}", remedy="Update synthaug."
            )
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        with untouched_generator():
            networks = {name: load(folder / name) for name, load in cls.component_loaders.items()}
            stage = cls(cls.config_class(**values), **networks)
        tables = folder / "tables.safetensors"
        if tables.is_file():
            stage.set_tables(load_file(tables))
        for tensor in [*stage.parameters(), *stage.buffers()]:
            # A mapped file puts weights at odd addresses, where torch's kernels give other last bits than for the same
            # weights in memory of torch's own: fresh from training, or unpickled in a worker.
            tensor.data = tensor.data.clone()
        return stage.eval()

    def set_tables(self, tables: dict[str, Tensor]) -> None:
        """Replace fitted buffers, also by ones of another length."""
        own = dict(self.named_buffers(recurse=False))
        for name, value in tables.items():
            if name not in own:
                raise CheckpointError(type(self).__name__, expected=f"tables {sorted(own)}", got=repr(name))
            setattr(self, name, value.to(self.device))


def untouched_generator() -> AbstractContextManager[None]:
    """For building networks: torch fills new layers from its global generator, whose state is put back afterwards."""
    return torch.random.fork_rng(devices=[])


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves either the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file so that a crash leaves either the old content or the new one."""
    from safetensors.torch import save

    write_atomic(path, save(tensors))


def save_network(network: nn.Module, folder: Path, *, half: bool) -> None:
    """Write a diffusers model as `config.json` + safetensors."""
    import copy

    # Not `model.to`: diffusers' own version warns about modules it would keep in float32, an empty list here.
    model = nn.Module.to(copy.deepcopy(network), "cpu", torch.float16 if half else torch.float32)
    model.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]  # diffusers' ModelMixin
    path = folder / "config.json"
    if path.is_file():
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # where it was loaded from: a path of this machine
        write_atomic(path, (json.dumps(config, indent=2) + "\n").encode())
