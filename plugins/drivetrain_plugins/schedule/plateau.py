"""Reduce the rate when a metric stops improving, by the rule of `torch.optim.lr_scheduler.ReduceLROnPlateau`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.schedule._metric import METRIC, Follower
from drivetrain_plugins.schedule._warmup import HELP, Warmup
from drivetrain_plugins.shared.directions import DIRECTION, direction_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from drivetrain import Run


@plugin(
    role="schedule",
    requires=["evaluation"],
    companions={"evaluate": {"every": "1 step"}},
    example={"factor": 0.5, "patience": 0, "threshold": 0.2, "warmup": 1},
)
class Plateau:
    """Keep the rate, and multiply it by `factor` when more than `patience` evaluations in a row were no better.

    Which way is better follows from the metric's name. Evaluations before the first step and during the warm-up do
    not count.
    """

    metric: str = option("loss", help=METRIC)
    direction: str = option("auto", choices=("auto", "min", "max"), help=DIRECTION)
    factor: float = option(0.1, gt=0, lt=1, help="what the rate is multiplied by")
    patience: int = option(10, ge=0, help="evaluations without improvement that are put up with")
    threshold: float = option(1e-4, ge=0, help="what counts as an improvement")
    threshold_mode: str = option(
        "relative", choices=("relative", "absolute"), help="share of the best, or a difference"
    )
    cooldown: int = option(0, ge=0, help="evaluations after a reduction that do not count")
    min_lr: float | None = option(None, ge=0, help="smallest rate")
    min_share: float | None = option(None, ge=0, le=1, help="smallest rate, as a share of each group's own")
    eps: float = option(1e-8, ge=0, help="smaller reductions are not made")
    warmup: Warmup = option(0.0, converter=Warmup.parse, help=HELP)
    _follows: Any = option(None, init=False)
    _least: list[float] = option(factory=list, init=False)
    _bad: int = option(0, init=False)  # evaluations in a row that were no better
    _cooling: int = option(0, init=False)  # evaluations left that do not count

    def __attrs_post_init__(self) -> None:
        """Find the direction."""
        mode = direction_of(self.metric, self.direction)
        relative = self.threshold_mode == "relative"
        self._follows = Follower("plateau", self.metric, mode, self.threshold, relative, self.eps)

    @hookimpl
    def build_schedule(self, run: Run) -> list[Callable[[int], float]]:
        """Return the factor of each group as a function of the applied steps; it moves with the evaluations.

        Raises:
            ConfigError: the metric's set is not evaluated, or the smallest rate is above a group's own.
        """
        functions = self._follows.build(run, self.warmup)
        self._bad, self._cooling = 0, 0
        self._least = self._follows.bounds(self.min_lr, self.min_share, 0.0)
        if max(self._least) > 1:
            received, do = f"min_lr={self.min_lr}, lr={self._follows.rates}", "give a smaller min_lr, or min_share"
            raise ConfigError([Problem("plateau: the rate could not fall", received, do)])
        return functions  # type: ignore[no-any-return]

    @hookimpl
    def evaluated(self, run: Run, split: str, metrics: Mapping[str, float]) -> None:
        """Count the evaluation, and reduce the rate if it is time."""
        follows = self._follows
        value = follows.heard(run, split, metrics, self.warmup)
        if value is None:
            return
        self._bad = 0 if follows.better(value) else self._bad + 1
        if self._cooling:
            self._cooling -= 1
            self._bad = 0
        if self._bad > self.patience:
            follows.change(run, lambda factor, group: max(factor * self.factor, self._least[group]))
            self._cooling, self._bad = self.cooldown, 0

    def state_dict(self) -> dict[str, Any]:
        """Return best value, counters and factors."""
        return {**self._follows.state_dict(), "bad": self._bad, "cooling": self._cooling}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on."""
        self._follows.load_state_dict(state)
        self._bad, self._cooling = state["bad"], state["cooling"]
