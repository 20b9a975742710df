"""Warm-up, as every schedule here takes it: a share of all steps, a number of steps, or a number of items."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import ConfigError, Problem, Trigger

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run

HELP = 'below 1: share of all steps; from 1 on: number of steps; or written out: "500 steps", "10M tokens"'


@attrs.frozen
class Warmup:
    """How long the rate rises."""

    count: float
    unit: str = "steps"  # "share", "steps" or "tokens"

    @classmethod
    def parse(cls, value: Any) -> Warmup:
        """Read a number or a text."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and value.replace(".", "", 1).isdigit():
            value = float(value)
        if isinstance(value, str):
            trigger = Trigger.parse(value)
            if trigger.unit not in ("steps", "tokens"):
                raise ValueError(f"a warm-up is measured in steps or tokens. Received: {value!r}")
            return cls(trigger.count, trigger.unit)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"warmup must be a number that is not negative, or a text. Received: {value!r}")
        return cls(value, "share" if value < 1 else "steps")

    def __str__(self) -> str:
        """Write the warm-up the way it is read."""
        return f"{self.count:.15g}" if self.unit == "share" else f"{self.count:.15g} {self.unit}"

    def steps(self, run: Run, plugin: str) -> int:
        """Return the number of warm-up steps of `run`.

        Raises:
            ConfigError: it is in tokens, of which nobody knows the step, or longer than the run.
        """
        if self.unit == "tokens":
            do = "give it in steps or as a share"
            raise ConfigError([Problem(f"{plugin}: its warm-up cannot be in tokens", str(self), do)])
        steps = math.ceil(self.count * run.total_steps) if self.unit == "share" else int(self.count)
        if steps > run.total_steps:
            what = f"the warm-up of {plugin!r} is longer than the run"
            received, do = f"warmup={self} for {run.total_steps} steps", "give fewer, or a share below 1 such as 0.1"
            raise ConfigError([Problem(what, received, do)])
        return steps


def warmed(run: Run, warmup: Warmup, plugin: str, after: Callable[[int, int, int], float]) -> Callable[[int], float]:
    """Return a schedule that rises from 0 over the warm-up and then is `after(step, warm-up steps, all steps)`.

    A warm-up in tokens multiplies the schedule, which runs from the first step on: nobody knows at which step it ends.
    """
    total = run.total_steps
    if warmup.unit == "tokens":
        items = warmup.count
        # Resuming makes another `progress`, so it is looked up in each step.
        return lambda step: min(1.0, run.progress.items / items) * after(step, 0, total)
    warm = warmup.steps(run, plugin)
    return lambda step: step / warm if step < warm else after(step, warm, total)


def smallest_share(run: Run, rate: float | None, share: float | None, *, plugin: str) -> float:
    """Return the smallest rate as a share of the first group's, from one of the two ways to give it."""
    if (rate is None) == (share is None):
        received = f"min_lr={rate}, min_share={share}"
        raise ConfigError([Problem(f"{plugin}: give either min_lr or min_share", received)])
    first = run.optimizer.param_groups[0]["initial_lr"]
    least = float(rate / first) if rate is not None else float(share or 0.0)
    if least > 1:
        do = "give a min_lr that is not above the optimizer's rate"
        raise ConfigError([Problem(f"{plugin}: the rate would rise", f"min_lr={rate}, lr={first}", do)])
    return least


def wave(share: float, cycles: float, least: float = 0.0) -> float:
    """Return a cosine from 1 at share 0, `cycles` waves long, whose lowest point is `least`."""
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * share)) * (1 - least) + least)
