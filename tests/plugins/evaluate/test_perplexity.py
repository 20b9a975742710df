"""`perplexity`: exp of the mean over all tokens, in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from plugin_helpers import columns, cpu_run, fit, net

from drivetrain import Micro, Run, TrainingError
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import SGD, Evaluate, Loader, Perplexity


def measure(batches, *, shifted=False, run=None):
    run = run or cpu_run()
    run.shifted_labels = shifted
    (metric,) = Perplexity().metrics(run, "evaluate")
    for logits, labels in batches:
        metric.update(Micro({"labels": labels}, len(labels), len(labels), outputs={"logits": logits}))
    return metric.compute()


def drawn():
    """Return three batches of sequences of different lengths, some labels ignored."""
    draws = torch.Generator().manual_seed(5)
    batches = []
    for rows, length in ((4, 3), (2, 9), (1, 6)):
        labels = torch.randint(0, 7, (rows, length), generator=draws)
        labels[torch.rand(rows, length, generator=draws) < 0.3] = -100
        batches.append((3 * torch.randn(rows, length, 7, generator=draws), labels))
    return batches


def by_hand(batches, shift):
    """Return exp of the mean of -log p, label by label."""
    nats = []
    for logits, labels in batches:
        chances = logits.double().softmax(-1)
        for row in range(len(labels)):
            for place in range(shift, labels.shape[1]):
                if (label := int(labels[row, place])) != -100:
                    nats.append(-math.log(chances[row, place - shift, label]))
    return math.exp(math.fsum(nats) / len(nats))


@pytest.mark.parametrize("shift", [0, 1], ids=["own labels", "next labels"])
def test_closed_form(shift):
    """It is exp of the mean over all labels of all batches, of the next ones where the loss is causal."""
    assert measure(drawn(), shifted=bool(shift)) == {"perplexity": pytest.approx(by_hand(drawn(), shift), rel=1e-6)}


def test_uniform_guesses_have_the_perplexity_of_the_vocabulary():
    """A model that knows nothing of 50 tokens has a perplexity of 50; in half precision, too."""
    batches = [(torch.zeros(2, 4, 50, dtype=torch.bfloat16), torch.full((2, 4), 3))]
    assert measure(batches) == {"perplexity": pytest.approx(50.0, rel=1e-6)}


def test_beyond_numbers_it_is_infinite():
    """What float64 cannot hold is infinite, and no label is no perplexity."""
    logits = torch.zeros(1, 1, 2)
    logits[..., 0] = 2000.0
    assert measure([(logits, torch.ones(1, 1, dtype=torch.long))]) == {"perplexity": math.inf}
    assert measure([(logits, torch.full((1, 1), -100))]) == {}


@pytest.mark.parametrize("size", [1, 5, 30])
def test_run_logs_exp_of_the_loss_whatever_the_batch_size(size):
    """Where the loss is the plain cross-entropy, the logged number is its exp over the whole split."""
    plugins = [SGD(lr=0.3), Evaluate(), Perplexity(), Loader(8, evaluate_batch_size=size)]
    trainer, _ = fit(net(), plugins, columns(), columns(23, seed=8), steps=5)
    logged = trainer.run.metrics
    assert logged["evaluate/perplexity"] == pytest.approx(math.exp(logged["evaluate/loss"]), rel=1e-6)


def on_rank():
    rank = torch.distributed.get_rank()
    run = Run(device=torch.device("cpu"), rank=rank, world_size=2)
    return measure(drawn() if rank else [], run=run)


def test_ranks_add_up():
    """A rank without rows has the number of those with rows."""
    assert run_ranks(on_rank) == [measure(drawn())] * 2


def test_what_has_no_labels_is_refused_or_left_out():
    """Outputs without logits are refused; a set that is only predicted is not measured."""
    (metric,) = Perplexity().metrics(cpu_run(), "evaluate")
    with pytest.raises(TrainingError, match="perplexity needs outputs with 'logits'"):
        metric.update(Micro({"labels": torch.zeros(2)}, 2, 2, outputs={"loss": torch.zeros(())}))
    assert Perplexity().metrics(cpu_run(), "predict") == []
