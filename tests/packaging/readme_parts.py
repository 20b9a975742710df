"""The parts of the README that are made from the code: `python tests/packaging/readme_parts.py --write`.

The table of plugins comes from the entry points, the loop from the docstring of `drivetrain.hooks`, and what
`drivetrain explain` prints from the recipe that stands in the README.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tempfile
import textwrap
from pathlib import Path

from drivetrain import Recipe, hooks
from drivetrain.catalogue import Catalogue, Entry
from drivetrain.listing import summary_of
from drivetrain.options import ROLES

README = Path(__file__).parents[2] / "README.md"
MARKS = "<!-- {}: begin (python tests/packaging/readme_parts.py --write) -->", "<!-- {}: end -->"


def first_party() -> list[Entry]:
    """Return the entries of this distribution, in the order of roles, then of names."""
    catalogue = Catalogue()
    entries = [catalogue.entry(name) for name in catalogue.names]
    own = [entry for entry in entries if entry.value.startswith("drivetrain_plugins.")]
    return sorted(own, key=lambda entry: (ROLES.index(role_of(entry)), entry.name))


def role_of(entry: Entry) -> str:
    """Return the folder that the plugin's file is in."""
    return entry.value.split(".")[1]


def source_of(entry: Entry) -> Path:
    """Return the plugin's file, without importing it."""
    spec = importlib.util.find_spec(entry.value.partition(":")[0])
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def extras_of(entry: Entry) -> str:
    """Return what to install: `require(..., extra="hf")` and `library(...)` say it, in the plugin's file or a helper's."""
    file = source_of(entry)
    trees = [ast.parse(file.read_text(encoding="utf-8"))]
    for node in ast.walk(trees[0]):
        helper = (
            file.with_name(f"{(node.module or '').rpartition('.')[2]}.py") if isinstance(node, ast.ImportFrom) else file
        )
        if helper.name.startswith("_") and helper.name != "_library.py" and helper.is_file():
            trees.append(ast.parse(helper.read_text(encoding="utf-8")))
    calls = [(n, tree is trees[0]) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)]
    extras, packages = set(), set()
    for call, own in calls:
        name = getattr(call.func, "id", "")
        if name == "library":
            apart = call.args[2:] or [k.value for k in call.keywords if k.arg == "install"]
            packages |= {part.value for part in apart if isinstance(part, ast.Constant)}
            extras |= set() if apart else {"optimizers"}
        elif name == "require" and own:  # a helper's may be for rows of one kind
            extras |= {k.value.value for k in call.keywords if k.arg == "extra" and isinstance(k.value, ast.Constant)}
    if packages:
        return " and ".join(f"`--no-deps {package}`" for package in sorted(map(str, packages)))
    return f"`drivetrain[{','.join(sorted(map(str, extras)))}]`" if extras else "`drivetrain`"


def plugins(_: str) -> str:
    """Return the table of plugins."""
    rows = [f"| `{e.name}` | {role_of(e)} | {summary_of(e)} | {extras_of(e)} |" for e in first_party()]
    return "\n".join(["| plugin | role | what it does | install |", "| --- | --- | --- | --- |", *rows])


def loop(_: str) -> str:
    """Return the loop in pseudo-code: the first indented block of the contract's docstring."""
    documented = (hooks.__doc__ or "").split("\n\n")
    drawn = next(part for part in documented if part.startswith("    assemble:"))
    return f"```text\n{textwrap.dedent(drawn)}\n```"


def explain(readme: str) -> str:
    """Return the plan of the README's recipe."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text(recipe_of(readme), encoding="utf-8")
        return f"```text\n{Recipe.load(recipe).plan()}\n```"


def recipe_of(readme: str) -> str:
    """Return the first TOML block that is a recipe."""
    return next(block for language, block in blocks(readme) if language == "toml" and "[run]" in block)


def blocks(readme: str) -> list[tuple[str, str]]:
    """Return (language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)


PARTS = {"plugins": plugins, "loop": loop, "explain": explain}


def written(readme: str, part: str) -> str:
    """Return what stands in the README between the marks of `part`."""
    begin, end = (mark.format(part) for mark in MARKS)
    return readme.partition(begin)[2].partition(end)[0].strip()


def replaced(readme: str) -> str:
    """Return the README with fresh parts."""
    for part, make in PARTS.items():
        begin, end = (mark.format(part) for mark in MARKS)
        before, _, rest = readme.partition(begin)
        readme = f"{before}{begin}\n\n{make(readme)}\n\n{end}{rest.partition(end)[2]}"
    return readme


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/packaging/readme_parts.py --write")
    README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
