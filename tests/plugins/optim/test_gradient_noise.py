"""`gradient-noise` adds noise whose size and stream are those of its documentation."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import BATCH, assert_same_weights, columns, fit, net

from drivetrain import Shuffled, hookimpl
from drivetrain.rng import derive_seed
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import SGD, GradientNoise


class SkipOne:
    """Skip step 2."""

    @hookimpl
    def gradients_ready(self, step):
        if step.number == 2:
            step.skip("the test asked for it")


def test_run_equals_noise_by_hand():
    """With dropout and a skipped step, the weights are those of a loop that adds eta / (1 + t)^gamma by hand."""
    data, ours, theirs = columns(), net(dropout=0.2), net(dropout=0.2)
    fit(ours, [SGD(lr=0.1), GradientNoise(eta=0.3, gamma=0.7), SkipOne()], data, steps=12)
    optimizer, updates = torch.optim.SGD(theirs.parameters(), lr=0.1, fused=True), 0
    for step in range(12):
        epoch, batch = divmod(step, 5)
        picked = Shuffled(40, 0).order(epoch)[batch * BATCH : (batch + 1) * BATCH]
        torch.manual_seed(derive_seed(0, "step", step, 0))
        theirs(**{name: column[picked] for name, column in data.items()})["loss"].backward()
        draws = torch.Generator().manual_seed(derive_seed(0, "gradient-noise", step))
        for parameter in theirs.parameters():
            deviation = (0.3 / (1 + updates) ** 0.7) ** 0.5
            parameter.grad.add_(torch.randn(parameter.shape, generator=draws), alpha=deviation)
        if step != 2:
            optimizer.step()
            updates += 1
        optimizer.zero_grad()
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("applied", [0, 99])
def test_the_variance_is_the_papers(applied):
    """Of many draws the mean is 0 and the variance eta / (1 + t)^gamma."""

    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(200_000))

        def forward(self, features, labels):
            return 0.0 * self.weight.sum()

    found = []

    class Look:
        @hookimpl
        def assembled(self, run):
            run.progress.applied = applied

        @hookimpl
        def gradients_ready(self, step):
            found.append(step.run.model.weight.grad.clone())

    fit(Wide(), [SGD(), GradientNoise(eta=0.5, gamma=0.55), Look()], columns(), steps=1)
    assert found[0].var().item() == pytest.approx(0.5 / (1 + applied) ** 0.55, rel=0.02)
    assert abs(found[0].mean().item()) < 0.01


def test_the_global_stream_is_not_drawn_from():
    """The dropout of a run is the same with and without noise (law 3)."""
    masks = [[], []]
    for kept, plugins in zip(masks, ([], [GradientNoise()]), strict=True):
        model = net(dropout=0.5)
        model.drop.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out == 0))
        fit(model, [SGD(lr=1e-9), *plugins], columns(), steps=3)
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


class Sum:
    """Sum gradients over the ranks."""

    provides = ("data-parallel",)

    @hookimpl
    def gradients_ready(self, step):
        for parameter in step.run.parameters:
            torch.distributed.all_reduce(parameter.grad)


def on_a_rank():
    model = net()
    fit(model, [SGD(lr=0.1), Sum(), GradientNoise(eta=0.1)], columns(48), steps=3)
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_ranks_add_the_same_noise():
    """Two ranks stay together."""
    first, second = run_ranks(on_a_rank)
    assert all(torch.equal(first[name], second[name]) for name in first)
