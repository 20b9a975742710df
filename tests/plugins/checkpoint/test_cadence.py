"""When saves come: moments of every kind, milestones, requests that combine, weights only, and saves that fail."""

from __future__ import annotations

import errno
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from checkpoint_runs import ROWS, named, steps, trainer

from drivetrain import CheckpointError, Trigger, hookimpl
from drivetrain_plugins import Checkpoint, Evaluate
from drivetrain_plugins.checkpoint._store import LocalStore


class Listener:
    """The steps at whose boundary a save was made, and at which a checkpoint was told."""

    effect = "observes"

    def __init__(self):
        self.saved_at, self.asked_at = [], []

    @hookimpl(wrapper=True)
    def save(self, run, path):
        self.asked_at.append(run.progress.step)
        return (yield)

    @hookimpl
    def saved(self, run, path):
        self.saved_at.append(run.progress.step)


def manifest(folder, step):
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())


# --- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ("2 steps", [2, 4, 6, 8]),
        (3, [3, 6]),
        ("3 steps or 1 epoch", [3, 4, 6, 8]),
        ("3 steps   or   5 steps", [3, 5, 6]),
        (["3 steps", 5], [3, 5, 6]),
        (("epoch",), [4, 8]),
        ("24 samples", [3, 6]),
        ("20 tokens", [3, 5, 8]),  # a row without labels is one item: 8, 16, 24, ...
        ([Trigger.parse("0.5 epochs")], [2, 4, 6, 8]),
    ],
)
def test_moments(tmp_path, every, expected):
    """A cadence is one moment or several, as text, a number or a list; saves come whenever one of them does."""
    trainer(tmp_path, checkpoint=Checkpoint(every=every, keep=99, at_end=False), steps=8).fit(ROWS)
    assert steps(tmp_path) == named(*expected)


def test_seconds_are_counted_from_the_last_firing(tmp_path, monkeypatch):
    """With "10 seconds" a save comes at the first step after 10 seconds, by a clock that never goes back."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("drivetrain.triggers.time", SimpleNamespace(monotonic=lambda: clock.now))

    class Tick:
        @hookimpl
        def gradients_ready(self, step):
            clock.now += 4.0

    checkpoint = Checkpoint(every="10 seconds or 7 steps", keep=99, at_end=False)
    trainer(tmp_path, Tick(), checkpoint=checkpoint, steps=9).fit(ROWS)
    assert steps(tmp_path) == named(3, 6, 7, 9)  # 12 s, 24 s, the 7th step, 36 s


def test_a_resumed_run_saves_where_the_uninterrupted_one_would(tmp_path):
    """Steps, epochs and samples are counted from the start of training, not from the resume."""
    options = {"every": "3 steps or 1 epoch", "keep": 99, "at_end": False}
    trainer(tmp_path, checkpoint=Checkpoint(every=5, keep=99, at_end=False), steps=5).fit(ROWS)
    listener = Listener()
    trainer(tmp_path, listener, checkpoint=Checkpoint(**options), steps=10).fit(ROWS, resume=True)
    assert listener.saved_at == [6, 8, 9]


@pytest.mark.parametrize(
    ("every", "message"),
    [
        ([], "at least one moment"),
        ("3 steps or", "no moment"),
        ("3 steps or 2 fortnights", "unknown unit 'fortnights'"),
        ("0 steps", "must be positive"),
        (["2 steps", 1.5], "no moment"),
        (True, "no moment"),
    ],
)
def test_what_is_no_moment_is_refused(every, message):
    """A cadence that says nothing, or one part of which does, is refused when the plugin is made."""
    with pytest.raises(ValueError, match=message):
        Checkpoint(every=every)


# --- milestones ------------------------------------------------------------------------------------------------------


def test_milestones_stay_for_ever(tmp_path):
    """Milestones survive every rotation, of this run and of those that go on from it, and are marked."""
    trainer(tmp_path, checkpoint=Checkpoint(every=2, keep=1, milestones="3 steps"), steps=8).fit(ROWS)
    assert steps(tmp_path) == named(3, 6, 8)
    assert [manifest(tmp_path, n)["milestone"] for n in (3, 6, 8)] == [True, True, False]
    trainer(tmp_path, checkpoint=Checkpoint(every=1, keep=1), steps=13).fit(ROWS, resume=True)
    assert steps(tmp_path) == named(3, 6, 8, 13)  # 8 is what the run went on from
    trainer(tmp_path, checkpoint=Checkpoint(every=1, keep=1), steps=15).fit(ROWS, resume=True)
    assert steps(tmp_path) == named(3, 6, 13, 15)


def test_a_mark_is_for_its_step_only(tmp_path):
    """A milestone whose save failed does not make one of a later checkpoint."""
    store = Failing(lambda saves: saves == 2)
    checkpoint = Checkpoint(every="1 step", keep=9, milestones="2 steps", on_failure="continue")
    checkpoint._store = store
    trainer(tmp_path, checkpoint=checkpoint, steps=5).fit(ROWS)
    assert {n: manifest(tmp_path, n)["milestone"] for n in (1, 3, 4, 5)} == {1: False, 3: False, 4: True, 5: False}


# --- requests combine ------------------------------------------------------------------------------------------------


def test_requests_of_one_step_are_one_save(tmp_path):
    """A due save, a milestone, one of the best, the end, a stop and another plugin's request at one step save once."""

    class Asks:
        @hookimpl
        def step_end(self, step):
            step.run.request_save("mine")
            if step.run.progress.step == 4:
                step.run.request_stop("enough")

    checkpoint = Checkpoint(every="2 steps or 1 epoch", keep=99, milestones="2 steps", best=2)
    listener = Listener()
    evaluate = Evaluate(every="1 step")
    result = trainer(tmp_path, listener, Asks(), evaluate, checkpoint=checkpoint, steps=9).fit(ROWS, ROWS)
    assert result.stopped == "enough"
    assert listener.saved_at == listener.asked_at == [1, 2, 3, 4]


