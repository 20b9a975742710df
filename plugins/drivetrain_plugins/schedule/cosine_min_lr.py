"""Linear warm-up, then a cosine down to a smallest rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import HELP, Warmup, smallest_share, warmed, wave

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"warmup": 0.25, "min_share": 0.1})
class CosineMinLR:
    """Raise the rate over the warm-up, then let it fall along a cosine to a smallest rate above zero."""

    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)
    min_lr: float | None = option(None, ge=0, help="the smallest rate of the first parameter group")
    min_share: float | None = option(
        None, ge=0, le=1, help="the smallest rate as a share of the peak, instead of min_lr"
    )
    cycles: float = option(0.5, gt=0, help="waves of the cosine; 0.5 falls from the peak to the smallest rate once")

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""
        cycles, least = self.cycles, smallest_share(run, self.min_lr, self.min_share, plugin="cosine-min-lr")

        def after(step: int, warm: int, total: int) -> float:
            return wave((step - warm) / max(1, total - warm), cycles, least)

        return warmed(run, self.warmup, "cosine-min-lr", after)
