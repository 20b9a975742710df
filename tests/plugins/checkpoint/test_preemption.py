"""`preemption` as a plugin: its options, its handlers, the file, its place among the others. Signals: tests/faults."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from checkpoint_runs import ROWS, named, steps, trainer

from drivetrain import ConfigError, RecipeError, Trainer, hookimpl
from drivetrain.recipe import Recipe
from drivetrain_plugins import SGD, Checkpoint, Preemption


class At:
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    @hookimpl
    def gradients_ready(self, step):
        if step.number + 1 == self.step:
            self.act()


def kill(number):
    return lambda: os.kill(os.getpid(), number)


def fit(folder, *plugins, **settings):
    made = trainer(folder, *plugins, steps=8, **settings)
    return made.fit(ROWS)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"signals": ["SIGTREM"]}, "'SIGTREM' is no signal that a run can be asked with: did you mean 'SIGTERM'"),
        ({"signals": ["TERM"]}, "'TERM' is no signal.* 'SIGTERM'"),
        ({"save_signals": ["SIGKILL"]}, "'SIGKILL' is no signal"),
        ({"signals": "SIGSEGV"}, "'SIGSEGV' is no signal"),
        ({"signals": [15]}, "15 is no signal that a run can be asked with: known: SIGTERM, SIGINT"),
        (
            {"signals": ["SIGTERM", "SIGUSR2"]},
            "SIGUSR2 stands in signals and in save_signals; SIGUSR2 saves by default",
        ),
        ({"save_signals": ["SIGINT"]}, "SIGINT stands in signals and in save_signals; take it out of one"),
        ({"stop_file": "a/b"}, "stop_file is the name of a file in the run's folder.* Received: 'a/b'"),
        ({"stop_file": ".."}, "stop_file is the name of a file"),
        ({"stop_file": None}, "stop_file is the name of a file"),
    ],
)
def test_wrong_options(options, reason):
    """A signal that does not exist, cannot be handled or means a fault is refused; the nearest name is told."""
    with pytest.raises(ValueError, match=reason):
        Preemption(**options)


def test_a_wrong_signal_in_a_recipe():
    """A recipe's error names plugin and option."""
    recipe = Recipe.from_dict(
        {"run": {"steps": 1}, "plugins": {"sgd": {"lr": 1}, "preemption": {"signals": ["SIGTRM"]}}}
    )
    with pytest.raises(RecipeError, match=r"preemption[\s\S]*SIGTRM[\s\S]*SIGTERM"):
        recipe.trainer()


def test_one_name_stands_for_a_list():
    """A single signal may be given as a word; doubles are one."""
    assert Preemption(signals="SIGHUP").signals == ("SIGHUP",)
    assert Preemption(signals=["SIGINT", "SIGINT"]).signals == ("SIGINT",)


# --- handlers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_handler():
    """Put a handler of the caller's in place of SIGUSR1's."""

    def own(number, frame):
        heard.append(number)

    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, own)
    yield own, heard
    signal.signal(signal.SIGUSR1, before)


class Fails:
    @hookimpl
    def step_end(self):
        raise ArithmeticError("on purpose")


@pytest.mark.parametrize("end", ["well", "error", "exit"])
def test_handlers_are_restored(tmp_path, own_handler, end):
    """However a run ends, every signal does afterwards what it did before."""
    own, heard = own_handler
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
    before = [signal.getsignal(number) for number in numbers]
    if end == "well":
        fit(tmp_path, Preemption())
    elif end == "error":
        with pytest.raises(ArithmeticError):
            fit(tmp_path, Preemption(), Fails(), At(1, kill(signal.SIGTERM)))
    else:
        with pytest.raises(SystemExit, match="138"):
            fit(tmp_path, Preemption(), At(3, kill(signal.SIGUSR1)))
    assert [signal.getsignal(number) for number in numbers] == before
    assert heard == []
    os.kill(os.getpid(), signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) is own


def test_an_instance_forgets_the_run_before(tmp_path):
    """What stopped one run does not stop the next one of the same instances."""
    asked, act = Preemption(), [kill(signal.SIGINT)]
    made = trainer(tmp_path, asked, At(3, lambda: act.pop()() if act else None), steps=8)
    with pytest.raises(SystemExit) as caught:
        made.fit(ROWS)
    assert caught.value.code == 130
    assert made.fit(ROWS, resume=True).steps == 8


def test_another_signal_does_not_leave(tmp_path):
    """A scheduler warns by one signal and then sends another: the save is not cut off, and the first gives the code."""

    def both():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.51)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        fit(tmp_path, Preemption(), At(3, both))
    assert caught.value.code == 138
    assert steps(tmp_path) == named(2, 3)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_ends_as_it_always_did(tmp_path):
    """A child that the run forks is ended by SIGTERM, as pools of processes end theirs; the run goes on."""
    ended, context = [], multiprocessing.get_context("fork")

    def fork():
        runs = context.Event()  # Python forgets signals that come before a forked process has begun
        child = context.Process(target=lambda: (runs.set(), time.sleep(60)))
        child.start()
        runs.wait(10)
        child.terminate()
        child.join(10)
        ended.append(child.exitcode)
        child.kill()

    assert fit(tmp_path, Preemption(), At(3, fork)).steps == 8
    assert ended == [-signal.SIGTERM]


def in_a_thread(work):
    caught = []

    def run():
        try:
            caught.append(work())
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run, name="the trainer's")
    thread.start()
    thread.join()
    return caught[0]