def test_at_end_can_be_left_out(tmp_path):
    """With at_end=False neither the last step nor a stop is saved, unless a save is due there."""

    class Stop:
        @hookimpl
        def step_end(self, step):
            if step.run.progress.step == 3:
                step.run.request_stop("enough")

    for folder, plugins, expected in (("a", [], [2, 4]), ("b", [Stop()], [2])):
        checkpoint = Checkpoint(every=2, keep=9, at_end=False)
        trainer(tmp_path / folder, *plugins, checkpoint=checkpoint, steps=5).fit(ROWS)
        assert steps(tmp_path / folder) == named(*expected)


# --- weights only ----------------------------------------------------------------------------------------------------


def test_weights_only_are_marked_and_refuse_to_resume(tmp_path):
    """A checkpoint of what="weights" holds the model alone, says so, and is refused with what to do instead."""
    made = trainer(tmp_path, checkpoint=Checkpoint(every=2, what="weights"), steps=2)
    made.fit(ROWS)
    path = tmp_path / "checkpoints" / "step-00000002"
    assert manifest(tmp_path, 2)["kind"] == "weights"
    assert set(json.loads((path / "state.json").read_text())) == {"model", "progress"}
    from safetensors.torch import load_file

    stored = load_file(path / "model.safetensors")
    assert torch.equal(stored["one.weight"], made.run.model.one.weight)
    assert load_file(path / "state.safetensors") == {}
    for resume in (path, True, "auto"):
        with pytest.raises(CheckpointError, match=r"holds weights only.*add the plugin `warm-start`"):
            trainer(tmp_path, steps=4).fit(ROWS, resume=resume)


def test_weights_that_are_newest_are_passed_over(tmp_path, caplog):
    """With weights only as the newest, resume takes the newest that can be resumed, and says why."""
    trainer(tmp_path, steps=2).fit(ROWS)
    checkpoint = Checkpoint(every=1, what="weights", keep=9)
    trainer(tmp_path, checkpoint=checkpoint, steps=4).fit(ROWS, resume=True)
    assert steps(tmp_path) == named(2, 3, 4)
    run = trainer(tmp_path, steps=4).assemble(ROWS)
    with caplog.at_level(logging.WARNING, "drivetrain"):
        assert run.hooks.load(run, None).name == "step-00000002"
    told = [r.getMessage() for r in caplog.records]
    assert [t.startswith("checkpoint: passed over: ") for t in told] == [True, True]
    assert all("holds weights only" in t for t in told)


