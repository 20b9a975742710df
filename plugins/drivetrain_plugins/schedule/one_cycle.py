"""One rise and one fall over the whole run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from drivetrain import hookimpl, option, plugin

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule")
class OneCycle:
    """Raise the rate along a cosine from a part of the peak, and let it fall to almost nothing.

    Source: Smith and Topin 2019, "Super-Convergence"; as `torch.optim.lr_scheduler.OneCycleLR`, without its momentum.
    """

    rise: float = option(0.3, gt=0, lt=1, help="share of the steps in which the rate rises")
    first: float = option(25.0, gt=0, help="the peak divided by the first rate")
    last: float = option(1e4, gt=0, help="the first rate divided by the last")

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""
        peak, end = self.rise * run.total_steps - 1, run.total_steps - 1
        first, last = 1 / self.first, 1 / self.first / self.last

        def factor(step: int) -> float:
            if step <= peak and peak > 0:
                return _between(first, 1.0, step / peak)
            return _between(1.0, last, min(1.0, (step - peak) / max(1e-9, end - peak)))

        return factor


def _between(start: float, stop: float, share: float) -> float:
    return stop + (start - stop) / 2.0 * (math.cos(math.pi * share) + 1)
