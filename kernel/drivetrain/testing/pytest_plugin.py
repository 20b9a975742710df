"""The pytest plugin: fixtures that import torch and drivetrain when a test asks for them, and nothing before."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from drivetrain.catalogue import Catalogue
    from drivetrain.state import Micro, Run, Step
    from drivetrain.testing.probes import Recorder

pytest.register_assert_rewrite("drivetrain.testing.suite", "drivetrain.testing.compose")


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """Return a function that assembles a small run from plugins (see `drivetrain.testing.make_run`)."""
    from drivetrain.testing import carriers  # noqa: PLC0415

    return carriers.make_run


@pytest.fixture
def make_step() -> Callable[..., Step]:
    """Return a function that makes a `Step` to call one hot hook with."""
    from drivetrain.testing import carriers  # noqa: PLC0415

    return carriers.make_step


@pytest.fixture
def make_micro() -> Callable[..., Micro]:
    """Return a function that makes a `Micro` to call one hot hook with."""
    from drivetrain.testing import carriers  # noqa: PLC0415

    return carriers.make_micro


@pytest.fixture
def recorder() -> Recorder:
    """Return a plugin that records every hook that is fired, with the step."""
    from drivetrain.testing import probes  # noqa: PLC0415

    return probes.Recorder()


@pytest.fixture
def empty_catalogue(monkeypatch: pytest.MonkeyPatch) -> Catalogue:
    """Return a catalogue with nothing in it, and make looking for installed plugins an error."""
    from importlib import metadata  # noqa: PLC0415

    from drivetrain import catalogue  # noqa: PLC0415

    def refuse(**selection: Any) -> Any:
        if selection.get("group") == catalogue.GROUP:
            pytest.fail("this test looked for installed plugins; pass catalogue=empty_catalogue")
        return found(**selection)

    found = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", refuse)
    return catalogue.Catalogue(())


@pytest.fixture(scope="session")
def kit_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the kit's folder; its model and dataset are written when something names them."""
    from drivetrain.testing import files  # noqa: PLC0415

    folder = files.write_kit(tmp_path_factory.mktemp("kit"))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def kit_dir(kit_folder: Path) -> Path:
    """Return a folder with rows as jsonl and as a set of `datasets`, small models and kit_module.py (importable)."""
    from drivetrain.testing import files  # noqa: PLC0415

    for name in (*files.WRITERS, "text-train.jsonl", "text-dev.jsonl", "text-dataset"):
        files.ensure(kit_folder, name)
    return kit_folder
