"""What schedules that follow a metric share: which metric it is, which way is better, and the factor of each group."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import ConfigError, Problem, TrainingError
from drivetrain_plugins.schedule._warmup import Warmup, warmed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drivetrain import Run

METRIC = '"loss", "accuracy"; of a named evaluation set: "evaluate/NAME:loss"'


@attrs.define
class Follower:
    """Listen to one metric of one evaluation set; hold each group's factor and when it changed."""

    plugin: str
    metric: str
    mode: str  # "min" or "max"
    threshold: float
    relative: bool
    eps: float  # smallest change of a rate
    rates: list[float] = attrs.field(factory=list)  # initial ones, of each group
    factors: list[float] = attrs.field(factory=list)
    best: float | None = None
    changes: list[list[Any]] = attrs.field(factory=list)  # [updates done, factors from there on]

    @property
    def place(self) -> tuple[str, str]:
        """Return split and name of the metric."""
        split, _, name = self.metric.rpartition(":")
        return split or "evaluate", name

    def build(self, run: Run, warmup: Warmup) -> list[Callable[[int], float]]:
        """Begin with factors of 1 and return the schedule of each group.

        Raises:
            ConfigError: the set is not evaluated in this run.
        """
        split, _ = self.place
        if split not in run.batches:
            sets = [name for name in run.batches if name.startswith("evaluate")]
            what = f"{self.plugin}: there is no evaluation set {split!r}"
            do = 'name one of the sets: metric = "evaluate/NAME:loss"' if sets else "give evaluation data"
            raise ConfigError([Problem(what, f"metric={self.metric!r}; sets: {sets}", do, kind="missing")])
        self.rates = [group["initial_lr"] for group in run.optimizer.param_groups]
        self.factors, self.best, self.changes = [1.0] * len(self.rates), None, []

        def of(index: int) -> Callable[[int], float]:
            return warmed(run, warmup, self.plugin, lambda _step, _warm, _total: self.factors[index])

        return [of(index) for index in range(len(self.rates))]

    def heard(self, run: Run, split: str, metrics: Mapping[str, float], warmup: Warmup) -> float | None:
        """Return the metric, if it is of this evaluation and the warm-up is over.

        Raises:
            TrainingError: the evaluation does not have it.
        """
        wanted, name = self.place
        progress = run.progress
        done = progress.items if warmup.unit == "tokens" else progress.applied
        warm = warmup.count if warmup.unit == "tokens" else warmup.steps(run, self.plugin)
        if split != wanted or progress.step == 0 or done < warm:
            return None
        if name not in metrics:
            do = f"name one of them: metric = ..., or add the plugin that measures {name!r}"
            raise TrainingError(f"{self.plugin}: {split!r} has no metric {name!r}; {do}. Received: {sorted(metrics)}")
        return float(metrics[name])

    def better(self, value: float) -> bool:
        """Tell whether `value` is better than the best by more than the threshold, and keep it if so."""
        sign = 1.0 if self.mode == "min" else -1.0
        best = sign * math.inf if self.best is None else self.best
        margin = sign * self.threshold
        won = sign * value < sign * (best * (1.0 - margin) if self.relative else best - margin)
        if won:
            self.best = value
        return won

    def change(self, run: Run, move: Callable[[float, int], float]) -> None:
        """Set each group's factor to `move(factor, group)`, unless the rate would hardly change."""
        moved = [move(factor, index) for index, factor in enumerate(self.factors)]
        pairs = zip(self.factors, moved, self.rates, strict=True)
        self.moved_to(run, [new if abs(old - new) * rate > self.eps else old for old, new, rate in pairs])

    def moved_to(self, run: Run, factors: list[float]) -> None:
        """Take these factors."""
        if factors != self.factors:
            self.factors = factors
            self.changes.append([run.progress.applied, factors])

    def bounds(self, rate: float | None, share: float | None, default: float) -> list[float]:
        """Return a bound of each group's factor, from a rate, a share of the group's own rate, or neither."""
        if rate is not None and share is not None:
            raise ConfigError([Problem(f"{self.plugin}: give a rate or a share, not both", f"{rate} and {share}")])
        fallback = default if share is None else share
        return [fallback if rate is None else rate / own for own in self.rates]

    def state_dict(self) -> dict[str, Any]:
        """Return what the next evaluation depends on."""
        return {"factors": self.factors, "best": self.best, "changes": self.changes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on."""
        self.factors, self.best, self.changes = list(state["factors"]), state["best"], list(state["changes"])