# --- saves that fail -------------------------------------------------------------------------------------------------


class Failing(LocalStore):
    """A store in which making the folder of those saves fails that `fails(number)` says; 1 is the first."""

    def __init__(self, fails):
        self.fails, self.saves = fails, 0

    def make_folder(self, path):
        if ".tmp-00000000" not in str(path):  # no probe
            self.saves += 1
            if self.fails(self.saves):
                raise OSError(errno.EIO, "Input/output error", str(path))
        super().make_folder(path)


def failing(fails, **options):
    checkpoint = Checkpoint(every=1, keep=99, **options)
    checkpoint._store = Failing(fails)
    return checkpoint


def test_a_failure_ends_the_run_by_default(tmp_path):
    """With on_failure="raise" the first save that fails ends the run."""
    made = trainer(tmp_path, checkpoint=failing(lambda n: n == 2), steps=5)
    with pytest.raises(CheckpointError, match=r"step-00000002 could not be written: Input/output error"):
        made.fit(ROWS)
    assert made.run.progress.step == 2
    assert steps(tmp_path) == named(1)


def test_failures_in_a_row_are_counted(tmp_path, caplog):
    """With "continue" a run goes on, says so with the number, and ends at that many failures in a row."""
    made = trainer(tmp_path, checkpoint=failing(lambda n: n > 2, on_failure="continue", failures=3), steps=9)
    with caplog.at_level(logging.WARNING, "drivetrain"), pytest.raises(CheckpointError, match="step-00000005"):
        made.fit(ROWS)
    assert [f"failure {n} of 3 in a row" in r.getMessage() for n, r in enumerate(caplog.records, 1)] == [True, True]
    assert steps(tmp_path) == named(1, 2)


def test_a_success_resets_the_count(tmp_path, caplog):
    """Two failures, a success, two failures: with three tolerated in a row the run reaches its end."""
    checkpoint = failing(lambda n: n % 3 != 0, on_failure="continue", failures=3)
    trainer(tmp_path, checkpoint=checkpoint, steps=9).fit(ROWS)
    assert steps(tmp_path) == named(3, 6, 9)
    assert [r.getMessage()[12:26] for r in caplog.records] == ["failure 1 of 3", "failure 2 of 3"] * 3


@pytest.mark.parametrize("stop", [False, True])
def test_the_last_save_is_never_gone_without(tmp_path, stop):
    """The save at the end of a run, or of a stop, raises though failures are tolerated."""

    class Stop:
        @hookimpl
        def step_end(self, step):
            if stop and step.run.progress.step == 3:
                step.run.request_stop("enough")

    last = 3 if stop else 5
    made = trainer(tmp_path, Stop(), checkpoint=failing(lambda n: n == last, on_failure="continue"), steps=5)
    with pytest.raises(CheckpointError, match=f"step-0000000{last} could not be written"):
        made.fit(ROWS)
    assert made.run.progress.step == last
    assert steps(tmp_path) == named(*range(1, last))


def test_a_failure_changes_no_bit(tmp_path):
    """A run that goes on without some checkpoints ends with the weights of one that had them all."""
    ends = []
    for folder, checkpoint in (
        ("a", failing(lambda n: n in (2, 3), on_failure="continue")),
        ("b", Checkpoint(every=1)),
    ):
        made = trainer(tmp_path / folder, checkpoint=checkpoint, steps=6)
        made.fit(ROWS)
        ends.append(made.run.model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    "options", [{"on_failure": "ignore"}, {"failures": 0}, {"what": "all"}, {"best": -1}, {"best": 1.5}, {"mode": "up"}]
)
def test_options_out_of_range_are_refused(options):
    """An option that is none of those there are is refused when the plugin is made, and named."""
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}|whole"):
        Checkpoint(**options)
