"""Memory that runs out, in any part of a step or of a save: a clean error, whole checkpoints, and an exact resume."""

from __future__ import annotations

import multiprocessing
import random
import resource
import traceback
from functools import partial
from pathlib import Path
from typing import ClassVar

import attrs
import faults_worker
import numpy as np
import pytest
import torch

from drivetrain import DataError, Trainer, TrainingError, hookimpl, option, plugin
from drivetrain.testing import digest
from drivetrain.testing.probes import Watch
from drivetrain_plugins import Accumulate, AdamW, BadRows, Checkpoint, Clip, Linear, Loader
from drivetrain_plugins.checkpoint._store import LocalStore

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "faults_worker"])
STEPS, BAD, BOTH = 10, 5, 2  # the bad step's number; micro-batches of a step
LARGE = 256 * 2**20  # bytes that are too much under the limit
ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "runtime": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: out of memory"),
    "python": MemoryError,
}


@plugin(role="memory")
class Starve:
    """Raise in one part of one step, or let a real limit do it."""

    free_options: ClassVar = ("where", "error")

    where: str = option("", help="which part: before or after a hook, or in the middle of the update")
    error: str = option("python", help="what is raised; real: allocate, under a limit of this process")

    def _fail(self, place, step):
        if place != self.where or step is None or step.number != BAD:
            return
        if self.error == "real":
            allocate()
        raise ERRORS[self.error]()  # noqa: RSE102 - a function that makes it

    @hookimpl(wrapper=True)
    def forward(self, micro):
        self._fail("before forward", micro.step)
        outputs = yield
        self._fail("after forward", micro.step if micro.is_last else None)
        return outputs

    @hookimpl(wrapper=True)
    def backward(self, micro):
        self._fail("before backward", micro.step if micro.is_last else None)  # one micro-batch's gradients are there
        result = yield
        self._fail("after backward", micro.step if micro.is_last else None)
        return result

    @hookimpl(wrapper=True)
    def optimizer_step(self, step):
        self._fail("before optimizer_step", step)
        if self.where == "inside optimizer_step" and step.number == BAD:
            with torch.no_grad():  # as an update that has come to its second parameter
                step.run.parameters[0].add_(1.0)
            self._fail(self.where, step)
        result = yield
        self._fail("after optimizer_step", step)
        return result


PLACES = [
    "before forward", "after forward", "before backward", "after backward",
    "before optimizer_step", "inside optimizer_step", "after optimizer_step",
]  # fmt: skip


def build(folder, where="", error="python", *more, store=None, model=faults_worker.Tiny, every="2 steps", workers=0):
    """Return a trainer and its rows."""
    torch.default_generator.manual_seed(1)
    checkpoint = Checkpoint(every=every, keep=20)
    checkpoint._store = store or LocalStore()
    plugins = [AdamW(lr=3e-3), Linear(warmup=0.2), Clip(norm=0.5), Accumulate(batches=BOTH), Starve(where, error)]
    plugins += [Loader(batch_size=4, workers=workers), faults_worker.Recorder(), *more, checkpoint]
    settings = {"steps": STEPS, "seed": 11, "log_every": 3, "device": "cpu"}
    return Trainer(model(), plugins, output=folder, **settings), faults_worker.Augmented()


