"""A process that forks one child for each run it is told to make, in which signals come at chosen points.

It reads one JSON object a line (see `Job`) and answers one: how the child ended, what it reported and wrote to stderr.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from faults_worker import Augmented, FaultyStore, Recorder, Tiny, digest

from drivetrain import Trainer, hookimpl, plugin
from drivetrain_plugins import (
    Accumulate,
    AdamW,
    AsyncCheckpoint,
    Checkpoint,
    Clip,
    Evaluate,
    Linear,
    Loader,
    Preemption,
)
from drivetrain_plugins.checkpoint import preemption

STEPS, ROW = 10, 41
POINTS = ("start", "fork", "rows", "forward", "backward", "accumulation", "evaluation", "end")


@attrs.define(kw_only=True)
class Job:
    """One child's work."""

    folder: str  # the run's output
    resume: Any = "auto"
    keep: int = 2
    workers: int = 0
    start_method: str | None = None
    every: str = "3 steps"
    how: str | None = None  # saves go on beside the training, in a "thread" or by a "fork"
    point: str | None = None  # one of POINTS: where the signal is sent from
    step: int = 3  # in which step (counted from 0), for the points that have one
    call: int | None = None  # or: before this store call
    send: str = "SIGTERM"  # or "stop", the file
    times: int = 1
    pause: float = 0.0  # seconds between two
    group: bool = False  # to the whole process group, as a terminal does
    same_s: float | None = None  # for preemption.SAME_S
    options: dict[str, Any] = attrs.field(factory=dict)  # of `preemption`
    inside: bool = False  # `preemption` last in the list, not first
    after: float | None = None  # seconds after which the parent sends it to the group
    slow: float = 0.0  # seconds added to each step, and a tenth of them to each store call


class Sender:
    """Sends what the job says, once, at its point."""

    def __init__(self, job: Job):
        self.job, self.process, self.sent = job, os.getpid(), False

    def at(self, point: str, step: int | None = None) -> None:
        """Send, if this is the point."""
        if point == self.job.point and step in (None, self.job.step) and not self.sent:
            self.send()

    def was_forked(self) -> None:
        """Know that the child has sent it."""
        self.sent = self.sent or self.job.point == "fork"

    def call(self, number: int, name: str, args: Any) -> None:
        """Send before a store call."""
        time.sleep(self.job.slow / 10)
        if number == self.job.call:
            self.send()

    def send(self) -> None:
        self.sent = True
        if self.job.send == "stop":
            Path(self.job.folder, "stop").touch()
            return
        number = getattr(signal, self.job.send)
        for time_number in range(self.job.times):
            if time_number:
                time.sleep(self.job.pause)
            os.killpg(0, number) if self.job.group else os.kill(self.process, number)


class Sending(Augmented):
    """Rows of which one sends the signal when it is read, here or in a worker."""

    def __init__(self, sender: Sender):
        super().__init__()
        self.sender = sender

    def __getitem__(self, index):
        if index == ROW:
            self.sender.at("rows")
        return super().__getitem__(index)


@plugin(role="control", effect="observes")
class SendAt:
    """Reach the points of a run."""

    _sender: Any = attrs.field(init=False, default=None)
    _step: int = attrs.field(init=False, default=-1)

    @hookimpl
    def assembled(self, run):
        run.model.drop.register_forward_hook(self._dropped)

    def _dropped(self, module, inputs, output):
        if output.requires_grad:
            self._sender.at("forward", self._step)
            output.register_hook(lambda gradient: self._sender.at("backward", self._step))

    @hookimpl(wrapper=True)
    def epoch(self, run):
        self._sender.at("start")
        return (yield)

    @hookimpl(wrapper=True)
    def train_step(self, step):
        self._step = step.number
        time.sleep(self._sender.job.slow)
        return (yield)

    @hookimpl(wrapper=True)
    def backward(self, micro):
        result = yield
        if not micro.is_last:
            self._sender.at("accumulation", self._step)
        return result

    @hookimpl(wrapper=True)
    def prepare(self, micro):
        if micro.step is None:
            self._sender.at("evaluation", micro.run.progress.step - 1)
        return (yield)

    @hookimpl
    def saved(self, run, path):
        if run.progress.step == STEPS:
            self._sender.at("end")


