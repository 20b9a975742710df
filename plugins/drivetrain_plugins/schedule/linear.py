"""Linear warm-up, then linear decay to zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import HELP, Warmup, warmed

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"warmup": 0.25})
class Linear:
    """Raise the rate over the warm-up, then let it fall to zero at the last step."""

    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""

        def after(step: int, warm: int, total: int) -> float:
            return max(0.0, (total - step) / max(1, total - warm))

        return warmed(run, self.warmup, "linear", after)
