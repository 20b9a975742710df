"""The README's table of plugins, made from the entry points: `python tests/packaging/plugin_table.py --write`."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

from drivetrain.catalogue import Catalogue, Entry
from drivetrain.options import ROLES

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- plugins: begin (python tests/packaging/plugin_table.py --write) -->", "<!-- plugins: end -->"


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
    """Return what to install: `require(..., extra="hf")` in the plugin's file names the extra."""
    tree = ast.parse(source_of(entry).read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "require"]
    found = {k.value.value for c in calls for k in c.keywords if k.arg == "extra" and isinstance(k.value, ast.Constant)}
    return f"`drivetrain[{','.join(sorted(map(str, found)))}]`" if found else "`drivetrain`"


def render() -> str:
    """Return the table as Markdown."""
    rows = [f"| `{e.name}` | {role_of(e)} | {e.summary} | {extras_of(e)} |" for e in first_party()]
    return "\n".join(["| plugin | role | what it does | install |", "| --- | --- | --- | --- |", *rows])


def written(text: str) -> str:
    """Return the table that stands in the README `text`."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def replaced(text: str) -> str:
    """Return the README `text` with a fresh table."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{render()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(render())
