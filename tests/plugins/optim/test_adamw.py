"""`adamw` is `torch.optim.AdamW` over the run's groups."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import assert_same_weights, columns, cpu_run, fit, groups_by_hand, net, train_by_hand

from drivetrain.loop import Defaults
from drivetrain_plugins import AdamW
from drivetrain_plugins.optim._fused_adamw import FusedAdamW


def build(plugin, model, device="cpu"):
    run = cpu_run(model=model)
    run.device = torch.device(device)
    return plugin.build_optimizer(run, Defaults(run, model, {}).parameter_groups(run))


def test_groups_decay_weights_and_spare_biases_and_norms():
    """The first group holds the weights and the decay, the second biases and norms without decay."""
    model = net()
    optimizer = build(AdamW(lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6), model)
    expected = groups_by_hand(model, 0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group, by_hand in zip(optimizer.param_groups, expected, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in by_hand["params"]]
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.8, 0.95), 1e-6)


def test_without_decay_all_parameters_share_a_group():
    """Groups that differ in nothing are one, so that a fused step is one call."""
    model = net()
    (group,) = build(AdamW(lr=0.01), model).param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    ("asked", "device", "fused"), [(None, "cpu", True), (None, "meta", False), (False, "cpu", False)]
)
def test_fused_follows_the_device_unless_it_is_set(asked, device, fused):
    """The fused kernel is taken where the device has it, and left where the user says so."""
    model = net().to(device)
    assert build(AdamW(fused=asked), model, device).param_groups[0]["fused"] is fused


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("variant", [{"fused": True}, {"fused": False}, {"foreach": True}, {"amsgrad": True}])
def test_run_equals_torch_by_hand(weight_decay, variant):
    """Twelve steps over three epochs leave the very bits that torch.optim.AdamW leaves in a hand-written loop."""
    data, ours, theirs = columns(30), net(), net()
    options = {"lr": 0.03, "betas": (0.8, 0.99), "eps": 1e-7, **variant}
    _, record = fit(ours, [AdamW(**options, weight_decay=weight_decay)], data, steps=12)
    fused = {"fused": options.pop("fused", "foreach" not in options)}
    by_hand = torch.optim.AdamW(groups_by_hand(theirs, weight_decay), **options, **fused)
    history = train_by_hand(theirs, data, by_hand, steps=12)
    assert_same_weights(ours, theirs)
    assert record.of("loss") == [step["loss"] for step in history]


def test_the_kept_lists_are_of_the_plain_kernel():
    """What the fast path does not know goes through torch's own class."""
    assert type(build(AdamW(), net())) is FusedAdamW
    assert type(build(AdamW(amsgrad=True), net())) is torch.optim.AdamW
    assert type(build(AdamW(foreach=True), net())) is torch.optim.AdamW


def test_weight_decay_changes_the_run():
    """The comparison with the hand-written loop can fail: without decay the weights are others."""
    data, decayed, plain = columns(), net(), net()
    fit(decayed, [AdamW(lr=0.03, weight_decay=0.1)], data, steps=3)
    fit(plain, [AdamW(lr=0.03)], data, steps=3)
    assert not torch.equal(decayed.first.weight, plain.first.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be a number > 0"),
        ({"lr": float("nan")}, "lr must be a number > 0"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, "betas must be a number >= 0 and < 1"),
        ({"weight_decay": -0.1}, "weight_decay must be a number >= 0"),
    ],
)
def test_values_out_of_bounds_are_refused(options, message):
    """A value out of bounds is refused with the bound and the value."""
    with pytest.raises(ValueError, match=message):
        AdamW(**options)
