"""`run.lock` while processes race for it, stopped or killed at any call of the file system."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal

import pytest
from lock_rivals import (
    FORK,
    STALE,
    age_unwritten,
    content,
    leave_stale,
    names,
    rivals,
    write,
)

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _lock
from drivetrain_plugins.checkpoint._lock import NAME, RunLock


@pytest.fixture
def rival(tmp_path):
    """Return a function that starts another process."""
    with rivals(tmp_path) as start:
        yield start


def crowd(folder, number, barrier, reports):
    lock = RunLock(folder)
    barrier.wait()
    try:
        lock.acquire()
        reports.send((number, None))
    except CheckpointError as error:
        reports.send((number, str(error)))
    barrier.wait()  # nobody gives up before all have tried
    os._exit(0)


@pytest.mark.parametrize("stale", STALE)
def test_exactly_one_of_many_wins(tmp_path, stale):
    """Eight processes at once, on an empty folder or a stale lock: one has it, the others are refused; 12 times."""
    for trial in range(12):
        folder = tmp_path / str(trial)
        folder.mkdir()
        leave_stale(folder, stale)
        barrier, (here, there) = FORK.Barrier(8), FORK.Pipe(duplex=False)
        processes = [FORK.Process(target=crowd, args=(folder, n, barrier, there)) for n in range(8)]
        for process in processes:
            process.start()
        answers = [here.recv() for _ in processes]
        for process in processes:
            process.join()
        here.close()
        there.close()
        assert [text for _, text in answers].count(None) == 1, answers
        winner = next(number for number, text in answers if text is None)
        assert content(folder)["pid"] == processes[winner].pid
        assert all("belongs to another run" in text for _, text in answers if text is not None)
        assert names(folder) == [NAME]


@pytest.mark.parametrize("stale", STALE)
def test_every_interleaving_of_two(tmp_path, rival, stale):
    """One is stopped before each of its calls while another takes the lock: in the end one of them has it."""
    for at in itertools.count(1):
        leave_stale(tmp_path, stale)
        slow, fast = rival(), RunLock(tmp_path)
        stopped = slow.begin("acquire", at)
        try:
            fast.acquire()
        except CheckpointError:
            won = slow
            assert slow.end() is None
            assert content(tmp_path)["pid"] == slow.pid
        else:
            won = fast
            assert "belongs to another run" in slow.end()
            assert content(tmp_path)["pid"] == os.getpid()
            fast.beat()
            assert not fast.lost
        assert names(tmp_path) == [NAME]
        if won is slow:
            assert slow.do("release") is None
        fast.release()
        assert names(tmp_path) == []
        slow.kill()
        if not stopped:
            assert at > (4 if stale == "nothing" else 10)
            break


def test_interleavings_of_three(tmp_path, rival):
    """Two are stopped before any of their calls, a third takes its turn, then they go on: one has it in the end."""
    calls = range(3, 17, 2)
    for first, second in itertools.product(calls, calls):
        leave_stale(tmp_path, "dead")
        slow, slower, fast = rival(), rival(), RunLock(tmp_path)
        slow.begin("acquire", first)
        slower.begin("acquire", second)
        won = []
        with contextlib.suppress(CheckpointError):
            fast.acquire()
            won.append(os.getpid())
        won += [one.pid for one in (slow, slower) if one.end() is None]
        assert won == [content(tmp_path)["pid"]], (first, second)
        assert names(tmp_path) == [NAME]
        fast.release()
        slow.kill()
        slower.kill()
        (tmp_path / NAME).unlink(missing_ok=True)


def test_interleavings_around_a_second_death(tmp_path, rival):
    """While one is stopped, another takes the stale lock over and dies; a third begins to follow that: one has it."""
    for first, second in itertools.product(range(5, 13), range(7, 15)):
        leave_stale(tmp_path, "dead")
        slow, victim, slower = rival(), rival(), rival()
        slow.begin("acquire", first)
        victim.do("acquire")
        victim.kill()
        slower.begin("acquire", second)
        won = [one.pid for one in (slow, slower) if one.end() is None]
        assert won == [content(tmp_path)["pid"]], (first, second)
        slow.kill()
        slower.kill()
        (tmp_path / NAME).unlink()


def test_a_start_that_slept_does_not_take_its_sleep_for_the_owners(tmp_path, rival):
    """A process that is suspended for minutes while it starts asks the file system's clock anew."""
    for at in itertools.count(1):
        write(tmp_path, host="elsewhere")
        slow = rival()
        stopped = slow.begin("acquire", at)
        for path in tmp_path.iterdir():
            if path.name != NAME:
                os.utime(path, (1, 1))
        assert "from here it is taken for dead" in slow.end()
        assert names(tmp_path) == [NAME]
        slow.kill()
        if not stopped:
            break


