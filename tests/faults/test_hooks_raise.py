"""A plugin that raises, in every hook there is: the error names it, the others end in order, and nothing is lost."""

from __future__ import annotations

import functools
import inspect
import random
from pathlib import Path

import attrs
import faults_worker
import numpy as np
import pytest
import torch

from drivetrain import CheckpointError, Trainer, hookimpl, plugin
from drivetrain.hooks import Hooks
from drivetrain.testing import digest
from drivetrain.testing.probes import Recorder
from drivetrain_plugins import AdamW, BadRows, Checkpoint, Clip, Evaluate, ExportSafetensors, Linear, Loader

STEPS, LATE = 7, 3  # a hook of the loop fails when so many steps are done, and one is saved
KINDS = {name: spec.drivetrain_kind for name, spec in vars(Hooks).items() if hasattr(spec, "drivetrain_kind")}
PLACES = [
    (hook, place)
    for hook, kind in KINDS.items()
    for place in (["before", "after"] if kind == "operation" else ["first", "last"])
]


class Sabotage(Exception):  # noqa: N818 - it is raised to see what happens
    """An error like any other."""


class Halt(BaseException):
    """An error that `except Exception` does not see."""


def dive():
    """Go on for ever."""
    return dive()


def nothing_left():
    """Use an iterator up."""
    return next(iter(()))


