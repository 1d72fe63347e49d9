"""The README's examples run, its links and commands exist, and no tracked file knows the machine it was written on.

Each ```python block is run in a namespace and a folder of its own, which holds `my_cells/images` and `my_cells/labels`
with four small frames. A block with `>>>` is a doctest. A block that cannot run here has the line
`<!-- not run: reason -->` before it. A block with Cellpose is run where Cellpose is installed, on a small network in place of
the one that its `CellposeModel` builds or downloads. One with Lightning or accelerate is skipped where that is missing.
"""

from __future__ import annotations

import doctest
import importlib
import os
import re
import runpy
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import tifffile
from skimage.io import imread

from synthaug.randomness import SampleKey

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
# Examples are gathered before any test runs; test_the_readme_has_examples tells of a README that is not there.
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.*-->\s*\Z")
LINK = re.compile(r"""!?\[[^\]]*\]\(<?([^)>\s]+)>?[^)]*\)|(?:src|href)="([^"]+)\"""")


@dataclass(frozen=True)
class Example:
    """A ```python block; `line` is that of its first statement."""

    line: int
    code: str
    runs: bool


def examples(text: str) -> list[Example]:
    found = []
    for fence in FENCE.finditer(text):
        if fence[1] in ("python", "py", "pycon"):
            line = text.count("\n", 0, fence.start(2)) + 1
            found.append(Example(line, fence[2], NOT_RUN.search(text[: fence.start()]) is None))
    return found


def run(example: Example) -> None:
    """Run an example as if it stood in a script of its own."""
    namespace = {"__name__": "__main__"}
    if ">>>" in example.code:
        test = doctest.DocTestParser().get_doctest(example.code, namespace, "README.md", "README.md", example.line - 1)
        doctest.DebugRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test)
    else:
        exec(compile("\n" * (example.line - 1) + example.code, README, "exec"), namespace)


def links(text: str) -> set[str]:
    """Targets of links and images inside the project, without their anchors."""
    targets = {link[1] or link[2] for link in LINK.finditer(FENCE.sub("", text))}
    return {unquote(t.split("#")[0]) for t in targets if not re.match(r"[a-z+]+:|#", t)}


def is_ignored(path: Path) -> bool:
    """Whether git leaves the file out, so that a clone would not have it."""
    return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode == 0


def make_commands(text: str) -> set[str]:
    """The targets of all `make ...` in code: fenced, indented or within a line."""
    code = [fence[2] for fence in FENCE.finditer(text)] + re.findall(r"`([^`\n]+)`|^ {4}(.*)$", text, re.MULTILINE)
    lines = "\n".join(part for chunk in code for part in ([chunk] if isinstance(chunk, str) else chunk))
    return set(re.findall(r"(?:^|&& |; |\$ )make ([a-z]+)", lines, re.MULTILINE))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.fixture
def my_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to work in, with four annotated frames of a dozen bright discs."""
    (tmp_path / "my_cells" / "images").mkdir(parents=True)
    (tmp_path / "my_cells" / "labels").mkdir()
    y, x = np.mgrid[:256, :256]
    for i in range(4):
        random = SampleKey(0, ("readme", i)).numpy()
        labels = np.zeros((256, 256), np.uint16)
        for label in range(1, 13):
            row, column = divmod(label - 1, 4)
            centre = 40 + 80 * row + random.integers(-9, 10), 35 + 60 * column + random.integers(-9, 10)
            labels[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < random.integers(9, 15) ** 2] = label
        image = random.poisson(200 + 600 * (labels > 0)).astype(np.uint16)
        tifffile.imwrite(tmp_path / "my_cells" / "images" / f"{i}.tif", image)
        tifffile.imwrite(tmp_path / "my_cells" / "labels" / f"{i}.tif", labels)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cellpose_with_a_small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips where there is no Cellpose."""
    if "CELLPOSE" not in os.environ:
        pytest.importorskip(
            "cellpose", reason="Cellpose is not installed here; make test runs this in its environments"
        )
    from tests.cellpose_nets import tiny_net

    models = importlib.import_module("cellpose.models")
    monkeypatch.setattr(models, "CellposeModel", lambda gpu: SimpleNamespace(net=tiny_net()))


EXAMPLES = [e for e in examples(TEXT) if e.runs and "cellpose" not in e.code]
CELLPOSE_EXAMPLES = [e for e in examples(TEXT) if e.runs and "cellpose" in e.code]


def test_the_readme_has_examples() -> None:
    assert README.is_file(), "README.md is missing"
    assert EXAMPLES, "README.md has no python example that runs"
    assert CELLPOSE_EXAMPLES, "README.md has no example with Cellpose"


