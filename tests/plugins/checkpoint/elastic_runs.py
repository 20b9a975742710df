"""Runs over several ranks whose weights are sharded by FSDP2, or replicated, for the tests of sharded checkpoints."""

from __future__ import annotations

import attrs
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from drivetrain import Stage, Trainer, Transform, hookimpl, plugin
from drivetrain_plugins import AdamW, AsyncCheckpoint, Checkpoint, Loader

ROWS = {
    "tokens": torch.arange(96 * 6).reshape(96, 6) % 7,
    "labels": torch.arange(96) % 5,
    "number": torch.arange(96),
}


class Net(torch.nn.Module):
    """Rows that two ranks cannot share evenly: 7, 5 and 1; and a buffer that moves alike on all ranks."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 5)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens, labels, number):
        self.calls += 1
        hidden = self.norm(self.embed(tokens).mean(1))
        return torch.nn.functional.cross_entropy(self.scale * self.head(hidden), labels)


@plugin(role="parallel", provides=["data-parallel"])
class Sharded:
    """FSDP2 over all ranks, where there are several; its mean over ranks is a factor that AdamW does not feel."""

    @hookimpl
    def transforms(self, run):
        return [Transform(Stage.SHARD, lambda model: self._shard(run, model))]

    @staticmethod
    def _shard(run, model):
        if run.world_size > 1:
            return fully_shard(model, mesh=init_device_mesh("cpu", (run.world_size,)))
        return model


@plugin(role="parallel", provides=["data-parallel"])
class Replicated:
    """The sum of all ranks' gradients."""

    @hookimpl
    def gradients_ready(self, step):
        if step.run.world_size > 1:
            for parameter in step.run.parameters:
                torch.distributed.all_reduce(parameter.grad)


@plugin(role="report", effect="observes")
class Seen:
    """The numbers of the rows of each step of this rank, and what was saved and loaded."""

    _steps: list = attrs.field(init=False, factory=list)
    _heard: list = attrs.field(init=False, factory=list)

    @hookimpl
    def step_end(self, step):
        self._steps.append([step.number, [n for micro in step.micros for n in micro.batch["number"].tolist()]])

    @hookimpl
    def saved(self, run, path):
        self._heard.append(path.name)

    @hookimpl
    def loaded(self, run, path):
        self._heard.append(f"loaded {path.name}")


def whole(value):
    """Return a state tree without DTensors, as lists that can be compared bit for bit."""
    if isinstance(value, torch.Tensor):
        value = value.full_tensor() if isinstance(value, DTensor) else value
        return value.detach().double().tolist()
    if isinstance(value, dict):
        return {key: whole(inside) for key, inside in value.items()}
    return [whole(inside) for inside in value] if isinstance(value, (list, tuple)) else value


def fit(folder, steps, resume, parallel="sharded", batch_size=8, *, writes="checkpoint", **options):
    """Make a run on this rank; return what it saw and what it ended as."""
    torch.manual_seed(0)
    made = {"checkpoint": Checkpoint, "async": AsyncCheckpoint}[writes](every=4, keep=9, **options)
    seen, own = Seen(), {"sharded": Sharded, "replicated": Replicated}[parallel]()
    plugins = [AdamW(lr=0.02), Loader(batch_size=batch_size), own, made, seen]
    trainer = Trainer(Net(), plugins, output=folder, steps=steps, seed=3, device="cpu", log_every=100)
    trainer.fit(ROWS, resume=resume)
    state = trainer.run.state_dict()
    ended = {part: whole(state[part]) for part in ("model", "optimizer", "progress")}
    return {"steps": seen._steps, "heard": seen._heard, "ended": ended}
