"""`bf16` is `torch.autocast` around forward and loss."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import assert_same_weights, columns, cpu_run, fit, net, train_by_hand

from drivetrain import Micro, hookimpl
from drivetrain_plugins import BF16, AdamW, Clip, Evaluate


def wrapped(hook):
    """Enter a wrapper of the plugin with a carrier; return the generator, stopped at its yield."""
    plugin = BF16()
    plugin.assembled(cpu_run())
    generator = getattr(plugin, hook)(Micro(None, 1, 1))
    next(generator)
    return generator


@pytest.mark.parametrize("hook", ["forward", "compute_loss"])
def test_autocast_is_on_inside_and_off_outside(hook):
    """Inside the hook, matrix products are bfloat16; its result is handed on, and autocast is off again."""
    generator, square = wrapped(hook), torch.ones(2, 2)
    assert (square @ square).dtype is torch.bfloat16
    with pytest.raises(StopIteration) as stop:
        generator.send("result")
    assert stop.value.value == "result"
    assert (square @ square).dtype is torch.float32


def test_autocast_is_off_after_an_error():
    """A forward that raises leaves no autocast behind."""
    generator = wrapped("forward")
    with pytest.raises(ZeroDivisionError):
        generator.throw(ZeroDivisionError())
    assert not torch.is_autocast_enabled("cpu")


def test_run_equals_autocast_by_hand():
    """Steps with dropout and clipping leave the bits of a hand-written loop under torch.autocast."""
    data, ours, theirs = columns(), net(dropout=0.2), net(dropout=0.2)
    _, record = fit(ours, [BF16(), AdamW(lr=0.02), Clip(0.5)], data, steps=10)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.02, weight_decay=0.0, fused=True)
    history = train_by_hand(theirs, data, optimizer, steps=10, autocast=True, max_norm=0.5)
    assert_same_weights(ours, theirs)
    assert record.of("loss") == [step["loss"] for step in history]
    full = net(dropout=0.2)
    fit(full, [AdamW(lr=0.02), Clip(0.5)], data, steps=10)
    assert not torch.equal(full.first.weight, ours.first.weight)  # autocast did something


def test_weights_gradients_and_optimizer_state_stay_float32():
    """Only the forward pass is bfloat16."""
    seen = set()

    class See:
        @hookimpl
        def gradients_ready(self, step):
            seen.update(p.grad.dtype for p in step.run.parameters)

    trainer, _ = fit(net(), [BF16(), AdamW(), See()], columns(), steps=2)
    seen.update(p.dtype for p in trainer.run.parameters)
    seen.update(v.dtype for s in trainer.run.optimizer.state.values() for v in s.values())
    assert seen == {torch.float32}


def test_a_loss_plugin_runs_under_autocast_too():
    """A loss that is computed outside the model has matrix products in bfloat16, its result in float32."""
    products, losses = [], []

    class Loss:
        @hookimpl
        def compute_loss(self, micro):
            logits = micro.outputs["logits"]
            products.append((logits @ logits.T).dtype)
            loss = torch.nn.functional.cross_entropy(logits, micro.batch["labels"])
            losses.append(loss.dtype)
            return loss * micro.scale

    fit(net(), [BF16(), AdamW(), Loss()], columns(), steps=1)
    assert (products, losses) == ([torch.bfloat16], [torch.float32])


def test_evaluations_are_under_autocast_too():
    """An evaluation sees the model as it is trained: its loss is that of torch.autocast by hand."""
    data, held, model = columns(), columns(8, seed=9), net()
    trainer, _ = fit(model, [BF16(), AdamW(lr=0.02), Evaluate()], data, held, steps=2)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**held)["loss"].item()
    assert trainer.run.metrics["evaluate/loss"] == expected


def test_two_precisions_are_refused():
    """Two plugins that set the precision cannot be in one run."""
    from drivetrain import PlanError, Trainer

    with pytest.raises(PlanError, match="'bf16' and 'bf16:second' cannot be combined"):
        Trainer(net(), [BF16(), ("bf16:second", BF16()), AdamW()], steps=1).fit(columns())
