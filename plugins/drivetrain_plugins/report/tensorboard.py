"""TensorBoard event files, by tensorboardX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import ConfigError, hookimpl, option, plugin, require
from drivetrain_plugins.shared import samples

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    import pluggy

    from drivetrain import Run


@plugin(role="report", effect="observes")
class TensorBoard:
    """Write every logged number as a TensorBoard scalar, and samples as text, to OUTPUT/tensorboard."""

    folder: str = option("tensorboard", help="folder in the run's folder")
    _writer: Any = option(None, init=False)
    _purge: int = option(0, init=False)  # said by the first file, too: TensorBoard takes the first for no restart

    @hookimpl
    def add_hooks(self, manager: pluggy.PluginManager) -> None:
        """Know the hook of samples."""
        manager.add_hookspecs(samples.SampleHooks)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Find the library before the first step."""
        if run.settings.output is None:
            raise ConfigError("tensorboard needs the run's folder: Trainer(..., output=...) or [run] output = ...")
        require("tensorboardX", plugin="tensorboard")
        self._purge = 0

    @hookimpl
    def loaded(self, run: Run, path: Path) -> None:  # noqa: ARG002
        """Hide the points after the checkpoint; they will be written again."""
        self._purge = run.progress.step + 1

    @hookimpl(wrapper=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Hold the writer open while the run lasts."""
        if run.rank != 0:
            return (yield)
        library = require("tensorboardX", plugin="tensorboard")
        assert run.settings.output is not None  # refused when assembled
        # A file is named by the second it is made in; without the step, a quick resume would overwrite the one before.
        suffix, folder = f".step-{run.progress.step}", str(run.settings.output / self.folder)
        self._writer = library.SummaryWriter(folder, purge_step=self._purge, filename_suffix=suffix)
        try:
            return (yield)
        finally:
            self._writer.close()
            self._writer = None

    @hookimpl
    def log(self, run: Run, metrics: dict[str, float]) -> None:
        """Write the numbers at this step."""
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, run.progress.step)

    @hookimpl
    def samples(self, run: Run, split: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write the samples as a table."""
        if self._writer is not None and rows:
            lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
            table = "\n".join("|".join(["", *map(_cell, line), ""]) for line in lines)
            self._writer.add_text(f"{split}/samples", table, run.progress.step)


def _cell(value: Any) -> str:
    """Return a value as a cell of a Markdown table."""
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