def build(job: Job) -> tuple[Trainer, Any, FaultyStore]:
    """Return the trainer, the rows and the store of a job."""
    torch.default_generator.manual_seed(1)
    sender = Sender(job)
    saves = {"every": job.every, "keep": job.keep}
    checkpoint = Checkpoint(**saves) if job.how is None else AsyncCheckpoint(**saves, how=job.how)
    sends, asked = SendAt(), Preemption(**job.options)
    sends._sender, checkpoint._store = sender, FaultyStore(sender.call)
    os.register_at_fork(after_in_child=lambda: sender.at("fork"), after_in_parent=sender.was_forked)
    plugins = [AdamW(lr=3e-3), Linear(warmup=0.2), Clip(norm=0.5), Accumulate(batches=2), Evaluate(every="4 steps")]
    plugins += [Loader(batch_size=8, workers=job.workers, prefetch=1, start_method=job.start_method)]
    plugins += [("recorder", Recorder()), checkpoint, ("send-at", sends)]
    plugins = [*plugins, asked] if job.inside else [asked, *plugins]
    made = Trainer(Tiny(), plugins, output=job.folder, steps=STEPS, seed=11, log_every=3)
    return made, Sending(sender), checkpoint._store


def perform(job: Job) -> dict[str, Any]:
    """Make the run of a job; return its digests and the store's calls."""
    if job.same_s is not None:
        preemption.SAME_S = job.same_s
    if job.send == "stop":
        preemption.LOOK_S = 0.0  # the runs are shorter than a second
    seed = int.from_bytes(os.urandom(4), "little") if list(Path(job.folder).glob("checkpoints/step-*")) else 3
    random.seed(seed)  # a resumed run must take these from the checkpoint
    np.random.seed(seed)  # noqa: NPY002
    trainer, rows, store = build(job)
    result = trainer.fit(rows, evaluate=Augmented(12), resume=job.resume)
    state = trainer.run.state_dict()
    parts = {part: digest(state[part]) for part in ("model", "optimizer", "progress", "interval", "plugins")}
    calls = [name for name, _ in store.log]
    return {"digests": parts, "steps": result.steps, "stopped": result.stopped, "calls": calls}


def fork(line: str, reply: Path) -> dict[str, Any]:
    """Perform the job of `line` in a child and return how it ended."""
    job, errors = Job(**json.loads(line)), reply.with_suffix(".err")
    reply.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), 2)
        status = 1
        try:
            reply.write_text(json.dumps(perform(job)))
            status = 0
        except SystemExit as error:
            status = error.code
        except KeyboardInterrupt:  # as Python ends with it
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    if job.after is not None:
        time.sleep(job.after)
        os.killpg(child, getattr(signal, job.send))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"status": status, "errors": errors.read_text(), **(json.loads(reply.read_text()) if status == 0 else {})}


def main() -> None:
    """Serve jobs from standard input until it ends."""
    import torch._dynamo

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(fork(line, Path(sys.argv[1]))), file=answers, flush=True)


# --- ranks -----------------------------------------------------------------------------------------------------------


class Reduces:
    """The mean of the ranks' gradients, the plainest way."""

    provides = ("data-parallel",)

    @hookimpl
    def gradients_ready(self, step):
        for parameter in step.run.parameters:
            torch.distributed.all_reduce(parameter.grad)


def fit_rank(folder: str, resume: bool, step: int | None, send: str) -> dict[str, Any]:
    """Make a run on this rank, of which rank 1 alone is sent a signal; return how it ended and its digests."""
    rank, at = torch.distributed.get_rank(), step

    class Alone:
        @hookimpl
        def gradients_ready(self, step):
            if rank == 1 and step.number == at:
                os.kill(os.getpid(), getattr(signal, send))

    torch.default_generator.manual_seed(1)
    plugins = [Preemption(), AdamW(lr=3e-3), ("reduces", Reduces()), ("alone", Alone()), Checkpoint(every="4 steps")]
    heard = Recorder()
    model = Tiny()
    model.norm = torch.nn.Identity()  # each rank has statistics of its own
    trainer = Trainer(model, [*plugins, ("recorder", heard)], output=folder, steps=STEPS, seed=11, log_every=3)
    code = None
    try:
        trainer.fit(Augmented(), resume=resume)
    except SystemExit as error:
        code = error.code
    run = trainer.run
    return {
        "code": code,
        "step": run.progress.step,
        "stopped": run.stopped,
        "handler": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "digests": {part: digest(run.state_dict()[part]) for part in ("model", "optimizer", "progress")},
    }
