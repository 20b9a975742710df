"""A constant rate, after an optional linear warm-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import warmup_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"warmup": 2})
class Constant:
    """Raise the rate over the warm-up, then keep it."""

    warmup: float = option(0.0, ge=0, help="below 1: share of all steps; from 1 on: number of steps")

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""
        warm = warmup_steps(run, self.warmup, "constant")
        return lambda step: step / warm if step < warm else 1.0
