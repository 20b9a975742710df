"""`run.lock`: one owner at a time, whose life and death other processes see."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from lock_rivals import (
    attempt,
    content,
    in_fork,
    names,
    output,
    python,
    rivals,
    write,
)

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _lock
from drivetrain_plugins.checkpoint._lock import NAME, Owner, RunLock


@pytest.fixture
def rival(tmp_path):
    """Return a function that starts another process."""
    with rivals(tmp_path) as start:
        yield start


@pytest.fixture
def lock(tmp_path):
    """Return a lock that is given up after the test."""
    made = RunLock(tmp_path)
    yield made
    made.release()


def test_an_owner_is_told_and_the_file_goes_with_it(tmp_path, lock):
    """The file says who, and is gone after the release; nothing else is left."""
    lock.acquire()
    told = content(tmp_path)
    assert told["pid"] == os.getpid()
    assert told["started"] == int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    assert names(tmp_path) == [NAME]
    lock.release()
    assert names(tmp_path) == []
    lock.release()  # twice is once
    lock.acquire()
    assert names(tmp_path) == [NAME]


def test_a_living_owner_is_named(tmp_path, lock, rival):
    """The second is refused with host, process number, since when, the last sign of life, and what to do."""
    first = rival()
    assert first.do("acquire") is None
    told = content(tmp_path)
    with pytest.raises(CheckpointError, match=r"belongs to another run.* choose another output folder") as caught:
        lock.acquire()
    text = str(caught.value)
    assert f"process {first.pid} on {told['host']!r} since {told['since']}, last sign of life 0 s ago; it runs" in text
    assert str(tmp_path / NAME) in text
    assert content(tmp_path) == told
    assert names(tmp_path) == [NAME]
    first.do("release")
    lock.acquire()


def test_a_second_run_of_this_process_is_refused(tmp_path, lock):
    """The same process is no excuse; a lock that is held is not taken twice by the same object either."""
    lock.acquire()
    for other in (RunLock(tmp_path), lock):
        with pytest.raises(CheckpointError, match="belongs to another run"):
            other.acquire()
    assert not lock.lost
    RunLock(tmp_path).release()  # it has nothing to give up
    assert content(tmp_path)["pid"] == os.getpid()


def test_a_killed_owner_is_followed_at_once(tmp_path, lock, rival, caplog):
    """After SIGKILL the next start takes over with a warning, whether or not anyone has waited for the dead process."""
    for waited in (True, False):
        first = rival()
        first.do("acquire")
        first.kill(wait=waited)
        caplog.clear()
        lock.acquire()
        (warning,) = [record.getMessage() for record in caplog.records]
        assert f"was taken over: process {first.pid} on " in warning
        assert "it has ended" in warning
        assert names(tmp_path) == [NAME]
        lock.release()


def test_a_stopped_owner_is_not_dead(tmp_path, lock, rival):
    """SIGSTOP is no end: an old heartbeat does not count where the machine can be asked."""
    first = rival()
    first.do("acquire")
    os.kill(first.pid, signal.SIGSTOP)
    os.utime(tmp_path / NAME, (0, 0))
    with pytest.raises(CheckpointError, match="it runs"):
        lock.acquire()


def test_a_number_that_was_given_again_is_another_process(tmp_path, lock, rival):
    """A living process with the owner's number, which was started at another time, is not the owner."""
    other = rival()
    started = _lock._process(other.pid)[1]
    write(tmp_path, pid=other.pid, started=started)
    with pytest.raises(CheckpointError, match="it runs"):
        lock.acquire()
    write(tmp_path, pid=other.pid, started=started - 1)
    lock.acquire()


def test_an_exec_leaves_no_owner(tmp_path):
    """A program that replaces itself keeps its number; the lock of the one before is left over."""
    code = """
        RunLock(sys.argv[1]).acquire()
        code = "import sys; from drivetrain_plugins.checkpoint._lock import *; RunLock(sys.argv[1]).acquire(); print(1)"
        os.execv(sys.executable, [sys.executable, "-c", code, sys.argv[1]])
    """
    assert output(python(code, tmp_path)) == "1"


