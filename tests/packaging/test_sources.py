"""What may not stand in the sources, how long they may be, and what every test owes."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from drivetrain.hooks import Hooks

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "kernel").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])
TESTS = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("test_*.py")])
MODULE_LINES = 400
KERNEL_LINES = 1500  # logical ones: statements, however the formatter breaks them; documentation is not charged for
# They make a list of plugins or draw one, or are for type checkers only: a run loads none.
FRONT_ENDS = {"cli.py", "recipe.py", "explain.py", "listing.py", "protocols.py"}

# Whatever makes objects of bytes, or code of text: a checkpoint or a recipe must never reach one of these.
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "imp", "runpy"}
CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.jit.load", "torch.hub.load",
    "numpy.load", "np.load", "numpy.save", "np.save", "os.system", "os.popen",
}  # fmt: skip
# The kit's two-rank runner sends results between processes that it started itself; no file is involved.
SPARED = {"kernel/drivetrain/testing/ranks.py": "pickle"}


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` of an attribute chain, or ""."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def forbidden(tree: ast.AST) -> Iterator[str]:
    """Yield "line: name" for every use of what makes objects of bytes or code of text."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            made = [f"{node.module}.{alias.name}" for alias in node.names]
            names = made if (node.module or "").partition(".")[0] in MODULES else [m for m in made if m in CALLS]
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):  # a field may be called so
            names = [dotted(node)] if dotted(node) in CALLS else []
        elif isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "trust_remote_code", "shell"}:
            names = [node.arg]
        yield from (f"{getattr(node, 'lineno', '?')}: {name}" for name in names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path):
    """No module of kernel and plugins pickles, unpickles or evaluates anything."""
    spared = SPARED.get(path.relative_to(ROOT).as_posix())
    found = [use for use in forbidden(ast.parse(path.read_text(encoding="utf-8"))) if use.partition(" ")[2] != spared]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)", "eval('1')", "f = exec", "import yaml", "import os\nos.system('x')",
    ],
)  # fmt: skip
def test_the_scan_finds_what_it_looks_for(code: str):
    """Each forbidden form is found, so that an empty result means something."""
    assert list(forbidden(ast.parse(code)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short(path: Path):
    """No module of kernel and plugins is longer than 400 lines."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MODULE_LINES


def logical_lines(text: str) -> int:
    """Count the statements, docstrings left out."""
    return sum(
        isinstance(node, ast.stmt) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in ast.walk(ast.parse(text))
    )


def test_the_kernel_is_small():
    """What a run loads of the kernel stays under 1,500 logical lines."""
    modules = [path for path in (ROOT / "kernel" / "drivetrain").glob("*.py") if path.name not in FRONT_ENDS]
    counted = {path.name: logical_lines(path.read_text(encoding="utf-8")) for path in modules}
    assert sum(counted.values()) < KERNEL_LINES, counted


def test_a_run_loads_no_front_end():
    """Training from Python imports neither the recipe nor the command line, which the line budget leaves out."""
    code = """
import sys, torch
from drivetrain import Trainer
from drivetrain_plugins import SGD
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
    def forward(self, x):
        return (x * self.weight).square().mean()
Trainer(Model(), [SGD()], steps=2).fit({"x": torch.ones(16, 2)})
print(sorted({"drivetrain.recipe", "drivetrain.cli", "drivetrain.explain", "drivetrain.listing", "drivetrain.protocols", "drivetrain.testing", "cattrs", "click"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_contracts_hold():
    """The kernel imports no plugin and no role another one, as import-linter reads pyproject.toml."""
    tool = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert tool is not None, "pip install -e '.[test]' brings it"
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


# --- tests -----------------------------------------------------------------------------------------------------------


def functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    """Yield every function of the tests and of the kit."""
    for path in [*TESTS, *(ROOT / "kernel" / "drivetrain" / "testing").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def asserts(function: ast.AST, helpers: set[str]) -> bool:
    """Tell whether a function can fail by itself: an assertion, an expected error, or a helper that has one."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in {"raises", "warns", "fail", "assert_close", "assert_array_equal"} | helpers:
                return True
        if isinstance(node, ast.Raise) and "AssertionError" in ast.dump(node):
            return True
    return False


def asserting_helpers() -> set[str]:
    """Return the names of functions that assert, directly or through others."""
    known: set[str] = set()
    everyone = [(node.name, node) for _, node in functions()]
    while more := {name for name, node in everyone if name not in known and asserts(node, known)}:
        known |= more
    return known


HELPERS = asserting_helpers()
WRITTEN = [(path, node) for path, node in functions() if node.name.startswith("test_")]


def test_no_test_is_without_an_assertion():
    """Every test can fail: it asserts, expects an error, or calls a helper that does."""
    assert len(WRITTEN) > 50
    assert [f"{path.name}:{node.lineno} {node.name}" for path, node in WRITTEN if not asserts(node, HELPERS)] == []


def test_every_test_states_its_property():
    """Every test has a docstring that is one sentence or more."""
    silent = [f"{path.name}:{node.lineno} {node.name}" for path, node in WRITTEN if not ast.get_docstring(node)]
    assert silent == []


# --- hooks -----------------------------------------------------------------------------------------------------------

HOOKS = sorted(name for name, value in vars(Hooks).items() if hasattr(value, "drivetrain_kind"))


@cache
def used_in_tests() -> set[str]:
    """Return every marked method, attribute and string of the tests: where a hook is implemented, called or named."""
    found: set[str] = set()
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                found.add(node.name)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_and_tested(hook: str):
    """A hook has a docstring, and a plugin or a caller of it stands in the tests."""
    assert (getattr(Hooks, hook).__doc__ or "").strip().partition("\n")[0].endswith((".", '."', "`."))
    assert hook in used_in_tests()
