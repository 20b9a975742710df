"""`evaluate`: the loss of all items, at its moments, and nothing left behind."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from plugin_helpers import BATCH, CLASSES, FEATURES, Record, as_rows, assert_same_weights, columns, fit, net

from drivetrain import ConfigError, Micro, Run, Trainer, TrainingError, hookimpl
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import SGD, Accuracy, AdamW, Checkpoint, Evaluate, Loader, Pad

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


class Build:
    """Build a model of tokens, with the labels shifted or not."""

    provides = ("data-parallel",)  # nothing is trained

    def __init__(self, shift):
        self.shift = shift

    @hookimpl
    def build_model(self, run):
        run.shifted_labels = self.shift
        return Tokens(self.shift)


@pytest.mark.parametrize("shift", [False, True], ids=["token labels", "shifted labels"])
def test_loss_is_the_mean_over_items_whatever_the_batch_size(shift, tokenizer):
    """The loss weighs items, so that batches of 1, 3, 8 and 17 rows give the closed form."""
    rows = token_rows()
    for size in (1, 3, 8, 17):
        plugins = [Build(shift), Pad(tokenizer), Loader(3, evaluate_batch_size=size), SGD(), Evaluate()]
        trainer = Trainer(plugins=plugins, steps=1)
        trainer.assemble(rows, rows)
        assert trainer.evaluate()["loss"] == pytest.approx(mean_by_hand(rows, shift), abs=1e-12)


def ragged(rows):
    """Fill rows up to the longest one, as a collator does that needs no tokenizer."""
    longest = max(len(row["labels"]) for row in rows)
    filled = {"input_ids": 0, "labels": -100}
    return {k: torch.tensor([row[k] + [v] * (longest - len(row[k])) for row in rows]) for k, v in filled.items()}


class Ragged:
    """A plugin that collates so."""

    @hookimpl
    def build_collator(self, run):
        return ragged


def on_ranks(rows):
    found = []
    for shift in (False, True):
        for size in (1, 3, 8):
            plugins = [Build(shift), Ragged(), Loader(8, evaluate_batch_size=size), SGD(), Evaluate()]
            trainer = Trainer(plugins=plugins, steps=1, device="cpu")
            trainer.assemble(rows, rows)
            found.append(trainer.evaluate()["loss"])
    return found


def test_ranks_share_the_items():
    """Two ranks whose last batches differ, one of which may be empty, give the closed form, and the same number."""
    rows = token_rows()
    first, second = run_ranks(on_ranks, rows)
    assert first == second
    by_hand = [mean_by_hand(rows, shift) for shift in (False, True) for _ in range(3)]
    assert first == pytest.approx(by_hand, abs=1e-12)


def test_items_that_are_counted_on_the_device():
    """A loss plugin may count items in a tensor: the mean is the same."""

    class Count:
        @hookimpl
        def build_count(self, run):
            return lambda batch: (batch["labels"] != -100).sum()

    rows = token_rows()
    trainer = Trainer(Tokens(), [Ragged(), Loader(3), Count(), SGD(), Evaluate()], steps=1, device="cpu")
    trainer.assemble(rows, rows)
    assert trainer.evaluate()["loss"] == pytest.approx(mean_by_hand(rows, False), abs=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_shown(value):
    """A loss of which a batch is infinite or no number is what it is: neither hidden nor an error."""

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, features, labels):
            loss = self.net(features, labels)["loss"]
            return {"loss": loss if self.training or len(labels) == 8 else loss * 0 + value}

    _, record = fit(Odd(), [SGD(), Evaluate()], columns(), columns(9), steps=1)
    assert record.of("evaluate/loss") == pytest.approx([value], nan_ok=True)


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
    run.model.net.norm.requires_grad_(False)
    run.model.net.first.weight.grad = torch.ones_like(run.model.net.first.weight)
    flags = [p.requires_grad for p in run.model.parameters()]
    buffers = [b.clone() for b in run.model.buffers()]
    seeded()
    torch.manual_seed(3)
    before = [m.training for m in run.model.modules()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    run.plugins["evaluate"].evaluate(run, "evaluate")
    assert [m.training for m in run.model.modules()] == before
    assert torch.equal(run.model.net.first.weight.grad, torch.ones_like(run.model.net.first.weight))
    assert run.model.net.last.weight.grad is None
    assert [p.requires_grad for p in run.model.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(buffers, run.model.buffers(), strict=True))
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
        ({"every": "2 steps", "delay": "5 steps"}, 9, [6, 8, 9]),
        ({"every": "2 steps", "delay": "4 steps"}, 6, [4, 6]),
        ({"every": "3 steps", "delay": "1 epoch", "at_end": False}, 10, [6, 9]),
        ({"every": "1 step", "delay": "100 steps", "at_start": True}, 3, [0, 3]),
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


def test_a_request_does_not_wait():
    """An evaluation that is asked for comes at once, whatever `delay` says; one that is due waits."""

    class Ask:
        @hookimpl
        def step_end(self, step):
            if step.number == 1:
                step.run.request_evaluate("a test")

    _, record = fit(net(), [SGD(), Evaluate(every="1 step", delay="4 steps"), Ask()], columns(), columns(8), steps=5)
    assert [step for step, metrics in record.logs if "evaluate/loss" in metrics] == [2, 4, 5]


def test_a_resumed_run_waits_as_long(tmp_path):
    """The delay is counted from the start of training, not from where a run went on."""
    plugins = [SGD(), Evaluate(every="2 steps", delay="5 steps"), Checkpoint(every="3 steps", on_change="accept")]
    Trainer(net(), plugins, steps=3, output=tmp_path).fit(columns(), columns(8))
    record = Record()
    Trainer(net(), [*plugins, record], steps=8, output=tmp_path).fit(columns(), columns(8), resume=True)
    assert [step for step, metrics in record.logs if "evaluate/loss" in metrics] == [6, 8]


def test_the_chosen_sets_are_evaluated():
    """`sets` takes names as they were given or as they are logged, at every occasion; the others are left alone."""
    data = {"near": columns(9, seed=5), "far": columns(3, seed=6), "train": columns(4)}
    plugin = Evaluate(every="1 step", sets=["evaluate/train", "near"], at_start=True)
    trainer, record = fit(net(), [SGD(), plugin], columns(), data, steps=2)
    seen = [next(iter(metrics)) for _, metrics in record.logs if "loss" not in metrics]
    assert seen == ["evaluate/near/loss", "evaluate/train/loss"] * 3
    assert "loss" in trainer.evaluate("evaluate/far")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("naer", r"no evaluation set 'naer'\W+received: sets: \['near', 'far'\]\W+do: did you mean 'near'"),
        ([], "no set is chosen"),
    ],
)
def test_sets_that_are_not_there_are_refused(sets, message):
    """Before step 0, an unknown set is told with those there are."""
    with pytest.raises(ConfigError, match=message):
        fit(net(), [SGD(), Evaluate(sets=sets)], columns(), {"near": columns(9), "far": columns(3)}, steps=1)


@pytest.mark.parametrize("delay", ["10 minutes", "0 steps", "4 stepz"])
def test_a_delay_that_cannot_be_kept_is_refused(delay):
    """Time would be another one after resuming, and nothing comes after 0 steps."""
    with pytest.raises(ValueError, match=r"resumed run differs|must be positive|did you mean"):
        Evaluate(delay=delay)


def test_rows_to_predict_are_not_scored():
    """A split that starts with "predict" goes through the model and the metrics in evaluation mode, without a loss."""
    seen, losses = [], []
    unlabelled = {"features": columns(9)["features"]}

    class Scores(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(dropout=0.9)

        def forward(self, features, labels=None):
            return self.net(features, torch.zeros(len(features), dtype=torch.int64) if labels is None else labels)

    class Data:
        facts: ClassVar = {"splits": ["predict"]}

        @hookimpl
        def build_dataset(self, run, split):
            run.facts["splits"] = ["predict"]
            data = {"predict": unlabelled, "train": columns(), "evaluate": columns(8)}
            return as_rows(data[split])

        @hookimpl(wrapper=True)
        def compute_loss(self, micro):
            losses.append(sorted(micro.batch))
            return (yield)

        @hookimpl
        def metrics(self, run, split):
            return [self]

        def update(self, micro):
            seen.append(micro.outputs["logits"])

        def compute(self):
            return {"batches": float(len(seen))}

    trainer, record = fit(Scores(), [SGD(), Data(), Evaluate(at_end=False)], None, steps=1)
    losses.clear()
    assert trainer.evaluate("predict") == {"batches": 2.0}
    assert losses == []
    trainer.run.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(seen), trainer.run.model(**unlabelled)["logits"])
    assert record.of("evaluate/loss") == []


def test_it_is_evaluated_before_the_save_of_the_same_step(tmp_path):
    """A checkpoint of a step that is evaluated comes after the evaluation, and after the plugins that hear of it."""
    order = []

    class Hear:
        @hookimpl
        def evaluated(self, run):
            order.append(("evaluated", run.progress.step))

        @hookimpl(wrapper=True)
        def save(self, run):
            order.append(("save", run.progress.step))
            return (yield)

    plugins = [SGD(), Checkpoint(every="2 steps"), Evaluate(every="2 steps"), Hear()]
    Trainer(net(), plugins, steps=3, output=tmp_path).fit(columns(), columns(8))
    assert order == [(what, step) for step in (2, 3) for what in ("evaluated", "save")]


def test_a_moment_that_cannot_be_read_is_refused():
    """A cadence in an unknown unit names the nearest one."""
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        Evaluate(every="3 stepz")


def test_a_run_without_evaluation_data_is_refused():
    """Before step 0, an evaluation of nothing is told what is missing and what to do."""
    with pytest.raises(ConfigError, match="no evaluation data"):
        fit(net(), [SGD(), Evaluate()], columns(), None, steps=1)


class Twice:
    """A metric under a name that another has, too."""

    def update(self, micro):
        pass

    def compute(self):
        return {"accuracy": 0.0}


class Twin:
    @hookimpl
    def metrics(self, run):
        return [Twice()]


def test_two_metrics_of_one_name_are_refused():
    """A number never takes the place of another: the name and the second's kind are told."""
    with pytest.raises(TrainingError, match=r"called accuracy\. Received: Twice"):
        fit(net(), [SGD(), Evaluate(), Accuracy(), Twin()], columns(), evaluate=columns(), steps=1)


@pytest.mark.parametrize("split", ["evaluate", "predict"])
def test_a_rank_without_rows_passes_over_the_batch(split):
    """Where the other ranks have all rows of a batch, the model is not called with nothing."""
    run = Trainer(net(), [SGD(), Evaluate(at_end=False)], device="cpu").assemble(columns(), columns(), steps=1)
    run.batches[split] = SimpleNamespace(iterate=lambda *_: iter([Micro(None, 0, 0)]))
    assert run.hooks.evaluate(run, split) == {}
