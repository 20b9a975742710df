"""One metric of one evaluation set, by which something is decided."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs

from drivetrain import ConfigError, Problem, TrainingError
from drivetrain_plugins.shared.directions import direction_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain import Run

METRIC = '"SPLIT/NAME" as it is logged: "evaluate/loss", "evaluate/dev/accuracy"'


@attrs.define
class Watched:
    """Find the metric in the evaluations of a run, each step's once, and compare its values."""

    plugin: str
    metric: str
    mode: str  # "min" or "max"
    split: str = attrs.field(init=False, default="")
    name: str = attrs.field(init=False, default="")
    last: int = attrs.field(init=False, default=-1)  # the step of the newest evaluation that counted

    @classmethod
    def of(cls, plugin: str, metric: str, mode: str) -> Watched:
        """Take a plugin's options.

        Raises:
            ValueError: `mode` is "auto", and the name does not say which way is better.
        """
        return cls(plugin, metric, direction_of(metric.rpartition("/")[2], mode, option="mode"))

    def start(self, run: Run) -> None:
        """Look for the evaluation set when a run is assembled.

        Raises:
            ConfigError: it is none of those that this run evaluates.
        """
        sets = run.evaluated
        self.split, _, self.name = self.metric.rpartition("/")
        self.last = -1
        if self.split not in sets:
            what = f"{self.plugin}: the metric {self.metric!r} is of no set that is evaluated"
            do = f'name a metric of one of them: metric = "{sets[0] if sets else "evaluate"}/loss"'
            raise ConfigError([Problem(what, f"sets: {sets}", do, kind="missing")])

    def heard(self, run: Run, split: str, metrics: Mapping[str, float]) -> float | None:
        """Return the value, if this evaluation has it: the first of its step that is of the set.

        Raises:
            TrainingError: it is of the set, and does not measure the metric.
        """
        if split != self.split or run.progress.step <= self.last:
            return None
        if self.name not in metrics:
            there = [f"{split}/{name}" for name in sorted(metrics)]
            raise TrainingError(
                f"{self.plugin}: the evaluation of {split!r} does not measure {self.metric!r}. Received: {there}. "
                f"Name one of them, or add the plugin that measures {self.name!r}"
            )
        self.last = run.progress.step
        return float(metrics[self.name])

    def better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        """Tell whether `value` is better `than` another by more than `by`; one that is not finite never is."""
        if not math.isfinite(value):
            return False
        if than is None:
            return True
        return value < than - by if self.mode == "min" else value > than + by
