"""`optimizer-in-backward` takes the optimizer's own steps, a parameter at a time, and holds one gradient at most."""

from __future__ import annotations

import weakref

import pytest
import torch
from plugin_helpers import Crash, assert_same_weights, columns, fit, net

from drivetrain import Catalogue, ConfigError, PlanError, Trainer, hookimpl, option, plugin
from drivetrain.testing.digests import decode, digest, encode
from drivetrain_plugins import (
    SGD,
    Accumulate,
    AdamW,
    Checkpoint,
    Clip,
    Evaluate,
    Linear,
    OptimizerInBackward,
)

STEPS = 12


class Groups:
    """Three groups: a rate of its own, decay, and a name that no optimizer knows."""

    @hookimpl
    def parameter_groups(self, run):
        named = dict(run.model.named_parameters())
        own = [(n, p) for n, p in named.items() if n.startswith("first")]
        decayed = [(n, p) for n, p in named.items() if n == "last.weight"]
        rest = [(n, p) for n, p in named.items() if not n.startswith("first") and n != "last.weight"]
        return [{"params": own, "lr": 0.2}, {"params": decayed, "weight_decay": 0.3}, {"params": rest, "tag": "rest"}]


class Rates:
    """A schedule for each group."""

    @hookimpl
    def build_schedule(self, run):
        total = run.total_steps
        falls, drops, rises = (lambda s: 1 - s / total), (lambda s: 1.0 if s < 4 else 0.1), (lambda s: (s + 1) / total)
        return [falls, drops, rises, drops][: len(run.optimizer.param_groups)]


def named(name, **options):
    return Catalogue().entry(name).load()(**options)


OPTIMIZERS = {
    "fused adamw": lambda: AdamW(lr=0.03, weight_decay=0.1),
    "adamw": lambda: AdamW(lr=0.03, weight_decay=0.1, fused=False),
    "sgd": lambda: SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    "adam": lambda: named("adam", lr=0.03, weight_decay=0.1),
    "adafactor": lambda: named("adafactor", lr=0.03),
    "rmsprop": lambda: named("rmsprop", lr=0.01, momentum=0.5),
    "two in one": lambda: named("muon", lr=0.02),
}
# These count steps in their groups, some in tensors that they change in place, one from a later step on.
COUNTING = {
    "schedule-free-adamw": ("schedulefree", {"lr": 0.05, "warmup": 3}),
    "schedule-free-radam": ("schedulefree", {"lr": 0.05}),
    "stable-adamw": ("optimi", {"lr": 0.05}),
    "ademamix": ("pytorch_optimizer", {"lr": 0.05}),
}


@pytest.mark.parametrize("name", COUNTING)
def test_what_groups_count_is_counted_once_a_step(name):
    """Optimizers that count by group end bit for bit where they do without the plugin, in steps without items, too."""
    module, options = COUNTING[name]
    pytest.importorskip(module)
    data, plain, layerwise = columns(30), net(0.2), net(0.2)
    data["labels"][:4] = -100
    one, _ = fit(plain, [named(name, **options)], data, steps=STEPS)
    two, _ = fit(layerwise, [OptimizerInBackward(), named(name, **options)], data, steps=STEPS)
    assert_same_weights(plain, layerwise)
    parts = ("model", "optimizer", "progress", "counters")
    assert digest(one.run, *parts) == digest(two.run, *parts)


def test_a_group_without_gradients_is_counted():
    """A group of which no parameter is used in a step counts that step, as it does without the plugin."""
    pytest.importorskip("schedulefree")

    class Sometimes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)
            self.calls = 0

        def forward(self, features, labels):
            self.calls += 1
            logits = self.used(features) + (self.idle(features) if self.calls % 2 else 0)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels)}

    class Apart:
        @hookimpl
        def parameter_groups(self, run):
            named = list(run.model.named_parameters())
            return [
                {"params": [(n, p) for n, p in named if n.startswith("used")]},
                {"params": [(n, p) for n, p in named if n.startswith("idle")], "lr": 0.3},
            ]

    torch.manual_seed(1)
    plain, layerwise = Sometimes(), Sometimes()
    layerwise.load_state_dict(plain.state_dict())
    one, _ = fit(plain, [named("schedule-free-sgd"), Apart()], columns(), steps=STEPS)
    two, _ = fit(layerwise, [named("schedule-free-sgd"), Apart(), OptimizerInBackward()], columns(), steps=STEPS)
    assert_same_weights(plain, layerwise)
    assert digest(one.run, "optimizer") == digest(two.run, "optimizer")


