"""The only source of random numbers in the library: a key names a sample, and the key alone decides its noise.

Nothing here reads or sets a global random state (Cellpose reseeds numpy every epoch, MONAI's loader reseeds workers), and
noise is always drawn on the CPU, so that the same key gives the same noise on every device.
Source of the idea: per-sample generators of NVlabs/edm2; counter-based Philox (Salmon et al., SC 2011) for numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthaug.errors import InputError


@dataclass(frozen=True, slots=True)
class SampleKey:
    """A name for one sample, from which all of its random numbers follow.

    Args:
        seed: The user's seed.
        path: What the sample is: words and counters, for example `("cell", lane, block, index)`.

    >>> key = SampleKey(0).child("cell", 3)
    >>> key == SampleKey(0, ("cell", 3)), key.integer() == SampleKey(1, ("cell", 3)).integer()
    (True, False)
    >>> bool(torch.equal(torch.rand(2, generator=key.generator()), torch.rand(2, generator=key.generator())))
    True
    """

    seed: int
    path: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int | np.integer):
            raise InputError("seed", expected="an integer", got=repr(self.seed))

    def child(self, *parts: int | str) -> SampleKey:
        """The key of a part of this sample."""
        return SampleKey(self.seed, self.path + parts)

    def group(self, size: int) -> SampleKey:
        """A key that `size` samples share, those numbered one after the other from a multiple of it at the end of the path.

        >>> SampleKey(0, ("cell", 9)).group(8) == SampleKey(0, ("cell", 15)).group(8) != SampleKey(0, ("cell", 7)).group(8)
        True
        """
        *parent, number = self.path or (0,)
        together = number // size if isinstance(number, int) else number
        return SampleKey(self.seed, (*parent, "group", together))

    def digest(self) -> bytes:
        """16 bytes that depend on the seed and on every part of the path, words and numbers kept apart."""
        text = "\x1f".join([str(int(self.seed))] + [f"{'s' if isinstance(p, str) else 'i'}{p}" for p in self.path])
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def integer(self) -> int:
        """A 63-bit integer, for generators that take a plain seed (MONAI's `set_random_state`, say)."""
        return int.from_bytes(self.digest()[:8], "little") >> 1

    def generator(self) -> torch.Generator:
        """A fresh CPU `torch.Generator` at the start of this key's stream.

        Torch's CPU generator keeps only the low 32 bits of its seed: among 80,000 keys two are likely to share a stream.
        What must differ between samples comes from `normal`, `uniform` or `numpy()`, which use all 128 bits.
        """
        return torch.Generator().manual_seed(self.integer())

    def numpy(self) -> np.random.Generator:
        """A fresh numpy generator (Philox) at the start of this key's stream."""
        return np.random.Generator(np.random.Philox(key=int.from_bytes(self.digest(), "little")))


def log_between(ends: tuple[float, float], share: Any) -> Any:
    """So far from one end to the other on a logarithmic scale; `share` in [0, 1], a number or an array.

    >>> log_between((1.0, 100.0), 0.5)
    10.0
    """
    low, high = ends
    return low * (high / low) ** share


def normal(keys: Sequence[SampleKey], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, float32 `[len(keys), *shape]`; row i depends on `keys[i]` alone."""
    rows = [key.numpy().standard_normal(tuple(shape), dtype=np.float32) for key in keys]
    return torch.from_numpy(np.array(rows, np.float32).reshape(len(keys), *shape))


def uniform(keys: Sequence[SampleKey], shape: Sequence[int]) -> Tensor:
    """Uniform noise in [0, 1), float32 `[len(keys), *shape]`; row i depends on `keys[i]` alone."""
    rows = [key.numpy().random(tuple(shape), dtype=np.float32) for key in keys]
    return torch.from_numpy(np.array(rows, np.float32).reshape(len(keys), *shape))
