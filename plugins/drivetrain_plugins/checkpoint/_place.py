"""From a path or a URL to the shelf that it names."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint._local import LocalShelf
from drivetrain_plugins.checkpoint._store import LocalStore

if TYPE_CHECKING:
    from drivetrain import Run
    from drivetrain_plugins.checkpoint._shelf import Shelf

log = logging.getLogger("drivetrain")


def shelf_of(place: Path | str, store: LocalStore | None = None, deadline_s: float = 600.0) -> Shelf:
    """Return the shelf at a folder or a URL.

    Raises:
        MissingDependency: the URL's scheme needs a package that is not installed.
    """
    text = str(place)
    if "://" not in text or text.startswith("file://"):
        return LocalShelf(Path(text.removeprefix("file://")).expanduser().absolute(), store or LocalStore())
    from drivetrain_plugins.checkpoint._object import ObjectShelf  # noqa: PLC0415 - loads fsspec

    return ObjectShelf.open(text, deadline_s)


def checkpoint_at(place: Path | str, store: LocalStore | None = None, deadline_s: float = 600.0) -> tuple[Shelf, str]:
    """Return the shelf on which the checkpoint at a path or a URL stands, and its name there."""
    text = str(place).rstrip("/")
    if "://" in text:
        parent, _, name = text.rpartition("/")
        return shelf_of(parent, store, deadline_s), name
    path = Path(text).expanduser().absolute()
    return shelf_of(path.parent, store, deadline_s), path.name


def check_space(run: Run, place: object, free: int | None) -> None:
    """Refuse to start where not even the state there is now fits; warn where the optimizer's will not.

    Raises:
        CheckpointError: there is less space than the model takes.
    """
    if free is None:
        return
    model = sum(t.numel() * t.element_size() for t in run.model.state_dict().values() if isinstance(t, torch.Tensor))
    trained = sum(p.numel() * p.element_size() for p in run.parameters)
    if free < model:
        needs = f"{place} has {free} bytes free, and the model alone takes {model}"
        raise CheckpointError(
            f"no checkpoint can be written: {needs}. Make room, or choose another output"
        ) from OSError(errno.ENOSPC, "No space left on device", str(place))
    if free < model + 2 * trained:
        log.warning(
            "checkpoint: %s has %d bytes free; a checkpoint may take about %d", place, free, model + 2 * trained
        )
