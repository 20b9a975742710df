"""Clocks that jump and names that are strange: a checkpoint's place is in its step, never in a time stamp."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from pathlib import Path

import faults_worker
import pytest
import small_runs
import small_saves

from drivetrain import DrivetrainError
from drivetrain_plugins import Checkpoint

NOW = 1_700_000_000
STEPS = (2, 4, 6, 8)
STAMPS = {
    "equal": lambda n: NOW,
    "backwards": lambda n: NOW - 1000 * n,
    "in the future": lambda n: NOW + 10**9 - n,
    "before 1970": lambda n: -(10**6) * (n + 1),
    "all zero": lambda n: 0,
}
LONGEST = "/checkpoints/.tmp-00000002-0123456789abcdef/state.safetensors"  # of the paths that a save makes
PATH_MAX = 4095


def stamp(parent, moment):
    """Give the checkpoints, and all that is in them, times by their position."""
    for number, folder in enumerate(sorted(parent.iterdir())):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (moment(number), moment(number)))


@pytest.fixture
def parent(tmp_path):
    """Return a folder with four checkpoints, none of them rotated away."""
    (tmp_path / "checkpoints").mkdir()
    for step in STEPS:
        small_saves.save(tmp_path / "checkpoints", step, keep=9)
    return tmp_path / "checkpoints"


# --- clocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stamps", STAMPS)
def test_time_stamps_decide_nothing(parent, stamps):
    """Whatever the files' times are, the newest is that of the highest step, and the lowest go first."""
    stamp(parent, STAMPS[stamps])
    assert small_saves.newest(parent) == 8
    small_saves.save(parent, 10, keep=3)
    assert small_saves.check(parent, clean=True) == [6, 8, 10]
    (parent / "step-00000010" / "state.json").write_bytes(b"")
    stamp(parent, STAMPS[stamps])
    assert small_saves.newest(parent) == 8


def test_the_order_of_writing_decides_nothing(tmp_path):
    """Copies in any order, as a move of a run makes them, are read and rotated by step."""
    for order in itertools.permutations(STEPS[:3]):
        parent = tmp_path / "-".join(map(str, order))
        parent.mkdir()
        for step in order:
            small_saves.save(parent, step, keep=9)
        assert small_saves.newest(parent) == 6
        small_saves.save(parent, 8, keep=2)
        assert small_saves.check(parent, clean=True) == [6, 8]


def test_a_resumed_run_does_not_look_at_times(finished, uninterrupted, worker, tmp_path):
    """A run with an older checkpoint that looks newer goes on from the one of the highest step, to the same bits."""
    shutil.copytree(finished[0], tmp_path / "run")
    stamp(tmp_path / "run" / "checkpoints", lambda n: NOW - 1000 * n)
    answer = worker(tmp_path / "run")
    assert answer["source"] == "step-00000010"
    assert answer["digests"] == uninterrupted["digests"]


def jumping(moments):
    """Return a clock that gives one moment after the other, for ever."""
    clock = itertools.cycle(moments)
    return lambda: next(clock)


@pytest.mark.parametrize("moments", [(NOW, NOW - 10**6, NOW + 10**8, 0), (NOW,), (NOW + 5, NOW)])
def test_a_wall_clock_that_jumps(monkeypatch, uninterrupted, tmp_path, moments):
    """A wall clock that jumps by years at each look changes no bit, no name and no rotation."""
    clock = jumping(moments)
    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr(time, "time_ns", lambda: int(clock() * 1e9))
    ended = faults_worker.perform(faults_worker.Job(folder=str(tmp_path / "run")))
    assert ended["digests"] == uninterrupted["digests"]
    assert ended["calls"] == uninterrupted["calls"]
    assert small_saves.steps_in(tmp_path / "run" / "checkpoints") == [8, 10]


def test_a_cadence_in_hours_does_not_follow_the_wall_clock(monkeypatch, tmp_path):
    """A save that is due every hour does not come because somebody set the clock forward by a day at each step."""
    clock = itertools.count(NOW, 86_400)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    seen, raised = small_runs.train(tmp_path / "run", Checkpoint(every="1 hour"))
    assert (seen.saved_steps, raised) == ([10], None)


# --- names ---------------------------------------------------------------------------------------------------------


def resumes(output, base):
    """Run to step 4 and on to step 6 into an output; return the steps whose checkpoints are in `base`."""
    kept = [small_runs.train(output, Checkpoint(every="2 steps", keep=2), steps=n, resume="auto") for n in (4, 6)]
    assert [(seen.saved_steps, raised) for seen, raised in kept] == [([2, 4], None), ([6], None)]
    return small_saves.check(base / "checkpoints", clean=True)


