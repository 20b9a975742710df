"""Warm-up, a long plateau, then a short decay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.schedule._warmup import HELP, Warmup

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run

SHAPES: dict[str, Callable[[float], float]] = {  # from the share of the way to the share of the rise
    "linear": lambda share: share,
    "cosine": lambda share: 0.5 * (1.0 - math.cos(math.pi * share)),
    "1-sqrt": lambda share: 1.0 - math.sqrt(1.0 - share),
}
Shape = Literal["linear", "cosine", "1-sqrt"]


@plugin(role="schedule", example={"warmup": 2, "decay": 2})
class WarmupStableDecay:
    """Raise the rate over the warm-up, keep it, and let it fall over the last steps.

    Source: Hu et al. 2024, "MiniCPM"; Haegele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations" (the shape "1-sqrt").
    """

    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)
    decay: float = option(0.1, ge=0, help="below 1: share of all steps; from 1 on: number of steps, at the end")
    warmup_shape: Shape = option("linear", choices=list(SHAPES), help="how the rate rises")
    decay_shape: Shape = option("cosine", choices=list(SHAPES), help="how the rate falls")
    min_share: float = option(0.0, ge=0, le=1, help="rate at both ends, as a share of the peak")

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Return the factor as a function of the applied steps."""
        total, least = run.total_steps, self.min_share
        warm = self.warmup.steps(run, "warmup-stable-decay")
        fall = math.ceil(self.decay * total) if self.decay < 1 else int(self.decay)
        if warm + fall > total:
            received = f"{warm} and {fall} steps of {total}"
            raise ConfigError([Problem("warmup-stable-decay: warm-up and decay are longer than the run", received)])
        rise, drop = SHAPES[self.warmup_shape], SHAPES[self.decay_shape]

        def factor(step: int) -> float:
            if step < warm:
                return max(0.0, rise(step / warm) * (1.0 - least) + least)
            if step < total - fall:
                return 1.0
            if step >= total:
                return least
            share = (step - (total - fall)) / fall
            left = 1.0 - math.sqrt(share) if drop is SHAPES["1-sqrt"] else 1.0 - drop(share)
            return max(0.0, left * (1.0 - least) + least)

        return factor
