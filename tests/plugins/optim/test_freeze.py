"""`freeze` keeps parameters still, in whole or up to a moment, as a function of the run's progress."""

from __future__ import annotations

import pytest
import torch
from around_helpers import SaveAt, Snapshots, go_on, same, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import assert_same_weights, columns, fit, net, train_by_hand

from drivetrain import ConfigError, Trainer, hookimpl
from drivetrain_plugins import SGD, AdamW, Clip, Freeze
from drivetrain_plugins.optim._moment import Moment
from drivetrain_plugins.optim._names import matches


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


ALL = {"first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"}


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"freeze": ["first"]}, ALL - {"first.weight", "first.bias"}),
        ({"freeze": ["*.bias", "norm"]}, {"first.weight", "last.weight"}),
        ({"train": ["last"]}, {"last.weight", "last.bias"}),
        ({"freeze": ["*"], "train": ["*.bias"]}, {"first.bias", "norm.bias", "last.bias"}),
    ],
)
def test_only_the_others_are_trained(options, trained):
    """What is frozen keeps its bits and is not in the optimizer; the rest equals a hand-written loop; flags come back."""
    ours, theirs, seen = net(), net(), Snapshots()
    theirs_trained = [p.requires_grad_(name in trained) for name, p in theirs.named_parameters()]
    trainer, _ = fit(ours, [AdamW(lr=0.05, fused=False), Freeze(**options), Clip(norm=0.1), seen], columns(), steps=6)
    by_hand = torch.optim.AdamW([p for p in theirs_trained if p.requires_grad], lr=0.05, weight_decay=0.0)
    train_by_hand(theirs, columns(), by_hand, steps=6, max_norm=0.1)
    assert_same_weights(ours, theirs)
    assert moved(seen.weights[0], seen.weights[-1]) == trained
    names = {name for group in trainer.run.optimizer.param_groups for name in group["param_names"]}
    assert names == trained
    assert all(p.requires_grad for p in ours.parameters())


def test_unfreezing_follows_the_moments():
    """Each part begins to move at its moment, in steps, epochs and shares, and neither moves nor decays before."""
    freeze, seen = Freeze(
        freeze=["first", "norm"],
        until=[
            {"pattern": "norm.bias", "at": "2 steps"},
            {"pattern": "norm", "at": 0.5},
            {"pattern": "first.weight", "at": "1 epoch"},
        ],
    ), Snapshots()  # fmt: skip
    fit(net(), [AdamW(lr=0.05, weight_decay=0.1), freeze, seen], columns(), steps=8)  # 5 steps are an epoch
    last, bias = {"last.weight", "last.bias"}, {"norm.bias"}
    changes = [moved(a, b) for a, b in zip(seen.weights, seen.weights[1:], strict=False)]
    assert changes[:2] == [last] * 2
    assert changes[2:4] == [last | bias] * 2
    assert changes[4] == last | bias | {"norm.weight"}
    assert changes[5:] == [ALL - {"first.bias"}] * 3


def test_unfrozen_run_equals_one_by_hand():
    """A parameter that joins at step 3 has a fresh optimizer state then, as in a loop that sets requires_grad."""
    ours, theirs = net(0.2), net(0.2)
    until = [{"pattern": "first", "at": 3}]
    fit(ours, [AdamW(lr=0.05, fused=False), Freeze(freeze=["first"], until=until)], columns(), steps=7)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.05, weight_decay=0.0)
    first = list(theirs.first.parameters())
    step, taken = optimizer.step, []

    def and_unfreeze():
        step()
        taken.append(None)
        for parameter in first:
            parameter.requires_grad_(len(taken) >= 3)

    optimizer.step = and_unfreeze
    for parameter in first:
        parameter.requires_grad_(False)
    train_by_hand(theirs, columns(), optimizer, steps=7)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("at", [2, 3, 5])
@pytest.mark.parametrize("optimizer", [SGD(lr=0.2, momentum=0.9, fused=False), AdamW(lr=0.05)])
def test_resumes_bit_for_bit(at, optimizer):
    """Saved before, at and after an unfreezing, it ends as if nothing had been."""
    options, data, save, ours = (
        {"freeze": ["first"], "until": [{"pattern": "first", "at": 3}]},
        columns(),
        SaveAt(at),
        net(0.2),
    )
    fit(ours, [optimizer, Freeze(**options), save], data, steps=8)
    run = go_on(net(0.2), [optimizer, Freeze(**options)], data, save.state, steps=8)
    assert same(weights_of(ours), weights_of(run.model))


def test_flags_are_given_back_when_a_run_fails():
    """However the run ends, and however often it was assembled, each parameter has the flag it came with."""

    class Fails:
        @hookimpl
        def step_end(self, step):
            raise RuntimeError("a test")

    model = net()
    model.last.bias.requires_grad_(False)
    plugins = [AdamW(), Freeze(freeze=["first"], until=[{"pattern": "first.bias", "at": 5}]), Fails()]
    trainer = Trainer(model, plugins, device="cpu", steps=3)
    trainer.assemble(columns())
    assert not model.first.bias.requires_grad
    with pytest.raises(RuntimeError, match="a test"):
        trainer.fit(columns())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"last.bias"}


