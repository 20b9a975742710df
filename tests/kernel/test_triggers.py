"""Moments: how they are read, and when they come."""

from __future__ import annotations

import time

import pytest

from drivetrain import Trigger
from drivetrain.testing import make_run
from drivetrain_plugins import Accumulate, Loader

READ = {
    "500 steps": (500, "steps"), "1 step": (1, "steps"), "step": (1, "steps"), 25: (25, "steps"),
    "1 epoch": (1, "epochs"), "epoch": (1, "epochs"), "0.5 epochs": (0.5, "epochs"), "1M tokens": (1e6, "tokens"),
    "1.5k samples": (1500, "samples"), "2_000 steps": (2000, "steps"), "10 minutes": (10, "minutes"),
    "30 s": (30, "seconds"), "2 h": (2, "hours"), "2 min": (2, "minutes"), " 3  steps ": (3, "steps"),
    "2G tokens": (2e9, "tokens"), "1B tokens": (1e9, "tokens"),
}  # fmt: skip
REFUSED = [
    "",
    "5",
    "steps 5",
    "0 steps",
    "-1 steps",
    "1.5 steps",
    "5 stepps",
    "1e3 steps",
    "5steps",
    0,
    True,
    None,
    2.5,
]


@pytest.mark.parametrize("text", READ, ids=str)
def test_reading(text):
    """People's ways to write a moment are understood, and reading what is shown gives the same."""
    trigger = Trigger.parse(text)
    assert (trigger.count, trigger.unit) == READ[text]
    again = Trigger.parse(str(trigger))
    assert (again.count, again.unit) == READ[text]


@pytest.mark.parametrize("text", REFUSED, ids=repr)
def test_refusing(text):
    """What cannot be meant is refused with what was received."""
    with pytest.raises(ValueError, match=r"step|moment|unit|positive"):
        Trigger.parse(text)


def fired(every, *plugins, start=0, **settings):
    """Return after which steps `every` is due in a run of 40 rows in batches of 8, from step `start` on."""
    run, due = make_run(*plugins, **settings), []
    trigger = None
    while not run.finished:
        run.stream = run.batches["train"].iterate(run.progress.epoch, run.progress.rows_in_epoch)
        step = run.hooks.plan_step(run)
        run.hooks.count_items(step)
        if trigger is None and run.progress.step == start:
            trigger = Trigger.parse(every).start(run)
        run.advance(step)
        if trigger is not None and trigger.due(run):
            due.append(run.progress.step)
    return due


TABLE = [
    ("3 steps", [3, 6, 9]),
    ("4 steps", [4, 8]),
    ("1 epoch", [5, 10]),
    ("0.5 epochs", [3, 5, 8, 10]),
    ("2 epochs", [10]),
    ("20 samples", [3, 5, 8, 10]),
    ("24 tokens", [3, 6, 9]),
    ("1 sample", [*range(1, 11)]),
    ("100 hours", []),
]


@pytest.mark.parametrize(("every", "steps"), TABLE, ids=[every for every, _ in TABLE])
def test_firing(every, steps):
    """A moment comes at the first step boundary at or after each multiple, once."""
    assert fired(every, epochs=2) == steps


@pytest.mark.parametrize(("every", "steps"), TABLE, ids=[every for every, _ in TABLE])
def test_firing_after_a_resume(every, steps):
    """A run that goes on at step 4 has the moments that the uninterrupted one has from there on."""
    assert fired(every, epochs=2, start=4) == [step for step in steps if step > 4]


def test_epochs_are_counted_in_rows():
    """Accumulation and batch size move no moment away from the end of the epoch."""
    assert fired("1 epoch", Loader(batch_size=7), Accumulate(2), epochs=2) == [3, 6]
    assert fired("1 epoch", Loader(batch_size=16, drop_last=True), epochs=3) == [2, 4, 6]


def test_wall_clock():
    """Time is measured from the last firing."""
    run = make_run()
    trigger = Trigger.parse("0.05 s").start(run)
    assert not trigger.due(run)
    time.sleep(0.06)
    assert trigger.due(run)
    assert not trigger.due(run)
