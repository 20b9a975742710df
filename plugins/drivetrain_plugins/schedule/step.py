"""Linear warm-up, then a fall every so many steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import HELP, Warmup, warmed

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"size": 2, "gamma": 0.5})
class StepDecay:
    """Raise the rate over the warm-up, then multiply it by a constant every so many steps."""

    size: int = option(help="steps between two falls", ge=1)
    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)
    gamma: float = option(0.1, gt=0, le=1, help="factor of each fall")

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""
        size, gamma = self.size, self.gamma

        def after(step: int, warm: int, total: int) -> float:  # noqa: ARG001 - as all schedules
            return gamma ** ((step - warm) // size)

        return warmed(run, self.warmup, "step", after)