def fit(trainer, rows, resume=False, seed=3):
    """Make the run, or go on with it; return it."""
    random.seed(seed)  # a resumed run takes these from the checkpoint
    np.random.seed(seed)  # noqa: NPY002 - the global one, which the recorder draws from
    trainer.fit(rows, resume=resume)
    return trainer.run


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return the digest of the run to which nothing happens."""
    torch.set_num_threads(1)
    return digest(fit(*build(tmp_path_factory.mktemp("straight"))))


def steps(folder):
    """Return the steps that stand on the disk; every byte of them is verified, and nothing else is there."""
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return [faults_worker.read(folder / "checkpoints" / name).manifest["step"] for name in names]


# --- in a step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", PLACES)
def test_in_any_part_of_a_step(tmp_path, straight, where, error):
    """The error comes out as it is, with plugin, hook and step; nothing half done is on the disk; the resume is exact."""
    watch = Watch()
    trainer, rows = build(tmp_path, where, error, watch)
    with pytest.raises((torch.OutOfMemoryError, RuntimeError, MemoryError)) as caught:
        fit(trainer, rows)
    assert type(caught.value) is type(ERRORS[error]())
    assert caught.value.__notes__ == [f"in plugin 'starve', hook {where.split()[1]!r}, step {BAD}"]
    assert watch.heard == [caught.value]
    assert watch.unwound
    assert steps(tmp_path) == [2, 4]
    assert digest(fit(*build(tmp_path), resume=True, seed=9)) == straight


@pytest.mark.parametrize("where", PLACES)
def test_the_same_objects_can_go_on(tmp_path, straight, where):
    """With the same model and plugins a second fit takes the checkpoint: no half update and no half gradient is left."""
    trainer, rows = build(tmp_path, where)
    with pytest.raises(MemoryError):
        fit(trainer, rows)
    trainer.plugins["starve"].where = ""
    assert digest(fit(trainer, rows, resume=True, seed=9)) == straight


# --- in a save -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["make_folder", "create", "write", "sync", "rename"])
def test_in_a_save(tmp_path, straight, call):
    """Memory that runs out in the third save leaves the two before it, and nothing of the third."""
    calls = []

    def act(number, name, args):
        if name == call and len(saves) == 2:
            raise MemoryError

    @plugin(role="report", effect="observes")
    class Count:
        """Count the saves."""

        @hookimpl
        def saved(self):
            saves.append(len(calls))

    saves = []
    trainer, rows = build(tmp_path, "", "python", Count(), store=faults_worker.FaultyStore(act))
    with pytest.raises(MemoryError) as caught:
        fit(trainer, rows)
    assert caught.value.__notes__ == ["in plugin 'checkpoint', hook 'save', step 6"]
    assert steps(tmp_path) == [2, 4]
    assert digest(fit(*build(tmp_path), resume=True, seed=9)) == straight


# --- in a batch ------------------------------------------------------------------------------------------------------


class Hungry(faults_worker.Augmented):
    """Rows of which one takes more memory than there is."""

    def __getitem__(self, index):
        if index == 17:
            raise MemoryError("no memory for this row")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_no_fault_of_a_row(tmp_path, workers):
    """A row that could not be read for want of memory is not left out as a bad one: the run ends."""
    trainer, _ = build(tmp_path, "", "python", BadRows(limit=3), workers=workers)
    with pytest.raises((MemoryError, DataError, TrainingError), match="no memory for this row"):
        fit(trainer, Hungry())


# --- a real limit ----------------------------------------------------------------------------------------------------


def limit(more):
    """Let this process have `more` bytes of address space from here on; or all that it may, again."""
    pages, hard = int(Path("/proc/self/statm").read_text().split()[0]), resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if more is None else pages * resource.getpagesize() + more, hard))


def allocate():
    """Ask for more than the limit leaves."""
    limit(LARGE // 8)
    torch.empty(LARGE, dtype=torch.uint8)


class Balloon(faults_worker.Tiny):
    """Allocates in the forward or the backward pass of one step."""

    def __init__(self, where):
        super().__init__()
        self.where, self.forwards = where, 0

    def forward(self, **batch):
        self.forwards += 1
        due = self.forwards == BOTH * BAD + BOTH
        if due and self.where == "forward":
            allocate()
        loss = super().forward(**batch)
        return Inflate.apply(loss) if due and self.where == "backward" else loss


class Inflate(torch.autograd.Function):
    """The identity, of which the backward pass needs much memory."""

    @staticmethod
    def forward(context, loss):
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        allocate()
        return gradient


def starved(connection, folder, where):
    """Make the run in this process, under a limit that a part of it exceeds."""
    torch.set_num_threads(1)
    inside = where in ("forward", "backward")
    trainer, rows = build(
        folder, "" if inside else where, "real", model=partial(Balloon, where) if inside else faults_worker.Tiny
    )
    try:
        fit(trainer, rows)
    except (RuntimeError, MemoryError) as error:
        limit(None)
        connection.send((type(error).__name__, str(error), error.__notes__, traceback.format_exc()))
    else:
        connection.send("it had enough")


def in_server(function, *arguments):
    """Return what `function` sends from a process of its own."""
    here, there = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=function, args=(there, *arguments))
    process.start()
    there.close()
    try:
        assert here.poll(60), "no answer"
        return here.recv()
    finally:
        process.kill()
        process.join()
        here.close()


@pytest.mark.parametrize("where", ["forward", "backward", "before optimizer_step"])
def test_a_real_limit(tmp_path, straight, where):
    """Under RLIMIT_AS torch's own error comes out, with the step; without the limit the run goes on to the same end."""
    name, text, notes, trace = in_server(starved, tmp_path, where)
    assert name == "RuntimeError", trace
    assert "can't allocate memory" in text
    plugin_and_hook = "plugin 'starve', hook 'optimizer_step', " if "optimizer" in where else ""
    assert notes == [f"in {plugin_and_hook}step {BAD}"]
    assert steps(tmp_path) == [2, 4]
    assert digest(fit(*build(tmp_path), resume=True, seed=9)) == straight


@plugin(role="report", effect="observes")
class Heavy:
    """A large state, and a limit from the first save on."""

    _tensor: object = attrs.field(init=False, default=None)
    _limited: bool = attrs.field(init=False, default=False)

    @hookimpl
    def assembled(self, run):
        self._tensor = torch.arange(LARGE // 8, dtype=torch.int64)

    @hookimpl(wrapper=True)
    def save(self):
        if not self._limited:
            self._limited = True
            limit(LARGE // 8)
        return (yield)

    def state_dict(self):
        return {"tensor": self._tensor}

    def load_state_dict(self, state):
        self._tensor = state["tensor"]


def heavy(connection, folder):
    """Save a large state under a limit that a copy of it would exceed."""
    torch.set_num_threads(1)
    trainer, rows = build(folder, "", "python", Heavy(), every="5 steps")
    try:
        fit(trainer, rows)
    except BaseException:
        limit(None)
        connection.send(traceback.format_exc())
    else:
        connection.send("saved")


def test_a_save_needs_no_copy_of_the_state(tmp_path):
    """A state of 256 MiB is written under a limit that leaves an eighth of it."""
    assert in_server(heavy, tmp_path) == "saved"
    saved = faults_worker.newest(tmp_path)
    assert saved.manifest["step"] == STEPS
    assert torch.equal(saved.tree["plugins"]["heavy"]["tensor"], torch.arange(LARGE // 8, dtype=torch.int64))
