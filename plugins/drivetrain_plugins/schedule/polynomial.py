"""Linear warm-up, then polynomial decay to a last rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import HELP, Warmup, warmed

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"warmup": 0.25, "power": 2.0})
class Polynomial:
    """Raise the rate over the warm-up, then let it fall along a power of the share that is left."""

    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)
    power: float = option(1.0, gt=0, help="exponent; 1 falls linearly")
    end: float = option(1e-7, ge=0, help="the last rate of the first parameter group")

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""
        power, first = self.power, run.optimizer.param_groups[0]["initial_lr"]
        if self.end >= first:
            do = "give an end below the optimizer's rate"
            raise ConfigError([Problem("polynomial: the rate would not fall", f"end={self.end}, lr={first}", do)])
        end = self.end

        def after(step: int, warm: int, total: int) -> float:
            if step > total:
                return float(end / first)
            left = 1 - (step - warm) / max(1, total - warm)
            return float(((first - end) * left**power + end) / first)

        return warmed(run, self.warmup, "polynomial", after)