@pytest.mark.parametrize("around", [(), (Linear(warmup=2),), (Groups(), Rates())], ids=["", "linear", "groups"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_is_the_plain_optimizer_bit_for_bit(make, around):
    """Weights, losses, the optimizer's saved state and the counters equal those of the run without the plugin."""
    data, plain, layerwise = columns(30), net(0.2), net(0.2)
    one, record = fit(plain, [make(), *around], data, steps=STEPS)
    two, other = fit(layerwise, [make(), *around, OptimizerInBackward()], data, steps=STEPS)
    assert_same_weights(plain, layerwise)
    assert record.of("loss") == other.of("loss")
    assert digest(one.run, "model", "optimizer", "progress") == digest(two.run, "model", "optimizer", "progress")


def test_one_gradient_is_alive_at_a_time():
    """While a backward pass runs no second gradient is alive, and after it there is none."""

    @plugin(role="report", effect="observes")
    class Count:
        """Count gradients whenever one becomes ready, before it is used."""

        alive: list[int] = option(factory=list, init=False)
        left: list[int] = option(factory=list, init=False)
        _seen: list[object] = option(factory=list, init=False)

        @hookimpl
        def assembled(self, run):
            for p in run.model.parameters():
                p.register_post_accumulate_grad_hook(self._ready)

        def _ready(self, p):
            self._seen.append(weakref.ref(p.grad))
            self.alive.append(sum(ref() is not None for ref in self._seen))

        @hookimpl
        def optimizer_step(self, step):
            self.left.append(sum(p.grad is not None for p in step.run.model.parameters()))
            step.run.optimizer.step()

    @plugin(role="report", effect="observes")
    class Watch(Count):
        """The same beside a plugin that owns `optimizer_step`."""

        @hookimpl(wrapper=True)
        def optimizer_step(self, step):
            self.left.append(sum(p.grad is not None for p in step.run.model.parameters()))
            return (yield)

    plain, layerwise, parameters = Count(), Watch(), len(list(net().parameters()))
    fit(net(), [AdamW(lr=0.01), plain], columns(), steps=3)
    fit(net(), [AdamW(lr=0.01), layerwise, OptimizerInBackward()], columns(), steps=3)
    assert max(plain.alive) == parameters
    assert plain.left == [parameters] * 3
    assert layerwise.alive == [1] * parameters * 3
    assert layerwise.left == [0] * 3


@pytest.mark.parametrize("ending", [(), (Crash(at=2),)], ids=["ended", "interrupted"])
def test_hooks_are_removed(ending):
    """After a run, ended or interrupted, a backward pass leaves gradients as ever and moves no weight."""
    model, data = net(), columns()
    try:
        fit(model, [AdamW(lr=0.1), OptimizerInBackward(), *ending], data, steps=3)
    except KeyboardInterrupt:
        assert ending
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model(**data)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize("make", [OPTIMIZERS["fused adamw"], OPTIMIZERS["two in one"]], ids=["adamw", "two in one"])
def test_resuming_is_exact_in_either_way(make, tmp_path):
    """A state from the middle, through the checkpoint's encoding, goes on bit for bit, with the plugin and without."""
    data, kept, straight = columns(30), {}, net(0.2)

    class Take:
        @hookimpl
        def step_end(self, step):
            if step.run.progress.step == 5:
                kept["state"] = encode(step.run.state_dict())

    fit(straight, [make(), Linear(), OptimizerInBackward(), Take()], data, steps=STEPS)
    for more in ((OptimizerInBackward(),), ()):
        resumed = net(0.2)
        trainer = Trainer(resumed, [make(), Linear(), *more], device="cpu", steps=STEPS)
        run = trainer.assemble(data)
        run.load_state_dict(decode(*kept["state"]))
        run.settings.log_every.start(run)
        run.model.train()
        run.hooks.fit(run)
        assert_same_weights(straight, resumed)


def test_evaluations_and_checkpoints_in_between_change_nothing(tmp_path):
    """Evaluating and saving in the middle leave the run as it was: neither makes a backward pass."""
    data, alone, watched = columns(30), net(), net()
    fit(alone, [AdamW(lr=0.03), OptimizerInBackward()], data, steps=STEPS)
    more = [Evaluate(every="3 steps"), Checkpoint(every="4 steps")]
    fit(watched, [AdamW(lr=0.03), OptimizerInBackward(), *more], data, columns(8), steps=STEPS, output=tmp_path)
    assert_same_weights(alone, watched)


def test_a_step_without_target_items_changes_nothing():
    """A micro-batch whose labels are all ignored makes no backward pass: neither weights nor state move."""
    data, once, twice = columns(16), net(), net()
    data["labels"][:] = -100
    fit(once, [AdamW(lr=0.03), OptimizerInBackward()], data, steps=2)
    assert_same_weights(once, twice)


def test_a_parameter_that_is_used_twice_is_updated_once():
    """A weight that two layers share is updated from the sum of its gradients, as without the plugin."""

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(6, 6)

        def forward(self, features, labels):
            hidden = self.inner(torch.tanh(self.inner(features)))
            return {"loss": torch.nn.functional.cross_entropy(hidden, labels)}

    torch.manual_seed(1)
    plain = Tied()
    layerwise = Tied()
    layerwise.load_state_dict(plain.state_dict())
    fit(plain, [AdamW(lr=0.03)], columns(), steps=5)
    fit(layerwise, [AdamW(lr=0.03), OptimizerInBackward()], columns(), steps=5)
    assert_same_weights(plain, layerwise)


@plugin(role="control", effect="changes")
class Halve:
    """Change gradients where all of them are there."""

    @hookimpl
    def gradients_ready(self, step):
        """Halve them."""
        for p in step.run.parameters:
            p.grad *= 0.5


@plugin(role="control")
class MaySkip:
    """Skip a step, now and then."""

    facts = {"may_skip": True}  # noqa: RUF012


class Ranked:
    """An optimizer whose rate falls from one parameter of a group to the next, as GrokAdamW's first beta does."""

    @hookimpl
    def build_optimizer(self, groups):
        class Falling(torch.optim.SGD):
            @torch.no_grad()
            def step(self, closure=None):
                for group in self.param_groups:
                    for place, p in enumerate(group["params"]):
                        p.add_(p.grad, alpha=-group["lr"] / (1 + place))

        return Falling(groups, lr=0.1)


class Plan:
    """Take two micro-batches a step."""

    facts = {"accumulation": 2}  # noqa: RUF012


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Clip(), "'optimizer-in-backward' and 'clip' cannot be combined"),
        (Accumulate(batches=2), "'optimizer-in-backward' and 'accumulate' cannot be combined"),
        (Plan(), "accumulation=2 would not be read"),
    ],
)
def test_what_needs_whole_gradients_is_refused_in_the_plan(other, message):
    """Clipping and accumulation are refused before anything is built."""
    with pytest.raises(PlanError, match=message):
        fit(net(), [AdamW(), OptimizerInBackward(), other], columns(), steps=2)


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ([AdamW(), Halve()], "cannot be combined with 'halve'"),
        ([AdamW(), MaySkip()], "'may-skip' may skip an update"),
        ([named("lbfgs")], "lbfgs"),
        ([Ranked()], "'ranked' cannot(.|\n)*depends on the parameters beside it"),
    ],
)
def test_what_cannot_be_right_is_refused_at_assembly(plugins, message):
    """Plugins of unknown names are found by what they act on, and optimizers by what one step of a copy changes."""
    model = net()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        fit(model, [*plugins, OptimizerInBackward()], columns(), steps=2)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
