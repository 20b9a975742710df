"""The schedule-free plugins train as their library does, and show the average wherever the model is looked at."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from plugin_helpers import (
    Crash,
    Record,
    assert_same_weights,
    columns,
    fit,
    groups_by_hand,
    net,
    train_by_hand,
)
from safetensors.torch import load_file

from drivetrain import Catalogue, ConfigError, Trainer, hookimpl
from drivetrain.testing.digests import decode, encode
from drivetrain_plugins import Checkpoint, Evaluate, ExportSafetensors, Linear

schedulefree = pytest.importorskip("schedulefree")

STEPS = 20
NAMES = {
    "schedule-free-adamw": ("AdamWScheduleFree", {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-7, "r": 0.5}, 0.1),
    "schedule-free-radam": ("RAdamScheduleFree", {"lr": 0.05, "betas": (0.9, 0.95), "silent_sgd_phase": False}, None),
    "schedule-free-sgd": ("SGDScheduleFree", {"lr": 0.5, "momentum": 0.7, "weight_lr_power": 1.0}, 3),
}
EACH = pytest.mark.parametrize("name", NAMES)


def plugin(name, **options):
    _, given, warmup = NAMES[name]
    given = {**given, "weight_decay": 0.1, **({} if warmup is None else {"warmup": warmup}), **options}
    return Catalogue().entry(name).load()(**given)


def by_hand(name, model):
    """Return the library's optimizer with the groups a person would write, ready to train."""
    kind, given, warmup = NAMES[name]
    given = dict(given)
    if warmup is not None:
        given["warmup_steps"] = math.ceil(warmup * STEPS) if warmup < 1 else warmup
    made = getattr(schedulefree, kind)(groups_by_hand(model, 0.1), **given)
    made.train()
    return made


class Look:
    """Keep the weights that hooks find in the model."""

    def __init__(self):
        self.trained, self.seen, self.written = {}, {}, {}

    @hookimpl
    def step_end(self, step):
        self.trained[step.run.progress.step] = copy.deepcopy(step.run.model.state_dict())

    @hookimpl(wrapper=True)
    def evaluate(self, run):
        result = yield
        self.trained[run.progress.step, "evaluated"] = copy.deepcopy(run.model.state_dict())
        return result

    @hookimpl
    def metrics(self, run):
        self.seen[run.progress.step] = copy.deepcopy(run.model.state_dict())
        return []

    @hookimpl
    def saved(self, run):
        self.written[run.progress.step] = copy.deepcopy(run.model.state_dict())


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]


@EACH
def test_twenty_steps_are_the_librarys(name):
    """Twenty steps with groups give the library's losses, and at the end the weights of its eval()."""
    data, ours, theirs = columns(30), net(), net()
    _, record = fit(ours, [plugin(name)], data, steps=STEPS)
    optimizer = by_hand(name, theirs)
    history = train_by_hand(theirs, data, optimizer, steps=STEPS)
    assert record.of("loss") == [step["loss"] for step in history]
    trained = copy.deepcopy(theirs)
    optimizer.eval()
    assert_same_weights(ours, theirs)
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), theirs.parameters(), strict=True))


@EACH
def test_everyone_who_looks_sees_the_average(name, tmp_path):
    """Evaluations, checkpoints and exports hold the weights of eval(), and training goes on from where it was."""
    data, ours, look = columns(30), net(), Look()
    exported = tmp_path / "model.safetensors"
    parts = [ExportSafetensors(to=str(exported)), look, plugin(name), Evaluate(every="5 steps")]
    parts.append(Checkpoint(every="5 steps", keep=9))
    trainer, _ = fit(ours, parts, data, columns(8), steps=STEPS, output=tmp_path / "run")
    for at in range(5, STEPS + 1, 5):
        model = net()
        optimizer = by_hand(name, model)
        train_by_hand(model, data, optimizer, steps=at)
        assert_equal(look.trained[at], model.state_dict())
        assert_equal(look.trained[at, "evaluated"], model.state_dict())  # the outermost wrapper sees the way back
        optimizer.eval()
        assert_equal(look.seen[at], model.state_dict())
        assert_equal(look.written[at], model.state_dict())
        assert_equal(load_file(tmp_path / f"run/checkpoints/step-{at:08d}/model.safetensors"), model.state_dict())
    assert_equal(load_file(exported), model.state_dict())
    trainer.export("safetensors", tmp_path / "again.safetensors")
    assert_equal(load_file(tmp_path / "again.safetensors"), model.state_dict())
    loss = trainer.evaluate()["loss"]
    model.eval()
    with torch.no_grad():
        assert loss == pytest.approx(model(**columns(8))["loss"].item(), abs=1e-6)
    assert_same_weights(ours, model)


