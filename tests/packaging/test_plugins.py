"""The catalogue of this distribution: what is offered, under which name, in which file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from readme_parts import first_party, role_of, source_of

import drivetrain_plugins
from drivetrain.listing import summary_of
from drivetrain.options import ROLES, option_fields

if TYPE_CHECKING:
    from drivetrain.catalogue import Entry

TESTS = Path(__file__).parents[1]
ENTRIES = first_party()
by_name = pytest.mark.parametrize("entry", ENTRIES, ids=[entry.name for entry in ENTRIES])


def test_entry_points_and_public_names_are_the_same_classes():
    """Every entry point gives the class that `drivetrain_plugins` exports, and there is no other one."""
    offered = {entry.load().__name__: entry.load() for entry in ENTRIES}
    assert sorted(offered) == sorted(drivetrain_plugins.__all__)
    for name, cls in offered.items():
        assert getattr(drivetrain_plugins, name) is cls


def test_every_plugin_has_a_file_of_its_own():
    """No file holds two plugins, and no plugin file is left out of the catalogue."""
    files = [source_of(entry) for entry in ENTRIES]
    assert len(set(files)) == len(files)
    folder = Path(drivetrain_plugins.__file__).parent
    helpers = {file for file in folder.glob("*/*.py") if file.name.startswith("_") or file.parent.name == "shared"}
    assert set(folder.glob("*/*.py")) - helpers == set(files)


@by_name
def test_names_role_and_docstring(entry: Entry):
    """A plugin's file is its name, its role its folder, and its docstring starts with one full sentence."""
    cls = entry.load()
    assert source_of(entry).stem == entry.name.replace("-", "_")
    assert cls.role == role_of(entry)
    assert cls.role in ROLES
    assert cls.effect in {"observes", "changes"}
    summary, *rest = (cls.__doc__ or "").split("\n", 1)
    assert summary.endswith("."), summary
    assert not rest or rest[0].startswith("\n"), "the first line must stand alone"
    assert summary_of(entry) == summary, "the catalogue reads it without importing the module"


@by_name
def test_every_option_has_a_help_text(entry: Entry):
    """The command line can say what each option is."""
    lacking = [name for name, field in option_fields(entry.load()).items() if not field.metadata.get("help")]
    assert lacking == []


@by_name
def test_every_plugin_has_a_test_file(entry: Entry):
    """The test file of a plugin stands where its file does, or a shared one there names it."""
    folder, stem, name = TESTS / "plugins" / role_of(entry), source_of(entry).stem, entry.load().__name__
    texts = [file.read_text(encoding="utf-8") for file in folder.glob("*.py")]
    assert (folder / f"test_{stem}.py").is_file() or any(re.search(rf'\b{name}\b|"{entry.name}"', t) for t in texts)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "import drivetrain",
            "torch numpy attrs datasets transformers safetensors fsspec tensorboardX drivetrain_plugins",
        ),
        ("import drivetrain_plugins", "torch datasets transformers"),
        (
            "from drivetrain import Catalogue as C; import drivetrain.listing as c; [c.summary_of(C().entry(n)) for n in C().names]",
            "torch",
        ),
        ("import drivetrain.cli as c; c.main(['plugins'], standalone_mode=False)", "torch"),
        ("from drivetrain import Trainer", "datasets transformers safetensors fsspec tensorboardX drivetrain_plugins"),
        ("from drivetrain_plugins import *", "datasets transformers tensorboardX"),
    ],
)
def test_imports_stay_light(code: str, absent: str):
    """Importing drivetrain loads no heavy library before a run needs it."""
    check = f"{code}\nimport sys; print('loaded', *sorted(set({absent.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["loaded"]


@pytest.mark.parametrize("name", ["kernel", "plugins"])
def test_source_folders_are_no_packages(name: str):
    """`kernel` and `plugins` hold no `__init__.py`, so that no module can be loaded twice."""
    assert not (TESTS.parent / name / "__init__.py").exists()
