"""Linear warm-up, then cosines that begin anew."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import HELP, Warmup, warmed

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"warmup": 0.25})
class CosineRestarts:
    """Raise the rate over the warm-up, then let it fall to zero along a cosine several times, each from the peak.

    Source: Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts".
    """

    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)
    cycles: int = option(2, ge=1, help="how many times the rate falls")

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""
        cycles = self.cycles

        def after(step: int, warm: int, total: int) -> float:
            share = (step - warm) / max(1, total - warm)
            return 0.0 if share >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((cycles * share) % 1.0))))

        return warmed(run, self.warmup, "cosine-restarts", after)
