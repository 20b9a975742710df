"""Linear warm-up, then linear decay to zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import warmup_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"warmup": 0.25})
class Linear:
    """Raise the rate over the warm-up, then let it fall to zero at the last step."""

    warmup: float = option(0.0, ge=0, help="below 1: share of all steps; from 1 on: number of steps")

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""
        warm, total = warmup_steps(run, self.warmup, "linear"), run.total_steps

        def factor(step: int) -> float:
            return step / warm if step < warm else max(0.0, (total - step) / max(1, total - warm))

        return factor
