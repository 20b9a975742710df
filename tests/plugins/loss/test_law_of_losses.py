"""Law 1: a step's gradient is the sum of item losses over the number of items, however the rows are arranged."""

from __future__ import annotations

import pytest
import torch
from loss_runs import (
    CLASSES,
    Gradient,
    Words,
    arrangements,
    by_hand,
    distance,
    log_softmax,
    model_of,
    nll,
    step_gradient,
    token_rows,
)

from drivetrain import Trainer
from drivetrain_plugins import SGD, Accumulate, Loader, Pad
from drivetrain_plugins.loss.bce import BCE
from drivetrain_plugins.loss.causal_lm_loss import CausalLMLoss
from drivetrain_plugins.loss.chunked_cross_entropy import ChunkedCrossEntropy
from drivetrain_plugins.loss.cross_entropy import CrossEntropy
from drivetrain_plugins.loss.label_smoothing import LabelSmoothing
from drivetrain_plugins.loss.loss_function import LossFunction
from drivetrain_plugins.loss.model_loss import ModelLoss
from drivetrain_plugins.loss.mse import MSE

WEIGHTS = (0.5, 1.0, 2.0, 3.0, 0.25)


def shifted(logits, row):
    return nll(logits[:-1], row["labels"][1:])


def plain(logits, row):
    return nll(logits, row["labels"])


def weighted(logits, row):
    kept = torch.tensor([label for label in row["labels"] if label != -100], dtype=torch.int64)
    return nll(logits, row["labels"]) * torch.tensor(WEIGHTS, dtype=logits.dtype)[kept]


def smoothed(logits, row):
    labels = torch.tensor(row["labels"])
    return 0.8 * nll(logits, labels) - 0.2 * log_softmax(logits[labels != -100]).mean(-1)


def squared(logits, row):
    return (logits[:, 0] - torch.tensor(row["labels"], dtype=logits.dtype)) ** 2


def mean_of_logits(outputs, batch):
    """Return a mean that no plugin has: of the absolute distance of two logits over tokens with a label."""
    kept = batch["labels"] != -100
    return (outputs.logits[..., 0] - outputs.logits[..., 1])[kept].abs().mean()


def absolute(logits, row):
    kept = torch.tensor(row["labels"]) != -100
    return (logits[:, 0] - logits[:, 1])[kept].abs()


class NoLoss:
    """Nobody owns the loss: the model's own is taken, and counted as it counts."""


CASES = {
    "the model's own, shifted": ("gpt2", "words", NoLoss, shifted),
    "causal-lm-loss": ("gpt2", "words", CausalLMLoss, shifted),
    "causal cross-entropy": ("gpt2", "words", CrossEntropy, shifted),
    "chunked, shifted": ("gpt2", "words", lambda: ChunkedCrossEntropy(chunk=5), shifted),
    "cross-entropy": ("tagger", "classes", CrossEntropy, plain),
    "weighted cross-entropy": ("tagger", "classes", lambda: CrossEntropy(weights=WEIGHTS), weighted),
    "chunked": ("bert", "words", lambda: ChunkedCrossEntropy(chunk=5), plain),
    "label-smoothing": ("tagger", "classes", lambda: LabelSmoothing(epsilon=0.2), smoothed),
    "mse": ("regressor", "numbers", MSE, squared),
    "loss-function": ("tagger", "classes", lambda: LossFunction(mean_of_logits), absolute),
    "model-loss": ("tagger", "classes", ModelLoss, plain),
}


def made(kind, dtype):
    return model_of("tagger", dtype, num_labels=1) if kind == "regressor" else model_of(kind, dtype)


def padding(multiple):
    return Pad(Words(), multiple=multiple)


