"""Linear warm-up, then a fall at each of some steps."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import HELP, Warmup, warmed

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"milestones": [2, 4], "gamma": 0.5})
class MultiStep:
    """Raise the rate over the warm-up, then multiply it by a constant at each of the milestones."""

    milestones: tuple[int, ...] = option(help="applied steps at which the rate falls, ascending", ge=1)
    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)
    gamma: float = option(0.1, gt=0, le=1, help="factor of each fall")

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""
        milestones, gamma = sorted(self.milestones), self.gamma

        def after(step: int, warm: int, total: int) -> float:  # noqa: ARG001 - as all schedules
            return gamma ** bisect.bisect_right(milestones, step)

        return warmed(run, self.warmup, "multi-step", after)
