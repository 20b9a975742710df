"""A process that has torch imported and forks one child for each run it is told to make, kill or resume.

It reads one JSON object a line (see `Job`) and answers one: how the child ended and what it reported. It never runs a
tensor operation itself, so that its forks start clean; a fork costs milliseconds where importing torch costs seconds.
"""

from __future__ import annotations

import hashlib
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

from drivetrain import Trainer, hookimpl, plugin
from drivetrain_plugins import Accumulate, AdamW, Checkpoint, Clip, Linear, Loader
from drivetrain_plugins.checkpoint import _saved
from drivetrain_plugins.checkpoint._place import checkpoint_at, shelf_of
from drivetrain_plugins.checkpoint._store import LocalStore

ROWS, STEPS = 90, 10  # 12 batches of 8, the last of 2; accumulation 2 makes 6 steps an epoch


@attrs.define(kw_only=True)
class Job:
    """One child's work."""

    folder: str  # the run's output
    resume: Any = "auto"
    model: str = "tiny"
    every: str = "2 steps"
    keep: int = 2
    steps: int = STEPS
    workers: int = 0
    stop_at: int | None = None
    before_call: int | None = None  # SIGKILL before this store call (counted from 1)
    inside_write: int | None = None  # SIGKILL when half of this store call, a write, is done
    kill_after: float | None = None  # seconds, from the parent
    slow: float = 0.0  # seconds added to each store call
    store: str | None = None  # the URL of a store, instead of the run's folder


class Tiny(torch.nn.Module):
    """Tied weights, dropout, BatchNorm, and a buffer that moves but is not persistent."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(12, 16)
        self.project = torch.nn.Linear(4, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.drop = torch.nn.Dropout(0.2)
        self.head = torch.nn.Linear(16, 12)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, tokens, features, labels):
        self.calls += 1
        hidden = self.embed(tokens).mean(1) + self.project(features)
        return torch.nn.functional.cross_entropy(self.head(self.drop(self.norm(hidden))), labels)


class Augmented(torch.utils.data.Dataset):
    """Rows that draw from all three global generators each time they are read."""

    def __init__(self, rows: int = ROWS):
        draws = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(0, 12, (rows, 6), generator=draws)
        self.labels = torch.randint(0, 12, (rows,), generator=draws)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        noise = torch.randn(4) + random.gauss(0, 0.1) + np.random.standard_normal()  # noqa: NPY002 - as augmentations do
        return {"tokens": self.tokens[index], "features": noise.float(), "labels": self.labels[index]}


class ForBert(Augmented):
    """The same rows as a transformer takes them, with tokens dropped at random."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        mask = (row["features"].repeat(2)[:6] > -1.0).long()
        return {"input_ids": row["tokens"], "attention_mask": mask, "labels": row["labels"] % 3}


@plugin(role="report", effect="observes")
class Recorder:
    """Everything a run shows: logged numbers, the rows of each step, and draws from the global generators."""

    _lines: list[str] = attrs.field(init=False, factory=list)
    _source: str | None = attrs.field(init=False, default=None)

    @hookimpl
    def assembled(self, run):
        self._lines, self._source = [], None

    @hookimpl
    def loaded(self, run, path):
        self._source = str(path).rpartition("/")[2]

    @hookimpl
    def step_end(self, step):
        digest = hashlib.sha256()
        for micro in step.micros:
            for value in micro.batch.values():
                digest.update(value.numpy().tobytes())
        drawn = f"{random.random().hex()} {np.random.random().hex()}"  # noqa: NPY002 - the global one is restored
        self._lines.append(f"{step.number} {digest.hexdigest()} {drawn}")

    @hookimpl
    def log(self, run, metrics):
        self._lines.append(" ".join(f"{k}={float(v).hex()}" for k, v in sorted(metrics.items())))

    def state_dict(self):
        return {"lines": self._lines}

    def load_state_dict(self, state):
        self._lines = list(state["lines"])


@plugin(role="control", effect="observes")
class StopAt:
    """Stop after a step."""

    step: int = 0

    @hookimpl
    def step_end(self, step):
        if step.run.progress.step == self.step:
            step.run.request_stop("as asked")


CALLS = [name for name in vars(LocalStore) if not name.startswith("_")]


