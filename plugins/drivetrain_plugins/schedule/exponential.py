"""Linear warm-up, then exponential decay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import HELP, Warmup, warmed

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"warmup": 2, "gamma": 0.9})
class Exponential:
    """Raise the rate over the warm-up, then multiply it by a constant at every step."""

    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)
    gamma: float = option(0.99, gt=0, le=1, help="factor of each step")

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""
        gamma = self.gamma

        def after(step: int, warm: int, total: int) -> float:  # noqa: ARG001 - as all schedules
            return gamma ** (step - warm)

        return warmed(run, self.warmup, "exponential", after)
