"""The whole test file of a third-party plugin: the kit's suite, and what only its author can know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain_stop_at import StopAt

from drivetrain import Result, Trainer, TrainingError
from drivetrain.testing import PluginSuite
from drivetrain_plugins import SGD, Accuracy, Evaluate


class TestStopAt(PluginSuite):
    """Everything that drivetrain asks of a plugin."""

    plugin = StopAt


class Line(torch.nn.Module):
    """Tell the side of a point."""

    def __init__(self) -> None:
        """Start from zero: at first every point is on the same side."""
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        torch.nn.init.zeros_(self.linear.weight)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take points (B, 2) and sides (B,)."""
        logits = self.linear(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def fit(stop: StopAt) -> Result:
    """Train at most 60 steps."""
    x = torch.linspace(-1, 1, 64).reshape(32, 2)
    data = {"x": x, "labels": (x[:, 0] > 0).long()}
    trainer = Trainer(Line(), [SGD(lr=0.1), Evaluate(every="2 steps"), Accuracy(), stop], steps=60)
    return trainer.fit(data, data)


@pytest.mark.parametrize(("metric", "mode", "value"), [("accuracy", "max", 0.9), ("loss", "min", 0.5)])
def test_stops_at_the_first_evaluation_that_reaches_the_value(metric: str, mode: Any, value: float) -> None:
    """The run ends at the step whose evaluation reached the value, with a reason that names it."""
    result = fit(StopAt(value=value, metric=metric, mode=mode))
    reached = result.metrics[f"evaluate/{metric}"]
    assert (reached >= value) if mode == "max" else (reached <= value)
    assert result.steps < 60
    assert result.steps % 2 == 0
    assert f"evaluate/{metric} reached {value:g}" in str(result.stopped)


def test_a_value_out_of_reach_changes_nothing() -> None:
    """A run whose metric never reaches the value takes all its steps."""
    result = fit(StopAt(value=1.1))
    assert (result.steps, result.stopped) == (60, None)


def test_an_unknown_metric_is_told_with_those_there_are() -> None:
    """A metric that the evaluation does not have ends the run with the names of those it has."""
    with pytest.raises(TrainingError, match=r"no metric 'f1'\. It has: accuracy, loss"):
        fit(StopAt(value=0.5, metric="f1"))
