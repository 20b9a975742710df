"""Two runs on one folder: the second is refused, or takes over from one that is dead; proved with whole runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import traceback

import faults_worker
import numpy as np
import pytest
import torch

from drivetrain import CheckpointError, hookimpl, plugin
from drivetrain_plugins import JsonlLog
from drivetrain_plugins.checkpoint._lock import NAME, Owner
from drivetrain_plugins.checkpoint._store import LocalStore

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "faults_worker"])
PATIENCE_S = 60


# --- in the other process --------------------------------------------------------------------------------------------


class Pause:
    """Tell the other end when the run has come to a step (0: when it is assembled), and wait for its word."""

    effect = "observes"

    def __init__(self, step, connection):
        self._step, self._connection = step, connection

    def _wait(self, run):
        self._connection.send("paused")
        if self._connection.recv() == "beat":
            run.plugins["checkpoint"]._lock.beat()

    @hookimpl
    def assembled(self, run):
        if self._step == 0:
            self._wait(run)

    @hookimpl
    def step_end(self, step):
        if step.run.progress.step == self._step:
            self._wait(step.run)


def serve(connection, folder, pause, resume, job):
    """Make a run and report how it ended."""
    multiprocessing.set_start_method("fork", force=True)  # for loader workers; a server's child has it as its own
    torch.set_num_threads(1)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global one, which the recorder draws from
    trainer, rows = faults_worker.build(faults_worker.Job(folder=str(folder), **job), LocalStore())
    trainer.plugins = {"jsonl-log": JsonlLog(), **trainer.plugins, "pause": Pause(pause, connection)}
    try:
        trainer.fit(rows, resume=resume)
    except BaseException as error:
        connection.send({"error": type(error).__name__, "text": str(error), "trace": traceback.format_exc()})
    else:
        state = trainer.run.state_dict()
        digests = {part: faults_worker.digest(state[part]) for part in ("model", "optimizer", "progress", "interval")}
        connection.send({"digests": digests, "source": trainer.plugins["recorder"]._source})


class Other:
    """A run in a process of its own, which waits at a step."""

    def __init__(self, folder, pause, resume="auto", **job):
        self.connection, there = SERVER.Pipe()
        self.process = SERVER.Process(target=serve, args=(there, folder, pause, resume, job))
        self.process.start()
        there.close()

    def hear(self):
        """Return what it says next."""
        assert self.connection.poll(PATIENCE_S), "no answer"
        return self.connection.recv()

    def paused(self):
        """Wait until it waits."""
        answer = self.hear()
        assert answer == "paused", answer
        return self

    def say(self, word="go on"):
        """Let it go on."""
        self.connection.send(word)

    def end(self):
        """Let it go on to its end, and return how it ended."""
        self.say()
        return self.hear()

    def close(self):
        """Make sure that it is gone."""
        self.process.kill()
        self.process.join()
        self.connection.close()


@pytest.fixture
def other(tmp_path):
    """Return a function that starts a run on the test's folder."""
    made = []

    def start(pause=5, resume="auto", **job):
        made.append(Other(tmp_path / "run", pause, resume, **job))
        return made[-1]

    yield start
    for one in made:
        one.close()


# --- the tests -------------------------------------------------------------------------------------------------------


