"""Texts for the metrics of texts, and two ranks that share them."""

from __future__ import annotations

import random

import torch

from drivetrain import Run
from drivetrain.options import import_object
from drivetrain.testing.ranks import run_ranks

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "its", "house,", "then", "slept", "well", "."]


def texts(number, seed=0):
    """Return predictions and references: sentences, and the same with words put in, taken out and exchanged."""
    draws = random.Random(seed)
    references = [" ".join(draws.choices(WORDS, k=draws.randint(4, 14))) for _ in range(number)]
    predictions = []
    for text in references:
        words = [word if draws.random() < 0.8 else draws.choice(WORDS) for word in text.split()]
        predictions.append(" ".join(word for word in words if draws.random() < 0.9))
    predictions[0] = references[0]
    return predictions, references


def compute(plugin, predictions, references, *, rank=0, world_size=1, size=3):
    """Stream texts in batches through the fresh metrics of a plugin; with ranks, each takes its share of them."""
    run = Run(device=torch.device("cpu"), rank=rank, world_size=world_size)
    if hasattr(plugin, "assembled"):
        plugin.assembled(run)
    metrics = plugin.text_metrics(run)
    predictions, references = predictions[rank::world_size], references[rank::world_size]
    result = {}
    for metric in metrics:
        for start in range(0, len(references), size):
            metric.update(predictions[start : start + size], references[start : start + size])
        result.update(metric.compute())
    return result


def _on_rank(name, options, predictions, references):
    made = import_object(f"drivetrain_plugins:{name}", plugin="a test")(**options)
    ranks = torch.distributed
    return compute(made, predictions, references, rank=ranks.get_rank(), world_size=ranks.get_world_size())


def on_two_ranks(name, predictions, references, **options):
    """Return what each of two ranks computes."""
    return run_ranks(_on_rank, name, options, predictions, references)


def evaluate_seq2seq(folder):
    """Return the metrics of the kit's model on nine rows, on this rank of those there are, and what was shown."""
    from drivetrain import Trainer, hookimpl
    from drivetrain.testing.kinds import kit_rows
    from drivetrain_plugins import SGD, Bleu, ErrorRate, Evaluate, Generate, HFModel, Loader, Seq2Seq

    class Hear:
        provides = ("data-parallel",)  # said, not done: nothing is trained
        shown = ()

        @hookimpl
        def samples(self, run, split, rows):
            self.shown = tuple(rows)

    plugins = [HFModel(str(folder), task="seq2seq-lm"), Seq2Seq(), Loader(2, evaluate_batch_size=2), SGD(), Evaluate()]
    made, hear = Generate(max_new_tokens=5, samples=2), Hear()
    trainer = Trainer(plugins=[*plugins, made, ErrorRate(), Bleu(), hear], steps=1, device="cpu")
    trainer.assemble(kit_rows("pairs", 16), kit_rows("pairs", 9, 50))
    return trainer.evaluate(), hear.shown
