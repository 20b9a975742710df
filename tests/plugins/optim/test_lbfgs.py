"""`lbfgs` is `torch.optim.LBFGS` with a closure over the step."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from plugin_helpers import BATCH, FEATURES, assert_same_weights, columns, cpu_run, fit, net
from torch import distributed

from drivetrain import ConfigError, PlanError, Shuffled, Trainer, hookimpl
from drivetrain.rng import derive_seed
from drivetrain.testing.digests import decode, digest, encode
from drivetrain.testing.probes import StopAt
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import LBFGS, Accumulate, Clip, Linear

OPTIONS = {"lr": 0.5, "max_iter": 4, "history_size": 3}
SEARCHES = {"none": None, "strong-wolfe": "strong_wolfe"}
searches = pytest.mark.parametrize("search", list(SEARCHES))


def count_forwards(model):
    """Return a list that grows by one at each forward."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def train_by_hand(model, data, optimizer, *, steps):
    """Train as the documentation of torch's class shows, with the run's dropout; return each step's loss."""
    model.train()
    rows, losses = len(data["labels"]), []
    for step in range(steps):
        epoch, batch = divmod(step, -(-rows // BATCH))
        picked = Shuffled(rows, 0).order(epoch)[batch * BATCH : (batch + 1) * BATCH]

        def closure(step=step, picked=picked):
            torch.manual_seed(derive_seed(0, "step", step, 0))
            optimizer.zero_grad()
            loss = model(**{name: column[picked] for name, column in data.items()})["loss"]
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


def theirs(model, search, **options):
    spared = {"first.bias", "norm.weight", "norm.bias", "last.bias"}
    named = dict(model.named_parameters())
    ordered = [p for n, p in named.items() if n not in spared] + [named[n] for n in named if n in spared]
    return torch.optim.LBFGS(ordered, **{**OPTIONS, **options}, line_search_fn=SEARCHES[search])


@searches
def test_run_equals_torch_by_hand(search):
    """Twenty steps with dropout leave the bits of torch's class with a closure, after as many forwards."""
    data, ours, other = columns(30), net(0.2), net(0.2)
    calls, expected = count_forwards(ours), count_forwards(other)
    trainer, record = fit(ours, [LBFGS(**OPTIONS, line_search=search)], data, steps=20)
    by_hand = theirs(other, search)
    losses = train_by_hand(other, data, by_hand, steps=20)
    assert_same_weights(ours, other)
    assert record.of("loss") == losses  # that of the first evaluation, as with any other optimizer
    evaluations = trainer.run.optimizer.state[trainer.run.optimizer.param_groups[0]["params"][0]]["func_evals"]
    assert len(calls) == len(expected) == evaluations > 20


class Doubles:
    """Double the features of what is prepared."""

    @hookimpl(wrapper=True)
    def prepare(self, micro):
        micro.batch = {**micro.batch, "features": 2 * micro.batch["features"]}
        return (yield)


def test_batches_are_prepared_once_for_each_evaluation():
    """Who changes batches in `prepare` is given them as they came, however often the loss is evaluated."""
    data, ours, other = columns(30), net(), net()
    fit(ours, [LBFGS(**OPTIONS), Doubles()], data, steps=5)
    fit(other, [LBFGS(**OPTIONS)], {**data, "features": 2 * data["features"]}, steps=5)
    assert_same_weights(ours, other)


class Squares(torch.nn.Module):
    """Least squares, in float64."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(FEATURES, dtype=torch.float64))

    def forward(self, features, labels):
        return torch.square(features.double() @ self.weight - labels).mean()


def test_least_squares_are_solved():
    """A line search on all rows finds the solution that linear algebra finds."""
    data, model = columns(BATCH), Squares()
    fit(model, [LBFGS(max_iter=50, line_search="strong-wolfe")], data, steps=1)
    solved = torch.linalg.lstsq(data["features"].double(), data["labels"].double()).solution
    torch.testing.assert_close(model.weight.detach(), solved, rtol=1e-6, atol=1e-6)


def go_on(plugins, data, state, steps):
    trainer = Trainer(net(0.2), plugins, device="cpu", steps=steps)
    run = trainer.assemble(data)
    if state is not None:
        run.load_state_dict(state)
    run.settings.log_every.start(run)
    run.model.train()
    run.hooks.fit(run)
    return run


@searches
def test_resume_is_exact(search):
    """The memory, lists of tensors and numbers, goes through JSON and back, and the run goes on bit for bit."""
    data = columns(30)

    def plugin():
        return LBFGS(**OPTIONS, line_search=search)

    straight = go_on([plugin(), Linear()], data, None, 9)
    stopped = go_on([plugin(), Linear(), StopAt(4)], data, None, 9)
    (memory,) = stopped.state_dict()["optimizer"]["state"].values()
    assert len(memory["old_dirs"]) == OPTIONS["history_size"]
    resumed = go_on([plugin(), Linear()], data, decode(*encode(stopped.state_dict())), 9)
    assert digest(resumed) == digest(straight)


class SkipsAt:
    """Skip step 3 when its gradients are there for the `evaluation`th time."""

    facts: ClassVar = {"may_skip": True}

    def __init__(self, evaluation):
        self.left, self.heard, self.kept = evaluation, 0, {}

    @hookimpl
    def gradients_ready(self, step):
        if step.number == 3:
            self.heard += 1
            if self.heard == self.left:
                step.skip("the test asked for it")

    @hookimpl
    def step_end(self, step):
        self.kept[step.number] = digest(step.run, "model", "optimizer")


@searches
@pytest.mark.parametrize("evaluation", [1, 2, 4])
def test_a_step_skipped_in_any_evaluation_changes_nothing(search, evaluation):
    """Weights and memory are as before the step, no other evaluation is made, and the run goes on from there."""
    data, ours, other = columns(30), net(0.2), net(0.2)
    skips = SkipsAt(evaluation)
    trainer, _ = fit(ours, [LBFGS(**OPTIONS, line_search=search), skips], data, steps=6)
    assert skips.heard == evaluation
    assert skips.kept[3] == skips.kept[2] != skips.kept[4]
    assert (trainer.run.progress.applied, trainer.run.skipped_steps) == (5, 1)
    first = SkipsAt(1)
    fit(other, [LBFGS(**OPTIONS, line_search=search), first], data, steps=6)
    assert_same_weights(ours, other)
    assert skips.kept == first.kept


def test_micro_batches_without_items_are_skipped():
    """A step without target items is not evaluated at all."""
    data, model = columns(2 * BATCH), net()
    data["labels"][:] = -100
    before = net()
    fit(model, [LBFGS(**OPTIONS)], data, steps=2)
    assert_same_weights(model, before)


def test_accumulation_is_one_evaluation():
    """Micro-batches of two make the gradients of one batch of both, to rounding, in every evaluation."""
    data, ours, whole = columns(2 * BATCH), net(), net()
    fit(ours, [LBFGS(**OPTIONS), Accumulate(2)], data, steps=1)
    optimizer = theirs(whole, "none")

    def closure():
        optimizer.zero_grad()
        loss = whole(**data)["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    for left, right in zip(ours.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(left, right)


class AllReduce:
    """Add the gradients over ranks."""

    provides = ("data-parallel",)

    @hookimpl
    def gradients_ready(self, step):
        for parameter in step.run.parameters:
            distributed.all_reduce(parameter.grad)


class OneRankSkips(SkipsAt):
    """Skip on the second rank alone."""

    @hookimpl
    def gradients_ready(self, step):
        if step.run.rank == 1:
            super().gradients_ready(step)


def on_ranks(skip):
    model = net()
    plugins = [LBFGS(**OPTIONS, line_search="strong-wolfe"), AllReduce(), *([OneRankSkips(3)] if skip else [])]
    trainer = Trainer(model, plugins, device="cpu", steps=5)
    trainer.fit(columns(4 * BATCH))
    evaluations = trainer.run.optimizer.state[trainer.run.optimizer.param_groups[0]["params"][0]]["func_evals"]
    return digest(trainer.run, "model", "optimizer"), evaluations, trainer.run.skipped_steps


@pytest.mark.parametrize("skip", [False, True])
def test_ranks_search_together(skip):
    """Every rank sees the whole loss and takes the same lengths; what one skips in the search, all skip."""
    one, two = run_ranks(on_ranks, skip)
    assert one == two
    assert one[2] == int(skip)


def by_groups(*groups):
    model = net()
    run = Trainer(model, [LBFGS()], device="cpu", steps=1).assemble(columns())
    named = dict(model.named_parameters())
    given = [{**options, "params": [(name, named[name]) for name in names]} for options, *names in groups]
    return LBFGS().build_optimizer(run, given)


def test_groups_without_decay_are_one():
    """Groups that differ in a decay of 0 alone are merged, in their order; a rate they share is kept."""
    (group,) = by_groups(({"lr": 0.3}, "last.weight"), ({"lr": 0.3, "weight_decay": 0.0}, "last.bias")).param_groups
    assert group["param_names"] == ["last.weight", "last.bias"]
    assert group["lr"] == 0.3


@pytest.mark.parametrize(
    "groups",
    [
        [({"weight_decay": 0.1}, "last.weight"), ({"weight_decay": 0.1}, "last.bias")],
        [({"weight_decay": 0.1}, "last.weight"), ({}, "last.bias")],
        [({"lr": 0.1}, "last.weight"), ({}, "last.bias")],
    ],
)
def test_other_groups_are_refused(groups):
    """A decay above 0, or rates that differ, cannot be had."""
    with pytest.raises(ConfigError, match="lbfgs has one group of parameters and no weight decay"):
        by_groups(*groups)


def test_nothing_to_update_is_refused():
    """A model whose parameters are all frozen is told so."""
    with pytest.raises(ConfigError, match="lbfgs has nothing to update"):
        LBFGS().build_optimizer(cpu_run(), [])


class Limits:
    """A plugin that limits gradients by a name nobody knows."""

    @hookimpl
    def clip_gradients(self, step):
        for parameter in step.run.parameters:
            parameter.grad.clamp_(-1, 1)


def test_what_changes_gradients_afterwards_is_refused():
    """Only the first gradients would be limited: `clip` is refused in the plan, another plugin when all is built."""
    with pytest.raises(PlanError, match="plugins 'lbfgs' and 'clip' cannot be combined"):
        fit(net(), [LBFGS(), Clip()], columns(), steps=1)
    with pytest.raises(ConfigError, match="plugins 'lbfgs' and 'limits' cannot be combined"):
        fit(net(), [LBFGS(), Limits()], columns(), steps=1)


def test_parameters_of_two_types_are_refused():
    """One vector has one type."""
    model = net()
    model.last.double()
    with pytest.raises(ConfigError, match="must be of one type and on one device"):
        fit(model, [LBFGS()], columns(), steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr must be a number > 0"),
        ({"max_iter": 0}, "max_iter must be a number >= 1"),
        ({"line_search": "strong_wolfe"}, "did you mean 'strong-wolfe'"),
        ({"tolerance_grad": -1}, "tolerance_grad must be a number >= 0"),
    ],
)
def test_values_out_of_bounds_are_refused(options, message):
    """A value out of bounds is refused with the bound and the value."""
    with pytest.raises(ValueError, match=message):
        LBFGS(**options)