def test_outside_the_main_thread(tmp_path):
    """Signals cannot be handled there: it is said with what to do; without signals the file works there too."""
    error = in_a_thread(lambda: fit(tmp_path / "one", Preemption()))
    assert isinstance(error, ConfigError)
    assert 'thread "the trainer\'s"' in str(error)
    assert "signals = []" in str(error)
    assert not list((tmp_path / "one").glob("checkpoints/step-*"))
    silent = Preemption(signals=[], save_signals=[])
    folder = tmp_path / "two"
    result = in_a_thread(lambda: fit(folder, silent, At(1, (folder / "stop").touch)))
    assert (result.steps, result.stopped) == (1, f"the file {folder / 'stop'}")


# --- among the others ------------------------------------------------------------------------------------------------


class Joins:
    """Finishes something after the run, as an asynchronous save does, and not in a `finally`."""

    def __init__(self):
        self.joined = 0

    @hookimpl(wrapper=True)
    def fit(self, run):
        result = yield
        self.joined = run.progress.step
        return result


@pytest.mark.parametrize("first", [False, True])
def test_the_others_have_finished_when_it_exits(tmp_path, first):
    """Wherever it stands in the list, SystemExit is raised when all other wrappers of `fit` have returned."""
    joins, asked, sends = Joins(), Preemption(), At(3, kill(signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        fit(tmp_path, *([asked, joins, sends] if first else [joins, sends, asked]))
    assert (caught.value.code, joins.joined) == (143, 3)


def test_a_run_that_is_not_saved_at_its_end_is_saved_when_asked(tmp_path):
    """at_end=False of `checkpoint` is about ends that the run comes to; what a signal stops is saved."""
    with pytest.raises(SystemExit):
        fit(tmp_path, Preemption(), At(3, kill(signal.SIGTERM)), checkpoint=Checkpoint(every=100, at_end=False))
    assert steps(tmp_path) == named(3)


def test_a_run_that_nothing_saves(tmp_path, caplog):
    """It is told at the start, and stops all the same."""
    model = trainer(tmp_path).model
    made = Trainer(model, [SGD(lr=0.1), Preemption(exit=False), At(3, kill(signal.SIGTERM))], steps=8)
    with caplog.at_level(logging.WARNING, "drivetrain"):
        result = made.fit(ROWS)
    assert (result.steps, result.stopped) == (3, "SIGTERM")
    assert "it will stop without saving. Add `checkpoint`" in caplog.messages[0]
    assert "preemption: SIGTERM: the run stops after step 3" in caplog.messages
    assert not any("asked to save" in message for message in caplog.messages)


def test_a_run_that_fails_after_a_signal(tmp_path):
    """The error is raised, not the exit: it says more."""
    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(tmp_path, Preemption(), At(1, kill(signal.SIGTERM)), Fails())


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_file_stops_and_is_removed(tmp_path):
    """A file of the given name, there from the start, stops after the first step, is removed, and the run is saved."""
    (tmp_path / "halt").touch()
    result = fit(tmp_path, Preemption(stop_file="halt"))
    assert (result.steps, result.stopped) == (1, f"the file {tmp_path / 'halt'}")
    assert not (tmp_path / "halt").exists()
    assert steps(tmp_path) == named(1)
    assert trainer(tmp_path, Preemption(), steps=8).fit(ROWS, resume=True).stopped is None


@pytest.mark.parametrize("what", ["folder", "off", "other"])
def test_what_is_no_stop_file(tmp_path, what):
    """A folder of that name, the file where none is looked for, and another file stop nothing and stay."""
    path = tmp_path / ("other" if what == "other" else "stop")
    path.mkdir() if what == "folder" else path.touch()
    assert fit(tmp_path, Preemption(stop_file="" if what == "off" else "stop")).steps == 8
    assert path.exists()


def test_a_file_that_cannot_be_removed(tmp_path, caplog, monkeypatch):
    """The run stops all the same, and says that the file will stop the next one."""
    (tmp_path / "stop").touch()

    real = Path.unlink

    def unlink(self, **options):
        if self.name == "stop":
            raise PermissionError(13, "injected", str(self))
        real(self, **options)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "drivetrain"):
        patch.setattr(type(tmp_path), "unlink", unlink)
        assert fit(tmp_path, Preemption(), checkpoint=Checkpoint(every=100, at_end=False)).steps == 1
    assert "stop cannot be removed and will stop the next run, too" in caplog.text


def test_the_file_is_looked_for_once_a_second(tmp_path, monkeypatch):
    """Not at each step: a run of thousands of steps looks at its start and then by the clock."""
    looks, real = [], Path.is_file

    def is_file(self):
        if self.name == "stop":
            looks.append(time.monotonic())
        return real(self)

    monkeypatch.setattr(type(tmp_path), "is_file", is_file)
    begin = time.monotonic()

    class UntilThreeLooks:
        @hookimpl
        def step_end(self, step):
            if len(looks) == 3:
                step.run.request_stop("seen enough")

    made = trainer(tmp_path, Preemption(), UntilThreeLooks(), checkpoint=Checkpoint(every=10**6), steps=10**6)
    result = made.fit(ROWS)
    assert result.steps > 100
    assert looks[0] - begin < 1
    assert [1 <= later - sooner < 1.5 for sooner, later in itertools.pairwise(looks)] == [True, True]
