"""`evaluate-on-start`: one evaluation before the first step."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import Record, assert_same_weights, columns, fit, net

from drivetrain import ConfigError, PlanError, Trainer, hookimpl
from drivetrain_plugins import SGD, Checkpoint, Evaluate, EvaluateOnStart, JsonlLog


def moments(record, name="evaluate/loss"):
    return [step for step, metrics in record.logs if name in metrics]


def test_the_first_evaluation_is_of_the_model_as_it_came():
    """Before the first step there is the loss of the model that was given; training goes on as without it."""
    model, held = net(), columns(9, seed=5)
    with torch.no_grad():
        by_hand = model(**held)["loss"].item()
    trainer, record = fit(model, [SGD(), Evaluate(every="2 steps"), EvaluateOnStart()], columns(), held, steps=3)
    assert moments(record) == [0, 2, 3]
    assert record.of("evaluate/loss")[0] == pytest.approx(by_hand, rel=1e-6)
    plain, _ = fit(net(), [SGD()], columns(), steps=3)
    assert_same_weights(trainer.run.model, plain.run.model)


@pytest.mark.parametrize("order", [1, -1])
def test_a_log_is_open_by_then(order, tmp_path):
    """The evaluation is in the log file, wherever the plugins stand in the list."""
    plugins = [EvaluateOnStart(), Evaluate(), JsonlLog(), SGD()][::order]
    Trainer(net(), plugins, steps=1, output=tmp_path).fit(columns(), columns(8))
    assert '{"step": 0, "evaluate/loss"' in (tmp_path / "log.jsonl").read_text().splitlines()[0]


@pytest.mark.parametrize(("on_resume", "expected"), [(False, [6]), (True, [3, 6])])
def test_resuming(on_resume, expected, tmp_path):
    """A run that goes on is evaluated first only if asked to, and only if it has steps to take."""
    plugins = [SGD(), Evaluate(every="100 steps"), EvaluateOnStart(on_resume=on_resume), Checkpoint(on_change="accept")]
    Trainer(net(), plugins, steps=3, output=tmp_path).fit(columns(), columns(8))
    for moment in (expected, []):
        record = Record()
        Trainer(net(), [*plugins, record], steps=6, output=tmp_path).fit(columns(), columns(8), resume=True)
        assert moments(record) == moment


def test_the_chosen_sets_are_evaluated():
    """The sets are those of `evaluate`."""
    sets = {"near": columns(8), "far": columns(8)}
    _, record = fit(net(), [SGD(), Evaluate(sets="far"), EvaluateOnStart()], columns(), sets, steps=1)
    assert moments(record, "evaluate/far/loss") == [0, 1]
    assert moments(record, "evaluate/near/loss") == []


def test_a_failure_is_told():
    """What fails in the evaluation is heard by `failed`, before any step."""
    heard = []

    class Bad:
        @hookimpl
        def evaluated(self):
            raise ZeroDivisionError

        @hookimpl
        def failed(self, run, error):
            heard.append((run.progress.step, type(error)))

    with pytest.raises(ZeroDivisionError):
        fit(net(), [SGD(), Evaluate(), EvaluateOnStart(), Bad()], columns(), columns(8), steps=2)
    assert heard == [(0, ZeroDivisionError)]


def test_what_cannot_be_is_refused():
    """Two first evaluations are one too many, and without `evaluate` there is none."""
    with pytest.raises(
        ConfigError, match=r"evaluate-on-start and evaluate would both .*\s+received: evaluate: at_start"
    ):
        fit(net(), [SGD(), EvaluateOnStart(), Evaluate(at_start=True)], columns(), columns(8), steps=1)
    with pytest.raises(PlanError, match="evaluate-on-start"):
        fit(net(), [SGD(), EvaluateOnStart()], columns(), columns(8), steps=1)
