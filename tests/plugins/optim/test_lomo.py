"""`lomo` is gradient descent, made in the backward pass by `lomo-optim`."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import (
    Crash,
    assert_same_weights,
    columns,
    fit,
    groups_by_hand,
    net,
    train_by_hand,
)

from drivetrain import ConfigError, PlanError, Shuffled, hookimpl
from drivetrain.rng import derive_seed
from drivetrain_plugins import SGD, Accumulate, AdamW, Checkpoint, Clip, Evaluate, Linear, Lomo, OptimizerInBackward

lomo_optim = pytest.importorskip("lomo_optim", reason="needs: pip install --no-deps lomo-optim")

STEPS = 20


class Groups:
    """Two groups with rates of their own."""

    @hookimpl
    def parameter_groups(self, run):
        named = list(run.model.named_parameters())
        first = [(n, p) for n, p in named if n.startswith("first")]
        return [{"params": first, "lr": 0.3}, {"params": [(n, p) for n, p in named if not n.startswith("first")]}]


class Rates:
    """A schedule for each group."""

    @hookimpl
    def build_schedule(self):
        return [lambda s: 1 - s / STEPS, lambda s: 1.0 if s < 4 else 0.1]


def test_it_is_gradient_descent_bit_for_bit():
    """Twenty steps with groups, each with a schedule, leave the weights of torch.optim.SGD in a hand-written loop."""
    data, ours, theirs = columns(30), net(0.2), net(0.2)
    _, record = fit(ours, [Lomo(lr=0.1), Groups(), Rates()], data, steps=STEPS)
    first = list(theirs.first.parameters())
    rest = [p for p in theirs.parameters() if all(p is not q for q in first)]
    optimizer = torch.optim.SGD([{"params": first, "lr": 0.3}, {"params": rest}], lr=0.1, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Rates().build_schedule())
    history = train_by_hand(theirs, data, optimizer, steps=STEPS, scheduler=schedule)
    assert_same_weights(ours, theirs)
    assert record.of("loss") == [step["loss"] for step in history]


def test_fused_gradient_descent_is_near():
    """The plugin `sgd`, whose fused kernel rounds once less, ends within 1e-6 of it."""
    data, ours, fused = columns(30), net(), net()
    fit(ours, [Lomo(lr=0.1), Linear()], data, steps=STEPS)
    fit(fused, [SGD(lr=0.1), Linear()], data, steps=STEPS)
    for a, b in zip(ours.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_it_is_the_library_by_hand():
    """With one group, decay and a limit, twenty steps are those of Lomo.fused_backward called by hand."""
    data, ours, theirs = columns(30), net(), net()

    class One:
        @hookimpl
        def parameter_groups(self, run):
            return [{"params": list(run.model.named_parameters())}]

    fit(ours, [Lomo(lr=0.1, weight_decay=0.2, clip_grad_value=0.02), One(), Linear()], data, steps=STEPS)
    optimizer = lomo_optim.Lomo(theirs, lr=0.1, weight_decay=0.2, clip_grad_value=0.02)
    for step in range(STEPS):
        epoch, batch = divmod(step, 4)
        picked = Shuffled(30, 0).order(epoch)[batch * 8 : (batch + 1) * 8]
        torch.manual_seed(derive_seed(0, "step", step, 0))
        loss = theirs(**{name: column[picked] for name, column in data.items()})["loss"]
        optimizer.fused_backward(loss, 0.1 * (STEPS - step) / STEPS)
    assert_same_weights(ours, theirs)


def test_biases_and_norms_do_not_decay():
    """Decay is the groups': weights shrink by it before each update, biases and norms do not."""

    class Decayed(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1.0 - group["lr"] * group["decay"]).add_(p.grad, alpha=-group["lr"])

    data, ours, theirs = columns(30), net(), net()
    fit(ours, [Lomo(lr=0.1, weight_decay=0.5)], data, steps=STEPS)
    groups = [{"params": g["params"], "decay": g["weight_decay"]} for g in groups_by_hand(theirs, 0.5)]
    train_by_hand(theirs, data, Decayed(groups, lr=0.1), steps=STEPS)
    assert_same_weights(ours, theirs)


def test_one_gradient_is_alive_at_a_time():
    """While a backward pass runs there is the gradient that became ready and no other; none is left."""
    seen = []

    class Count:
        @hookimpl
        def assembled(self, run):
            parameters = list(run.model.parameters())
            for p in parameters:
                p.register_post_accumulate_grad_hook(lambda _: seen.append(sum(q.grad is not None for q in parameters)))

    model = net()
    fit(model, [Lomo(lr=0.1), Count()], columns(), steps=3)
    assert set(seen) == {1}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("ending", [(), (Crash(at=2),)], ids=["ended", "interrupted"])
def test_hooks_are_removed(ending):
    """After a run, ended or interrupted, a backward pass leaves gradients as ever and moves no weight."""
    model, data = net(), columns()
    try:
        fit(model, [Lomo(lr=0.1), *ending], data, steps=3)
    except KeyboardInterrupt:
        assert ending
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model(**data)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_resuming_is_exact(tmp_path):
    """A run that was killed goes on from its checkpoint bit for bit, evaluations in between."""
    data, straight, resumed = columns(30), net(0.2), net(0.2)

    def run(model, folder, at, *, resume=False):
        parts = [Lomo(lr=0.1), Linear(), Checkpoint(every="5 steps"), Evaluate(every="3 steps"), Crash(at=at)]
        from drivetrain import Trainer

        made = Trainer(model, parts, log_every="1 step", device="cpu", steps=STEPS, output=tmp_path / folder)
        made.fit(data, columns(8), resume=resume)

    run(straight, "a", 0)
    with pytest.raises(KeyboardInterrupt):
        run(net(0.2), "b", 12)
    run(resumed, "b", 0, resume=True)
    assert_same_weights(straight, resumed)


def test_a_step_without_target_items_changes_nothing():
    """A micro-batch whose labels are all ignored makes no backward pass and no update, decay included."""
    data, once, twice = columns(16), net(), net()
    data["labels"][:] = -100
    fit(once, [Lomo(lr=0.1, weight_decay=0.5)], data, steps=2)
    assert_same_weights(once, twice)


@pytest.mark.parametrize("other", [Clip(), Accumulate(), OptimizerInBackward(), AdamW()])
def test_what_cannot_be_right_is_refused_in_the_plan(other):
    """Accumulation, clipping by norm and other optimizers are refused before anything is built."""
    with pytest.raises(PlanError, match="lomo"):
        fit(net(), [Lomo(), other], columns(), steps=2)


def test_float16_weights_are_refused():
    """The library would scale the loss by itself and ask for a norm in the middle of the run: refused at assembly."""
    with pytest.raises(ConfigError, match=r"float16 weights(.|\n)*torch.float16"):
        fit(net().half(), [Lomo()], columns(), steps=2)
