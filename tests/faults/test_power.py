"""A power loss at any call leaves a complete checkpoint: every state that a disk could have is made, and read."""

from __future__ import annotations

import collections
import os
import random
import shutil
import tempfile
from pathlib import Path

import faults_worker
import numpy as np
import power_model
import pytest
import small_saves

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint._local import LocalShelf
from drivetrain_plugins.checkpoint._store import LocalStore


@pytest.fixture
def states():
    """Return a folder to be made for each state, in memory where there is such a file system."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder) / "state"


def recorded(base, steps, keep, deaf=(), inside=""):
    """Make the saves of a run from its start on; return the calls, and where the checkpoints are."""
    base.mkdir()
    store, parent = power_model.Recorder(base, deaf), base / inside / "checkpoints"
    LocalShelf(parent, store).prepare()
    for step in steps:
        small_saves.save(parent, step, keep=keep, store=store)
    return store.log, parent.relative_to(base)


class Judge:
    """Reads states with the real reader, each distinct one once."""

    def __init__(self, folder: Path, where: Path, reader=small_saves.newest):
        self.folder, self.where, self.reader = folder, where, reader
        self.found = {}  # of each state: the step that was read, None where there is none, or an error
        self.counts = collections.Counter()

    def read(self, state):
        """Return what a reader finds in a state."""
        if state not in self.found:
            power_model.build(state, self.folder)
            try:
                self.found[state] = self.reader(self.folder / self.where)
            except CheckpointError as error:
                self.found[state] = str(error)
            shutil.rmtree(self.folder)
        return self.found[state]

    def verdict(self, done, state):
        """Return "good", or what is wrong with a state after the saves `done`."""
        found = self.read(state)
        if isinstance(found, str):
            return "corrupt"
        last = done[-1] if done else None
        return "good" if last is None or (found is not None and found >= last) else "lost" if found is None else "older"

    def all(self, log):
        """Judge what a kill and what a power loss leaves after each call; return the counts of bad ones."""
        for done, killed, states in power_model.crashes(log):
            self.counts["kill points"] += 1
            self.counts["power states"] += len(states)
            assert killed in states
            self.counts[f"kill {self.verdict(done, killed)}"] += 1
            self.counts.update(f"power {self.verdict(done, state)}" for state in states)
        self.counts["distinct states"] = len(self.found)
        print(dict(self.counts))
        return {name: n for name, n in self.counts.items() if name.split()[-1] in ("corrupt", "lost", "older")}


@pytest.mark.parametrize(
    ("keep", "steps", "least"),
    [(1, (2, 4), 290), (2, (2, 4), 250), (2, (2, 4, 6), 350), (2, (2, 4, 4), 340)],
    ids=["two saves, one kept", "two saves, two kept", "three saves, two kept", "a save in place of another"],
)
def test_every_state_after_a_power_loss(tmp_path, states, keep, steps, least):
    """From the moment a save is done, its checkpoint or a later one is read, whole, in every state of the disk."""
    log, where = recorded(tmp_path / "run", steps, keep)
    judge = Judge(states, where)
    bad = judge.all(log)
    assert judge.counts["power states"] >= least
    assert {step for step in judge.found.values() if step is not None} == set(steps)
    if len(set(steps)) < len(steps):  # while it is replaced, the one before is the newest
        assert bad.keys() <= {"kill older", "power older"}
    else:
        assert bad == {}


def test_replacing_the_only_one(tmp_path, states):
    """A save of the step of the only checkpoint there is never leaves none."""
    log, where = recorded(tmp_path / "run", (2, 2), keep=1)
    assert Judge(states, where).all(log) == {}


def test_a_new_output_folder(tmp_path, states):
    """A run whose folder, and its parents, did not exist does not lose it with its checkpoints."""
    log, where = recorded(tmp_path / "base", (2, 4), keep=1, inside="runs/first")
    assert Judge(states, where).all(log) == {}


@pytest.mark.parametrize(
    ("deaf", "steps", "wrong"),
    [(("sync",), (2,), "corrupt"), (("sync_folder",), (2, 4), "lost"), (("sync", "sync_folder"), (2,), "corrupt")],
)
def test_without_fsync_it_would_not_hold(tmp_path, states, deaf, steps, wrong):
    """The model bites: where files or folders are not really synced, there are states without a whole checkpoint."""
    log, where = recorded(tmp_path / "run", steps, 1, deaf)
    bad = Judge(states, where).all(log)
    assert bad[f"power {wrong}"] > 0
    assert not [name for name in bad if name.startswith("kill")]  # a kill alone loses nothing that was written


@pytest.mark.parametrize("kept", [1, 2])
def test_the_next_start_goes_on(tmp_path, states, kept):
    """From every state the next start clears up, saves, and leaves what it wrote as the newest."""

    def start(parent):
        parent.parent.mkdir(exist_ok=True)
        LocalShelf(parent, LocalStore()).prepare()
        assert not [p for p in parent.iterdir() if p.name.startswith(".")]
        small_saves.save(parent, 8, keep=kept)
        assert not [p for p in parent.iterdir() if p.name.startswith(".")]
        return small_saves.newest(parent)

    log, where = recorded(tmp_path / "run", (2, 4), kept)
    judge = Judge(states, where, start)
    judge.all(log)
    assert set(judge.found.values()) == {8}
    assert len(judge.found) > 40


def test_the_saves_of_a_whole_run(tmp_path, states):
    """The calls of a real run with a model, an optimizer and two rotations hold what those of bare saves do."""
    folder = tmp_path / "run"
    folder.mkdir()
    store = power_model.Recorder(folder)
    trainer, rows = faults_worker.build(faults_worker.Job(folder=str(folder), keep=1, steps=6), store)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global one, which the recorder draws from
    trainer.fit(rows, resume="auto")
    judge = Judge(states, Path("checkpoints"), lambda parent: _step(faults_worker.newest(parent.parent)))
    assert judge.all(store.log) == {}
    assert {step for step in judge.found.values() if step is not None} == {2, 4, 6}
    assert judge.counts["power states"] > 450


def _step(saved):
    return saved.manifest["step"] if saved else None