def test_another_users_process_lives(tmp_path, lock):
    """That a process may not be asked with a signal does not mean that it is gone."""
    if os.getuid() != 0:
        write(tmp_path, pid=1, started=_lock._process(1)[1])
        with pytest.raises(CheckpointError, match="it runs"):
            lock.acquire()
        return
    lock.acquire()
    tmp_path.chmod(0o777)

    def nobody():
        os.chdir(tmp_path)  # the folders above are not theirs
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        return attempt(".")

    assert "it runs" in in_fork(nobody)


def test_a_forked_child_is_no_owner(tmp_path, lock):
    """A child that inherits the lock can neither release it nor beat for it, nor take the folder while its parent lives."""
    lock.acquire()
    os.utime(tmp_path / NAME, (1, 1))

    def child():
        lock.beat()
        lock.release()
        return attempt(tmp_path), threading.active_count()

    text, threads = in_fork(child)
    assert "it runs" in text
    assert threads == 1
    assert content(tmp_path)["pid"] == os.getpid()
    assert (tmp_path / NAME).stat().st_mtime == 1
    lock.release()
    assert names(tmp_path) == []


def test_the_heartbeat_touches_the_file(tmp_path, monkeypatch):
    """A thread gives a sign of life at the interval, and ends with the lock."""
    beaten, real = threading.Event(), os.utime

    def seen(path, *times, **options):
        real(path, *times, **options)
        if path == tmp_path / NAME and not times:
            beaten.set()

    lock = RunLock(tmp_path, beat_s=0.01)
    threads = threading.active_count()
    lock.acquire()
    monkeypatch.setattr(os, "utime", seen)
    for _ in range(2):
        real(tmp_path / NAME, (1, 1))
        beaten.clear()
        assert beaten.wait(10)
        assert (tmp_path / NAME).stat().st_mtime > 1
    lock.release()
    assert threading.active_count() == threads


def test_a_folder_that_was_taken_is_lost(tmp_path, caplog):
    """The heartbeat notices another owner, says so once, leaves its file alone, and so does the release."""
    lock = RunLock(tmp_path, beat_s=0.01)
    lock.acquire()
    assert not lock.lost
    theirs = Owner.here().dump()
    (tmp_path / "new").write_bytes(theirs)
    (tmp_path / "new").rename(tmp_path / NAME)
    os.utime(tmp_path / NAME, (1, 1))
    lock._thread.join(10)
    assert lock.lost
    lock.beat()
    lock.release()
    assert (tmp_path / NAME).read_bytes() == theirs
    assert (tmp_path / NAME).stat().st_mtime == 1
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"was taken from this run by process {os.getpid()}" in told
    (tmp_path / NAME).unlink()
    lock.acquire()
    assert not lock.lost
    lock.release()


def test_a_file_that_was_removed_comes_back(tmp_path, lock, rival, caplog):
    """Removed by hand while its owner runs, the lock is written again; if somebody was quicker, the folder is lost."""
    lock.acquire()
    own = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).unlink()
    lock.beat()
    assert (tmp_path / NAME).read_bytes() == own
    assert names(tmp_path) == [NAME]
    assert "written again" in caplog.text
    (tmp_path / NAME).unlink()
    other = rival()
    assert other.do("acquire") is None
    lock.beat()
    assert lock.lost
    lock.release()
    assert content(tmp_path)["pid"] == other.pid


def test_a_heartbeat_that_fails_is_told_once_and_goes_on(tmp_path, monkeypatch, caplog):
    """An error of the file system ends neither the thread nor the run, and is not told each time."""
    lock, beats, healed = RunLock(tmp_path, beat_s=0.01), threading.Semaphore(0), threading.Event()
    real = os.utime

    def failing(path, *times, **options):
        beats.release()
        if not healed.is_set():
            raise OSError(5, "Input/output error")
        real(path, *times, **options)

    lock.acquire()
    monkeypatch.setattr(os, "utime", failing)
    for _ in range(3):
        assert beats.acquire(timeout=10)
    healed.set()
    for _ in range(3):
        assert beats.acquire(timeout=10)
    assert not lock.lost
    lock.release()
    assert caplog.text.count("no sign of life could be given") == 1
