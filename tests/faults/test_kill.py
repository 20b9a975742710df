"""A run that is killed, anywhere, goes on to the end it would have had: proved with SIGKILL, compared by digests."""

from __future__ import annotations

import os
import random
import shutil

import faults_worker
import pytest

PARTS = 6


def visible(folder):
    """Return the names of the checkpoints a reader sees."""
    parent = folder / "checkpoints"
    return sorted(p.name for p in parent.iterdir() if not p.name.startswith(".")) if parent.exists() else []


def kill_and_resume(worker, folder, reference, **kill):
    """Kill a run, check what is visible, resume it to its end, compare with the reference."""
    assert worker(folder, **kill)["status"] == -9
    names = visible(folder)
    for name in names:
        faults_worker.read(folder / "checkpoints" / name)
    resumed = worker(folder)
    assert resumed["source"] == (names[-1] if names else None)
    assert resumed["digests"] == reference["digests"]
    left = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert left[-1] == "step-00000010"
    assert not [name for name in left if name.startswith(".")]
    assert len(left) <= 3  # keep = 2, and the one it went on from
    shutil.rmtree(folder)


@pytest.mark.parametrize("part", range(PARTS))
def test_killed_before_every_call(worker, uninterrupted, tmp_path, part):
    """A SIGKILL before any store call of a run (saves, rotations, start) leaves only whole checkpoints, and exact resume."""
    calls = len(uninterrupted["calls"])
    assert calls > 100
    for call in range(1 + part, calls + 1, PARTS):
        kill_and_resume(worker, tmp_path / str(call), uninterrupted, before_call=call)


@pytest.mark.parametrize("part", range(2))
def test_killed_inside_every_write(worker, uninterrupted, tmp_path, part):
    """A SIGKILL with half of a write done, for every write of a run, changes nothing that a reader sees."""
    writes = [i for i, name in enumerate(uninterrupted["calls"], 1) if name == "write"]
    assert len(writes) == 21  # the probe at the start, and 5 saves of 4 files
    for call in writes[part::2]:
        kill_and_resume(worker, tmp_path / str(call), uninterrupted, inside_write=call)


def test_killed_while_replacing_a_damaged_one(worker, finished, tmp_path):
    """A run that passed over a damaged checkpoint and is killed at any call of writing it anew still resumes exactly."""
    folder, reference = finished

    def damaged(target):
        shutil.copytree(folder, target)
        (target / "checkpoints" / "step-00000010" / "state.json").write_bytes(b"")
        return target

    calls = worker(damaged(tmp_path / "count"))["calls"]
    assert "rename" in calls
    for call in range(1, len(calls) + 1):
        target = damaged(tmp_path / str(call))
        assert worker(target, before_call=call)["status"] == -9
        assert worker(target)["digests"] == reference["digests"]
        assert visible(target)[-1] == "step-00000010"
        shutil.rmtree(target)


def kill_at_random(worker, tmp_path, trials):
    """Kill a small transformer's run, which saves at each step, up to three times at random moments."""
    seed = int(os.environ.get("DRIVETRAIN_FAULT_SEED") or random.SystemRandom().randrange(2**32))
    print(f"DRIVETRAIN_FAULT_SEED={seed}")
    job = {"model": "bert", "every": "1 step", "slow": 0.001}
    reference = worker(tmp_path / "reference", **job)
    draws, killed = random.Random(seed), 0
    for trial in range(trials):
        folder = tmp_path / str(trial)
        for _ in range(3):
            killed += worker(folder, kill_after=draws.uniform(0.05, 0.7), **job)["status"] == -9
        assert worker(folder, **job)["digests"] == reference["digests"], f"trial {trial}, seed {seed}"
    assert killed >= trials


def test_killed_at_random_times(worker, tmp_path):
    """A transformer's run killed at random moments, three times in a row, ends with the bits it would have had."""
    kill_at_random(worker, tmp_path, 10)


@pytest.mark.slow
def test_killed_at_many_random_times(worker, tmp_path):
    """The same, 30 times."""
    kill_at_random(worker, tmp_path, 30)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("model", ["tiny", "bert"])
def test_stopped_twice_in_one_epoch(worker, tmp_path, workers, model):
    """Stopping after steps 2 and 3 of a six-step epoch, and in the next one, changes no bit of the end."""
    job = {"workers": workers, "model": model, "every": "100 steps"}
    reference = worker(tmp_path / "reference", **job)
    for stop in (2, 3, 7):
        stopped = worker(tmp_path / "run", stop_at=stop, **job)
        assert stopped["steps"] == stop
    ended = worker(tmp_path / "run", **job)
    assert ended["source"] == "step-00000007"
    assert ended["digests"] == reference["digests"]


def test_the_digests_see_a_lost_state(worker, finished, tmp_path):
    """The comparison is sharp: a run that starts over instead of resuming, with one step less, has other digests."""
    shorter = worker(tmp_path / "run", steps=9)
    differing = [part for part, value in finished[1]["digests"].items() if shorter["digests"][part] != value]
    assert set(differing) >= {"model", "optimizer", "progress", "plugins"}
