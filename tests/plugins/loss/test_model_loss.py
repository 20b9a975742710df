"""`model-loss` is the kernel's default with a name, for models whose loss has another name or other items."""

from __future__ import annotations

import pytest
import torch
from loss_runs import model_of
from plugin_helpers import assert_same_weights, columns, cpu_run, fit, net

from drivetrain import TrainingError
from drivetrain_plugins import SGD
from drivetrain_plugins.loss.model_loss import ModelLoss

LABELS = {"labels": torch.tensor([[1, 2, -100], [3, 4, 5]])}


class Renamed(torch.nn.Module):
    """A model whose loss has another name."""

    def __init__(self, reduce):
        super().__init__()
        self.net, self.reduce = net(), reduce

    def forward(self, features, labels):
        made = self.net(features, labels)
        each = torch.nn.functional.cross_entropy(made["logits"], labels, reduction="none")
        return {"objective": self.reduce(each)}


def test_trains_bit_for_bit_as_the_default():
    """Naming it changes nothing."""
    left, right = net(), net()
    fit(left, [SGD(lr=0.1)], columns(), steps=6)
    fit(right, [("model-loss", ModelLoss()), SGD(lr=0.1)], columns(), steps=6)
    assert_same_weights(left, right)


def test_loss_under_another_name():
    """The key says where the mean is; one that is no scalar, or not there, is told."""
    _, own = fit(net(), [SGD(lr=0.1)], columns(), steps=3)
    _, ours = fit(Renamed(torch.mean), [("loss", ModelLoss(key="objective")), SGD(lr=0.1)], columns(), steps=3)
    assert ours.of("loss") == pytest.approx(own.of("loss"), rel=1e-6)
    with pytest.raises(TrainingError, match=r"must be a mean, a 0-dim tensor. Received: shape \(8,\)"):
        fit(Renamed(lambda each: each), [("loss", ModelLoss(key="objective")), SGD()], columns(), steps=1)
    with pytest.raises(TrainingError, match=r"under 'loss'. Received: dict \['objective'\]"):
        fit(Renamed(torch.mean), [("loss", ModelLoss()), SGD()], columns(), steps=1)


@pytest.mark.parametrize(("kind", "items"), [("gpt2", 3), ("llama", 3), ("bert", 5), ("tagger", 5)])
def test_auto_counts_as_the_models_own_loss_does(kind, items):
    """A causal model that is given directly is known by its own loss."""
    assert ModelLoss().build_count(cpu_run(model=model_of(kind)))(LABELS) == items


def test_items_can_be_said():
    """Labels, shifted labels or rows, whatever the model is."""
    run = cpu_run(model=net())
    counted = {items: ModelLoss(items=items).build_count(run)(LABELS) for items in ("labels", "shifted-labels", "rows")}
    assert counted == {"labels": 5, "shifted-labels": 3, "rows": None}
