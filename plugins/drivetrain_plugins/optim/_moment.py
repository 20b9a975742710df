"""A point of a run: a share of its steps, or a number of steps, epochs, samples or tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import Trigger

if TYPE_CHECKING:
    from drivetrain import Run

HELP = 'below 1: share of all steps; from 1 on: number of steps; or written out: "500 steps", "1 epoch", "10M tokens"'
UNITS = ("steps", "epochs", "samples", "tokens")  # what is a function of the run's progress: time is not


def cadence(value: Any) -> Trigger:
    """Read a trigger that is a function of the run's progress."""
    trigger = Trigger.parse(value)
    if trigger.unit not in UNITS:
        raise ValueError(f"must be measured in {', '.join(UNITS)}, or a resumed run differs. Received: {value!r}")
    return trigger


@attrs.define(eq=False)
class Moment:
    """When something begins; `passed(run)` is cheap once it has."""

    count: float
    unit: str = "steps"  # "share" or one of UNITS
    _trigger: Trigger | None = attrs.field(init=False, default=None)
    _passed: bool = attrs.field(init=False, default=False)

    @classmethod
    def parse(cls, value: Any) -> Moment:
        """Read a number or a text."""
        if isinstance(value, cls):
            return cls(value.count, value.unit)
        if isinstance(value, str) and value.replace(".", "", 1).isdigit():
            value = float(value)
        if isinstance(value, str):
            trigger = cadence(value)
            return cls(trigger.count, trigger.unit)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"a moment must be a number that is not negative, or a text. Received: {value!r}")
        if value >= 1 and value != int(value):
            raise ValueError(f"a number of steps must be whole. Received: {value!r}")
        return cls(value, "share" if value < 1 else "steps")

    def __str__(self) -> str:
        """Write the moment the way it is read."""
        return f"{self.count:.15g}" if self.unit == "share" else f"{self.count:.15g} {self.unit}"

    def steps(self, run: Run) -> int | None:
        """Return after how many steps it is, where that is known."""
        if self.unit == "share":
            return math.ceil(self.count * run.total_steps)
        return int(self.count) if self.unit == "steps" else None

    def start(self, run: Run) -> Moment:
        """Look where `run` stands; call it when a run is assembled and when it has resumed.

        Raises:
            ConfigError: it is a part of an epoch of a stream, of which nobody knows where it ends.
        """
        steps = self.steps(run)
        count, unit = (self.count, self.unit) if steps is None else (float(steps), "steps")
        self._passed = count == 0
        if not self._passed:
            Trigger(count, unit).start(run)
            self._trigger = Trigger(count, unit)  # not started: it is due as soon as its first time is past
        return self

    def passed(self, run: Run) -> bool:
        """Tell whether `run` has come so far."""
        if not self._passed:
            self._passed = self._trigger is not None and self._trigger.due(run)
        return self._passed
