"""Linear warm-up, then a cosine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import HELP, Warmup, warmed, wave

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"warmup": 0.25})
class Cosine:
    """Raise the rate over the warm-up, then let it fall to zero along a cosine.

    Source: Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts".
    """

    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)
    cycles: float = option(0.5, gt=0, help="waves of the cosine; 0.5 falls from the peak to zero once")

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""
        cycles = self.cycles

        def after(step: int, warm: int, total: int) -> float:
            return wave((step - warm) / max(1, total - warm), cycles)

        return warmed(run, self.warmup, "cosine", after)