def content(folder):
    """Return every file below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(ended, uninterrupted):
    """Compare the end of a run with that of the uninterrupted one."""
    return {part: ended["digests"][part] == uninterrupted["digests"][part] for part in ended["digests"]}


ALL = dict.fromkeys(("model", "optimizer", "progress", "interval"), True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_run_is_refused_and_changes_nothing(other, tmp_path, uninterrupted, workers):
    """While a run is at step 5 another cannot begin, resume or restart in its folder; the first ends as it would have."""
    first = other(workers=workers).paused()
    before = content(tmp_path / "run")
    for resume in (False, "auto", True):
        answer = other(pause=99, resume=resume, workers=workers).hear()
        assert answer["error"] == "CheckpointError", answer
        told = f"process {first.process.pid} on {socket.gethostname()!r} since "
        assert told in answer["text"]
        assert "it runs" in answer["text"]
        assert content(tmp_path / "run") == before
    assert same(first.end(), uninterrupted) == ALL
    logged = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [3, 6, 9, 10]  # its open file is still the one there
    assert NAME not in content(tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_is_followed_at_once(other, tmp_path, uninterrupted, workers):
    """After SIGKILL the next start takes the folder, shuts out a third, and ends with the bits of the uninterrupted run."""
    first = other(workers=workers).paused()
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.join()
    assert NAME in content(tmp_path / "run")
    second = other(pause=7, workers=workers).paused()
    assert f"process {second.process.pid} on " in other(pause=99).hear()["text"]
    ended = second.end()
    assert ended["source"] == "step-00000004"
    assert same(ended, uninterrupted) == ALL
    assert NAME not in content(tmp_path / "run")


def test_of_two_at_once_one_trains(other, tmp_path, uninterrupted):
    """Two runs that begin at the same moment: one trains to its end, the other is refused, whichever is quicker."""
    runs = [other(pause=0) for _ in range(2)]
    for one in runs:
        one.paused()
    for one in runs:
        one.say()
    answers = [one.hear() for one in runs]
    refused = [answer for answer in answers if "error" in answer]
    (trained,) = [answer for answer in answers if "error" not in answer]
    assert same(trained, uninterrupted) == ALL
    assert len(refused) == 1
    late = "starts from the beginning, but"  # the quicker one had ended
    assert "belongs to another run" in refused[0]["text"] or late in refused[0]["text"]


def test_a_run_whose_folder_was_taken_saves_no_more(other, tmp_path):
    """When its heartbeat finds another owner, the run ends at its next save; the other's files are left alone."""
    first = other().paused()
    theirs = Owner.here().dump()
    (tmp_path / "run" / "new").write_bytes(theirs)
    (tmp_path / "run" / "new").rename(tmp_path / "run" / NAME)
    before = {name: raw for name, raw in content(tmp_path / "run").items() if name.startswith(("checkpoints", NAME))}
    first.say("beat")
    answer = first.hear()
    assert answer["error"] == "CheckpointError"
    assert "another process has taken" in answer["text"]
    after = {name: raw for name, raw in content(tmp_path / "run").items() if name.startswith(("checkpoints", NAME))}
    assert after == before
    assert after[NAME] == theirs


def test_a_run_that_fails_gives_its_folder_up(tmp_path):
    """An error in training, and in the start itself, leaves no owner behind; the next run of the process has the folder."""

    @plugin(role="report", effect="observes")
    class Broken:
        """Raise in a step, or before the first."""

        step: int = 0

        @hookimpl(wrapper=True)
        def fit(self):
            if self.step == 0:
                raise ZeroDivisionError
            return (yield)

        @hookimpl
        def step_end(self, step):
            if step.run.progress.step == self.step:
                raise ZeroDivisionError

    folder = tmp_path / "run"
    for step in (3, 0):
        trainer, rows = faults_worker.build(faults_worker.Job(folder=str(folder)), LocalStore())
        trainer.plugins["broken"] = Broken(step)
        with pytest.raises(ZeroDivisionError):
            trainer.fit(rows, resume="auto")
        assert not (folder / NAME).exists()


def test_a_second_trainer_of_the_process_is_refused(tmp_path):
    """A run that is started from within a run, on the same folder, is refused, and the outer one goes on."""
    refused = []

    @plugin(role="report", effect="observes")
    class Again:
        """Start another run in the middle of this one."""

        @hookimpl
        def step_end(self, step):
            if step.run.progress.step == 3:
                trainer, rows = faults_worker.build(faults_worker.Job(folder=str(folder)), LocalStore())
                with pytest.raises(CheckpointError, match="belongs to another run") as caught:
                    trainer.fit(rows, resume="auto")
                refused.append(str(caught.value))

    folder = tmp_path / "run"
    trainer, rows = faults_worker.build(faults_worker.Job(folder=str(folder), steps=4), LocalStore())
    trainer.plugins["again"] = Again()
    assert trainer.fit(rows).steps == 4
    assert f"process {os.getpid()} on " in refused[0]
    assert not (folder / NAME).exists()
