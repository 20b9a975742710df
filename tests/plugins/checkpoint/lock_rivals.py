"""Other processes that take and give up a `run.lock`, stop and die where a test wants them to."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint._lock import NAME, Owner, RunLock

FORK = multiprocessing.get_context("fork")
INTERRUPTED = "interrupted"
CALLS = ("open", "read", "write", "link", "rename", "unlink", "utime")


def interrupt(at, number, tell):
    """Let this process send itself a signal before its file-system call `at` from here on (counted from 1)."""
    counter = itertools.count(1)

    def counted(call):
        def made(*args, **options):
            if next(counter) == at:
                tell(INTERRUPTED)
                os.kill(os.getpid(), number)
            return call(*args, **options)

        return made

    before = {name: getattr(os, name) for name in CALLS}
    for name, call in before.items():
        setattr(os, name, counted(call))
    return before


def _rival(folder, connection):
    """Do what the other end asks for, until it hangs up."""
    lock = RunLock(folder)
    with contextlib.suppress(EOFError):
        while True:
            action, at, number = connection.recv()
            before = interrupt(at, number, connection.send)
            try:
                answer = getattr(lock, action)()
            except CheckpointError as error:
                answer = str(error)
            for name, call in before.items():
                setattr(os, name, call)
            connection.send(answer)
    os._exit(0)


class Rival:
    """Another process with a lock on the same folder."""

    def __init__(self, folder):
        self.here, there = FORK.Pipe()
        self.process = FORK.Process(target=_rival, args=(folder, there), daemon=True)
        self.process.start()
        self.pid = self.process.pid
        self.answers = []
        there.close()

    def begin(self, action, at=0, number=signal.SIGSTOP):
        """Start `acquire` or `release`, with a signal before the call `at`; True if the process stopped or died."""
        self.here.send((action, at, number))
        self.answers = [self._answer()]
        if self.answers != [INTERRUPTED]:
            return False
        self.answers.clear()
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return True

    def end(self):
        """Return what the action came to: None, or the text of the error."""
        if not self.answers:
            os.kill(self.pid, signal.SIGCONT)
        return self.answers.pop() if self.answers else self._answer()

    def _answer(self):
        assert self.here.poll(20), "no answer"
        return self.here.recv()

    def do(self, action):
        """Start and end an action."""
        self.begin(action)
        return self.end()

    def kill(self, wait=True):
        """Send SIGKILL; without `wait` nobody asks for its end, so that it stays a zombie."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        if wait:
            self.process.join()


def in_fork(function):
    """Return what `function` returns in a forked process."""

    def child():
        there.send(function())
        os._exit(0)

    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=child, daemon=True)
    process.start()
    there.close()
    try:
        assert here.poll(20), "no answer"
        return here.recv()
    finally:
        process.kill()
        process.join()
        here.close()


def attempt(folder):
    """Try to take a folder; return None, or the text of the error."""
    try:
        RunLock(folder).acquire()
    except CheckpointError as error:
        return str(error)
    return None


@contextlib.contextmanager
def rivals(folder):
    """Give a function that starts another process; all are gone afterwards."""
    made = []

    def start():
        made.append(Rival(folder))
        return made[-1]

    yield start
    for one in made:
        one.process.kill()
        one.process.join()
        one.here.close()


def python(code, folder, *around):
    """Run `code` in a process of its own, `around` in front of it; skip where the system does not allow that."""
    begin = "import os, sys\nfrom drivetrain_plugins.checkpoint._lock import *\nfrom drivetrain_plugins.checkpoint import _lock\n"
    command = [*around, sys.executable, "-W", "ignore", "-c", begin + textwrap.dedent(code), str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def needs(*command):
    """Skip where a command that needs rights fails."""
    made = subprocess.run([*command, "true"], check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"{' '.join(command)}: {made.stderr.strip()}")


def output(process):
    """Return what a process printed."""
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    return out.strip()


def content(folder):
    return json.loads((folder / NAME).read_text())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, age=0.0, **changed):
    """Write a lock file as another process would have, some seconds ago."""
    owner = Owner.here()
    path = folder / NAME
    path.write_text(json.dumps({**json.loads(owner.dump()), **changed}))
    beaten = path.stat().st_mtime - age
    os.utime(path, (beaten, beaten))
    return path


def leave_stale(folder, how):
    if how == "dead":
        write(folder, pid=dead_number(), token="dead")
    elif how == "elsewhere":
        write(folder, age=61, host="elsewhere")
    elif how == "damaged":
        path = folder / NAME
        path.write_bytes(b"")
        os.utime(path, (0, 0))


def dead_number():
    process = FORK.Process(target=os._exit, args=(0,))
    process.start()
    process.join()
    return process.pid


def age_unwritten(folder):
    """Let a minute pass for a file that was made, but not written, when its process was killed."""
    unwritten = [path for path in folder.iterdir() if path.name != NAME]
    assert all(path.stat().st_size == 0 for path in unwritten)
    for path in unwritten:
        os.utime(path, (1, 1))


STALE = ["nothing", "dead", "elsewhere", "damaged"]
