"""`evaluate`: the loss of all items, at its moments, and nothing left behind."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from plugin_helpers import BATCH, CLASSES, FEATURES, Record, as_rows, assert_same_weights, columns, fit, net

from drivetrain import ConfigError, Micro, Run, Trainer, hookimpl
from drivetrain_plugins import SGD, AdamW, Evaluate, Loader, Pad

VOCABULARY = 11


class Tokens(torch.nn.Module):
    """A label for each token, in float64."""

    def __init__(self, shift=False):
        super().__init__()
        self.shift = shift
        table = torch.arange(VOCABULARY * 4, dtype=torch.float64).reshape(VOCABULARY, 4).cos() * 2
        self.table = torch.nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, input_ids, labels, attention_mask=None):
        logits = self.table(input_ids)
        kept, wanted = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
        loss = torch.nn.functional.cross_entropy(kept.flatten(0, 1), wanted.flatten())
        return {"loss": loss, "logits": logits}


def token_rows(hidden=0.4):
    """Return rows whose numbers of labels differ widely."""
    draws = random.Random(4)
    rows = []
    for number in range(17):
        ids = [draws.randrange(VOCABULARY) for _ in range(2 + 3 * (number % 5))]
        rows.append({"input_ids": ids, "labels": [-100 if draws.random() < hidden else i % 4 for i in ids]})
    return rows


def mean_by_hand(rows, shift):
    """Return the sum of all item losses divided by their number."""
    table, losses = Tokens().table.weight.log_softmax(-1), []
    for row in rows:
        pairs = zip(row["input_ids"][:-1], row["labels"][1:], strict=True) if shift else zip(*row.values(), strict=True)
        losses += [-table[token, label].item() for token, label in pairs if label != -100]
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("shift", [False, True], ids=["token labels", "shifted labels"])
def test_loss_is_the_mean_over_items_whatever_the_batch_size(shift, tokenizer):
    """The loss weighs items, so that batches of 1, 4 and 17 rows give the closed form."""

    class Build:
        @hookimpl
        def build_model(self, run):
            run.shifted_labels = shift
            return Tokens(shift)

    rows = token_rows()
    for size in (1, 4, 17):
        plugins = [Build(), Pad(tokenizer), Loader(3, evaluate_batch_size=size), SGD(), Evaluate()]
        trainer = Trainer(plugins=plugins, steps=1)
        trainer.assemble(rows, rows)
        assert trainer.evaluate()["loss"] == pytest.approx(mean_by_hand(rows, shift), abs=1e-12)


def test_a_split_without_labels_has_no_loss(tokenizer):
    """Where all labels are -100 there is no loss to report, instead of 0/0; the run goes on."""
    held = [{"input_ids": [1, 2], "labels": [-100, -100]}] * 3
    trainer, record = fit(Tokens(), [Pad(tokenizer), SGD(), Evaluate()], token_rows(), held, steps=2)
    assert trainer.evaluate() == {}
    assert record.of("evaluate/loss") == []
    assert trainer.run.progress.step == 2


class Drawing(torch.utils.data.Dataset):
    """Rows that draw from every global generator."""

    def __init__(self, rows):
        self.data = columns(rows)

    def __len__(self):
        return len(self.data["labels"])

    def __getitem__(self, index):
        noise = torch.randn(FEATURES) + random.random() + float(np.random.random())  # noqa: NPY002
        return {"features": self.data["features"][index] + noise, "labels": self.data["labels"][index]}


class DrawingNet(torch.nn.Module):
    """A model that draws from every global generator, in evaluations too, and that has BatchNorm."""

    def __init__(self):
        super().__init__()
        self.net = net(dropout=0.3)
        self.batch_norm = torch.nn.BatchNorm1d(FEATURES)

    def forward(self, features, labels):
        noise = torch.randn(()) + random.random() + float(np.random.random())  # noqa: NPY002
        return self.net(self.batch_norm(features) + noise, labels)


@pytest.fixture
def seeded():
    """Let Python's and numpy's generators start at the same place."""

    def seed():
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002

    return seed


def test_training_is_bit_identical_with_and_without(seeded):
    """Evaluating after each step changes no weight, buffer or loss, however much rows and model draw."""
    ends, losses = [], []
    for plugins, held in (([Evaluate(every="1 step", at_start=True)], Drawing(9)), ([], None)):
        seeded()
        trainer, record = fit(DrawingNet(), [AdamW(lr=0.01), *plugins], Drawing(20), held, epochs=2)
        ends.append(trainer.run.model)
        losses.append(record.of("loss"))
    assert_same_weights(*ends)
    assert losses[0] == losses[1]


def assembled(model, rows, held, *plugins):
    trainer = Trainer(model, [SGD(), Evaluate(), *plugins], steps=3)
    run = trainer.assemble(rows, held)
    run.model.train()
    return run


def test_modes_gradients_and_streams_are_put_back(seeded):
    """Modules that trained train again, frozen ones stay frozen; gradients and generators are as they were."""
    run = assembled(DrawingNet(), columns(), Drawing(9))
    run.model.batch_norm.eval()
    run.model.net.first.weight.grad = torch.ones_like(run.model.net.first.weight)
    seeded()
    torch.manual_seed(3)
    before = [m.training for m in run.model.modules()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    run.plugins["evaluate"].evaluate(run, "evaluate")
    assert [m.training for m in run.model.modules()] == before
    assert torch.equal(run.model.net.first.weight.grad, torch.ones_like(run.model.net.first.weight))
    assert run.model.net.last.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]  # noqa: NPY002


def test_modes_are_put_back_after_an_error():
    """A metric that raises leaves the model in training mode."""

    class Bad:
        def update(self, micro):
            raise ZeroDivisionError

    class Metrics:
        @hookimpl
        def metrics(self, run):
            return [Bad()]

    run = assembled(net(), columns(), columns(8), Metrics())
    with pytest.raises(ZeroDivisionError):
        run.plugins["evaluate"].evaluate(run, "evaluate")
    assert all(m.training for m in run.model.modules())


def test_model_is_evaluated_without_dropout_and_gradients():
    """The loss is that of the model in evaluation mode, and nothing is kept for a backward pass."""
    model, held, seen = net(dropout=0.9), columns(12, seed=8), []

    class Metric:
        def update(self, micro: Micro):
            seen.append((micro.outputs["logits"].requires_grad, micro.step, micro.num_rows))

        def compute(self):
            return {"batches": float(len(seen))}

    class Metrics:
        @hookimpl
        def metrics(self, run: Run, split):
            return [Metric()]

    run = assembled(model, columns(), held, Metrics())
    result = run.plugins["evaluate"].evaluate(run, "evaluate")
    model.eval()
    with torch.no_grad():
        expected = model(**held)["loss"].item()
    assert result == {"loss": pytest.approx(expected, rel=1e-6), "batches": 2.0}
    assert seen == [(False, None, 8), (False, None, 4)]


@pytest.mark.parametrize(
    ("options", "steps", "moments"),
    [
        ({"every": "2 steps"}, 5, [2, 4, 5]),
        ({"every": "2 steps", "at_start": True}, 4, [0, 2, 4]),
        ({"every": "2 steps", "at_end": False}, 5, [2, 4]),
        ({}, 12, [5, 10, 12]),  # an epoch is 5 steps
        ({"every": "0.5 epochs"}, 5, [3, 5]),
        ({"every": "100 steps", "at_end": False}, 5, []),
    ],
)
def test_moments(options, steps, moments):
    """It evaluates when due, at the start and at the end, once each time."""
    data = columns(5 * BATCH)
    _, record = fit(net(), [SGD(), Evaluate(**options)], data, columns(8), steps=steps)
    assert [step for step, metrics in record.logs if "evaluate/loss" in metrics] == moments


@pytest.mark.parametrize("order", ["before", "after"])
def test_first_evaluation_is_in_the_log_wherever_the_plugin_stands(order, tmp_path):
    """An evaluation before the first step reaches a log plugin that is listed after it, too."""
    from drivetrain_plugins import JsonlLog

    plugins = [Evaluate(at_start=True), JsonlLog()]
    plugins = plugins if order == "before" else plugins[::-1]
    Trainer(net(), [*plugins, SGD()], steps=1, output=tmp_path).fit(columns(), columns(8))
    assert '{"step": 0, "evaluate/loss"' in (tmp_path / "log.jsonl").read_text().splitlines()[0]


def test_named_sets_are_evaluated_each_under_its_name():
    """Several sets are evaluated in turn; `evaluated` hears each with its own numbers."""
    heard = []

    class Hear:
        @hookimpl
        def evaluated(self, run, split, metrics):
            heard.append((split, metrics["loss"]))

    sets = {"near": columns(9, seed=5), "far": columns(3, seed=6)}
    trainer, record = fit(net(), [SGD(), Evaluate(), Hear()], columns(), sets, steps=1)
    trainer.run.model.eval()
    with torch.no_grad():
        by_hand = {f"evaluate/{n}": trainer.run.model(**rows)["loss"].item() for n, rows in sets.items()}
    assert dict(heard) == {split: pytest.approx(loss, rel=1e-6) for split, loss in by_hand.items()}
    logged = {name: value for _, metrics in record.logs for name, value in metrics.items()}
    assert {n: v for n, v in logged.items() if n.startswith("evaluate")} == {f"{s}/loss": v for s, v in heard}


def test_training_data_can_be_evaluated_on_request():
    """`Trainer.evaluate("train")` measures the training rows; an unknown split is refused with those there are."""
    data = columns(16)
    trainer, _ = fit(net(), [SGD(lr=0.1), Evaluate()], as_rows(data), columns(8), steps=2)
    trainer.run.model.eval()
    with torch.no_grad():
        expected = trainer.run.model(**data)["loss"].item()
    assert trainer.evaluate("train")["loss"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ConfigError, match=r"no split 'test' to evaluate. Received: \['evaluate', 'train'\]"):
        trainer.evaluate("test")


def test_a_requested_evaluation_comes_at_the_step_boundary():
    """Another plugin may ask for an evaluation between the moments."""

    class Ask:
        @hookimpl
        def gradients_ready(self, step):
            if step.number == 1:
                step.run.request_evaluate("a test")

    record = Record()
    plugins = [SGD(), Evaluate(every="100 steps", at_end=False), Ask(), record]
    Trainer(net(), plugins, steps=4).fit(columns(), columns(CLASSES))
    assert [step for step, metrics in record.logs if "evaluate/loss" in metrics] == [2]


def test_a_moment_that_cannot_be_read_is_refused():
    """A cadence in an unknown unit names the nearest one."""
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        Evaluate(every="3 stepz")


def test_a_run_without_evaluation_data_is_refused():
    """Before step 0, an evaluation of nothing is told what is missing and what to do."""
    with pytest.raises(ConfigError, match="no evaluation data"):
        fit(net(), [SGD(), Evaluate()], columns(), None, steps=1)
