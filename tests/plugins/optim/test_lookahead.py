"""`lookahead` moves slow weights towards where the optimizer came, every k updates."""

from __future__ import annotations

import pytest
import torch
from around_helpers import SaveAt, Skip, Snapshots, go_on, same, weights_of
from plugin_helpers import assert_same_weights, columns, fit, net, train_by_hand

from drivetrain_plugins import SGD, AdamW, Lookahead


class ByHand(torch.optim.SGD):
    """Lookahead around SGD with momentum, as the paper's algorithm 1 writes it."""

    def __init__(self, parameters, k, alpha, **options):
        super().__init__(parameters, **options)
        self.k, self.alpha, self.taken = k, alpha, 0
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        super().step(closure)
        self.taken += 1
        if self.taken % self.k == 0:
            with torch.no_grad():
                fast = [p for group in self.param_groups for p in group["params"]]
                for slow, p in zip(self.slow, fast, strict=True):
                    slow.add_(p - slow, alpha=self.alpha)
                    p.copy_(slow)


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (2, 0.25), (1, 1.0)])
def test_run_equals_the_paper_by_hand(k, alpha):
    """Thirteen steps leave the weights of a hand-written algorithm."""
    data, ours, theirs = columns(), net(), net()
    fit(ours, [SGD(lr=0.2, momentum=0.9), Lookahead(k=k, alpha=alpha)], data, steps=13)
    by_hand = ByHand(theirs.parameters(), k, alpha, lr=0.2, momentum=0.9)
    train_by_hand(theirs, data, by_hand, steps=13)
    for (name, got), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_all_the_way_changes_nothing():
    """With alpha 1 the slow weights are the fast ones, and the run is that without the plugin, bit for bit."""
    data, ours, plain = columns(), net(), net()
    fit(ours, [SGD(lr=0.2, momentum=0.9), Lookahead(k=3, alpha=1.0)], data, steps=7)
    fit(plain, [SGD(lr=0.2, momentum=0.9)], data, steps=7)
    assert_same_weights(ours, plain)


def test_skipped_steps_do_not_count():
    """The slow weights move after k updates that were applied."""
    seen, lookahead = Snapshots(), Lookahead(k=2, alpha=0.5)
    fit(net(), [SGD(lr=0.2), Skip(1), lookahead, seen], columns(), steps=4)
    start, first, skipped, moved, last = seen.weights
    assert same(first, skipped)
    fast = Snapshots()
    fit(net(), [SGD(lr=0.2), Skip(1), fast], columns(), steps=3)
    expected = {name: value.lerp(fast.weights[3][name], 0.5) for name, value in start.items()}
    assert same(moved, expected)
    assert not same(moved, last)
    assert same(dict(lookahead.state_dict()["slow"]), moved)


@pytest.mark.parametrize("at", [3, 5])
def test_resumes_bit_for_bit(at):
    """Saved between two moves or at one, it ends as if nothing had been, with AdamW's state beside it."""
    data, save, ours = columns(), SaveAt(at), net(0.2)
    fit(ours, [AdamW(lr=0.05), Lookahead(k=5), save], data, steps=12)
    run = go_on(net(0.2), [AdamW(lr=0.05), Lookahead(k=5)], data, save.state, steps=12)
    assert same(weights_of(ours), weights_of(run.model))


def test_begins_where_it_is_added():
    """A run that had none, and goes on with one, starts from the weights that were loaded."""
    data, save, lookahead, seen = columns(), SaveAt(4), Lookahead(k=2, alpha=0.5), Snapshots()
    fit(net(), [SGD(lr=0.2), save], data, steps=8)
    before, fast = Snapshots(), Snapshots()
    fit(net(), [SGD(lr=0.2), before], data, steps=6)
    go_on(net(), [SGD(lr=0.2), lookahead, seen], data, save.state, steps=8)
    expected = {name: value.lerp(before.weights[6][name], 0.5) for name, value in before.weights[4].items()}
    assert same(seen.weights[2], expected)
    assert fast.weights == []


def test_slow_weights_of_half_precision_are_kept_in_float32():
    """Small moves of bfloat16 weights add up in the slow weights, of which the model has the rounded ones."""
    data = {**columns(), "features": columns()["features"].bfloat16()}
    lookahead, model = Lookahead(k=1, alpha=0.1), net().bfloat16()
    fit(model, [SGD(lr=0.05), lookahead], data, steps=4)
    slow = dict(lookahead.state_dict()["slow"])
    assert {value.dtype for value in slow.values()} == {torch.float32}
    assert same(weights_of(model), {name: value.bfloat16() for name, value in slow.items()})
