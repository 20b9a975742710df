"""Where exports go, and how they get there whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from drivetrain import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run

PARTS = {"additional_chat_templates"}  # folders that transformers makes inside an export


def target(run: Run, to: str | None, name: str, plugin: str) -> Path:
    """Return the export's path: `to`, or `name` in the run's folder."""
    if to is not None:
        return Path(to).expanduser()
    if run.settings.output is None:
        raise ConfigError(f"{plugin} needs a place: give it `to`, or give the run a folder ([run] output = ...)")
    return run.settings.output / name


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file or folder beside `path`, then put it in place of what is there.

    Raises:
        ConfigError: it cannot be written there.
    """
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():  # a process was killed between the two renames below
            old.rename(path)
        _remove(fresh)
        _remove(old)
        write(fresh)
        refuse_loss(path, folder=fresh.is_dir())
        _open_by_umask(fresh)
        if path.is_dir() or (path.exists() and fresh.is_dir()):  # only a file replaces a file in one call
            path.rename(old)
        fresh.replace(path)
        _remove(old)
    except OSError as error:
        do = "choose another place, or make room there"
        raise ConfigError([Problem(f"the export {path} cannot be written", str(error), do)]) from error


def refuse_loss(path: Path, *, folder: bool) -> None:
    """Refuse to put an export in the place of a folder that is no earlier export of a model.

    Raises:
        ConfigError: other files would be lost.
    """
    if not path.is_dir() or not any(path.iterdir()):
        return
    model = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    others = [inside.name for inside in path.iterdir() if inside.is_dir() and inside.name not in PARTS]
    if not folder or not model or others:
        received = ", ".join(sorted(inside.name for inside in path.iterdir())[:8])
        what = f"the export would replace the folder {path}, which is no earlier export"
        raise ConfigError([Problem(what, f"it holds {received}", "choose another place, or remove the folder")])


def _open_by_umask(path: Path) -> None:
    """Give the files the usual mode: safetensors writes 0600, which a group could not read."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
        file.chmod(0o666 & ~umask)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
