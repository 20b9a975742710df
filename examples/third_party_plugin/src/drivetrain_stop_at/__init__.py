"""Stop training when a metric reaches a value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from drivetrain import TrainingError, hookimpl, option, plugin

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="control", requires=["evaluation"], example={"value": 0.0, "metric": "loss", "mode": "min"})
class StopAt:
    """Stop the run as soon as a metric of an evaluation reaches a value."""

    value: float = option(help="the value to reach")
    metric: str = option("accuracy", help='name of the metric, without the split: "accuracy", "loss"')
    mode: Literal["max", "min"] = option("max", choices=["max", "min"], help="reached from below, or from above")
    split: str = option("evaluate", help='whose metrics count: "evaluate" or "evaluate/NAME"')

    @hookimpl
    def evaluated(self, run: Run, split: str, metrics: dict[str, float]) -> None:
        """Ask for the end of the run; it comes at this step's boundary, on all ranks. NaN reaches nothing."""
        if split != self.split:
            return
        if self.metric not in metrics:
            raise TrainingError(f"stop-at: {split} has no metric {self.metric!r}. It has: {', '.join(sorted(metrics))}")
        now = metrics[self.metric]
        reached = now >= self.value if self.mode == "max" else now <= self.value
        if reached:
            run.request_stop(f"{split}/{self.metric} reached {self.value:g}: it is {now:.4g}")
