"""Hundreds of saves and restarts in one process leave nothing behind: no file, thread, process, memory or temporary."""

from __future__ import annotations

import collections
import gc
import itertools
import multiprocessing
import os
import random
import tempfile
import threading
import time
from pathlib import Path

import faults_worker
import numpy as np
import pytest
import torch

from drivetrain import Run, Step, Trainer, hookimpl, plugin
from drivetrain.testing import digest
from drivetrain_plugins import (
    AdamW,
    AsyncCheckpoint,
    Checkpoint,
    Evaluate,
    JsonlLog,
    Linear,
    Loader,
    Preemption,
    SaveOnError,
    TensorBoard,
)

KEEP, EACH, WARM = 2, 2, 3  # checkpoints kept, steps of a cycle, cycles before the counting begins
PATIENCE_S = 5.0  # for the system to take leave of threads that have ended
SAVERS = {
    "checkpoint": Checkpoint,
    "thread": lambda **options: AsyncCheckpoint(how="thread", **options),
    "fork": lambda **options: AsyncCheckpoint(how="fork", **options),
}


class Fault(Exception):  # noqa: N818 - it is raised to see what is left
    """Ends a run."""


@plugin(role="control", effect="observes")
class StopsOrFails:
    """End the run when so many steps are done: in good order, or with an error in the step after."""

    at: int = 0
    fails: bool = False

    @hookimpl
    def gradients_ready(self, step):
        if self.fails and step.number == self.at:
            raise Fault

    @hookimpl
    def step_end(self, step):
        if not self.fails and step.run.progress.step == self.at:
            step.run.request_stop("the cycle is over")


def build(folder, saver, workers, steps, *more):
    """Return a trainer, new from end to end."""
    torch.default_generator.manual_seed(1)
    plugins = [AdamW(lr=3e-3), Linear(), Loader(batch_size=8, workers=workers), Evaluate(every=f"{EACH} steps")]
    plugins += [faults_worker.Recorder(), JsonlLog(), TensorBoard(), SaveOnError(), Preemption(), *more]
    plugins.append(SAVERS[saver](every=f"{EACH} steps", keep=KEEP))
    settings = {"steps": steps, "seed": 11, "log_every": 1, "device": "cpu"}
    return Trainer(faults_worker.Tiny(), plugins, output=folder, **settings)


def fit(trainer, seed):
    """Make the run, or go on with it; return it."""
    random.seed(seed)  # a resumed run takes these from the checkpoint
    np.random.seed(seed)  # noqa: NPY002 - the global one, which the recorder draws from
    trainer.fit(faults_worker.Augmented(40), faults_worker.Augmented(8), resume="auto")
    return trainer.run


def children(task):
    """Return the processes that a thread of this process has started and not waited for."""
    try:
        return (task / "children").read_text().split()
    except FileNotFoundError:  # it has ended meanwhile
        return []


def held(temporary, folder):
    """Return what this process holds."""
    gc.collect()
    tasks = list(Path("/proc/self/task").iterdir())
    targets = collections.Counter()
    for link in Path("/proc/self/fd").iterdir():
        try:
            targets[str(link.readlink()).partition(":[")[0].replace(str(folder), "RUN")] += 1
        except FileNotFoundError:  # the one that lists the folder
            continue
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line}
    kinds = (Run, Step, Trainer, torch.Tensor, threading.Thread)
    alive = [type(each) for each in gc.get_objects() if issubclass(type(each), kinds)]
    return {
        "files": dict(targets),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "tasks": len(tasks),
        "children": sorted(child for task in tasks for child in children(task)),
        "processes": len(multiprocessing.active_children()),
        "shared memory": sorted(mapped) + [p.name for p in Path("/dev/shm").iterdir() if str(os.getpid()) in p.name],
        "temporary": sorted(path.name for path in temporary.rglob("*")),
        "objects": collections.Counter(kind.__name__ for kind in alive),
        "folder": sorted(p.name for p in folder.iterdir() if not p.name.startswith("events.")),
        "checkpoints": len(list((folder / "checkpoints").iterdir())),
        "hidden": [p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")],
    }


def go_round(tmp_path, monkeypatch, cycles, case):
    """Save, end and go on so many times; compare what is held after each with what was after the first ones."""
    saver, workers, fails = case
    temporary, folder = tmp_path / "temporary", tmp_path / "run"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    steps, before = EACH * cycles, None
    for cycle in range(1, cycles):
        trainer = build(folder, saver, workers, steps, StopsOrFails(EACH * cycle, fails))
        if fails:
            with pytest.raises(Fault):
                fit(trainer, seed=cycle)
        else:
            assert fit(trainer, seed=cycle).progress.step == EACH * cycle
        del trainer
        if cycle == WARM:
            time.sleep(0.2)  # so that what is compared with holds no thread that is about to go
            before = held(temporary, folder)
        elif cycle > WARM:
            deadline = time.monotonic() + PATIENCE_S
            while (now := held(temporary, folder)) != before and time.monotonic() < deadline:
                time.sleep(0.01)
            assert now == before, f"after {cycle} cycles"
    assert before["hidden"] == []
    assert [name for name in before["temporary"] if not name.startswith("torchinductor_")] == []  # torch's, made once
    resumed = digest(fit(build(folder, saver, workers, steps), seed=9), "model", "optimizer", "progress")
    straight = fit(build(tmp_path / "straight", saver, workers, steps), seed=1)
    assert resumed == digest(straight, "model", "optimizer", "progress")


CASES = [("checkpoint", 0, False), ("checkpoint", 1, True), ("thread", 0, True), ("fork", 1, False)]


@pytest.mark.parametrize(
    "case", [*CASES[:2], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[2:])], ids=str
)
def test_twenty_restarts(tmp_path, monkeypatch, case):
    """After 20 restarts, ended in order or by an error, the process holds what it held after the third."""
    go_round(tmp_path, monkeypatch, 20, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(itertools.product(SAVERS, [0, 1], [False, True])), ids=str)
def test_two_hundred_restarts(tmp_path, monkeypatch, case):
    """The same, 200 times."""
    go_round(tmp_path, monkeypatch, 200, case)
