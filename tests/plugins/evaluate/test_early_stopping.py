"""`early-stopping`: the run ends at the step whose evaluation says so."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import Crash, assert_same_weights, columns, fit, net

from drivetrain import ConfigError, PlanError, Trainer, TrainingError, hookimpl
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import SGD, Checkpoint, EarlyStopping, Evaluate, EvaluateOnStart

NAN, INF = math.nan, math.inf


class Script:
    """A plugin whose metric has given values, the first of them at step 1."""

    def __init__(self, values, name="accuracy"):
        self.values, self.name, self.step = values, name, 0

    @hookimpl
    def metrics(self, run):
        self.step = run.progress.step
        return [self]

    def update(self, micro):
        pass

    def compute(self):
        return {self.name: 100.0 if self.step == 0 else self.values[self.step - 1]}


def ends(values, *, metric="evaluate/accuracy", every="1 step", extra=(), **options):
    """Return the step at which a run ends, and why."""
    name = metric.rpartition("/")[2]
    plugins = [EarlyStopping(metric, **options), Evaluate(every=every), Script(values, name), SGD(), *extra]
    trainer, _ = fit(net(), plugins, columns(), columns(8), steps=len(values))
    return trainer.run.progress.step, trainer.run.stopped


@pytest.mark.parametrize(
    ("values", "options", "step", "reason"),
    [
        ([1, 2, 3, 4, 5], {"patience": 1}, 5, None),
        ([1, 2, 2, 3, 4], {"patience": 1}, 3, "has not improved in 1 evaluations (the best was 2, the last 2)"),
        ([3, 2, 1, 4, 3, 2, 1, 5], {"patience": 3}, 7, "has not improved in 3 evaluations (the best was 4, the last 1)"),
        ([1, 1.5, 2.1, 2.9, 9], {"patience": 2, "min_delta": 1}, 5, None),  # 2.1 is an improvement, 2.9 is none
        ([1, 1.5, 2, 9, 9], {"patience": 2, "min_delta": 1}, 3, "has not improved in 2 evaluations (the best was 1, the"),
        ([3, 2, 1, 1, 5], {"mode": "min", "patience": 1}, 4, "has not improved in 1 evaluations (the best was 1"),
        ([1, 7, 8, 9], {"threshold": 7}, 2, "is 7, which is as good as 7"),
        ([9, 8, 6, 1], {"threshold": 7, "mode": "min"}, 3, "is 6, which is as good as 7"),
        ([1, NAN, 3, 4], {}, 2, "is nan"),
        ([1, INF, 3, 4], {}, 2, "is inf"),
        ([1, NAN, INF, 0, 4], {"stop_if_not_finite": False}, 4, "in 3 evaluations (the best was 1, the last 0)"),
        ([NAN, NAN, 2], {"stop_if_not_finite": False, "patience": 2}, 2, "in 2 evaluations (none was finite"),
        ([9, 8, 7, 6, 5], {"start_after": "3 steps", "patience": 1}, 4, "the best was 7, the last 6"),
        ([9, 8, 7, 6, 5], {"start_after": "3 steps", "patience": 1, "threshold": 7.5}, 4, "the best was 7"),
        ([9, NAN, 7, 6], {"start_after": "3 steps"}, 2, "is nan"),
        ([3, 2, 1, 5], {"every": "2 steps", "patience": 1}, 4, None),
        ([3, 5, 1, 2, 9, 9], {"every": "2 steps", "patience": 1}, 4, "the best was 5, the last 2"),
        ([1, 2, 3, 1], {"patience": 1}, 4, None),  # all steps are taken: it was not stopped
    ],
)  # fmt: skip
def test_it_stops_at_the_step_that_was_evaluated(values, options, step, reason):
    """The values say at which step to stop: it ends there, with a reason that names metric and values."""
    ended, stopped = ends(values, **options)
    assert ended == step
    assert stopped is None if reason is None else stopped.startswith("early-stopping: evaluate/accuracy ")
    assert reason is None or reason in stopped


def by_hand(values, patience, min_delta, mode):
    """Return the step at which to stop, from a table of all values."""
    sign = 1 if mode == "max" else -1
    best = since = None
    for step, value in enumerate(values, 1):
        if best is None or sign * (value - best) > min_delta:
            best, since = value, step
        elif step - since >= patience:
            return step
    return len(values)


@settings(deadline=None, max_examples=25)
@given(
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=9),
    patience=st.integers(1, 3),
    min_delta=st.sampled_from([0, 1, 2]),
    mode=st.sampled_from(["min", "max"]),
)
def test_any_sequence_of_values(values, patience, min_delta, mode):
    """Whatever the values are, it ends where a table of them says."""
    assert ends(values, patience=patience, min_delta=min_delta, mode=mode)[0] == by_hand(
        values, patience, min_delta, mode
    )


def test_the_loss_of_a_named_set():
    """A real loss, of one of two sets: it ends where the logged values say, and trains no further than that."""
    data = {"near": columns(9, seed=5), "far": columns(40)}
    plugins = [SGD(lr=2.0), Evaluate(every="1 step")]
    stopping = EarlyStopping("evaluate/near/loss", patience=2)
    trainer, record = fit(net(), [*plugins, stopping], columns(), data, steps=30)
    _, whole = fit(net(), plugins, columns(), data, steps=30)
    logged = whole.of("evaluate/near/loss")
    step = by_hand(logged, 2, 0, "min")
    assert step < 30
    assert trainer.run.progress.step == step
    assert record.of("evaluate/near/loss") == logged[:step]
    short, _ = fit(net(), plugins, columns(), data, steps=step)
    assert_same_weights(trainer.run.model, short.run.model)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_resuming_is_exact(at, tmp_path):
    """A run that was broken off after any step ends at the same step as one that was not, with the same weights."""
    values = [5, 4, 6, 5, 5, 4, 7, 8]  # the third in a row that is no better is the sixth

    def trainer(folder, crash=0):
        plugins = [EarlyStopping("evaluate/accuracy", mode="max", patience=3), Evaluate(every="1 step"), Script(values)]
        return Trainer(net(), [*plugins, SGD(lr=0.1), Checkpoint(every="1 step"), Crash(crash)], steps=8, log_every="1 step",
                       output=folder)  # fmt: skip

    straight = trainer(tmp_path / "straight")
    whole = straight.fit(columns(), columns(8))
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "parts", at + 1).fit(columns(), columns(8))
    second = trainer(tmp_path / "parts")
    again = second.fit(columns(), columns(8), resume=True)
    assert (again.steps, again.stopped) == (whole.steps, whole.stopped)
    assert whole.steps == by_hand(values, 3, 0, "max") == 6
    assert_same_weights(straight.run.model, second.run.model)


def test_an_evaluation_before_the_first_step_does_not_count():
    """The untrained model's value, 100, is none to beat."""
    assert ends([1, 2, 3, 4], patience=1, extra=[EvaluateOnStart()]) == (4, None)


