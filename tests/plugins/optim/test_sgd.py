"""`sgd` is `torch.optim.SGD` over the run's groups."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import assert_same_weights, columns, cpu_run, fit, groups_by_hand, net, train_by_hand

from drivetrain.loop import Defaults
from drivetrain_plugins import SGD


def test_groups_carry_the_decay():
    """Weights decay; biases and norms do not."""
    model = net()
    run = cpu_run(model=model)
    optimizer = SGD(lr=0.2, weight_decay=0.3).build_optimizer(run, Defaults(run, model, {}).parameter_groups(run))
    for group, by_hand in zip(optimizer.param_groups, groups_by_hand(model, 0.3), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in by_hand["params"]]
        assert (group["lr"], group["weight_decay"]) == (0.2, by_hand["weight_decay"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "weight_decay": 0.05},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "fused": False},
        {"momentum": 0.9, "foreach": True},
    ],
)
def test_run_equals_torch_by_hand(options):
    """Twelve steps over three epochs leave the very bits that torch.optim.SGD leaves in a hand-written loop."""
    data, ours, theirs = columns(30), net(), net()
    _, record = fit(ours, [SGD(lr=0.1, **options)], data, steps=12)
    given = {"fused": not options.get("foreach", False), **options}
    groups = groups_by_hand(theirs, given.pop("weight_decay", 0.0))
    history = train_by_hand(theirs, data, torch.optim.SGD(groups, lr=0.1, **given), steps=12)
    assert_same_weights(ours, theirs)
    assert record.of("loss") == [step["loss"] for step in history]


def test_first_step_is_the_closed_form():
    """Without momentum, a step subtracts the rate times gradient plus decayed weight."""
    data, model = columns(8), net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(**data)["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    fit(model, [SGD(lr=0.1, weight_decay=0.5)], data, steps=1)
    for name, parameter in model.named_parameters():
        decay = 0.5 * before[name] if name in ("first.weight", "last.weight") else 0.0
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * (gradients[name] + decay))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nesterov": True}, "nesterov needs a momentum above 0"),
        ({"dampening": 0.5}, "dampening needs a momentum above 0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.5}, "nesterov is defined without dampening"),
        ({"momentum": 0.9, "dampening": 1.5}, "dampening must be a number >= 0 and <= 1"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    """Variants of no momentum, and Nesterov's with dampening, are refused with what to do."""
    with pytest.raises(ValueError, match=message):
        SGD(**options)
