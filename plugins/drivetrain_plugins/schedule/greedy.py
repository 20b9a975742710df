"""GreedyLR: raise the rate while a metric improves, lower it while it does not (https://arxiv.org/abs/2512.14527)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.schedule._metric import METRIC, Follower
from drivetrain_plugins.schedule._warmup import HELP, Warmup
from drivetrain_plugins.shared.directions import DIRECTION, direction_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drivetrain import Run

LEAST, MOST = 0.1, 10.0  # shares of the optimizer's rate, where no bounds are given


@plugin(
    role="schedule",
    requires=["evaluation"],
    companions={"evaluate": {"every": "1 step"}},
    example={"factor": 0.5, "patience": 0, "threshold": 0.01},
)
class Greedy:
    """Divide the rate by `factor` after more than `patience` improving evaluations in a row; multiply after bad ones.

    Which way is better follows from the metric's name. The bounds are shares of the optimizer's rate (a tenth and ten
    times it), or rates where they are given as such; a rate outside of its bounds is refused. Evaluations before the
    first step and during the warm-up do not count.
    """

    metric: str = option("loss", help=METRIC)
    direction: str = option("auto", choices=("auto", "min", "max"), help=DIRECTION)
    factor: float = option(0.95, gt=0, lt=1, help="what the rate is multiplied by, or divided by")
    patience: int = option(10, ge=0, help="evaluations of one kind in a row after which the rate moves with the next")
    threshold: float = option(1e-6, ge=0, help="what counts as an improvement")
    threshold_mode: str = option(
        "absolute", choices=("relative", "absolute"), help="share of the best, or a difference"
    )
    cooldown: int = option(0, ge=0, help="evaluations after a reduction that do not count")
    rise_cooldown: int = option(0, ge=0, help="evaluations after a rise that do not count (there called warmup)")
    min_lr: float | None = option(None, ge=0, help="smallest rate")
    min_share: float | None = option(None, ge=0, le=1, help=f"smallest rate, as a share of each group's own; {LEAST}")
    max_lr: float | None = option(None, gt=0, help="largest rate")
    max_share: float | None = option(None, ge=1, help=f"largest rate, as a multiple of each group's own; {MOST:g}")
    eps: float = option(1e-8, ge=0, help="smaller changes are not made")
    smooth: bool = option(False, help="judge the mean of the last values instead of the value")
    window: int = option(50, ge=1, help="smooth: how many values")
    reset: int = option(500, ge=1, help="reductions at the smallest rate after which everything begins anew")
    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)
    _follows: Any = option(None, init=False)
    _bounds: Any = option(None, init=False)
    _counts: dict[str, int] = option(factory=dict, init=False)
    _values: list[float] = option(factory=list, init=False)
    _sum: float = option(0.0, init=False)

    def __attrs_post_init__(self) -> None:
        """Find the direction."""
        mode = direction_of(self.metric, self.direction)
        relative = self.threshold_mode == "relative"
        self._follows = Follower("greedy", self.metric, mode, self.threshold, relative, self.eps)

    @hookimpl
    def build_schedule(self, run: Run) -> list[Callable[[int], float]]:
        """Return the factor of each group as a function of the applied steps; it moves with the evaluations.

        Raises:
            ConfigError: the metric's set is not evaluated, or a group's rate is not within the bounds.
        """
        follows = self._follows
        functions = follows.build(run, self.warmup)
        least = follows.bounds(self.min_lr, self.min_share, LEAST)
        most = follows.bounds(self.max_lr, self.max_share, MOST)
        if max(least) > 1 or min(most) < 1:
            received = f"min_lr={self.min_lr}, max_lr={self.max_lr}, lr={follows.rates}"
            do = "give bounds around the optimizer's rate, or min_share and max_share"
            raise ConfigError([Problem("greedy: the rate is not within its bounds", received, do)])
        self._bounds = least, most
        self._restart()
        return functions  # type: ignore[no-any-return]

    def _restart(self) -> None:
        self._counts = {"good": 0, "bad": 0, "cooling": 0, "rising": 0, "left": self.reset}
        self._values, self._sum, self._follows.best = [], 0.0, None

    @hookimpl
    def evaluated(self, run: Run, split: str, metrics: Mapping[str, float]) -> None:
        """Count the evaluation, and move the rate if it is time."""
        value = self._follows.heard(run, split, metrics, self.warmup)
        if value is None:
            return
        counts, value = self._counts, self._smoothed(value)
        for waiting in ("cooling", "rising"):
            if counts[waiting]:
                counts.update({waiting: counts[waiting] - 1, "good": 0, "bad": 0})
                return
        better = self._follows.better(value)
        counts["good"], counts["bad"] = (counts["good"] + 1, 0) if better else (0, counts["bad"] + 1)
        if counts["good"] > self.patience:
            self._rise(run)
        elif counts["bad"] > self.patience:
            self._fall(run)

    def _smoothed(self, value: float) -> float:
        if not self.smooth:
            return value
        self._values.append(value)
        self._sum += value
        if len(self._values) > self.window:
            self._sum -= self._values.pop(0)
        return self._sum / len(self._values)

    def _rise(self, run: Run) -> None:
        self._follows.change(run, lambda factor, group: min(factor / self.factor, self._bounds[1][group]))
        self._counts.update(rising=self.rise_cooldown, good=0, left=self.reset)

    def _fall(self, run: Run) -> None:
        follows, least = self._follows, self._bounds[0]
        follows.change(run, lambda factor, group: max(factor * self.factor, least[group]))
        self._counts.update(cooling=self.cooldown, bad=0)
        if any(factor > bound for factor, bound in zip(follows.factors, least, strict=True)):
            return
        self._counts["left"] -= 1
        if self._counts["left"] == 0:
            follows.moved_to(run, [1.0] * len(follows.rates))
            self._restart()
            self._counts["cooling"] = self.cooldown

    def state_dict(self) -> dict[str, Any]:
        """Return best value, counters, factors and the values that are averaged."""
        return {**self._follows.state_dict(), "counts": self._counts, "values": self._values, "sum": self._sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on."""
        self._follows.load_state_dict(state)
        self._counts, self._values, self._sum = dict(state["counts"]), list(state["values"]), state["sum"]
