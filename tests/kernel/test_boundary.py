"""What is asked for while a step boundary is attended to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from drivetrain import ConfigError, Trainer, hookimpl
from drivetrain_plugins import SGD, Checkpoint, Evaluate

if TYPE_CHECKING:
    from pathlib import Path


class Line(torch.nn.Module):
    """Fit a line."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x, y):
        return torch.nn.functional.mse_loss(self.linear(x).squeeze(-1), y)


class AskAt:
    """Ask for a save, a stop, or both, when the evaluation of one step is heard; remember the weights then."""

    def __init__(self, step, *asks):
        self.step, self.asks, self.weights, self.votes = step, asks, None, []

    @hookimpl
    def evaluated(self, run, split, metrics):
        if run.progress.step == self.step:
            self.weights = run.model.linear.weight.detach().clone()
            for ask in self.asks:
                getattr(run, f"request_{ask}")("it was asked for")

    @hookimpl(wrapper=True)
    def agree(self, run, votes):
        agreed = yield
        self.votes.append((run.progress.step, votes, agreed))
        return agreed


def fit(ask: AskAt, output: Path | None = None):
    x = torch.randn(48, 2, generator=torch.Generator().manual_seed(0))
    plugins = [SGD(lr=0.1), Evaluate(every="2 steps", at_end=False), ask]
    if output is not None:
        plugins.append(Checkpoint(every="1000 steps", at_end=False))
    trainer = Trainer(Line(), plugins, steps=6, output=output)
    data = {"x": x, "y": x.sum(1)}
    return trainer, trainer.fit(data, data)


def test_a_stop_asked_for_by_an_evaluation_ends_the_run_at_that_step():
    """No further step is taken once an evaluation has asked for the end."""
    trainer, result = fit(AskAt(4, "stop"))
    assert (result.steps, result.stopped) == (4, "it was asked for")
    assert torch.equal(trainer.run.model.linear.weight, trainer.plugins["ask-at"].weights)


def test_a_save_asked_for_by_an_evaluation_holds_the_weights_that_were_evaluated(tmp_path: Path):
    """A checkpoint of the best step is a checkpoint of that step, not of the next one."""
    ask = AskAt(4, "save")
    _, result = fit(ask, tmp_path)
    assert result.steps == 6
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    again = Trainer(Line(), [SGD(lr=0.1), Checkpoint(on_change="accept")], steps=4, output=tmp_path)
    x = torch.randn(48, 2, generator=torch.Generator().manual_seed(0))
    again.fit({"x": x, "y": x.sum(1)}, resume=True)
    assert torch.equal(again.run.model.linear.weight, ask.weights)


def test_an_evaluation_cannot_ask_for_another_one_of_the_same_step():
    """Asking for an evaluation while one is heard does not go on for ever: each due step is evaluated once."""
    ask = AskAt(4, "evaluate")
    _, result = fit(ask)
    assert result.steps == 6
    assert [step for step, _, _ in ask.votes] == [2, 4, 4, 6]


def test_without_another_request_the_ranks_agree_once():
    """A boundary at which nobody asks for more costs one agreement."""
    ask = AskAt(0)
    fit(ask)
    assert [step for step, _, _ in ask.votes] == [2, 4, 6]


def test_what_no_plugin_does_is_told(caplog):
    """A save asked for in a run without checkpoints, evaluating without an evaluator and resuming say what is missing."""

    class Ask:
        @hookimpl
        def step_end(self, step):
            step.run.request_save("to be safe")

    data = {"x": torch.ones(8, 2), "y": torch.ones(8)}
    trainer = Trainer(Line(), [SGD(lr=0.1), Ask()], steps=1, device="cpu")
    assert trainer.fit(data).steps == 1
    assert "asked to save (to be safe), but no plugin of this run does" in caplog.text
    with pytest.raises(ConfigError, match="no plugin of this run evaluates"):
        trainer.evaluate("train")
    with pytest.raises(ConfigError, match="no plugin of this run can resume"):
        trainer.fit(data, resume=True)
