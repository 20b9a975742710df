"""Linear warm-up, then decay with the square root of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import HELP, Warmup, warmed

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"warmup": 2})
class InverseSqrt:
    """Raise the rate over the warm-up, then let it fall with the inverse square root of the step.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 5.3.
    """

    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)
    timescale: int | None = option(
        None, ge=1, help="steps after which the rate has fallen by the root of 2; None takes the warm-up's, or 10000"
    )

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""
        given = self.timescale

        def after(step: int, warm: int, total: int) -> float:  # noqa: ARG001 - as all schedules
            timescale = given or warm or 10_000
            return 1.0 / math.sqrt((step + timescale - warm) / timescale)

        return warmed(run, self.warmup, "inverse-sqrt", after)
