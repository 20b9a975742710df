"""Short runs whose surroundings change on the way."""

from __future__ import annotations

import random

import faults_worker
import numpy as np
import torch

from drivetrain import CheckpointError, Trainer, hookimpl
from drivetrain_plugins import SGD, Loader
from drivetrain_plugins.checkpoint._shelf import step_of


class Seen:
    """Where the run is, and which steps it saved; does something when a step ends, before the save is due."""

    def __init__(self, at=0, act=None):
        self.run, self.step, self.saved_steps, self.at, self.act = None, 0, [], at, act

    def act_at(self, step):
        if step == self.at:
            self.act()

    @hookimpl(tryfirst=True)
    def step_end(self, step):
        self.run, self.step = step.run, step.run.progress.step
        self.act_at(self.step)

    @hookimpl
    def saved(self, run, path):
        self.saved_steps.append(step_of(path.name))


def train(folder, checkpoint, seen=None, *, steps=10, resume=False, errors=CheckpointError):
    """Train for some steps; return what was seen, and the error that ended the run."""
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - the rows draw from it
    torch.default_generator.manual_seed(1)
    seen, raised = seen or Seen(), None
    plugins = [Loader(8), SGD(lr=0.1), checkpoint, seen]
    trainer = Trainer(faults_worker.Tiny(), plugins, output=folder, steps=steps, device="cpu")
    try:
        trainer.fit(faults_worker.Augmented(), resume=resume)
    except errors as error:
        raised = error
    return seen, raised
