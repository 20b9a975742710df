"""Runs that save while they train, and a store that waits, for the tests of `async-checkpoint`."""

from __future__ import annotations

import errno
import os

import attrs
import torch

from drivetrain import Trainer, hookimpl, plugin
from drivetrain_plugins import AdamW
from drivetrain_plugins.checkpoint._store import LocalStore

HOW = ["thread", "fork"]
ROWS = {"x": torch.arange(256.0).reshape(64, 4) / 100}


class Normed(torch.nn.Module):
    """Tied weights and a BatchNorm, whose buffers move in each forward."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x):
        return self.two(self.norm(self.one(x))).square().mean()


class Gate(LocalStore):
    """A store that waits, before it makes a checkpoint's first file, until somebody opens the gate; for any process.

    Args:
        fails: tells of a step whether its save fails.
        act: called in whoever writes, with the call's name and the step that is saved.
    """

    def __init__(self, fails=lambda step: False, act=lambda name, step: None):
        self.fails, self.act, self.shut, self.run = fails, act, False, os.getpid()
        self.reader, self.writer = os.pipe()

    def open(self):
        os.write(self.writer, b"1")

    def make_folder(self, path):
        step = int(path.name.split("-")[1])
        if step:  # no probe
            self.act("make_folder", step)
            if self.shut:
                os.read(self.reader, 1)
            if self.fails(step):
                raise OSError(errno.EIO, "Input/output error", str(path))
        super().make_folder(path)

    def sync(self, handle):
        super().sync(handle)
        self.act("sync", 0)

    def close_gate(self):
        os.close(self.reader)
        os.close(self.writer)


def run_of(folder, checkpoint, *plugins, until=5, model=None, store=None):
    """Return a trainer; `plugins` stand before the checkpoint plugin and wrap its saves."""
    torch.default_generator.manual_seed(0)
    if store is not None:
        checkpoint._store = store
    own = [AdamW(lr=0.01), *plugins, checkpoint]
    return Trainer(model or Normed(), own, output=folder, seed=3, steps=until)


@plugin(role="report", effect="observes")
class Tracks:
    """A plugin whose state is a tensor and a list, both changed in place."""

    _sum: torch.Tensor = attrs.field(init=False, factory=lambda: torch.zeros(3))
    _seen: list = attrs.field(init=False, factory=list)

    @hookimpl
    def step_end(self, step):
        self._sum += 1
        self._seen.append(step.number)

    def state_dict(self):
        return {"sum": self._sum, "seen": self._seen}

    def load_state_dict(self, state):
        self._sum.copy_(state["sum"])
        self._seen[:] = state["seen"]