class Modes(torch.nn.Module):
    """A body with BatchNorm and dropout, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
        self.head = torch.nn.Linear(8, 3)

    def forward(self, features, labels):
        return {"loss": torch.nn.functional.cross_entropy(self.head(self.body(features)), labels)}


@pytest.mark.parametrize("eval_frozen", [True, False])
def test_frozen_modules_stand_still_if_asked_to(eval_frozen):
    """With eval_frozen, statistics and dropout of frozen modules stand still until they are unfrozen; modes come back."""
    counts, model = [], Modes()

    class Watch:
        @hookimpl
        def step_end(self, step):
            modes = step.run.model.body.training, step.run.model.body[2].training, step.run.model.head.training
            counts.append((int(step.run.model.body[1].num_batches_tracked), *modes))

    freeze = Freeze(freeze=["body"], until=[{"pattern": "body", "at": 2}], eval_frozen=eval_frozen)
    fit(model, [Watch(), AdamW(), freeze], columns(), steps=4)
    still, moving = [(0, False, False, True), (0, False, False, True)], [(1, True, True, True), (2, True, True, True)]
    assert counts == (still + moving if eval_frozen else [(n, True, True, True) for n in (1, 2, 3, 4)])
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["frist"]}, "'frist'.*\n.*'first"),
        ({"freeze": ["*"]}, "no parameter would be trained"),
        ({"freeze": ["first"], "until": [{"pattern": "last", "at": 1}]}, "'last'"),
        (
            {"freeze": ["first"], "until": [{"pattern": "first", "at": 1}, {"pattern": "first.bias", "at": 2}]},
            "nothing left to unfreeze.*\n.*'first.bias'",
        ),
        ({"freeze": ["*"], "until": [{"pattern": "*", "at": 1}]}, "no parameter would be trained"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(options, message):
    """A pattern without a match is refused with names that are near, and so is a run without anything to train."""
    with pytest.raises(ConfigError, match=message):
        fit(net(), [AdamW(), Freeze(**options)], columns(), steps=2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"freeze": "first"},
        {"freeze": ["first"], "until": [{"pattern": "first"}]},
        {"freeze": ["first"], "until": [{"pattern": "first", "at": "1 minute"}]},
        {"freeze": ["first"], "until": [{"pattern": "first", "at": 1, "to": 2}]},
    ],
)
def test_options_that_are_no_lists_or_moments_are_refused(options):
    """Nothing to freeze, a text for a list, and an entry without a moment are refused where the plugin is made."""
    with pytest.raises(ValueError, match=r"Received|until has no key"):
        Freeze(**options)


def test_fused_momentum_is_refused():
    """Torch's fused SGD cannot take up parameters later, which is said before step 0 with what to do."""
    until = [{"pattern": "first", "at": 1}]
    with pytest.raises(ConfigError, match=r"'sgd'(.|\n)*fused = false"):
        fit(net(), [SGD(momentum=0.9), Freeze(freeze=["first"], until=until)], columns(), steps=2)


def test_what_another_plugin_froze_cannot_be_unfrozen():
    """A parameter that is not in the optimizer would never move, and is refused by name."""

    class Adapter:
        @hookimpl(wrapper=True)
        def parameter_groups(self, run):
            run.model.first.weight.requires_grad_(False)
            return (yield)

    freeze = Freeze(freeze=["first"], until=[{"pattern": "first", "at": 1}])
    with pytest.raises(ConfigError, match=r"another plugin of the run froze(.|\n)*first.weight"):
        fit(net(), [AdamW(), Adapter(), freeze], columns(), steps=2)


# --- names and moments, shared with other plugins ----------------------------------------------------------------------

WORDS = st.sampled_from(["a", "bb", "layer", "1", "12", "norm"])
NAMES = st.lists(WORDS, min_size=1, max_size=5).map(".".join)


@settings(deadline=None)
@given(name=NAMES, end=st.integers(1, 5))
def test_pattern_is_a_module_or_a_parameter(name, end):
    """A name's own beginnings in whole parts match it, and longer or broken ones do not."""
    parts = name.split(".")
    assert matches(".".join(parts[:end]), name)
    assert matches("*" + ".".join(parts[:end]), name)
    assert not matches(name + ".x", name)
    assert not matches(name[:-1] + "?x", name)


def test_numbers_of_layers_match_whole():
    """Layer 1 is not layer 12, unless a wildcard says so."""
    assert matches("encoder.layer.1", "encoder.layer.1.weight")
    assert not matches("encoder.layer.1", "encoder.layer.12.weight")
    assert matches("encoder.layer.1*", "encoder.layer.12.weight")
    assert matches("*.[01].*", "encoder.layer.1.weight")


@pytest.mark.parametrize(
    ("given", "text", "steps"), [(0.25, "0.25", 5), (0, "0", 0), (3, "3 steps", 3), ("2 epochs", "2 epochs", None)]
)
def test_moment_is_written_as_it_is_read(given, text, steps):
    """A moment's text reads as the same moment, and its steps are known where they can be."""

    class Twenty:
        total_steps = 20

    made = Moment.parse(given)
    assert str(made) == text
    assert str(Moment.parse(text)) == text
    assert made.steps(Twenty()) == steps
