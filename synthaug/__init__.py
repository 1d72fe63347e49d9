"""synthaug: training data for microscopy segmentation that makes itself.

Names are loaded on first use, so that importing the package costs little beyond torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthaug.cascade import Cascade
    from synthaug.datasets.cellpose import cellpose_data
    from synthaug.datasets.check import check_stream
    from synthaug.datasets.readers import open_pairs
    from synthaug.datasets.synth import SynthDataset
    from synthaug.datasets.throughput import measure_throughput
    from synthaug.datasets.transforms import RandSynthPopulation, RandSynthPopulationd
    from synthaug.randomness import SampleKey

__version__ = "0.1.0"

_HOMES = {
    "Cascade": "synthaug.cascade",
    "RandSynthPopulation": "synthaug.datasets.transforms",
    "RandSynthPopulationd": "synthaug.datasets.transforms",
    "SampleKey": "synthaug.randomness",
    "SynthDataset": "synthaug.datasets.synth",
    "cellpose_data": "synthaug.datasets.cellpose",
    "check_stream": "synthaug.datasets.check",
    "measure_throughput": "synthaug.datasets.throughput",
    "open_pairs": "synthaug.datasets.readers",
}

__all__ = [
    "Cascade",
    "RandSynthPopulation",
    "RandSynthPopulationd",
    "SampleKey",
    "SynthDataset",
    "__version__",
    "cellpose_data",
    "check_stream",
    "measure_throughput",
    "open_pairs",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'synthaug' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
