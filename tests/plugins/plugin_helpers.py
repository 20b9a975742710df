"""Tiny models, rows and a hand-written loop, shared by the plugins' tests."""

from __future__ import annotations

import contextlib

import torch

from drivetrain import Run, Shuffled, Trainer, hookimpl
from drivetrain.data import shifts_labels
from drivetrain.rng import derive_seed

FEATURES, CLASSES, BATCH = 6, 3, 8


class Net(torch.nn.Module):
    """Two layers with a norm between them; returns its mean loss and its logits."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first = torch.nn.Linear(FEATURES, 10)
        self.norm = torch.nn.LayerNorm(10)
        self.drop = torch.nn.Dropout(dropout)
        self.last = torch.nn.Linear(10, CLASSES)

    def forward(self, features, labels):
        logits = self.last(self.drop(torch.tanh(self.norm(self.first(features)))))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def net(dropout=0.0):
    """Return a `Net` with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return Net(dropout)


def columns(rows=40, seed=3):
    """Return features and labels of `rows` rows."""
    draws = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randn(rows, FEATURES, generator=draws),
        "labels": torch.randint(0, CLASSES, (rows,), generator=draws),
    }


def as_rows(data):
    """Return columns as a list of rows."""
    return [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]


def groups_by_hand(model, weight_decay):
    """Return the groups a person would write for a `Net`: weights decay, biases and the norm do not."""
    return [
        {"params": [model.first.weight, model.last.weight], "weight_decay": weight_decay},
        {
            "params": [model.first.bias, model.norm.weight, model.norm.bias, model.last.bias],
            "weight_decay": 0.0,
        },
    ]


def train_by_hand(model, data, optimizer, *, steps, scheduler=None, max_norm=None, autocast=False, seed=0):
    """Train `model` as any PyTorch tutorial does; return each step's loss, rate and gradient norm."""
    model.train()
    rows, history = len(data["labels"]), []
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    for step in range(steps):
        epoch, batch = divmod(step, -(-rows // BATCH))
        picked = Shuffled(rows, seed).order(epoch)[batch * BATCH : (batch + 1) * BATCH]
        torch.manual_seed(derive_seed(seed, "step", step, 0))
        with context:
            loss = model(**{name: column[picked] for name, column in data.items()})["loss"]
        loss.backward()
        norm = None if max_norm is None else torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        history.append({"loss": loss.item(), "learning_rate": rate, "grad_norm": norm})
    return history


class Record:
    """A plugin that keeps every log as (step, metrics)."""

    def __init__(self):
        self.logs = []

    @hookimpl
    def log(self, run, metrics):
        self.logs.append((run.progress.step, dict(metrics)))

    def of(self, name):
        """Return the values logged as `name`, in order."""
        return [metrics[name] for _, metrics in self.logs if name in metrics]


class Crash:
    """A plugin that ends the process's run after step `at`, unless it is told not to."""

    def __init__(self, at):
        self.at = at

    @hookimpl
    def log(self, run, metrics):
        if run.progress.step == self.at and "loss" in metrics:
            raise KeyboardInterrupt


def fit(model, plugins, data, evaluate=None, **settings):
    """Fit `model`; return the trainer and what was logged at every step."""
    record = Record()
    trainer = Trainer(model, [*plugins, record], log_every="1 step", device="cpu", **settings)
    trainer.fit(data, evaluate)
    return trainer, record


def assert_same_weights(left, right):
    """Compare two models' states bit for bit."""
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def cpu_run(**fields):
    """Return a run by hand, as hook-level tests need it."""
    run = Run(device=torch.device("cpu"), **fields)
    run.shifted_labels = run.model is not None and shifts_labels(run.model)  # as the kernel finds it
    return run
