"""`best-model`: the run ends with the weights of its best evaluation."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from plugin_helpers import Crash, Record, assert_same_weights, columns, fit, net, train_by_hand
from safetensors.torch import load_file

from drivetrain import ConfigError, PlanError, Trainer, TrainingError, hookimpl
from drivetrain_plugins import (
    EMA,
    SGD,
    AsyncCheckpoint,
    BestModel,
    Checkpoint,
    EarlyStopping,
    Evaluate,
    EvaluateOnStart,
    ExportSafetensors,
    Freeze,
)

NAN = math.nan
SCORES = [3.0, 5.0, 4.0, 5.0, NAN, 1.0]  # the first 5 is the best: a later one is not better


class Normed(torch.nn.Module):
    """A model with buffers that move, one of which is in no state dict."""

    def __init__(self):
        super().__init__()
        self.batch_norm = torch.nn.BatchNorm1d(6)
        self.net = net()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, features, labels):
        self.calls += self.training
        return self.net(self.batch_norm(features), labels)


class Script:
    """A plugin whose metric has given values, the first of them at step 1; `first` is that before any step."""

    def __init__(self, values=SCORES, first=0.0):
        self.values, self.first, self.step = values, first, 0

    @hookimpl
    def metrics(self, run):
        self.step = run.progress.step
        return [self]

    def update(self, micro):
        pass

    def compute(self):
        return {"accuracy": self.first if self.step == 0 else self.values[self.step - 1]}


class Snapshots:
    """A plugin that copies all parameters and buffers, at the start and after each step."""

    @hookimpl
    def assembled(self, run):
        self.states = [everything(run.model)]

    @hookimpl
    def step_end(self, step):
        self.states.append(everything(step.run.model))


def everything(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def scripted(folder=None, *extra, script=None, best=None, model=None, **settings):
    """Return a trainer whose evaluations have the scores."""
    plugins = [best or BestModel("evaluate/accuracy"), Evaluate(every="1 step"), script or Script(), SGD(lr=0.1)]
    settings = {"steps": 6, "log_every": "1 step", "device": "cpu", **settings}
    return Trainer(model or Normed(), [*plugins, *extra], output=folder, **settings)


@pytest.mark.parametrize("device", ["cpu", "model"])
@pytest.mark.parametrize(("mode", "best"), [("auto", 2), ("min", 6)])
def test_the_model_is_that_of_the_best_evaluation(device, mode, best):
    """Parameters and buffers are, bit for bit, those of the best step; the metrics say which it was."""
    seen = Snapshots()
    trainer = scripted(None, seen, best=BestModel("evaluate/accuracy", mode=mode, device=device))
    result = trainer.fit(columns(), columns(8))
    assert same(everything(trainer.run.model), seen.states[best])
    assert not same(seen.states[best], seen.states[5])
    assert result.metrics["best/step"] == best
    assert result.metrics["best/evaluate/accuracy"] == SCORES[best - 1]


def test_a_loop_by_hand_keeps_the_same():
    """With a real loss it is what a person keeps who trains step by step and evaluates after each."""
    data, held, model = columns(), columns(40, seed=5), net()
    optimizer, kept = torch.optim.SGD(model.parameters(), lr=1.0), {}
    for step in range(1, 13):
        again = net()
        optimizer = torch.optim.SGD(again.parameters(), lr=1.0)
        train_by_hand(again, data, optimizer, steps=step)
        again.eval()
        with torch.no_grad():
            kept[again(**held)["loss"].item()] = step, again
    step, by_hand = kept[min(kept)]
    assert 1 < step < 12
    trainer, _ = fit(model, [SGD(lr=1.0), Evaluate(every="1 step"), BestModel()], data, held, steps=12)
    for name, weight in by_hand.state_dict().items():
        torch.testing.assert_close(trainer.run.model.state_dict()[name], weight, msg=name)
    assert trainer.run.metrics["best/step"] == step


@pytest.mark.parametrize("kind", [Checkpoint, AsyncCheckpoint])
@pytest.mark.parametrize("order", [1, -1])
def test_exports_have_the_best_and_checkpoints_the_last(kind, order, tmp_path):
    """What is exported after training are the best weights; the last checkpoint has the last, to go on from."""
    seen = Snapshots()
    trainer = scripted(tmp_path, seen, kind(every="2 steps"), ExportSafetensors())
    plugins = list(trainer.plugins.items())[::order]
    trainer = Trainer(Normed(), plugins, steps=6, output=tmp_path, device="cpu")
    trainer.fit(columns(), columns(8))
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, seen.states[2][name]) for name, tensor in exported.items())
    saved = load_file(tmp_path / "checkpoints" / "step-00000006" / "model.safetensors")
    assert all(torch.equal(tensor, seen.states[6][name]) for name, tensor in saved.items())
    assert saved.keys() == seen.states[6].keys()


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_resuming_is_exact(at, tmp_path):
    """A run that was broken off before, at or after the best step ends with the same model, and goes on as it would."""
    straight = scripted(tmp_path / "straight", Checkpoint(every="1 step"), Crash(0))
    straight.fit(columns(), columns(8))
    with pytest.raises(KeyboardInterrupt):
        scripted(tmp_path / "parts", Checkpoint(every="1 step"), Crash(at + 1)).fit(columns(), columns(8))
    second = scripted(tmp_path / "parts", Checkpoint(every="1 step"), Crash(0))
    second.fit(columns(), columns(8), resume=True)
    assert second.run.metrics["best/step"] == 2
    assert same(everything(second.run.model), everything(straight.run.model))
    last = [
        load_file(tmp_path / part / "checkpoints/step-00000006/model.safetensors") for part in ("straight", "parts")
    ]
    assert same(*last)


def test_a_run_that_is_over_has_the_best_when_it_is_resumed(tmp_path):
    """From the last checkpoint, with no step left to take, the best weights come back; with more steps it goes on."""
    seen = Snapshots()
    best = BestModel("evaluate/accuracy")
    scripted(tmp_path, seen, Checkpoint(on_change="accept"), best=best).fit(columns(), columns(8))
    again = scripted(tmp_path, Snapshots(), Checkpoint(on_change="accept"), best=best)
    again.fit(columns(), columns(8), resume=True)
    assert same(everything(again.run.model), seen.states[2])
    record, script = Record(), Script([*SCORES, 4.0, 6.0, 2.0])
    more = scripted(tmp_path, seen, Checkpoint(on_change="accept"), record, script=script, steps=9)
    more.fit(columns(), columns(8), resume=True)
    assert more.run.metrics["best/step"] == 8
    assert same(everything(more.run.model), seen.states[2])  # the eighth step is the second of this process


def test_the_model_as_it_came_may_be_the_best():
    """An evaluation before the first step counts; after resuming, one of the weights that were loaded does not."""
    model, seen = Normed(), Snapshots()
    trainer = scripted(None, seen, EvaluateOnStart(), script=Script(first=9.0), model=model)
    trainer.fit(columns(), columns(8))
    assert same(everything(model), seen.states[0])
    assert trainer.run.metrics["best/step"] == 0


def test_a_stopped_run_ends_with_the_best():
    """Early stopping comes some steps after the best one; the best is brought back."""
    seen, stopping = Snapshots(), EarlyStopping("evaluate/accuracy", patience=2)
    trainer = scripted(None, seen, stopping)
    assert trainer.fit(columns(), columns(8)).steps == 4
    assert same(everything(trainer.run.model), seen.states[2])


@pytest.mark.parametrize(
    ("script", "options", "heard"),
    [
        (Script([NAN] * 6), {"every": "1 step"}, "its last value was nan"),
        (Script(), {"every": "100 steps", "at_end": False}, "it was not evaluated"),
    ],
)
def test_no_best_is_an_error(script, options, heard):
    """Where no value was finite, or there was none, the end of the run says so, and `failed` hears it."""
    failures = []

    class Hear:
        @hookimpl
        def failed(self, run, error):
            failures.append((run.progress.step, error))

    plugins = [BestModel("evaluate/accuracy"), Evaluate(**options), script, SGD(), Hear()]
    with pytest.raises(TrainingError, match=f"'evaluate/accuracy' never had a finite value: {heard}") as caught:
        fit(net(), plugins, columns(), columns(8), steps=6)
    assert failures == [(6, caught.value)]


def test_a_run_that_is_stopped_before_any_evaluation_keeps_its_weights(caplog):
    """A preempted run is no failure: it warns."""

    class Stop:
        @hookimpl
        def step_end(self, step):
            step.run.request_stop("a test")

    seen = Snapshots()
    with caplog.at_level(logging.WARNING):
        trainer, _ = fit(net(), [BestModel(), Evaluate(), SGD(), seen, Stop()], columns(), columns(8), steps=6)
    assert "best-model: 'evaluate/loss' never had a finite value" in caplog.text
    assert "the weights are those of step 1" in caplog.text
    assert same(everything(trainer.run.model), seen.states[1])


def test_evaluations_after_the_run_change_nothing():
    """An evaluation by hand, of a model that is as it was at its best, is no new best."""
    best = BestModel("evaluate/accuracy")
    trainer = scripted(None, best=best)
    trainer.fit(columns(), columns(8))
    before = everything(trainer.run.model)
    trainer.plugins["script"].values = [99.0] * 6
    trainer.evaluate()
    assert best.state_dict()["step"] == 2
    assert same(everything(trainer.run.model), before)


def test_only_what_moves_is_kept():
    """Frozen parameters are not copied; buffers are."""
    best = BestModel("evaluate/accuracy")
    scripted(None, Freeze(["net.first*"]), best=best).fit(columns(), columns(8))
    kept = best.state_dict()["weights"].keys()
    assert kept == {n for n in everything(Normed()) if not n.startswith("net.first")}


def test_training_is_not_touched():
    """Until the end, losses and weights are those of a run without the plugin."""
    seen, plain = Snapshots(), Snapshots()
    trainer = scripted(None, seen)
    trainer.fit(columns(), columns(8))
    others = [(n, p) for n, p in scripted(None, plain).plugins.items() if n != "best-model"]
    Trainer(Normed(), others, steps=6, device="cpu").fit(columns(), columns(8))
    assert all(same(a, b) for a, b in zip(seen.states, plain.states, strict=True))


def test_instances_can_be_fitted_again():
    """A second run remembers no best of the first."""
    trainer = scripted()
    trainer.fit(columns(), columns(8))
    first = trainer.run.model.state_dict()
    trainer.plugins["script"].values = [1.0, 1.5, 1.0, 1.0, 1.0, 1.2]
    trainer.model = Normed()
    trainer.fit(columns(), columns(8))
    assert trainer.run.metrics["best/evaluate/accuracy"] == 1.5
    assert_same_weights(trainer.run.model, _with(first))


def _with(state):
    model = Normed()
    model.load_state_dict(state)
    return model


def test_what_cannot_be_is_refused():
    """Sets that are not evaluated, metrics that are not measured, and averages in the weights' place."""
    with pytest.raises(ConfigError, match=r"best-model: the metric 'evaluate/dev/loss' .*\s+received: sets: \['evalua"):
        fit(net(), [BestModel("evaluate/dev/loss"), Evaluate(), SGD()], columns(), columns(8), steps=1)
    with pytest.raises(TrainingError, match=r"does not measure 'evaluate/f1'. Received: \['evaluate/loss'\]"):
        fit(net(), [BestModel("evaluate/f1"), Evaluate(), SGD()], columns(), columns(8), steps=1)
    with pytest.raises(PlanError, match=r"(?s)best-model.*ema"):
        fit(net(), [BestModel(), EMA(), Evaluate(), SGD()], columns(), columns(8), steps=1)
