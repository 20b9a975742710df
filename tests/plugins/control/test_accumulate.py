"""`accumulate`: several micro-batches make the step of one big batch."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import BATCH, as_rows, columns, fit, net

from drivetrain import Shuffled, hookimpl
from drivetrain_plugins import SGD, Accumulate, AdamW, Loader, Pad

VOCABULARY = 13


class Bigram(torch.nn.Module):
    """Next-token logits from each token alone, in float64; padding cannot touch them."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift
        draws = torch.Generator().manual_seed(2)
        table = torch.randn(VOCABULARY, VOCABULARY, generator=draws, dtype=torch.float64)
        self.table = torch.nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, input_ids, labels, attention_mask=None):
        logits = self.table(input_ids)
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class BigramPlugin:
    """Build the model and say that its loss shifts the labels."""

    def __init__(self, shift):
        self.shift = shift

    @hookimpl
    def build_model(self, run):
        run.shifted_labels = self.shift
        return Bigram(self.shift)


def ragged_rows():
    """Return rows of 2 to 9 tokens, a third of their labels -100; the labels of some rows are -100 altogether."""
    draws = torch.Generator().manual_seed(7)
    rows = []
    for number in range(22):
        length = int(torch.randint(2, 10, (), generator=draws))
        ids = torch.randint(0, VOCABULARY, (length,), generator=draws)
        hidden = torch.rand(length, generator=draws) < (1.0 if number % 5 == 0 else 0.33)
        rows.append({"input_ids": ids.tolist(), "labels": ids.masked_fill(hidden, -100).tolist()})
    return rows


def train(plugins, rows, shift, tokenizer, epochs=2):
    trainer, record = fit(None, [BigramPlugin(shift), Pad(tokenizer), *plugins], rows, epochs=epochs)
    return trainer.run.model.table.weight.detach(), record.of("loss")


@pytest.mark.parametrize("shift", [False, True], ids=["token labels", "shifted labels"])
@pytest.mark.parametrize("optimizer", [SGD(lr=2.0, momentum=0.5), AdamW(lr=0.1)], ids=["sgd", "adamw"])
@pytest.mark.parametrize(("batches", "size"), [(2, 4), (8, 1), (3, 3)])
def test_ragged_micro_batches_equal_the_big_batch(batches, size, optimizer, shift, tokenizer):
    """Weights and losses are those of the big batch within 1e-12, however labels are spread over the micro-batches."""
    rows = ragged_rows()
    parts, part_losses = train([Loader(size), Accumulate(batches), optimizer], rows, shift, tokenizer)
    whole, losses = train([Loader(batches * size), optimizer], rows, shift, tokenizer)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    assert part_losses == pytest.approx(losses, abs=1e-12)


def test_loss_is_the_mean_over_items_of_the_closed_form(tokenizer):
    """The first step's loss is the sum of all shifted item losses divided by their number, by hand."""
    rows = ragged_rows()
    _, losses = train([Loader(3), Accumulate(8), SGD(lr=0.1)], rows, True, tokenizer, epochs=1)
    table, total, items = Bigram(True).table.weight.log_softmax(-1), 0.0, 0
    for row in rows:
        for token, label in zip(row["input_ids"][:-1], row["labels"][1:], strict=True):
            if label != -100:
                total, items = total - table[token, label].item(), items + 1
    assert losses == [pytest.approx(total / items, abs=1e-12)]


def test_last_window_of_an_epoch_steps_once_with_what_is_left():
    """Five batches by threes are two steps an epoch; the second is the mean over the rows that are left."""
    data, ours, theirs = columns(4 * BATCH + 3), net().double(), net().double()
    data["features"] = data["features"].double()
    trainer, record = fit(ours, [SGD(lr=0.5), Accumulate(3), Loader(BATCH)], data, epochs=2)
    assert trainer.run.progress.step == trainer.run.total_steps == 4
    optimizer, losses = torch.optim.SGD(theirs.parameters(), lr=0.5), []
    for epoch in range(2):
        order = Shuffled(len(data["labels"]), 0).order(epoch)
        for window in (order[: 3 * BATCH], order[3 * BATCH :]):
            loss = theirs(data["features"][window], data["labels"][window])["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
    assert record.of("loss") == pytest.approx(losses, abs=1e-12)


def test_windows_do_not_reach_over_epochs():
    """Every step's micro-batches come from one epoch, and each row is seen once an epoch."""
    seen = []

    class See:
        @hookimpl
        def step_end(self, step):
            seen.append([micro.num_rows for micro in step.micros])

    rows = as_rows(columns(10))
    fit(net(), [SGD(), Loader(2), Accumulate(3), See()], rows, epochs=2)
    assert seen == [[2, 2, 2], [2, 2]] * 2


def test_it_declares_the_number_for_the_plan():
    """The kernel learns the number from a declared fact, and the plan shows it."""
    assert Accumulate(batches=5).facts == {"accumulation": 5}
    trainer, _ = fit(net(), [SGD(), Accumulate(5)], columns(), steps=1)
    assert trainer.plan().facts["accumulation"] == 5


@pytest.mark.parametrize("batches", [0, -1, True])
def test_less_than_one_batch_is_refused(batches):
    """A step needs at least one micro-batch."""
    with pytest.raises(ValueError, match="batches must be a number >= 1"):
        Accumulate(batches=batches)
