"""Stop when a metric has stopped improving (Prechelt 1998, "Early Stopping - But When?")."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from drivetrain import Trigger, hookimpl, option, plugin
from drivetrain_plugins.evaluate import _beginning
from drivetrain_plugins.evaluate._watched import METRIC, Watched
from drivetrain_plugins.shared.directions import DIRECTION

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from drivetrain import Run


@plugin(
    role="evaluate",
    requires=["evaluation"],
    companions={"evaluate": {"every": "1 step"}},
    example={"patience": 100, "stop_if_not_finite": False},
)
class EarlyStopping:
    """End the run, at the step that was evaluated, when `patience` evaluations in a row were no better than the best.

    An evaluation before the first step, or before the first one after resuming, does not count. The weights at the
    end are the last ones: `best-model` brings the best back, and `checkpoint` with `best` keeps them.
    """

    metric: str = option("evaluate/loss", help=METRIC)
    mode: str = option("auto", choices=("auto", "min", "max"), help=DIRECTION)
    patience: int = option(3, ge=1, help="evaluations in a row without improvement after which the run stops")
    min_delta: float = option(0.0, ge=0, lt=math.inf, help="what an improvement must be more than")
    threshold: float | None = option(None, help="stop as soon as the metric is as good as this")
    stop_if_not_finite: bool = option(True, help="stop when the metric is infinite or no number")
    start_after: Trigger | None = option(
        None, converter=_beginning.parse, help='evaluations before do not count, but for such numbers: "1 epoch"'
    )
    _watched: Watched = option(None, init=False)
    _best: float | None = option(None, init=False)
    _bad: int = option(0, init=False)  # evaluations in a row that were no better

    def __attrs_post_init__(self) -> None:
        """Find out which way is better."""
        self._watched = Watched.of("early-stopping", self.metric, self.mode)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Forget the run before.

        Raises:
            ConfigError: the metric's set is not evaluated.
        """
        self._watched.start(run)
        self._watched.last = 0
        _beginning.check(self.start_after, run)
        self._best, self._bad = None, 0

    @hookimpl
    def loaded(self, run: Run, path: Path | str) -> None:
        """Count from the next step's evaluation on: that of this one has been counted, or was none."""
        del path
        self._watched.last = run.progress.step

    @hookimpl
    def evaluated(self, run: Run, split: str, metrics: Mapping[str, float]) -> None:
        """Count the evaluation, and ask for the end of the run if it is time."""
        value = self._watched.heard(run, split, metrics)
        if value is None:
            return
        reason = self._judge(value, counts=_beginning.is_past(self.start_after, run))
        if reason is not None and run.progress.step < run.total_steps:
            run.request_stop(f"early-stopping: {self.metric} {reason}")

    def _judge(self, value: float, *, counts: bool) -> str | None:
        """Return why to stop, if there is a reason."""
        if self.stop_if_not_finite and not math.isfinite(value):
            return f"is {value}"
        if not counts:
            return None
        if self._watched.better(value, self._best, self.min_delta):
            self._best, self._bad = value, 0
        else:
            self._bad += 1
        sign = 1.0 if self._watched.mode == "min" else -1.0
        if self.threshold is not None and sign * value <= sign * self.threshold:
            return f"is {value:g}, which is as good as {self.threshold:g}"
        if self._bad >= self.patience:
            best = "none was finite" if self._best is None else f"the best was {self._best:g}"
            return f"has not improved in {self._bad} evaluations ({best}, the last {value:g})"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, and how many evaluations in a row were no better."""
        return {"best": self._best, "bad": self._bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on."""
        self._best, self._bad = state["best"], state["bad"]
