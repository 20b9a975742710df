"""A warm-up that does not begin at zero, then a cosine down to a smallest rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import HELP, Warmup, smallest_share, wave

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"warmup": 0.25, "min_share": 0.1})
class CosineWarmupMinLR:
    """Raise the rate from above zero over the warm-up, then let it fall along a cosine to a smallest rate.

    The first step is not lost to a rate of zero, and the smallest rate is that of the last step.
    """

    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)
    min_lr: float | None = option(None, ge=0, help="the smallest rate of the first parameter group")
    min_share: float | None = option(None, ge=0, le=1, help="the smallest rate as a share of the peak")
    first_share: float | None = option(
        None,
        ge=0,
        le=1,
        help="share of the peak in the first step; None: one of as many parts as the warm-up has steps",
    )
    cycles: float = option(0.5, gt=0, help="waves of the cosine; 0.5 falls from the peak to the smallest rate once")

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""
        least = smallest_share(run, self.min_lr, self.min_share, plugin="cosine-warmup-min-lr")
        warm, total = self.warmup.steps(run, "cosine-warmup-min-lr"), run.total_steps
        first, cycles = self.first_share, self.cycles

        def factor(step: int) -> float:
            if step < warm:
                if first is None:
                    return (step + 1.0) / max(1.0, warm)
                return first + (1.0 - first) * step / max(1.0, warm - 1)
            return wave((step - warm + 1.0) / max(1.0, total - warm), cycles, least)

        return factor
