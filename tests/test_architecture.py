"""The library keeps the rules of architecture.py, each rule fires on a small offence, and importing stays cheap."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import synthaug
from tests.architecture import FLOOR_OF, Module, violations

ROOT = Path(__file__).resolve().parents[1]
FILES = {p.relative_to(ROOT / "synthaug").as_posix(): p for p in sorted((ROOT / "synthaug").rglob("*.py"))}


def test_the_library_keeps_every_rule() -> None:
    modules = [Module(path, file.read_text(encoding="utf-8")) for path, file in FILES.items()]
    assert {"__init__.py", "randomness.py", "generators/stage.py"} <= FILES.keys()
    assert any(m.defines_stage() for m in modules)
    assert not violations(modules)


def test_embedded_cascades_hold_data_only() -> None:
    assert [path for path in FILES if path.startswith("pretrained/")] in ([], ["pretrained/__init__.py"])


STAGES = [
    Module("generators/masks.py", "from synthaug.generators.stage import Stage\nclass Masks(Stage): ..."),
    Module("generators/texture.py", "from synthaug.generators import stage\nclass Texture(stage.Stage): ..."),
]


def findings(path: str, source: str) -> list[str]:
    """What the rules say of one more file beside two stages."""
    modules = [m for m in STAGES if m.path != path] + [Module(path, source)]
    return [text for text in violations(modules) if text.startswith(f"{path}:")]


OFFENCES = [
    # floors
    ("types.py", "from synthaug.cascade import Cascade", "types imports cascade, which stands above it"),
    ("randomness.py", "def f():\n    import synthaug.generators.stage", "randomness imports generators"),
    ("errors.py", "from .training import loop", "errors imports training"),
    ("kernels/placement.py", "from ..datasets.readers import open_pairs", "kernels imports datasets"),
    ("kernels/placement.py", "from synthaug.evaluation import metrics", "kernels imports evaluation"),
    ("generators/camera.py", "from synthaug.datasets import crops", "generators imports datasets"),
    ("generators/camera.py", "from synthaug.cascade import Cascade", "generators imports cascade"),
    (
        "generators/camera.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import synthaug.cascade",
        ":3: ",
    ),
    ("cascade.py", "import importlib\nimportlib.import_module('synthaug.datasets.synth')", "cascade imports datasets"),
    ("datasets/synth.py", "class A:\n    from synthaug.training import loop", "datasets imports training"),
    (
        "datasets/synth.py",
        "try:\n    import synthaug.evaluation\nexcept ImportError: ...",
        "datasets imports evaluation",
    ),
    ("training/loop.py", "from synthaug.evaluation.metrics import seg", "training imports evaluation"),
    ("evaluation/sheet.py", "from synthaug.cli import main", "evaluation imports cli"),
    ("cascade.py", "from synthaug import SynthDataset", "name the module it lives in"),
    ("cascade.py", "import synthaug", "name the module it lives in"),
    ("datasets/synth.py", "import importlib\nimportlib.import_module(name)", "a computed name"),
    ("helpers.py", "x = 1", "'helpers' stands on no floor"),
    ("generators/__init__.py", "from synthaug.generators.masks import Masks", "stays empty"),
    ("__init__.py", "from synthaug.training.recipes import fit", "not part of the public names"),
    (
        "__init__.py",
        "import importlib\nimportlib.import_module('synthaug.evaluation.metrics')",
        "not part of the",
    ),
    # stages
    ("generators/texture.py", "from synthaug.generators.masks import Masks\nclass T(Stage): ...", "imports the stage"),
    ("generators/texture.py", "from synthaug.generators import masks\nclass T(Stage): ...", "imports the stage"),
    ("generators/texture.py", "def f():\n    from . import masks", "only cascade.py joins stages"),
    ("generators/camera.py", "from .texture import Texture", "imports the stage"),
    # other people's packages
    ("generators/masks.py", "from diffusers import UNet2DModel", "diffusers outside the function"),
    ("datasets/synth.py", "def f():\n    import diffusers", "diffusers, which belongs to generators/ and training/"),
    ("evaluation/sheet.py", "from matplotlib import pyplot", "matplotlib outside the function"),
    ("kernels/placement.py", "import triton.language as tl", "triton outside the function"),
    ("kernels/placement.py", "try:\n    import triton\nexcept ImportError:\n    pass", "triton outside the function"),
    ("generators/backends.py", "import torch_tensorrt", "torch_tensorrt outside the function"),
    ("generators/backends.py", "class A:\n    import xformers.ops", "xformers outside the function"),
    ("generators/shapes.py", "import pyshtools", "pyshtools outside the function"),
    ("datasets/synth.py", "def f():\n    from monai.data import MetaTensor", "monai, which belongs to datasets/"),
    ("cli.py", "def f():\n    import monai", "monai, which belongs to"),
    ("training/loop.py", "def f():\n    from cellpose import train", "cellpose, which belongs to datasets/cellpose.py"),
    # loading
    ("datasets/readers.py", "def f():\n    import pickle", "imports pickle: no pickle"),
    ("cascade.py", "from joblib import dump", "imports joblib: no pickle"),
    ("training/loop.py", "import torch\ntorch.load(path)", "torch.load without"),
    ("training/loop.py", "import torch\ntorch.load(path, weights_only=False)", "torch.load without"),
    ("training/loop.py", "from torch import load as read\nread(path, weights_only=flag)", "torch.load without"),
    ("datasets/readers.py", "import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle may only be False"),
    ("datasets/readers.py", "read(path, allow_pickle=flag)", "allow_pickle may only be False"),
    ("cascade.py", "M.from_pretrained(x, trust_remote_code=True)", "trust_remote_code may only be False"),
    # random numbers
    ("cascade.py", "import random", "imports random: no global random state"),
    ("cascade.py", "import numpy as np\nnp.random.seed(0)", "numpy.random.seed is global random state"),
    ("cascade.py", "import numpy\nf = numpy.random.uniform", "numpy.random.uniform is global"),
    ("cascade.py", "from numpy import random\nrandom.rand(3)", "numpy.random.rand is global"),
    (
        "cascade.py",
        "from numpy.random import default_rng\ndefault_rng(0)",
        "default_rng is global",
    ),
    ("randomness.py", "import numpy as np\nnp.random.default_rng()", "a second source of random numbers"),
    (
        "cascade.py",
        "import numpy as np\nnp.random.Generator(np.random.Philox(3))",
        "numpy.random.Generator is built in",
    ),
    ("cascade.py", "import numpy as np\nnp.random.RandomState(3)", "numpy.random.RandomState is built in"),
    ("cascade.py", "import torch\ntorch.Generator().manual_seed(3)", "torch.Generator is built in randomness.py only"),
    ("randomness.py", "import torch\ntorch.manual_seed(0)", "torch.manual_seed reads or sets the global"),
    ("cascade.py", "import torch\ntorch.cuda.manual_seed(0)", "torch.cuda.manual_seed reads or sets"),
    ("cascade.py", "import torch\nstate = torch.random.get_rng_state()", "get_rng_state reads or sets"),
    ("cascade.py", "import torch\ntorch.randn(3)", "torch.randn without generator="),
    ("cascade.py", "import torch as t\nt.rand(3, generator=None)", "t.rand without generator="),
    ("cascade.py", "from torch import randperm\nrandperm(3)", "randperm without generator="),
    ("cascade.py", "import torch\ntorch.randn_like(x)", "torch.randn_like without generator="),
    ("cascade.py", "x.normal_()", "x.normal_ without generator="),
    ("cascade.py", "(x / 2).uniform_(0, 1)", "uniform_ without generator="),
    ("cascade.py", "from torch import nn\nnn.init.xavier_uniform_(w)", "xavier_uniform_ without generator="),
    ("cascade.py", "from torch.nn import functional as F\nF.dropout(x)", "F.dropout without generator="),
    ("cascade.py", "from torch.utils.data import DataLoader\nDataLoader(x)", "DataLoader without generator="),
    ("generators/texture.py", "vae.encode(x).latent_dist.sample()", "latent_dist.sample without generator="),
    ("cascade.py", "from scipy import stats\nstats.norm.rvs(3)", "rvs without random_state="),
    (
        "datasets/transforms.py",
        "from monai.utils import set_determinism\nset_determinism(0)",
        "set_determinism reads",
    ),
]


@pytest.mark.parametrize(("path", "source", "message"), OFFENCES)
def test_an_offence_is_found(path: str, source: str, message: str) -> None:
    found = findings(path, source)
    assert any(message in text for text in found), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("types.py", "from synthaug.errors import InputError"),
        ("kernels/placement.py", "import numba\nfrom synthaug.kernels.other import f"),
        ("generators/texture.py", "from synthaug.generators.stage import Stage\nclass T(Stage): ..."),
        ("generators/texture.py", "from synthaug.generators import diffusion\ndef f():\n    import diffusers"),
        ("generators/texture.py", "vae.encode(x).latent_dist.sample(generator=key.generator())"),
        ("generators/backends.py", "def f():\n    import torch_tensorrt, triton, xformers"),
        ("cascade.py", "from synthaug.generators.masks import M\nfrom synthaug.generators.texture import Texture"),
        ("cascade.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from matplotlib.figure import Figure"),
        ("cascade.py", "import torch\ntorch.load(path, map_location='cpu', weights_only=True)"),
        ("datasets/transforms.py", "from monai.transforms import RandomizableTransform"),
        (
            "datasets/transforms.py",
            "import numpy as np\ndef f(R: np.random.RandomState) -> float:\n    return R.rand()",
        ),
        ("datasets/cellpose.py", "from cellpose import train\nfrom synthaug.datasets.bank import CellBank"),
        ("datasets/readers.py", "import numpy as np\nnp.load(path, allow_pickle=False)"),
        ("training/loop.py", "import torch\nrandom = key.numpy()\nrandom.random(3)\ntorch.randn(3, generator=g)"),
        ("training/loop.py", "import torch\ndef f(g: torch.Generator) -> None:\n    w.normal_(generator=g)"),
        ("evaluation/experiment.py", "import monai, cellpose\nfrom synthaug.training import recipes"),
        ("cli.py", "def f():\n    from synthaug.evaluation import sheet\n    from synthaug.training import loop"),
        ("randomness.py", "import numpy as np, torch\ntorch.Generator()\nnp.random.Generator(np.random.Philox(key=1))"),
    ],
)
def test_what_is_allowed_is_left_alone(path: str, source: str) -> None:
    assert findings(path, source) == []


def test_a_finding_names_file_and_line() -> None:
    text = "synthaug = 1\n\nimport pickle\n"
    assert findings("datasets/bank.py", text) == ["datasets/bank.py:3: imports pickle: no pickle"]


def test_every_room_has_a_floor() -> None:
    assert {path.split("/")[0].removesuffix(".py") for path in FILES} - {"__init__", "pretrained"} <= FLOOR_OF.keys()


HEAVY = {"cellpose", "diffusers", "matplotlib", "monai", "pyshtools", "transformers", "triton"}


def heavy_after(statement: str) -> tuple[set[str], bool]:
    """Slow packages that a statement loads beyond torch, and whether it left the global random state alone."""
    code = f"""
