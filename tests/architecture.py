"""What must never happen in the library, as rules on the syntax tree of its files; test_architecture.py applies them.

A rule is changed here, together with the offences in test_architecture.py that show it firing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

# Imports only ever go down, or stay on their floor.
FLOORS = [
    {"types", "randomness", "errors", "kernels"},
    {"generators"},
    {"cascade", "hub"},
    {"datasets"},
    {"training"},
    {"evaluation"},
    {"cli", "__main__"},
]
FLOOR_OF = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

# Who may import what, by file or folder.
HOMES = {
    "diffusers": ("generators/", "training/"),
    "monai": ("datasets/transforms.py", "evaluation/"),
    "cellpose": ("datasets/cellpose.py", "evaluation/"),
}
ONLY_INSIDE_FUNCTIONS = {"diffusers", "matplotlib", "pyshtools", "torch_tensorrt", "transformers", "triton", "xformers"}
NEVER_IMPORTED = {
    **dict.fromkeys(("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"), "no pickle"),
    "random": "no global random state",
}

# Random numbers: what reads or sets a state that others share, unless a generator is passed.
NUMPY_TYPES = {"BitGenerator", "Generator", "Philox", "RandomState", "SeedSequence"}
TORCH_STATE = {"default_generator", "get_rng_state", "initial_seed", "manual_seed", "seed", "set_rng_state"}
TORCH_DRAWS = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"),
    *(
        "normal",
        "bernoulli",
        "multinomial",
        "poisson",
        "dropout",
        "nn.Dropout",
        "nn.Dropout2d",
        "nn.functional.dropout",
    ),
    *("nn.init.kaiming_normal_", "nn.init.kaiming_uniform_", "nn.init.xavier_normal_", "nn.init.xavier_uniform_"),
    *("nn.init.trunc_normal_", "nn.init.orthogonal_", "nn.init.sparse_"),
    *("utils.data.DataLoader", "utils.data.RandomSampler", "utils.data.random_split"),
}
METHOD_DRAWS = {
    *("bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_"),
    "uniform_",
}
RESEEDS = {"enable_full_determinism", "seed_everything", "set_determinism", "set_seed"}
TYPING = {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
IMPORTERS = {"__import__", "import_module", "importlib.import_module"}


@dataclass(frozen=True)
class Import:
    """One imported name: `from a import b` is `a.b`."""

    target: str
    line: int
    inside_function: bool
    typing_only: bool

    @property
    def top(self) -> str:
        return self.target.split(".")[0]


class Module:
    """A source file of the library; `path` is relative to the package, as in `generators/masks.py`."""

    def __init__(self, path: str, source: str) -> None:
        self.path, self.tree = path, ast.parse(source)
        parts = path.removesuffix(".py").split("/")
        self.is_package = parts[-1] == "__init__"
        self.name = ".".join(["synthaug", *(parts[:-1] if self.is_package else parts)])
        self.room = parts[0]

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, inside_function=False, typing_only=False))

    def _imports(self, node: ast.AST, inside_function: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            function = inside_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = typing_only or (
                isinstance(node, ast.If) and child in node.body and ast.unparse(node.test) in TYPING
            )
            for target in self._targets(child):
                yield Import(target, child.lineno, function, typing)  # type: ignore[attr-defined]
            yield from self._imports(child, function, typing)

    def _targets(self, node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                package = self.name.split(".")[: None if self.is_package else -1]
                source = ".".join(filter(None, [*package[: len(package) - node.level + 1], source]))
            return [f"{source}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                return [name.value]
            return ["<computed>"]
        return []

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Local name -> what it was imported as."""
        names: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.split(".")[0]
                    names[alias.asname or top] = alias.name if alias.asname else top
            elif isinstance(node, ast.ImportFrom):
                names.update({a.asname or a.name: t for a, t in zip(node.names, self._targets(node))})
        return names

    def full_name(self, node: ast.AST) -> str | None:
        """`np.random.rand` as `numpy.random.rand`; None for what was not imported."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.full_name(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        return None

    def defines_stage(self) -> bool:
        """Whether a class here derives from `Stage`."""
        classes = (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef))
        return any(ast.unparse(base).split(".")[-1] == "Stage" for node in classes for base in node.bases)


Finding = tuple[int, str]


def floors(module: Module, stages: set[str]) -> Iterator[Finding]:
    """Imports only go down, name a module, and join no two stages."""
    if module.path == "__init__.py":
        for found in module.imports:
            if found.target.startswith(("synthaug.training", "synthaug.evaluation")):
                yield found.line, "training and evaluation are not part of the public names"
        return
    if module.is_package:
        if any(not isinstance(node, ast.Expr) for node in module.tree.body):
            yield 1, "a room's __init__.py stays empty, so that importing one of its files loads no other"
        return
    if module.room not in FLOOR_OF:
        yield 1, f"{module.room!r} stands on no floor"
        return
    for found in module.imports:
        if found.target == "<computed>":
            yield found.line, "imports a computed name, which no rule can follow"
        if found.top != "synthaug":
            continue
        room = [*found.target.split("."), ""][1]
        if room not in FLOOR_OF:
            yield found.line, f"imports {found.target}: name the module it lives in"
        elif FLOOR_OF[room] > FLOOR_OF[module.room]:
            yield found.line, f"{module.room} imports {room}, which stands above it"
        elif module.room == "generators":
            others = stages - {module.name}
            if any(found.target == stage or found.target.startswith(f"{stage}.") for stage in others):
                yield found.line, f"imports the stage {found.target}: only cascade.py joins stages"


def third_parties(module: Module, stages: set[str]) -> Iterator[Finding]:
    """Slow or optional packages stay where they are used."""
    for found in module.imports:
        if found.top in NEVER_IMPORTED:
            yield found.line, f"imports {found.top}: {NEVER_IMPORTED[found.top]}"
        if found.top in HOMES and not module.path.startswith(HOMES[found.top]):
            yield found.line, f"imports {found.top}, which belongs to {' and '.join(HOMES[found.top])}"
        if found.top in ONLY_INSIDE_FUNCTIONS and not (found.inside_function or found.typing_only):
            yield found.line, f"imports {found.top} outside the function that uses it"


def loading(module: Module, stages: set[str]) -> Iterator[Finding]:
    """Nothing that is read can run code."""
    for call in (node for node in ast.walk(module.tree) if isinstance(node, ast.Call)):
        flags = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in call.keywords}
        for name in ("allow_pickle", "trust_remote_code"):
            if flags.get(name, False) is not False:
                yield call.lineno, f"{name} may only be False"
        if module.full_name(call.func) == "torch.load" and flags.get("weights_only") is not True:
            yield call.lineno, "torch.load without weights_only=True"


def randomness(module: Module, stages: set[str]) -> Iterator[Finding]:
    """Every random number comes from a SampleKey: no shared state is read or set."""
    is_source = module.path == "randomness.py"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = module.full_name(node) or ""
            owner, _, last = name.rpartition(".")
            if owner == "numpy.random" and last not in NUMPY_TYPES:
                yield node.lineno, f"{name} is global random state, or a second source of random numbers"
            if last in RESEEDS or (last in TORCH_STATE and name.startswith("torch.")):
                yield node.lineno, f"{name} reads or sets the global random state"
        elif isinstance(node, ast.Call):
            name = module.full_name(node.func) or ""
            last = node.func.attr if isinstance(node.func, ast.Attribute) else name.rpartition(".")[2]
            given = {k.arg for k in node.keywords if not (isinstance(k.value, ast.Constant) and k.value.value is None)}
            draws = name.removeprefix("torch.") in TORCH_DRAWS or last in METHOD_DRAWS
            draws = draws or ast.unparse(node.func).endswith("latent_dist.sample")
            if draws and "generator" not in given:
                yield node.lineno, f"{ast.unparse(node.func)} without generator= reads the global random state"
            if last == "rvs" and "random_state" not in given:
                yield node.lineno, "rvs without random_state= reads the global random state"
            if not is_source and (name == "torch.Generator" or name.removeprefix("numpy.random.") in NUMPY_TYPES):
                yield node.lineno, f"{name} is built in randomness.py only; take key.generator() or key.numpy()"


RULES = (floors, third_parties, loading, randomness)


def violations(modules: list[Module]) -> list[str]:
    """Every breach of every rule, as `path:line: what`."""
    stages = {m.name for m in modules if m.room == "generators" and m.defines_stage()}
    return [f"{m.path}:{line}: {text}" for m in modules for rule in RULES for line, text in rule(m, stages)]
