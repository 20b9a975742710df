"""What exporters share: a place that is checked before training, one write at the end, and the format on request."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from drivetrain import ConfigError, DrivetrainError, Exporter, Problem, hookimpl
from drivetrain_plugins.export._paths import refuse_loss, target
from drivetrain_plugins.shared import exports

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    import pluggy

    from drivetrain import Run

DTYPES = (None, "float32", "bfloat16", "float16")


class NotExportedError(ConfigError):
    """A run has ended well, but an exporter failed; the others write theirs all the same."""


class AtEnd:
    """The hooks of an exporter: it writes when the run has ended well, on rank 0, and whenever its format is asked for.

    Subclasses are plugins with the options `to` and `at_end`; they say how to `write`.
    """

    plugin: ClassVar[str]
    format: ClassVar[str]
    suffix: ClassVar[str] = ""
    default: ClassVar[str]  # name of the file or folder in the run's folder
    to: str | None
    at_end: bool

    @hookimpl
    def add_hooks(self, manager: pluggy.PluginManager) -> None:
        """Bring the hook with which plugins change what is exported."""
        manager.add_hookspecs(exports.ExportHooks)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse a model or a place that cannot be exported, before any work is done."""
        self.refuse(run)
        if self.at_end:
            self._check_place(run)

    @hookimpl(wrapper=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Export when the run has ended well."""
        if run.rank == 0:
            self.rehearse(run)
        try:
            result = yield
        except NotExportedError:
            self._last(run)
            raise
        self._last(run)
        return result

    @hookimpl
    def export(self) -> list[Exporter]:
        """Offer the format."""
        return [Exporter(self.format, self.write, self.suffix)]

    def refuse(self, run: Run) -> None:
        """Raise ConfigError for a run whose model the format cannot hold."""

    def rehearse(self, run: Run) -> None:
        """Find out before the first step what would fail after the last; on rank 0."""

    def write(self, run: Run, path: Path) -> None:
        """Write the model to `path`."""
        raise NotImplementedError

    def place(self, run: Run) -> Path:
        """Return where the export at the end of the run goes."""
        return target(run, self.to, self.default, self.plugin)

    def _check_place(self, run: Run) -> None:
        place, output = self.place(run).absolute(), run.settings.output
        if output is not None and (place == output or place in output.parents):
            what = f"{self.plugin}: the export would replace the run's own folder"
            raise ConfigError([Problem(what, str(place), "name a folder or file inside it, or elsewhere")])
        refuse_loss(place, folder=not self.suffix)
        others = {n: p for n, p in run.plugins.items() if isinstance(p, AtEnd) and p is not self and p.at_end}
        for name, other in others.items():
            if other.place(run).absolute() == place:
                what = f"{self.plugin}: another exporter, {name!r}, writes to the same place"
                raise ConfigError([Problem(what, str(place), "give each its own `to`")])
        if run.rank == 0:
            _check_writable(place, self.plugin)

    def _last(self, run: Run) -> None:
        """Write at the end of a run.

        Raises:
            NotExportedError: it cannot be written; what the run has written besides stays.
        """
        if not self.at_end or run.rank != 0:
            return
        try:
            self.write(run, self.place(run))
        except DrivetrainError as error:
            raise NotExportedError(getattr(error, "problems", str(error))) from error
        except Exception as error:
            what = f"{self.plugin}: the trained model cannot be exported"
            do = "the run is complete: export its last checkpoint in another format (`drivetrain export`)"
            raise NotExportedError([Problem(what, f"{type(error).__name__}: {first_lines(error)}", do)]) from error


def _check_writable(place: Path, plugin: str) -> None:
    """Refuse a place below a file, or in a folder where nothing may be written."""
    try:
        above = next(folder for folder in place.parents if folder.exists())
        good, why = above.is_dir() and os.access(above, os.W_OK), f"{above} is no folder that can be written to"
    except OSError as error:
        good, why = False, str(error)
    if not good:
        what = f"{plugin}: the export {place} cannot be written"
        raise ConfigError([Problem(what, why, "choose another place")])


def first_lines(error: BaseException, count: int = 3) -> str:
    """Return the first lines of what a library said that are not empty."""
    return "\n        ".join([line.strip() for line in str(error).splitlines() if line.strip()][:count])


def caster(dtype: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that casts real numbers to `dtype` (None: as they are) and leaves other tensors alone."""
    if dtype is None:
        return lambda tensor: tensor
    wanted: torch.dtype = getattr(torch, dtype)
    return lambda tensor: tensor.to(wanted) if tensor.is_floating_point() else tensor
