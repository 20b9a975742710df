"""`spike-skip` skips what jumps, and nothing else."""

from __future__ import annotations

import statistics

import pytest
import torch
from plugin_helpers import Record, columns, cpu_run, fit, net

from drivetrain import Trainer, hookimpl
from drivetrain.testing.digests import decode, digest, encode
from drivetrain.testing.probes import StopAt
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import SGD, Clip, SpikeSkip


class Norms:
    """Give the gradients norms that are chosen beforehand."""

    def __init__(self, *norms):
        self.norms = norms

    @hookimpl
    def gradients_ready(self, step):
        parameters = step.run.parameters
        for parameter in parameters:
            parameter.grad.zero_()
        parameters[0].grad[0, 0] = self.norms[step.number]


class Reasons:
    """Keep why steps were skipped."""

    def __init__(self):
        self.all = []

    @hookimpl
    def step_end(self, step):
        self.all.append(step.skipped)


def skipped(plugin, *norms, more=()):
    """Return the numbers of the steps that were skipped in a run whose gradients have these norms."""
    reasons = Reasons()
    fit(net(), [SGD(lr=1e-6), Norms(*norms), plugin, reasons, *more], columns(), steps=len(norms))
    return [number for number, reason in enumerate(reasons.all) if reason is not None]


def by_the_rule(plugin, norms):
    """Say which steps are skipped, by the documented rule."""
    values, found, row = [], [], 0
    centre = statistics.median if plugin.centre == "median" else statistics.fmean
    for number, norm in enumerate(norms):
        window = values[-plugin.window :]
        if len(window) >= plugin.warmup and norm > plugin.factor * centre(window):
            found.append(number)
            row += 1
            if row == plugin.limit:
                values, row = [], 0
        else:
            values.append(norm)
            row = 0
    return found


@pytest.mark.parametrize("centre", ["median", "mean"])
def test_the_rule(centre):
    """The skipped steps are those of the rule, for norms that wander and jump."""
    draws = torch.Generator().manual_seed(4)
    norms = (2.0 ** torch.randint(-2, 4, (60,), generator=draws)).tolist()
    plugin = SpikeSkip(factor=2.5, centre=centre, window=6, warmup=3, limit=3)
    found = skipped(plugin, *norms)
    assert found == by_the_rule(plugin, norms)
    assert 5 < len(found) < 40


def test_warmup_protects_and_a_new_level_is_taken():
    """Nothing is skipped in the warm-up; after `limit` skipped steps in a row their level is normal."""
    assert skipped(SpikeSkip(factor=2.0, window=4, warmup=4), 1, 50, 1, 60) == []
    plugin = SpikeSkip(factor=2.0, window=4, warmup=2, limit=3)
    assert skipped(plugin, 1, 1, 9, 9, 9, 9, 9, 9, 30) == [2, 3, 4, 8]


def test_values_that_are_not_finite():
    """NaN is a spike, and no value of the window."""
    plugin = SpikeSkip(factor=2.0, window=4, warmup=2)
    assert skipped(plugin, 1, 1, torch.nan, 1.5, torch.inf, 1, 9) == [2, 4, 6]


def test_clipping_does_not_hide_a_spike():
    """The norm is that of the gradients before they are clipped, whichever plugin is first in the list."""
    for guards in ([SpikeSkip(warmup=2, window=4), Clip(0.1)], [Clip(0.1), SpikeSkip(warmup=2, window=4)]):
        record = Record()
        plugins = [SGD(lr=1e-6), Norms(1, 1, 9, 1), *guards, record]
        run = Trainer(net(), plugins, steps=4, device="cpu", log_every="1 step")
        run.fit(columns())
        assert record.of("skipped_steps") == [1, 1]
        assert record.of("grad_norm")[2] == pytest.approx(9)


def test_the_loss_can_be_watched():
    """With measure = "loss" a jump of the loss alone is skipped."""

    class Loss:
        @hookimpl(tryfirst=True)
        def gradients_ready(self, step):
            if step.number == 3:
                step.loss = step.loss * 10

    reasons = Reasons()
    plugins = [SGD(), Loss(), SpikeSkip(measure="loss", warmup=2, window=4), reasons]
    fit(net(), plugins, columns(), steps=5)
    assert reasons.all == [None, None, None, "a spike of the loss", None]


@pytest.mark.parametrize("stop", [3, 5])
def test_resume_is_exact(stop):
    """The window goes on where it was."""

    def begin(*more):
        norms = Norms(1, 2, 3, 9, 9, 9, 2, 9, 1)
        plugins = [SGD(lr=0.1), norms, SpikeSkip(factor=2.0, window=3, warmup=2, limit=4), *more]
        return Trainer(net(), plugins, steps=9, device="cpu").assemble(columns())

    def go_on(run):
        run.model.train()
        run.hooks.fit(run)
        return run

    straight, part, rest = go_on(begin()), go_on(begin(StopAt(stop))), begin()
    rest.load_state_dict(decode(*encode(part.state_dict())))
    assert digest(go_on(rest)) == digest(straight)
    assert straight.skipped_steps == 4


def test_a_warmup_longer_than_the_window_is_refused():
    """Such a window never fills."""
    with pytest.raises(ValueError, match="warmup cannot be longer"):
        SpikeSkip(warmup=9, window=8)
    assert SpikeSkip().assembled(cpu_run()) is None


class Sum:
    """Sum gradients over the ranks."""

    provides = ("data-parallel",)

    @hookimpl
    def gradients_ready(self, step):
        for parameter in step.run.parameters:
            torch.distributed.all_reduce(parameter.grad)


class LossOfRankOne:
    """Let the loss of one rank jump."""

    @hookimpl(tryfirst=True)
    def gradients_ready(self, step):
        if step.number == 2 and step.run.rank == 1:
            step.loss = step.loss * 100


def on_a_rank():
    plugins = [SGD(lr=0.1), Sum(), LossOfRankOne(), SpikeSkip(measure="loss", warmup=2, window=4)]
    run = fit(net(), plugins, columns(64), steps=4)[0].run
    return digest(run, "model", "plugins"), run.skipped_steps


def test_ranks_agree():
    """The loss is that of all ranks, and so is what is made of it."""
    first, second = run_ranks(on_a_rank)
    assert first == second
    assert first[1] == 1