class FaultyStore(LocalStore):
    """The real store, which counts and records its calls and asks `act(number, name, args)` before each."""

    def __init__(self, act=lambda number, name, args: None):
        self.log: list[tuple[str, tuple[Any, ...]]] = []
        self.act = act


def _counted(name):
    def call(self, *args, **options):
        self.log.append((name, args))
        self.act(len(self.log), name, args)
        return getattr(LocalStore, name)(self, *args, **options)

    return call


for _name in CALLS:
    setattr(FaultyStore, _name, _counted(_name))


def killer(job: Job):
    def act(number, name, args):
        if job.slow:
            time.sleep(job.slow)
        if number == job.inside_write:
            assert name == "write"
            os.write(args[0], memoryview(args[1])[: len(args[1]) // 2])
        if number in (job.before_call, job.inside_write):
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def digest(tree: Any) -> str:
    """Return a sha256 of a state tree that shares no code with the checkpoint's format."""
    made = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                made.update(f"{key}:".encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            made.update(f"{value.dtype}{tuple(value.shape)}".encode())
            made.update(bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
        else:
            made.update((value.hex() if isinstance(value, float) else repr(value)).encode())

    add(tree)
    return made.hexdigest()


def read(folder: Path | str) -> _saved.Saved:
    """Return the checkpoint in a folder, every byte of it verified."""
    return _saved.read(*checkpoint_at(folder))


def newest(run: Path, passed_over=lambda reason: None) -> _saved.Saved | None:
    """Return the newest valid checkpoint of the run in a folder."""
    return _saved.newest(shelf_of(run / "checkpoints"), passed_over)


def build(job: Job, store: LocalStore) -> tuple[Trainer, Any]:
    """Return the trainer and the rows of a job."""
    torch.default_generator.manual_seed(1)
    if job.model == "tiny":
        model, rows = Tiny(), Augmented()
    else:
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"vocab_size": 12, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 16}
        config = BertConfig(num_hidden_layers=2, num_attention_heads=2, num_labels=3, **sizes)
        model, rows = BertForSequenceClassification(config), ForBert()
    checkpoint = Checkpoint(every=job.every, keep=job.keep, store=job.store)
    checkpoint._store = store
    plugins = [AdamW(lr=3e-3), Linear(warmup=0.2), Clip(norm=0.5), Accumulate(batches=2)]
    plugins += [Loader(batch_size=8, workers=job.workers), Recorder(), checkpoint]
    if job.stop_at:
        plugins.append(("stop-at", StopAt(job.stop_at)))
    return Trainer(model, plugins, output=job.folder, steps=job.steps, seed=11, log_every=3), rows


def perform(job: Job) -> dict[str, Any]:
    """Make the run of a job; return its digests, and the store's calls."""
    store = FaultyStore(killer(job))
    shelf = shelf_of(job.store or Path(job.folder) / "checkpoints")
    seed = int.from_bytes(os.urandom(4), "little") if shelf.names() else 3
    random.seed(seed)  # a resumed run must take these from the checkpoint
    np.random.seed(seed)  # noqa: NPY002
    trainer, rows = build(job, store)
    result = trainer.fit(rows, resume=job.resume)
    state = trainer.run.state_dict()
    parts = {part: digest(state[part]) for part in ("model", "optimizer", "progress", "interval", "plugins")}
    source = trainer.plugins["recorder"]._source
    return {"digests": parts, "steps": result.steps, "source": source, "calls": [name for name, _ in store.log]}


def fork(line: str, reply: Path) -> dict[str, Any]:
    """Perform the job of `line` in a child and return how it ended."""
    job = Job(**json.loads(line))
    reply.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        status = 1
        try:
            reply.write_text(json.dumps(perform(job)))
            status = 0
        except BaseException:
            reply.write_text(json.dumps({"error": traceback.format_exc()}))
        finally:
            os._exit(status)
    if job.kill_after is not None:
        time.sleep(job.kill_after)
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    content = json.loads(reply.read_text()) if reply.exists() and status in (0, 1) else {}
    return {"status": status, **content}


def main() -> None:
    """Serve jobs from standard input until it ends."""
    import torch._dynamo  # what an optimizer imports at its first step
    import transformers.models.bert.modeling_bert  # noqa: F401

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    reply = Path(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(fork(line, reply)), file=answers, flush=True)