def test_a_release_races_with_a_start(tmp_path, rival):
    """An owner is stopped before each call of its release while another starts: that one is refused or has the folder."""
    outcomes = set()
    for at in itertools.count(1):
        owner, other = rival(), RunLock(tmp_path)
        owner.do("acquire")
        stopped = owner.begin("release", at)
        try:
            other.acquire()
        except CheckpointError:
            taken = False
        else:
            taken = True
        assert owner.end() is None
        other.beat()
        assert not other.lost
        assert names(tmp_path) == ([NAME] if taken else [])
        outcomes.add(taken)
        other.release()
        owner.kill()
        if not stopped:
            break
    assert outcomes == {True, False}


def test_an_owner_that_was_taken_for_dead_does_not_remove_its_successor(tmp_path, rival, monkeypatch, caplog):
    """Stopped before a call of its release, an owner elsewhere may lose the folder; then it leaves the new lock alone."""
    outcomes = set()
    for at in itertools.count(1):
        owner, other = rival(), RunLock(tmp_path)
        owner.do("acquire")
        os.utime(tmp_path / NAME, (0, 0))
        stopped = owner.begin("release", at)
        with monkeypatch.context() as patch:
            patch.setattr(_lock.socket, "gethostname", lambda: "here")  # so that this machine cannot ask
            with contextlib.suppress(CheckpointError):
                other.acquire()
        taken = other._owner is not None
        owner.end()
        assert names(tmp_path) == ([NAME] if taken else [])
        other.beat()
        assert not other.lost
        outcomes.add((taken, stopped))
        other.release()
        owner.kill()
        if not stopped:
            break
    assert {(True, True), (False, True)} <= outcomes
    assert "written again" not in caplog.text


def test_a_start_that_is_refused_hinders_no_release(tmp_path, rival):
    """Stopped before any call of a start that is refused, a process does not keep the owner from giving up."""
    for at in itertools.count(1):
        owner, other = RunLock(tmp_path), rival()
        owner.acquire()
        stopped = other.begin("acquire", at)
        owner.release()
        took = other.end() is None
        assert names(tmp_path) == ([NAME] if took else [])
        if took:
            other.do("release")
        other.kill()
        if not stopped:
            break


@pytest.mark.parametrize("action", ["acquire", "release"])
@pytest.mark.parametrize("stale", STALE)
def test_a_kill_at_any_call_blocks_nobody(tmp_path, rival, stale, action):
    """Killed before any call of taking or giving up, a process leaves nothing that the next start does not take."""
    for at in itertools.count(1):
        leave_stale(tmp_path, stale)
        victim, lock = rival(), RunLock(tmp_path)
        if action == "release":
            victim.do("acquire")
        died = victim.begin(action, at, signal.SIGKILL)
        if not died:
            victim.kill()
        lock.acquire()
        age_unwritten(tmp_path)
        lock.release()
        lock.acquire()
        assert names(tmp_path) == [NAME]
        lock.release()
        assert names(tmp_path) == []
        if not died:
            assert at > 4
            break


def test_two_deaths_in_a_row(tmp_path, rival):
    """One is killed while taking a stale lock over, a second while taking what that left: the third has the folder."""
    claimed, lock = 0, RunLock(tmp_path)
    for first, second in itertools.product(range(5, 15), range(5, 20)):
        leave_stale(tmp_path, "dead")
        for at in (first, second):
            victim = rival()
            victim.begin("acquire", at, signal.SIGKILL)
            victim.kill()
        claimed += sum(path.stat().st_nlink > 1 for path in tmp_path.iterdir() if path.name != NAME) > 2
        lock.acquire()
        age_unwritten(tmp_path)
        lock.release()
        lock.acquire()
        assert names(tmp_path) == [NAME], (first, second)
        lock.release()
    assert claimed > 5, "no claim was claimed"
