"""`accuracy`: a count of hits, as numpy makes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import columns, cpu_run, fit, net

from drivetrain import Micro, PlanError, TrainingError
from drivetrain_plugins import SGD, Accuracy, Evaluate, Loader


def measure(batches):
    """Stream (logits, labels) through a fresh metric, as the evaluation does."""
    (metric,) = Accuracy().metrics(cpu_run())
    for logits, labels in batches:
        metric.update(Micro({"labels": labels}, len(labels), len(labels), outputs={"logits": logits}))
    return metric.compute()


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    classes=st.integers(1, 6),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_share_of_hits_equals_numpy(shape, classes, ignored, seed):
    """For labels of any shape, over several batches, it is numpy's count without the ignored labels."""
    draws = torch.Generator().manual_seed(seed)
    batches, hits, items = [], 0, 0
    for _ in range(3):
        logits = torch.randn(*shape, classes, generator=draws)
        labels = torch.randint(0, classes, shape, generator=draws)
        labels[torch.rand(shape, generator=draws) < ignored] = -100
        batches.append((logits, labels))
        kept = labels.numpy() != -100
        hits += np.count_nonzero((np.argmax(logits.numpy(), -1) == labels.numpy())[kept])
        items += np.count_nonzero(kept)
    assert measure(batches) == ({"accuracy": hits / items} if items else {})


def test_nothing_counted_is_nothing_said():
    """Where every label is ignored there is no accuracy, as there is no loss."""
    assert measure([(torch.zeros(2, 3), torch.tensor([-100, -100]))]) == {}


def test_each_evaluation_counts_anew():
    """Two evaluations share no count."""
    plugin, run = Accuracy(), cpu_run()
    (first,), (second,) = plugin.metrics(run), plugin.metrics(run)
    first.update(Micro({"labels": torch.tensor([0])}, 1, 1, outputs={"logits": torch.tensor([[1.0, 0.0]])}))
    second.update(Micro({"labels": torch.tensor([1])}, 1, 1, outputs={"logits": torch.tensor([[1.0, 0.0]])}))
    assert (first.compute(), second.compute()) == ({"accuracy": 1.0}, {"accuracy": 0.0})


@pytest.mark.parametrize("size", [1, 5, 30])
def test_run_logs_the_share_for_the_whole_split(size):
    """The logged accuracy is numpy's over all rows, whatever the batch size."""
    held, model = columns(23, seed=8), net()
    plugins = [SGD(lr=0.3), Evaluate(), Accuracy(), Loader(8, evaluate_batch_size=size)]
    trainer, _ = fit(model, plugins, columns(), held, steps=5)
    with torch.no_grad():
        predicted = model.eval()(**held)["logits"].numpy().argmax(-1)
    expected = np.count_nonzero(predicted == held["labels"].numpy()) / 23
    assert trainer.run.metrics["evaluate/accuracy"] == expected


@pytest.mark.parametrize(
    ("outputs", "batch"),
    [
        (torch.zeros(2, 3), {"labels": torch.zeros(2)}),
        ({"loss": torch.zeros(())}, {"labels": torch.zeros(2)}),
        ({"logits": torch.zeros(2, 3)}, {"features": torch.zeros(2)}),
    ],
)
def test_outputs_without_logits_or_labels_are_refused(outputs, batch):
    """What cannot be counted is refused with what is needed."""
    (metric,) = Accuracy().metrics(cpu_run())
    with pytest.raises(TrainingError, match="accuracy needs outputs with 'logits' and batches with 'labels'"):
        metric.update(Micro(batch, 2, 2, outputs=outputs))


def test_without_an_evaluation_the_plan_refuses():
    """A metric that nobody computes is refused before the run."""
    with pytest.raises(PlanError, match="'accuracy' requires 'evaluation'"):
        fit(net(), [SGD(), Accuracy()], columns(), steps=1)


def test_a_shifted_model_is_measured_at_the_next_label():
    """Where the run's loss predicts the next token, so does the accuracy."""
    run = cpu_run()
    run.shifted_labels = True
    (metric,) = Accuracy().metrics(run)
    labels = torch.tensor([[5, 1, 0, -100], [5, 2, 2, 2]])
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 0, 9, 9], [2, 0, 2, 9]]), 10).float()
    metric.update(Micro({"labels": labels}, 2, 5, outputs={"logits": logits}))
    assert metric.compute() == {"accuracy": 4 / 5}


def test_labels_that_are_no_classes_are_refused():
    """Shapes that cannot be compared are told, not broadcast."""
    (metric,) = Accuracy().metrics(cpu_run())
    with pytest.raises(TrainingError, match=r"logits \(\.\.\., C\) for labels .* logits \(2, 3\), labels \(2, 3\)"):
        metric.update(Micro({"labels": torch.zeros(2, 3)}, 2, 2, outputs={"logits": torch.zeros(2, 3)}))