@pytest.mark.usefixtures("my_cells")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"README.md:{e.line}")
def test_an_example_runs(example: Example) -> None:
    for package in re.findall(r"^(?:import|from) (lightning|accelerate)", example.code, re.MULTILINE):
        pytest.importorskip(package, reason=f"{package} is not installed here; the extra dev brings it")
    run(example)


@pytest.mark.parametrize("framework", ["torch.utils.data", "monai.data", "lightning", "accelerate", "cellpose"])
def test_every_framework_has_its_lines(framework: str) -> None:
    assert framework in TEXT


@pytest.mark.usefixtures("my_cells", "cellpose_with_a_small_network")
@pytest.mark.parametrize("example", CELLPOSE_EXAMPLES, ids=lambda e: f"README.md:{e.line}")
def test_an_example_with_cellpose_runs(example: Example) -> None:
    run(example)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_every_link_leads_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    targets = sorted(links((ROOT / page).read_text(encoding="utf-8")))
    assert targets, f"{page} links to no picture or file"
    assert [target for target in targets if not (folder / target).exists() or is_ignored(folder / target)] == []


def test_the_evidence_is_what_was_measured(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "does_it_help.py"))
    tables = script["tables"]()
    assert len(tables) == 3
    assert [table for table in tables if table not in TEXT] == [], "run benchmarks/does_it_help.py and paste its tables"
    script["plot"](tmp_path / "curves.png")
    curves = imread(tmp_path / "curves.png")[..., :3]
    colours = {"real": (107, 114, 128), "copy-paste": (217, 119, 6), "synthetic": (5, 150, 105), "both": (29, 78, 216)}
    for arm, colour in colours.items():
        assert (curves == colour).all(-1).sum() > 500, f"{arm} is not drawn"


def test_every_make_command_exists() -> None:
    assert {"test", "demo"} <= make_commands(TEXT) <= make_targets()


# A path with at least two folders at the start of a word, or a home on Windows. Common places are fine.
MACHINE_PATH = re.compile(r"""(?:(?<=[\s"'`(=:,])|^)(/[A-Za-z][\w.-]*/[\w.-]+|[A-Z]:\\+Users)""", re.MULTILINE)
EVERYWHERE = ("/bin/", "/dev/", "/etc/", "/path/to", "/proc/", "/sys/", "/tmp/", "/usr/")


def machine_paths(text: str) -> list[str]:
    return [path for path in MACHINE_PATH.findall(text) if not path.startswith(EVERYWHERE)]


def tracked_texts() -> dict[str, str]:
    """Content of every text file under version control."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: no list of tracked files")
    files = {name: ROOT / name for name in listed.stdout.decode().split("\0") if name}
    contents = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    return {name: content.decode("utf-8", "replace") for name, content in contents.items() if b"\0" not in content}


def test_no_tracked_file_knows_this_machine() -> None:
    texts = tracked_texts()
    assert "pyproject.toml" in texts
    here = Path(__file__).name  # holds the examples below
    found = {name: machine_paths(text) for name, text in texts.items() if Path(name).name != here}
    assert {name: paths for name, paths in found.items() if paths} == {}


SAMPLE = """# Title
```bash
cd x && make test
```
```python
x = 1
assert x == 2
```
<!-- not run: needs a GPU -->
```python
raise RuntimeError
```
<!-- not run: -->
```python
>>> 1 + 1
3
```
[a](docs/a.md#part) ![b](b.png "title") <img src="c%20d.png"> [d](https://x.org/y) [e](#here) [f](mailto:a@b.c)
make sure that `make demo` runs
    make env TORCH=torch
"""


def test_examples_links_and_commands_are_found() -> None:
    assert [(e.line, e.runs) for e in examples(SAMPLE)] == [(6, True), (11, False), (15, True)]
    assert links(SAMPLE) == {"docs/a.md", "b.png", "c d.png"}
    assert make_commands(SAMPLE) == {"test", "demo", "env"}


def test_an_example_that_fails_is_noticed() -> None:
    wrong, _, wrong_doctest = examples(SAMPLE)
    with pytest.raises(AssertionError) as caught:
        run(wrong)
    assert caught.traceback[-1].lineno + 1 == 7
    with pytest.raises(doctest.DocTestFailure):
        run(wrong_doctest)


@pytest.mark.parametrize(
    "text",
    ["see /home/ann/data", '"data": "/mnt/d/x.tif"', "(/opt/wheels/a)", r"open('C:\Users')", "/srv/a/b", "a=/root/x"],
)
def test_a_path_of_one_machine_is_noticed(text: str) -> None:
    assert len(machine_paths(text)) == 1


@pytest.mark.parametrize(
    "text",
    ["#!/usr/bin/env bash", "https://a.org/b/c", "img/s", "a / b / c", "docs/a/b.md", "../x/y", "/tmp/a/b", "/x"],
)
def test_other_text_is_no_path_of_one_machine(text: str) -> None:
    assert machine_paths(text) == []
