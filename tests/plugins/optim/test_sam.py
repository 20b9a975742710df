"""`sam` takes the gradients at weights perturbed along the gradient, and leaves everything else as it was."""

from __future__ import annotations

import pytest
import torch
from around_helpers import Skip, same, weights_of
from plugin_helpers import BATCH, CLASSES, FEATURES, assert_same_weights, columns, fit, net

from drivetrain import Shuffled, Trainer, TrainingError, hookimpl
from drivetrain.rng import derive_seed
from drivetrain_plugins import SAM, SGD, Accumulate, Clip


def by_hand(model, data, *, steps, rho, adaptive=False, eta=0.01, micros=1, max_norm=None, lr=0.3):
    """Train with SAM as its paper has it: perturb with the gradient of the whole step; return the losses at the weights."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr), []
    order = Shuffled(len(data["labels"]), 0).order(0)
    for step in range(steps):
        rows = [
            order[start : start + BATCH] for start in range(step * micros * BATCH, (step + 1) * micros * BATCH, BATCH)
        ]

        def gradients(rows=rows, step=step):
            torch.manual_seed(derive_seed(0, "step", step, 0))
            optimizer.zero_grad()
            total = 0.0
            for picked in rows:
                loss = model(**{name: column[picked] for name, column in data.items()})["loss"] / len(rows)
                loss.backward()
                total += loss.item()
            return total

        losses.append(gradients())
        weights = [p.detach().clone() for p in model.parameters()]
        buffers = [b.clone() for b in model.buffers()]
        with torch.no_grad():
            sizes = [p.abs() + eta if adaptive else torch.ones_like(p) for p in model.parameters()]
            norm = sum((t * p.grad).square().sum() for t, p in zip(sizes, model.parameters(), strict=True)).sqrt()
            for t, p in zip(sizes, model.parameters(), strict=True):
                p.add_(rho * t * t * p.grad / norm)
        gradients()
        with torch.no_grad():
            for p, before in zip(model.parameters(), weights, strict=True):
                p.copy_(before)
            for b, before in zip(model.buffers(), buffers, strict=True):
                b.copy_(before)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return losses


def assert_close(ours, theirs):
    for (name, got), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "options", [{"rho": 0.3}, {"rho": 1.0, "adaptive": True}, {"rho": 1.0, "adaptive": True, "eta": 0.2}]
)
@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("max_norm", [None, 0.2])
def test_run_equals_the_paper_by_hand(options, micros, max_norm):
    """With dropout, accumulation and clipping, weights and losses are those of a hand-written SAM (and ASAM)."""
    data, ours, theirs = columns(120), net(0.3), net(0.3)
    plugins = [SGD(lr=0.3), SAM(**options), Accumulate(batches=micros), *([Clip(norm=max_norm)] if max_norm else [])]
    _, record = fit(ours, plugins, data, steps=5)
    losses = by_hand(theirs, data, steps=5, micros=micros, max_norm=max_norm, **options)
    assert_close(ours, theirs)
    assert record.of("loss") == pytest.approx(losses, rel=1e-5)
    plain = net(0.3)
    fit(plain, [p for p in plugins if not isinstance(p, SAM)], data, steps=5)
    assert (ours.first.weight - plain.first.weight).abs().max() > 1e-3


def test_batch_norm_follows_the_first_pass_only():
    """Running statistics, and the count of batches, are those of one pass at the weights for each step."""

    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.body = torch.nn.Sequential(
                torch.nn.Linear(FEATURES, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, CLASSES)
            )

        def forward(self, features, labels):
            return {"loss": torch.nn.functional.cross_entropy(self.body(features), labels)}

    data, ours, theirs = columns(), Normed(), Normed()
    fit(ours, [SGD(lr=0.3), SAM(rho=0.5)], data, steps=4)
    by_hand(theirs, data, steps=4, rho=0.5)
    assert_close(ours, theirs)
    assert ours.body[1].num_batches_tracked == 4


def test_weights_are_put_back_bit_for_bit():
    """A step that is skipped after both passes leaves the very bits there were, however large the perturbation."""
    model = net()
    before = weights_of(model)
    fit(model, [SGD(lr=0.3), SAM(rho=1e4), Skip(0, 1, 2)], columns(), steps=3)
    assert same(weights_of(model), before)


def test_weights_are_put_back_when_the_second_pass_fails():
    """What is raised at the perturbed weights leaves the model as it was, and the plugin usable."""

    class Fails:
        passes = 0

        @hookimpl(wrapper=True)
        def forward(self, micro):
            self.passes += 1
            if self.passes == 2:
                raise TrainingError("a test")
            return (yield)

    model, again, plain, sam = net(), net(), net(), SAM(rho=0.5)
    with pytest.raises(TrainingError, match="a test"):
        fit(model, [SGD(lr=0.3), sam, Fails()], columns(), steps=2)
    assert_same_weights(model, net())
    fit(again, [SGD(lr=0.3), sam], columns(), steps=3)
    fit(plain, [SGD(lr=0.3), SAM(rho=0.5)], columns(), steps=3)
    assert_same_weights(again, plain)


@pytest.mark.parametrize("adaptive", [False, True])
def test_loss_scale_does_not_change_the_perturbation(adaptive):
    """Gradients that a scaler has multiplied by 2^10 lead to the same step, as they are divided by their norm."""

    class Scaled:
        @hookimpl(wrapper=True)
        def compute_loss(self, micro):
            return (yield) * 1024.0

        @hookimpl
        def gradients_ready(self, step):
            for parameter in step.run.parameters:
                parameter.grad /= 1024.0

    data, ours, plain = columns(), net(0.2), net(0.2)
    fit(ours, [SGD(lr=0.3), SAM(rho=0.3, adaptive=adaptive), Scaled()], data, steps=5)
    fit(plain, [SGD(lr=0.3), SAM(rho=0.3, adaptive=adaptive)], data, steps=5)
    assert_close(ours, plain)


@pytest.mark.parametrize("first", [True, False])
def test_both_passes_see_the_batch_as_it_came(first):
    """Who changes batches in `prepare` changes each once, not the second pass's twice, in either order."""

    class Doubles:
        @hookimpl(wrapper=True)
        def prepare(self, micro):
            yield
            micro.batch = {**micro.batch, "features": 2 * micro.batch["features"]}

    data, ours, theirs = columns(), net(), net()
    pair = [SAM(rho=0.3), Doubles()]
    fit(ours, [SGD(lr=0.3), *(pair if first else pair[::-1])], data, steps=4)
    by_hand(theirs, {**data, "features": 2 * data["features"]}, steps=4, rho=0.3)
    assert_close(ours, theirs)


def test_step_without_targets_is_skipped_as_without_it():
    """A step in which no item counts has no gradients, no perturbation and no update."""
    data, model = columns(16), net()
    data["labels"][:] = -100
    before = weights_of(model)
    trainer, _ = fit(model, [SGD(lr=0.3), SAM()], data, steps=2)
    assert same(weights_of(model), before)
    assert trainer.run.skipped_steps == 2


@pytest.mark.parametrize("other", ["optimizer-in-backward", "lomo", "lbfgs"])
def test_optimizers_without_one_gradient_for_a_step_are_refused(other):
    """Who updates within a backward pass, or calls it several times, is refused by name before step 0."""
    plan = Trainer(net(), [("sam", SAM()), (other, SGD())], steps=2).plan(given=["train"])
    assert any("'sam'" in str(p) and repr(other) in str(p) for p in plan.problems)
