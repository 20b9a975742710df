"""What the tests of the plugins around an optimizer share."""

from __future__ import annotations

from typing import ClassVar

import torch

from drivetrain import Trainer, hookimpl


class Snapshots:
    """A plugin that copies the weights when the run is assembled, and after each step."""

    def __init__(self):
        self.weights = []

    @hookimpl
    def assembled(self, run):
        self.weights = [weights_of(run.model)]

    @hookimpl
    def step_end(self, step):
        self.weights.append(weights_of(step.run.model))


class Skip:
    """A plugin that skips the steps of the given numbers."""

    facts: ClassVar = {"may_skip": True}

    def __init__(self, *numbers):
        self.numbers = numbers

    @hookimpl
    def gradients_ready(self, step):
        if step.number in self.numbers:
            step.skip("a test")


class SaveAt:
    """A plugin that keeps the run's state, encoded as a checkpoint is, after step `at`."""

    def __init__(self, at):
        self.at, self.state = at, None

    @hookimpl(trylast=True)
    def step_end(self, step):
        from drivetrain.testing.digests import encode

        if step.run.progress.step == self.at:
            self.state = encode(step.run.state_dict())


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(left, right):
    """Tell whether two dictionaries of tensors are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def go_on(model, plugins, data, state, evaluate=None, **settings):
    """Fit from an encoded state, as resuming does; return the run."""
    from drivetrain.testing.digests import decode

    trainer = Trainer(model, plugins, device="cpu", **settings)
    run = trainer.assemble(data, evaluate)
    run.load_state_dict(decode(*state))
    run.hooks.loaded(run, None)
    run.settings.log_every.start(run)
    run.model.train()
    run.hooks.fit(run)
    return run