import json, sys, numpy, torch
before, states = set(sys.modules), (torch.get_rng_state().tolist(), repr(numpy.random.get_state()))
{statement}
after = (torch.get_rng_state().tolist(), repr(numpy.random.get_state()))
print(json.dumps([sorted({{m.split(".")[0] for m in set(sys.modules) - before}}), states == after]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded, untouched = json.loads(run.stdout.splitlines()[-1])
    return HEAVY & set(loaded), untouched


@pytest.mark.parametrize(
    "statement", ["import synthaug", "import synthaug.cli", "from synthaug import Cascade, SynthDataset, open_pairs"]
)
def test_importing_loads_nothing_slow(statement: str) -> None:
    assert heavy_after(statement) == (set(), True)


def test_the_guard_on_imports_fires() -> None:
    assert heavy_after("import matplotlib.colors; torch.rand(1)") == ({"matplotlib"}, False)


@pytest.mark.parametrize("name", synthaug.__all__)
def test_a_public_name_is_there(name: str) -> None:
    assert name in dir(synthaug)
    home = getattr(getattr(synthaug, name), "__module__", "synthaug")
    assert not home.startswith(("synthaug.training", "synthaug.evaluation"))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'synthaug' has no attribute 'Cascades'"):
        synthaug.Cascades  # noqa: B018


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert synthaug.__version__ == project["version"]
