"""`group-schedules` gives each group of the optimizer the rates of its own schedule."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import assert_same_weights, columns, fit, net

from drivetrain import ConfigError, Trainer, hookimpl
from drivetrain.testing.digests import digest
from drivetrain.testing.probes import StopAt
from drivetrain_plugins import SGD, GroupSchedules, Linear, ParameterGroups


class Named:
    """Make groups with names and rates of their own."""

    @hookimpl
    def parameter_groups(self, run):
        named = dict(run.model.named_parameters())
        parts = {"layers.0": ("first",), "layers.1": ("norm",), "head": ("last",)}
        return [
            {"name": name, "lr": rate, "params": [(n, p) for n, p in named.items() if n.startswith(which)]}
            for (name, which), rate in zip(parts.items(), (0.5, 0.25, 0.125), strict=True)
        ]


class Rates:
    """Keep each group's rate in each step."""

    def __init__(self):
        self.all = []

    @hookimpl
    def gradients_ready(self, step):
        self.all.append([group["lr"] for group in step.run.optimizer.param_groups])


TABLES = {"layers.*": {"plugin": "linear", "warmup": 2}, "2": {"plugin": "step", "size": 2, "gamma": 0.5}}


def test_run_equals_lambda_lr_by_hand():
    """Weights and rates are those of torch's LambdaLR with one function a group."""
    data, ours, theirs, rates = columns(), net(), net(), Rates()
    fit(ours, [SGD(momentum=0.9), Named(), GroupSchedules(groups=TABLES), rates], data, steps=10)
    groups = [
        {"params": list(module.parameters()), "lr": rate}
        for module, rate in ((theirs.first, 0.5), (theirs.norm, 0.25), (theirs.last, 0.125))
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)

    def line(step):
        return step / 2 if step < 2 else (10 - step) / 8

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [line, line, lambda step: 0.5 ** (step // 2)])
    from drivetrain import Shuffled

    for step in range(10):
        epoch, place = divmod(step, 5)
        picked = Shuffled(40, 0).order(epoch)[8 * place : 8 * place + 8]
        theirs(**{name: column[picked] for name, column in data.items()})["loss"].backward()
        assert rates.all[step] == pytest.approx([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert_same_weights(ours, theirs)


def test_names_go_before_patterns_and_the_default_takes_the_rest():
    """An exact name wins wherever it stands, then the first pattern; who is not named follows the default."""
    rates = Rates()
    tables = {"lay*": {"plugin": "exponential", "gamma": 0.5}, "layers.1": {"plugin": "constant"}}
    schedules = GroupSchedules(groups=tables, default={"plugin": "exponential", "gamma": 0.25})
    fit(net(), [SGD(), Named(), schedules, rates], columns(), steps=3)
    assert rates.all == [[0.5, 0.25, 0.125], [0.25, 0.25, 0.03125], [0.125, 0.25, 0.0078125]]


def test_groups_of_parameter_groups_are_found_by_name():
    """The names are those of `parameter-groups`."""
    rates = Rates()
    grouped = ParameterGroups(rules=[{"pattern": "last.*", "name": "head", "lr": 0.5}])
    schedules = GroupSchedules(groups={"head": {"plugin": "exponential", "gamma": 0.5}})
    run = fit(net(), [SGD(lr=1.0), grouped, schedules, rates], columns(), steps=3)[0].run
    heads = [group.get("name") == "head" for group in run.optimizer.param_groups]
    assert any(heads)
    assert not all(heads)
    assert rates.all[2] == [0.125 if head else 1.0 for head in heads]


def test_one_schedule_for_all_is_that_schedule():
    """With "*" the run is that of the schedule alone."""
    one, other = net(dropout=0.2), net(dropout=0.2)
    fit(one, [SGD(lr=0.1), Linear(warmup=2)], columns(), steps=6)
    fit(other, [SGD(lr=0.1), GroupSchedules(groups={"*": {"plugin": "linear", "warmup": 2}})], columns(), steps=6)
    assert_same_weights(one, other)


def test_resume_is_exact_with_a_chain_in_a_group():
    """What a schedule keeps is saved under its group's name."""
    parts = [{"plugin": "exponential", "gamma": 0.5, "until": "20 tokens"}, {"plugin": "constant"}]

    def begin(*more):
        schedules = GroupSchedules(groups={"head": {"plugin": "chain", "parts": parts}})
        return Trainer(net(), [SGD(), Named(), schedules, *more], steps=7, device="cpu").assemble(columns())

    def go_on(run):
        run.model.train()
        run.hooks.fit(run)
        return run

    straight, part, rest = go_on(begin()), go_on(begin(StopAt(4))), begin()
    rest.load_state_dict(part.state_dict())
    assert digest(go_on(rest)) == digest(straight)
    assert straight.plugins["group-schedules"].state_dict() == {"head": {"starts": [0, 3]}}


def test_a_chain_by_epochs_in_a_group():
    """Within a group epochs are those of the run."""
    parts = [{"plugin": "exponential", "gamma": 0.5, "until": "1 epoch"}, {"plugin": "constant"}]
    rates = Rates()
    schedules = GroupSchedules(groups={"head": {"plugin": "chain", "parts": parts}})
    fit(net(), [SGD(), Named(), schedules, rates], columns(), epochs=2)
    assert [rate / 0.125 for *_, rate in rates.all] == [*(0.5**n for n in range(5)), 1, 1, 1, 1, 1]


def test_refusals():
    """A name that no group has, a table without a schedule, and a metric-driven schedule are told."""
    with pytest.raises(ConfigError, match=r"(?s)follows 'tail'.*\['layers.0', 'layers.1', 'head'\]"):
        fit(net(), [SGD(), Named(), GroupSchedules(groups={"tail": {"plugin": "linear"}})], columns(), steps=1)
    with pytest.raises(ConfigError, match="'head' needs plugin"):
        GroupSchedules(groups={"head": {"warmup": 2}})
    with pytest.raises(ConfigError, match="Greedy is no function of the steps"):
        GroupSchedules(groups={"*": {"plugin": "greedy"}})