@pytest.mark.parametrize(
    "name",
    [
        "with space", " led by one", "two\nlines", "tab\t", "naïve", "日本語", "🚂", "-o", "--help", "a%20b", "a#b?c&d=e",
        "a'b\"c`d", "back\\slash", "{}[]*?", ".hidden", "step-00000002", "x" * 255, "é" * 127, "e\u0301",
        "\udcff bytes", "checkpoints", "C:", "nul", "~x",
    ],
)  # fmt: skip
def test_a_strange_output(tmp_path, name):
    """A run's folder may have any name that the file system takes, and is resumed from there."""
    assert resumes(tmp_path / name, tmp_path / name) == [4, 6]
    assert [p.name for p in tmp_path.iterdir()] == [name]


def of_length(folder, length):
    """Return a path below `folder` that is `length` long."""
    path = str(folder)
    while (left := length - len(path)) > 0:
        take = left - 1 if left <= 201 else min(200, left - 3)
        path += "/" + "d" * take
    assert len(path) == length
    return Path(path)


def test_the_longest_output(tmp_path):
    """A path under which everything that a save and a rotation make just fits works; nothing is left over."""
    rotated = len(LONGEST) + len("trash") - len("tmp")
    folder = of_length(tmp_path, PATH_MAX - rotated)
    assert resumes(folder, folder) == [4, 6]


@pytest.mark.parametrize("more", [11, 15, 30, 45])
def test_an_output_that_is_too_long(tmp_path, more):
    """A path that is longer by some characters is refused before step 0."""
    seen, raised = small_runs.train(
        of_length(tmp_path, PATH_MAX - len(LONGEST) + more), Checkpoint(every="2 steps"), errors=DrivetrainError
    )
    assert (seen.step, "File name too long" in str(raised)) == (0, True)


@pytest.mark.parametrize("more", [1, 10])
def test_an_output_that_is_a_little_too_long(tmp_path, more):
    """The same where only the longest names of a save do not fit."""
    folder = of_length(tmp_path, PATH_MAX - len(LONGEST) + more)
    seen, raised = small_runs.train(folder, Checkpoint(every="2 steps"))
    assert "File name too long" in str(raised)
    assert seen.step == 0


@pytest.mark.parametrize("length", [PATH_MAX - len("/manifest.json") + 1, PATH_MAX + 10])
def test_an_output_beyond_the_limit(tmp_path, length):
    """A path beyond the system's own limit is an error of drivetrain's."""
    _, raised = small_runs.train(of_length(tmp_path, length), Checkpoint(), errors=DrivetrainError)
    assert raised is not None


@pytest.mark.parametrize("output", ["run", ".", "./a/../run", "deep/er/run"])
def test_a_relative_output(tmp_path, monkeypatch, output):
    """A relative path means the folder of the start, wherever the process goes during the run."""
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    for steps in (4, 6):
        monkeypatch.chdir(home)
        kind = Checkpoint(every="2 steps", keep=2)
        seen, raised = small_runs.train(
            output, kind, small_runs.Seen(1, lambda: os.chdir(away)), steps=steps, resume="auto"
        )
        assert raised is None
        assert seen.saved_steps == ([2, 4] if steps == 4 else [6])
    assert not list(away.iterdir())
    assert small_saves.check((home / output).resolve() / "checkpoints", clean=True) == [4, 6]


LOOK_ALIKE = [
    "STEP-00000010", "Step-00000010", "step-00000010.replaced-0a1b2c3d", "step-0000001O", "step-00000010 ", "step-10",
    " step-00000010", "step-00000010\n", "step_00000010", "step-+0000010", "step-0000000000000010", "step-00000010.tmp",
    "step\u201100000010",
]  # fmt: skip


@pytest.mark.parametrize("name", LOOK_ALIKE)
def test_names_that_only_look_like_a_step(parent, name):
    """A folder with a name that is not exactly a step's is neither read as one, nor rotated away, nor replaced."""
    small_saves.save(parent, 10, keep=9)
    (parent / "step-00000010").rename(parent / name)
    assert small_saves.newest(parent) == 8
    small_saves.save(parent, 12, keep=1)
    assert {p.name for p in parent.iterdir()} == {name, "step-00000012"}
    small_saves.save(parent, 10, keep=9)
    assert small_saves.steps_in(parent) == [10, 12]


def test_digits_of_other_scripts(parent):
    """A name with another script's digits is no step's."""
    (parent / "step-00000008").rename(parent / "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0668")
    assert small_saves.newest(parent) == 6


def test_names_differ_without_case(tmp_path):
    """All names that a run makes are lower case, and differ without it: they do not collide where case is no matter."""
    store = faults_worker.FaultyStore()
    trainer, rows = faults_worker.build(faults_worker.Job(folder=str(tmp_path / "run")), store)
    random.seed(3)
    trainer.fit(rows)
    made = [Path(args[-1]) for name, args in store.log if name in ("create", "make_folder", "rename")]
    names = {str(path.relative_to(tmp_path)) for path in made}
    assert len(names) > 25
    assert all(name == name.lower() for name in names)
    assert all(path.name.isascii() for path in made)
