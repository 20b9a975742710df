"""A progress bar for people, plain lines for logs."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Run, Step

REDRAW_S = 0.1


@plugin(role="report", effect="observes")
class Progress:
    """Show a bar with loss, items/s and time left; where there is no terminal, one plain line for each log."""

    _bar: Any = option(None, init=False)
    _task: Any = option(None, init=False)
    _shown: str = option("", init=False)
    _drawn: float = option(0.0, init=False)
    _since: tuple[float, int] = option((0.0, 0), init=False)

    @hookimpl(wrapper=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Draw while the run lasts."""
        self._shown, self._since = "", (time.monotonic(), run.progress.items)
        if run.rank != 0 or not sys.stderr.isatty():
            return (yield)
        from rich import progress  # noqa: PLC0415 - only where there is a terminal
        from rich.console import Console  # noqa: PLC0415

        columns = (
            progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn(),
        )  # fmt: skip
        with progress.Progress(*columns, console=Console(stderr=True)) as bar:
            self._bar, self._task = bar, bar.add_task("training", total=run.total_steps, completed=run.progress.step)
            try:
                return (yield)
            finally:
                bar.update(self._task, completed=run.progress.step, description=self._shown)
                self._bar = None

    @hookimpl
    def step_end(self, step: Step) -> None:
        """Move the bar, ten times a second at most."""
        if self._bar is not None:
            now = time.monotonic()
            if now - self._drawn > REDRAW_S:
                self._drawn = now
                self._bar.update(self._task, completed=step.run.progress.step)

    @hookimpl
    def log(self, run: Run, metrics: dict[str, float]) -> None:
        """Show the newest numbers."""
        if run.rank != 0:
            return
        (then, items), now = self._since, time.monotonic()
        rate = (run.progress.items - items) / max(now - then, 1e-9)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "epoch")
        if "loss" in metrics:
            self._since = (now, run.progress.items)
            numbers += f"  {rate:.3g} items/s"
        self._shown = numbers
        if self._bar is not None:
            self._bar.update(self._task, completed=run.progress.step, description=numbers)
        else:
            left = (run.total_steps - run.progress.step) * (now - then) / max(1, run.progress.items - items)
            per_step = run.progress.items / max(1, run.progress.step)
            eta = f"  left {left * per_step:.0f} s" if "loss" in metrics and not run.finished else ""
            sys.stderr.write(f"step {run.progress.step}/{run.total_steps}  {numbers}{eta}\n")
