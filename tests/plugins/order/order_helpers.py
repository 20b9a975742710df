"""Rows of very different lengths, a model that sees tokens, and the smallest data parallelism."""

from __future__ import annotations

import types

import numpy as np
import torch
from plugin_helpers import cpu_run

from drivetrain import hookimpl, stack
from drivetrain.data import Fetch, InProcess, count_labels
from drivetrain_plugins.shared.table import Ragged, Table

WORDS = 50


def skewed(rows, seed=0, longest=60):
    """Return lengths as text has them: most are short, a few are long."""
    drawn = np.random.default_rng(seed).lognormal(2.0, 0.8, rows)
    return np.clip(drawn.astype(np.int64), 1, longest)


def table(rows, seed=0, longest=60):
    """Return a `Table` of token ids, each with a label for every token."""
    draws, lengths = np.random.default_rng(seed + 1), skewed(rows, seed, longest)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids, labels = (draws.integers(1, WORDS, offsets[-1]) for _ in range(2))
    return Table({"input_ids": Ragged(ids, offsets), "labels": Ragged(labels, offsets)})


def assembled(dataset, **fields):
    """Return a run as `build_sampler` sees it."""
    made = cpu_run(datasets={"train": dataset, "evaluate": dataset}, **fields)
    made.plan = types.SimpleNamespace(hooks={"bad_row": types.SimpleNamespace(owner="drivetrain")})
    return made


def sampler_of(plugin, dataset, *, seed=0, split="train"):
    """Return the sampler that the plugin builds over `dataset`."""
    run = assembled(dataset)
    run.settings.seed = seed
    return plugin.build_sampler(run, split)


def loader_of(sampler, *, batch_size=1, rank=0, world_size=1):
    """Return the kernel's loader over rows that are their own numbers."""
    numbers = [{"row": torch.tensor(number)} for number in range(sampler.rows)]
    fetch = Fetch(numbers, stack, count_labels, 0, "train")
    return InProcess(fetch, sampler, batch_size, rank=rank, world_size=world_size)


def numbers_of(micro):
    """Return the row numbers in a batch of `loader_of`."""
    return [] if micro.batch is None else micro.batch["row"].tolist()


def pad(rows):
    """Return tensors (B, L) padded with 0 and -100, in the longest row's length."""
    lists = {name: [torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels")}
    fills = {"input_ids": 0, "labels": -100}
    return {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fills[name])
        for name, values in lists.items()
    }


class PadRows:
    """The collator, as a plugin."""

    provides = ("padding",)

    @hookimpl
    def build_collator(self):
        return pad


class Tagger(torch.nn.Module):
    """Label every token from itself and the mean of its row; padding changes nothing."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, 8)
        self.drop = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(16, WORDS)

    def forward(self, input_ids, labels):
        mask = (input_ids != 0).unsqueeze(-1)
        tokens = self.embed(input_ids) * mask
        mean = tokens.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        logits = self.head(self.drop(torch.cat([tokens, mean.expand_as(tokens)], -1)))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def tagger(dropout=0.0, dtype=torch.float64):
    """Return a `Tagger` with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Tagger(dropout).to(dtype)


class AllReduce:
    """Add up the ranks' gradients."""

    provides = ("data-parallel",)

    @hookimpl
    def gradients_ready(self, step):
        for parameter in step.run.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)


class Watch:
    """Keep each step's rows, items and gradients."""

    def __init__(self):
        self.steps = []

    @hookimpl
    def gradients_ready(self, step):
        gradients = {name: p.grad.clone() for name, p in step.run.model.named_parameters() if p.grad is not None}
        self.steps.append((step.num_rows, step.num_items, gradients))


def gradient_by_hand(dataset, rows, dtype=torch.float64):
    """Return the gradient of the mean token loss over `rows`, one row at a time."""
    model, items = tagger(dtype=dtype), sum(len(dataset[row]["labels"]) for row in rows)
    for row in rows:
        batch = pad([dataset[row]])
        (model(**batch)["loss"] * (len(dataset[row]["labels"]) / items)).backward()
    return {name: p.grad for name, p in model.named_parameters()}
