"""An asynchronous run that is killed, in whatever process writes at that moment, goes on to the end it would have had."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import faults_worker
import pytest

from drivetrain_plugins import AsyncCheckpoint

HOW = ["thread", "fork"]


def killer(job):
    """Kill the run from whatever process makes a call: the run itself (thread), or the child that writes (fork).

    The job's `before_call` counts the store's calls as the writer sees them; its `inside_write` names the step whose
    save is killed, or 0. A child goes on as if nothing had happened: it must not live to.
    """
    run = os.getpid()

    def act(number, name, args):
        here = not job.inside_write or act.step == job.inside_write
        if name == "make_folder":
            act.step = int(args[0].name.split("-")[1])
        if job.before_call and number >= job.before_call and here and act.step and not act.done:
            act.done = True
            os.kill(run, signal.SIGKILL)
            time.sleep(0.3)
            (Path(job.folder).parent / f"{Path(job.folder).name}.orphan").write_text("still here")

    act.step, act.done = 0, False
    return act


def serve(how):
    """Serve jobs with runs that save asynchronously."""
    faults_worker.Checkpoint = partial(AsyncCheckpoint, how=how)
    faults_worker.killer = killer
    faults_worker.main()


@pytest.fixture(scope="module")
def workers(worker, tmp_path_factory):
    """Return, by how they write, processes that fork such runs."""
    made = {how: type(worker).__new__(type(worker)) for how in HOW}
    for how, one in made.items():
        run = f"import test_async_kill; test_async_kill.serve({how!r})"
        command = [sys.executable, "-W", "ignore", "-c", run, str(tmp_path_factory.mktemp(how) / "reply.json")]
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        one.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
    yield made
    for one in made.values():
        one.close()


def kill_and_resume(worker, folder, reference, **kill):
    """Kill a run, look at what is visible, resume it, compare; return whether it was killed."""
    killed = worker(folder, **kill)["status"] == -9
    parent = folder / "checkpoints"
    names = sorted(p.name for p in parent.glob("step-*"))
    for name in names:
        faults_worker.read(parent / name)
    resumed = worker(folder)
    assert resumed["digests"] == reference["digests"]
    assert not [p.name for p in parent.iterdir() if p.name.startswith(".")]
    assert max(p.name for p in parent.iterdir()) == "step-00000010"
    shutil.rmtree(folder)
    return killed


@pytest.mark.parametrize("how", HOW)
def test_the_end_is_that_of_the_synchronous_run(workers, uninterrupted, tmp_path, how):
    """Nothing killed: the run ends with the bits of one that saves at once."""
    assert workers[how](tmp_path / "run")["digests"] == uninterrupted["digests"]


@pytest.mark.parametrize("how", HOW)
def test_killed_while_it_writes(workers, uninterrupted, tmp_path, how):
    """SIGKILL of the run while its save is written, at several calls of several saves: the next start is exact."""
    killed = 0
    for step in (2, 10):
        for call in (0, 11, 20):
            kill = {"before_call": call + 1 if how == "thread" else 15 + call, "inside_write": step}
            killed += kill_and_resume(workers[how], tmp_path / f"{step}-{call}", uninterrupted, **kill)
    assert killed >= 5
    assert not list(tmp_path.glob("*.orphan")), "a child outlived its run"


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_killed_at_every_call(workers, uninterrupted, tmp_path, how):
    """The same at every call of every save."""
    killed = 0
    for step in (2, 4, 6, 8, 10):
        for call in range(12, 150 if how == "thread" else 50):
            kill = {"before_call": call, "inside_write": step}
            killed += kill_and_resume(workers[how], tmp_path / f"{step}-{call}", uninterrupted, **kill)
    assert killed > 100
    assert not list(tmp_path.glob("*.orphan"))
