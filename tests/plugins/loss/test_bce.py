"""`bce` is torch's BCEWithLogitsLoss over the labels that count."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import cpu_run

from drivetrain import ConfigError, DataError, Micro, Trainer
from drivetrain_plugins import SGD, Accuracy, Evaluate
from drivetrain_plugins.loss.bce import BCE


def loss_of(logits, labels, **options):
    plugin, batch = BCE(**options), {"labels": labels}
    plugin.assembled(cpu_run(model=torch.nn.Linear(1, 1)))
    return plugin.compute_loss(Micro(batch, len(labels), plugin.build_count()(batch), outputs=logits))


@pytest.mark.parametrize("weights", [(), (1.0, 5.0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_loss_is_torchs(weights, dtype):
    """Labels of either type give torch's mean over labels, positive ones weighed."""
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 2, (6, 3)).to(dtype)
    pos = torch.tensor(weights, dtype=torch.float64) if weights else None
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.double(), pos_weight=pos)
    assert loss_of(logits, labels, positive_weights=weights).item() == pytest.approx(theirs.item(), rel=1e-14)


def test_labels_that_are_passed_over_have_no_loss():
    """-100 marks a label that nobody gave."""
    logits, labels = torch.randn(4, 2, dtype=torch.float64, requires_grad=True), torch.rand(4, 2, dtype=torch.float64)
    labels[0, 1] = labels[2, 0] = -100
    kept = labels != -100
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(logits[kept], labels[kept])
    loss = loss_of(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-14)
    assert torch.equal(logits.grad == 0, ~kept)


def test_one_output_and_flat_labels():
    """A single logit may have labels (B,)."""
    logits, labels = torch.randn(5, 1), torch.tensor([0.0, 1, 1, 0, 1])
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels)
    assert loss_of(logits, labels).item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("bad", [2.0, -0.5, float("nan")])
def test_labels_that_are_no_probabilities(bad):
    """Labels outside 0 and 1 are errors of the data."""
    with pytest.raises(DataError, match=r"bce: field 'labels': .* between 0 and 1"):
        BCE().batch_checks()[0]({"labels": torch.tensor([[0.0, bad]])})


def test_weights_must_be_one_for_each_class():
    """Too few weights are an error of the configuration."""
    from loss_runs import model_of

    with pytest.raises(ConfigError, match="each of the model's 5 classes"):
        BCE(positive_weights=(1.0,)).assembled(cpu_run(model=model_of("classifier")))


@pytest.mark.parametrize("name", ["bce", "mse"])
def test_accuracy_of_labels_that_are_no_classes_is_refused(name):
    """Several labels a row, or numbers, have no largest logit to compare with: the plan says so."""
    from drivetrain_plugins.loss.mse import MSE

    plugin = {"bce": BCE, "mse": MSE}[name]()
    problems = Trainer(torch.nn.Linear(1, 1), [(name, plugin), SGD(), Evaluate(), Accuracy()], steps=1).plan().problems
    assert [p.what for p in problems] == [f"plugins {name!r} and 'accuracy' cannot be combined"]