RAISE = {
    "Exception": Sabotage,
    "BaseException": Halt,
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": functools.partial(SystemExit, 3),
    "StopIteration": nothing_left,  # these two raise it themselves
    "RecursionError": dive,
}
TYPES = {"Exception": Sabotage, "BaseException": Halt, "KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit}


@attrs.define(eq=False)
class When:
    """Says when a saboteur fails: at once, or when some steps are done."""

    trainer: Trainer = None
    late: bool = True
    fired: int = 0

    def now(self):
        if self.late and self.trainer.run.progress.step < LATE:
            return False
        self.fired += 1
        return self.fired == 1


def saboteur(hook, place, error, when):
    """Return a plugin that raises in `hook`, once: before or after what is inside, or as a listener."""

    def fail():
        if when.now():
            raise RAISE[error]()  # noqa: RSE102 - some are functions

    def before(self):
        fail()
        return (yield)

    def after(self):
        result = yield
        fail()
        return result

    def listener(self):
        fail()

    def bringer(self, manager):  # called without pluggy, which is not set up yet
        fail()

    made = {"before": before, "after": after}.get(place, bringer if hook == "add_hooks" else listener)
    made.__code__ = made.__code__.replace(co_name=hook)
    marked = hookimpl(made, wrapper=inspect.isgeneratorfunction(made))
    return type("Saboteur", (), {hook: marked, "effect": "observes"})()


@plugin(role="report", effect="observes")
class Guard:
    """Hold something while the run, a step and a loss last, and hear of a failure."""

    entered: int = attrs.field(init=False, default=0)
    inside: int = attrs.field(init=False, default=0)
    heard: list = attrs.field(init=False, factory=list)

    @hookimpl(wrapper=True)
    def fit(self):
        self.entered += 1
        return (yield from self._hold())

    @hookimpl(wrapper=True)
    def train_step(self):
        return (yield from self._hold())

    @hookimpl(wrapper=True)
    def compute_loss(self):
        return (yield from self._hold())

    def _hold(self):
        self.inside += 1
        try:
            return (yield)
        finally:
            self.inside -= 1

    @hookimpl
    def failed(self, error):
        self.heard.append(error)


@plugin(role="report", effect="observes")
class Fails:
    """Let the run fail, so that `failed` is fired."""

    @hookimpl
    def step_end(self, step):
        if step.run.progress.step == LATE:
            raise ZeroDivisionError


class Rows(faults_worker.Augmented):
    """Rows of which one cannot be read."""

    bad = 30  # comes late in the first epoch

    def __init__(self, rows=40):
        super().__init__(rows)

    def __getitem__(self, index):
        if index == self.bad:
            raise ValueError("this row is bad")
        return super().__getitem__(index)


def build(folder, first=None, last=None):
    """Return a trainer that fires every hook, with a plugin before or after the others."""
    torch.default_generator.manual_seed(1)
    plugins = {"saboteur": first} if first is not None else {}
    plugins.update(
        {"guard:outer": Guard(), "adamw": AdamW(lr=3e-3), "linear": Linear(warmup=0.2), "clip": Clip(norm=0.5)}
    )
    plugins.update(
        {"loader": Loader(batch_size=8), "bad-rows": BadRows(limit=1), "evaluate": Evaluate(every="2 steps")}
    )
    plugins.update({"recorder": faults_worker.Recorder(), "export": ExportSafetensors()})
    plugins.update({"checkpoint": Checkpoint(every="2 steps", keep=9), "guard:inner": Guard()})
    plugins.update({"saboteur": last} if last is not None else {})
    settings = {"steps": STEPS, "seed": 11, "log_every": 1, "device": "cpu"}
    return Trainer(faults_worker.Tiny(), list(plugins.items()), output=folder, **settings)


def fit(trainer, resume=False, seed=3):
    """Make the run, or go on with it, and export it."""
    random.seed(seed)  # a resumed run takes these from the checkpoint
    np.random.seed(seed)  # noqa: NPY002 - the global one, which the recorder draws from
    trainer.fit(Rows(), faults_worker.Augmented(8), resume=resume)
    trainer.export("safetensors", trainer.settings.output / "model.safetensors")
    return trainer.run


def checked(folder):
    """Return the steps that stand on the disk; every byte of them is verified, and nothing unfinished is beside them."""
    parent = folder / "checkpoints"
    names = sorted(path.name for path in parent.iterdir()) if parent.exists() else []
    assert not (folder / "run.lock").exists()
    return [faults_worker.read(parent / name).manifest["step"] for name in names]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return the digest of the run to which nothing happens, and the last step at which each hook is fired."""
    torch.set_num_threads(1)
    folder, recorder = tmp_path_factory.mktemp("straight"), Recorder()
    run = fit(build(folder))
    fit(build(tmp_path_factory.mktemp("recorded"), last=recorder))
    return digest(run), dict(recorder.events)


def sabotage(folder, hook, place, error, straight):
    """Let a plugin raise in a hook, look at what it leaves, go on without it, and compare the end."""
    reference, fired = straight
    resumes = hook in ("load", "loaded")
    loop = fired.get(hook, 0) >= LATE and hook != "export"
    when = When(late=loop)
    evil = saboteur(hook, place, error, when)
    trainer = when.trainer = build(folder, **{"first" if place in ("before", "first") else "last": evil})
    if resumes:
        fit(build(folder, last=faults_worker.StopAt(LATE)))
    if hook == "failed":
        trainer.plugins["fails"] = Fails()
    before = set(checked(folder))
    with pytest.raises(BaseException) as caught:
        fit(trainer, resume=resumes, seed=9 if resumes else 3)
    raised, step = caught.value, trainer.run.progress.step if trainer.run else 0
    assert when.fired == 1, raised
    look_at_the_error(raised, hook, place, error, step)
    guards = [trainer.plugins["guard:outer"], trainer.plugins["guard:inner"]]
    assert [guard.inside for guard in guards] == [0, 0]
    if loop:
        assert [(guard.entered, guard.heard) for guard in guards] == [(1, [raised])] * 2
    if hook == "failed":
        assert type(raised.__context__) is ZeroDivisionError
    saved = set(checked(folder))
    assert saved >= before | {n for n in (2, 4, 6) if max(before, default=0) < n < step}
    assert all(n <= step for n in saved - before)
    assert digest(fit(build(folder), resume="auto", seed=9 if saved else 3)) == reference


def look_at_the_error(raised, hook, place, error, step):
    """The error is the one that was raised, and says where."""
    if error == "StopIteration" and place in ("before", "after"):  # what a generator makes of it
        assert type(raised) is RuntimeError
        assert type(raised.__cause__) is StopIteration
    else:
        assert type(raised).__name__ == {"Exception": "Sabotage", "BaseException": "Halt"}.get(error, error)
    told = [f"in plugin 'saboteur', hook {hook!r}, step {step}"] if hook != "add_hooks" else []  # before there is a run
    assert getattr(raised, "__notes__", []) == told


@pytest.mark.parametrize(("hook", "place"), PLACES)
def test_a_hook_that_raises(tmp_path, straight, hook, place):
    """One kind of error in each hook, before and after the others: named, torn down, and gone on from."""
    number, half = divmod(PLACES.index((hook, place)), 2)
    sabotage(tmp_path, hook, place, list(RAISE)[(number + 3 * half) % len(RAISE)], straight)


@pytest.mark.slow
@pytest.mark.parametrize(("hook", "place"), PLACES)
def test_a_hook_that_raises_anything(tmp_path, straight, hook, place):
    """Every kind of error in each hook."""
    for error in RAISE:
        sabotage(tmp_path / error, hook, place, error, straight)


# --- states ----------------------------------------------------------------------------------------------------------


@plugin(role="report", effect="observes")
class Stateful:
    """A plugin whose state is whatever the test says, or none at all."""

    _state: object = attrs.field(init=False, default=None)
    _error: object = attrs.field(init=False, default=None)
    _run: object = attrs.field(init=False, default=None)

    @hookimpl
    def assembled(self, run):
        self._run = run

    def state_dict(self):
        if self._run.progress.step < LATE:
            return {}
        if self._error is not None:
            raise self._error("in its state")
        return {"value": self._state}

    def load_state_dict(self, state):
        if self._error is not None:
            raise self._error("in its state")


def with_state(folder, state=None, error=None):
    """Return a trainer with a plugin that has a state, or raises when it is asked for it."""
    evil = Stateful()
    evil._state, evil._error = state, error
    return build(folder, last=evil)


@pytest.mark.parametrize("kind", [ValueError, Sabotage, Halt, KeyboardInterrupt])
def test_a_state_that_cannot_be_had(tmp_path, straight, kind):
    """An error in `state_dict` ends the run with the plugin's name; the checkpoints before are whole."""
    with pytest.raises(kind, match="in its state") as caught:
        fit(with_state(tmp_path, error=kind))
    assert caught.value.__notes__ == ["in plugin 'saboteur', hook 'state_dict', step 4"]
    assert checked(tmp_path) == [2]
    assert digest(fit(build(tmp_path), resume=True, seed=9)) == straight[0]


@pytest.mark.parametrize("kind", [ValueError, KeyError, Sabotage, Halt, KeyboardInterrupt])
def test_a_state_that_is_not_taken(tmp_path, straight, kind):
    """An error in `load_state_dict` ends the resume with the plugin's name; the checkpoints are as they were."""
    fit(with_state(tmp_path, {"a": 1}))
    before = checked(tmp_path)
    for number in before[1:]:
        path = tmp_path / "checkpoints" / f"step-{number:08d}"
        trainer = with_state(tmp_path, error=kind)
        with pytest.raises((CheckpointError, kind), match="in its state") as caught:
            fit(trainer, resume=path)
        told = "\n".join([str(caught.value), *caught.value.__notes__])
        assert "'saboteur'" in told
        assert trainer.plugins["guard:outer"].entered == 0
    assert checked(tmp_path) == before
    assert digest(fit(build(tmp_path), resume=True, seed=9)) == straight[0]


def cycle():
    """Return a dictionary that holds itself."""
    made = {}
    made["self"] = made
    return made


def deep():
    """Return a list in a list, and so on."""
    return functools.reduce(lambda inside, _: [inside], range(5000), 1)


STATES = {
    "object": object(), "function": dive, "class": Sabotage, "set": {1}, "bytes": b"raw", "complex": 1j,
    "array": np.zeros(2), "path": Path("x"), "iterator": iter([1]), "cycle": cycle(), "deep": deep(),
    "sparse": torch.eye(2).to_sparse(), "meta": torch.empty(2, device="meta"), "in a list": [1, {"x": object()}],
    "a key": {object(): 1},
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_cannot_be_saved(tmp_path, straight, name):
    """What cannot be written and restored is refused with plugin, place and type; the checkpoints before are whole."""
    told = "plugins/saboteur/value.* cannot be saved. Received: |nested more than 48 deep at plugins/saboteur/value/"
    with pytest.raises(CheckpointError, match=told):
        fit(with_state(tmp_path, STATES[name]))
    assert checked(tmp_path) == [2]
    assert digest(fit(build(tmp_path), resume=True, seed=9)) == straight[0]