def test_instances_can_be_fitted_again():
    """A second run starts with no best value."""
    stopping, script = EarlyStopping("evaluate/accuracy", patience=2), Script([9, 8, 10, 1, 1, 1])
    for _ in range(2):
        trainer, _ = fit(net(), [stopping, Evaluate(every="1 step"), script, SGD()], columns(), columns(8), steps=6)
        assert trainer.run.progress.step == 5


class Sum:
    """Sum gradients over the ranks."""

    provides = ("data-parallel",)

    @hookimpl
    def gradients_ready(self, step):
        for parameter in step.run.parameters:
            torch.distributed.all_reduce(parameter.grad)


def on_a_rank():
    values = [1, 2, 3, 4] if torch.distributed.get_rank() == 0 else [1, 9, 3, 4]
    return ends(values, threshold=9, extra=[Sum()])


def test_all_ranks_stop_at_the_step_of_one():
    """Where a metric is of one rank alone, all end at the step at which that one asks for it."""
    (first, said), (second, reason) = run_ranks(on_a_rank)
    assert (first, second) == (2, 2)
    assert said == "another rank asked"
    assert "as good as 9" in reason


def test_a_metric_that_is_not_measured_is_told_at_the_first_evaluation():
    """The error names what the evaluation has."""
    plugins = [EarlyStopping("evaluate/f1"), Evaluate(every="1 step"), Script([1, 2, 3]), SGD()]
    with pytest.raises(TrainingError, match=r"'evaluate/f1'\. Received: \['evaluate/accuracy', 'evaluate/loss'\]"):
        fit(net(), plugins, columns(), columns(8), steps=3)


@pytest.mark.parametrize("metric", ["evaluate/dev/loss", "loss", "train/loss"])
def test_a_set_that_is_not_evaluated_is_refused(metric):
    """Before step 0, a metric of no set, or of one that is not chosen, is told with those there are."""
    data, plugins = {"dev": columns(8), "test": columns(8)}, [Evaluate(sets="test"), SGD()]
    for both in ([EarlyStopping(metric), *plugins], [*plugins, EarlyStopping(metric)]):
        with pytest.raises(ConfigError, match=r"early-stopping: the metric .*\s+received: sets: \['evaluate/test'\]"):
            fit(net(), both, columns(), data, steps=1)


def test_options_that_say_nothing_are_refused():
    """Which way is better must be known, and a moment must be the same after resuming."""
    with pytest.raises(ValueError, match='Give mode = "min" or "max"'):
        EarlyStopping("evaluate/novelty")
    with pytest.raises(ValueError, match="a resumed run differs"):
        EarlyStopping(start_after="1 hour")
    with pytest.raises(PlanError, match="early-stopping"):
        fit(net(), [EarlyStopping(), SGD()], columns(), columns(8), steps=1)
