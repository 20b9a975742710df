"""A constant rate, after an optional linear warm-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import HELP, Warmup, warmed

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"warmup": 2})
class Constant:
    """Raise the rate over the warm-up, then keep it."""

    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""

        def after(step: int, warm: int, total: int) -> float:  # noqa: ARG001 - as all schedules
            return 1.0

        return warmed(run, self.warmup, "constant", after)