@pytest.mark.parametrize("case", CASES)
def test_every_arrangement_gives_the_gradient_by_hand_in_float64(case):
    """Micro-batch size, accumulation, padding, flattening and packing move nothing, to 1e-12."""
    kind, labels, loss, items = CASES[case]
    rows = token_rows(labels)
    wanted, mean = by_hand(made(kind, torch.float64), rows, items)
    limit = 1e-6 if loss is NoLoss else 1e-12  # transformers rounds the logits to float32
    ways = arrangements(padding)
    if kind != "gpt2":  # a model that looks both ways needs the mask of `pack`
        ways = {name: way for name, way in ways.items() if "flattened" not in name}
    for name, way in ways.items():
        gradient, value = step_gradient(made(kind, torch.float64), rows, loss(), way)
        assert distance(gradient, wanted) < limit, name
        assert value == pytest.approx(mean, rel=limit), name


@pytest.mark.parametrize("case", CASES)
def test_every_arrangement_gives_the_same_gradient_in_float32(case):
    """In float32 the arrangements agree with the float64 gradient by hand to 1e-6 of its largest entry."""
    kind, labels, loss, items = CASES[case]
    rows = token_rows(labels)
    wanted, _ = by_hand(made(kind, torch.float64), rows, items)
    ways = arrangements(padding)
    for name in ("one row at a time", "ragged windows", "packed", *(["flattened"] if kind == "gpt2" else [])):
        gradient, _ = step_gradient(made(kind, torch.float32), rows, loss(), ways[name])
        assert distance(gradient, wanted) < 1e-6, name


def test_binary_labels_of_whole_rows():
    """BCE with labels that are missing, and weights, is the same in any micro-batches: one item a label."""
    rows = token_rows("words")
    draws = torch.Generator().manual_seed(2)
    for number, row in enumerate(rows):
        row["labels"] = torch.randint(0, 2, (CLASSES,), generator=draws).float().tolist()
        if number % 3 == 0:
            row["labels"][number % CLASSES] = -100.0

    def items(logits, row):
        labels = torch.tensor(row["labels"], dtype=torch.float64)
        p = torch.sigmoid(logits)
        losses = -(torch.tensor(WEIGHTS, dtype=torch.float64) * labels * p.log() + (1 - labels) * (1 - p).log())
        return losses[labels != -100]

    wanted, mean = by_hand(model_of("classifier"), rows, items)
    for name, way in arrangements(padding, packed=False).items():
        gradient, value = step_gradient(model_of("classifier"), rows, BCE(positive_weights=WEIGHTS), way)
        assert distance(gradient, wanted) < 1e-12, name
        assert value == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("streamed", [False, True])
def test_last_windows_step_once_and_leak_nothing(streamed):
    """Epochs whose rows fill neither the last micro-batch nor the last window train as a hand-written loop does."""
    rows, size, windows = token_rows("classes"), 2, 2  # 11 rows: steps of 4, 4 and 3 rows
    data = Iterable(rows) if streamed else rows
    keep, ours = Gradient(), model_of("tagger")
    plugins = [padding(1), ("loss", CrossEntropy()), Loader(batch_size=size), Accumulate(windows), SGD(lr=0.1), keep]
    trainer = Trainer(ours, plugins, steps=6, device="cpu")
    trainer.fit(data)
    assert trainer.run.progress.epoch == 2
    assert trainer.run.progress.rows == 22

    model = model_of("tagger")
    for number in range(6):
        epoch, step = divmod(number, 3)
        order = range(11) if streamed else trainer.run.batches["train"].sampler.order(epoch).tolist()
        picked = [rows[i] for i in order[step * 4 : step * 4 + 4]]
        gradient, mean = by_hand(model, picked, plain)
        assert distance(keep.steps[number], gradient) < 1e-12
        assert keep.losses[number] == pytest.approx(mean, rel=1e-12)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(0.1 * gradient.get(name, torch.zeros_like(parameter)))
    for left, right in zip(ours.parameters(), model.parameters(), strict=True):
        assert torch.allclose(left, right, rtol=1e-12, atol=1e-14)


class Iterable:
    """Rows that can only be read one after the other."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)