@EACH
@pytest.mark.parametrize("evaluated", [False, True])
def test_resuming_is_exact(name, evaluated, tmp_path):
    """A run that was killed goes on from its checkpoint bit for bit, also where an evaluation came just before it."""
    data, straight, resumed = columns(30), net(0.2), net(0.2)
    more = [Evaluate(every="5 steps")] if evaluated else []
    held_out = columns(8) if evaluated else None
    whole, _ = fit(
        straight, [plugin(name), Checkpoint(every="5 steps"), *more], data, held_out, steps=STEPS, output=tmp_path / "a"
    )
    parts = [Checkpoint(every="5 steps"), *more]
    with pytest.raises(KeyboardInterrupt):
        fit(net(0.2), [plugin(name), *parts, Crash(at=12)], data, held_out, steps=STEPS, output=tmp_path / "b")
    trainer = Trainer(
        resumed, [plugin(name), *parts, Crash(at=0), Record()], log_every="1 step", device="cpu", steps=STEPS, output=tmp_path / "b"
    )  # fmt: skip
    trainer.fit(data, held_out, resume=True)
    assert_same_weights(straight, resumed)
    texts = [encode(made.run.state_dict()) for made in (whole, trainer)]
    assert texts[0][0] == texts[1][0]
    assert all(torch.equal(a, b) for a, b in zip(texts[0][1], texts[1][1], strict=True))


@EACH
def test_a_state_taken_in_training_resumes_too(name):
    """A state that is taken between two steps, of the training weights, resumes bit for bit as one of the average does."""
    data, kept = columns(30), {}

    class Take:
        @hookimpl
        def step_end(self, step):
            if step.run.progress.step == 7:
                kept["state"] = encode(step.run.state_dict())

    straight, resumed = net(), net()
    fit(straight, [plugin(name), Take()], data, steps=STEPS)
    trainer = Trainer(resumed, [plugin(name)], device="cpu", steps=STEPS, log_every="1 step")
    run = trainer.assemble(data)
    state = decode(*kept["state"])
    assert state["plugins"] == {name: {"training": None}}
    assert all(group["train_mode"] for group in state["optimizer"]["param_groups"])
    run.load_state_dict(state)
    run.settings.log_every.start(run)
    run.model.train()
    run.hooks.fit(run)
    assert_same_weights(straight, resumed)


@EACH
def test_a_failed_run_leaves_the_average(name):
    """A run that is interrupted leaves the average of what it reached in the model, to be exported by hand."""
    data, ours, theirs = columns(30), net(), net()
    with pytest.raises(KeyboardInterrupt):
        fit(ours, [plugin(name), Crash(at=6)], data, steps=STEPS)
    optimizer = by_hand(name, theirs)
    train_by_hand(theirs, data, optimizer, steps=6)
    optimizer.eval()
    assert_same_weights(ours, theirs)


@EACH
def test_a_schedule_is_refused(name):
    """A schedule beside it is refused when the run is assembled, with both names."""
    with pytest.raises(ConfigError, match=f"'{name}' averages instead of lowering the rate.*'linear'"):
        fit(net(), [plugin(name), Linear()], columns(), steps=3)


def test_a_warmup_longer_than_the_run_is_refused():
    """A warm-up of more steps than the run has is refused with both numbers."""
    with pytest.raises(ConfigError, match="longer than the run"):
        fit(net(), [plugin("schedule-free-sgd", warmup=5)], columns(), steps=4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("schedule-free-adamw", {"betas": (0.9,)}, "betas must be two numbers"),
        ("schedule-free-radam", {"betas": (0.0, 0.9)}, "betas must be a number > 0 and < 1"),
        ("schedule-free-sgd", {"momentum": 0.0}, "momentum must be a number > 0 and < 1"),
        ("schedule-free-sgd", {"warmup": 1.5}, "warmup is a number of steps"),
    ],
)
def test_values_out_of_bounds_are_refused(name, options, message):
    """A value out of bounds is refused with the bound and the value; no share of the average makes it undefined."""
    with pytest.raises(ValueError, match=message):
        plugin(name, **options)
