"""TensorBoard event files, by tensorboardX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import ConfigError, hookimpl, option, plugin, require

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from drivetrain import Run


@plugin(role="report", effect="observes")
class TensorBoard:
    """Write every logged number as a TensorBoard scalar to OUTPUT/tensorboard."""

    folder: str = option("tensorboard", help="folder in the run's folder")
    _writer: Any = option(None, init=False)
    _purge: int | None = option(None, init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Find the library before the first step."""
        if run.settings.output is None:
            raise ConfigError("tensorboard needs the run's folder: Trainer(..., output=...) or [run] output = ...")
        require("tensorboardX", plugin="tensorboard")
        self._purge = None

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
