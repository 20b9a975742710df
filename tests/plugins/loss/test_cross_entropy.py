"""`cross-entropy` works for models without a loss, and keeps labels from those that have one."""

from __future__ import annotations

import pickle

import pytest
import torch
from loss_runs import Words, model_of, token_rows
from plugin_helpers import CLASSES, columns, cpu_run, fit, net

from drivetrain import ConfigError, DataError, Micro, Trainer, TrainingError
from drivetrain_plugins import BF16, SGD, Accuracy, Evaluate, Loader, Pad
from drivetrain_plugins.loss.cross_entropy import CrossEntropy

functional = torch.nn.functional


class Bare(torch.nn.Module):
    """A model that returns logits and takes no labels."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, features):
        return self.net(features, torch.zeros(len(features), dtype=torch.int64))["logits"]


def named(**options):
    return ("cross-entropy", CrossEntropy(**options))


def micro(made, labels, scale=1.0, **options):
    """Return the loss of a micro-batch, by calling the hooks."""
    plugin = CrossEntropy(**options)
    run = cpu_run(model=Bare(), facts=plugin.facts)
    count = plugin.build_count(run)
    plugin.assembled(run)
    batch = {"labels": labels}
    return plugin.compute_loss(Micro(batch, 1, count(batch), run=run, scale=scale, outputs={"logits": made}))


@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_loss_is_torch_cross_entropy(shape, dtype):
    """Labels of any shape and integer type give torch's mean, times the scale."""
    logits = torch.randn(*shape, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, shape)
    wanted = functional.cross_entropy(logits.reshape(-1, 7), labels.reshape(-1))
    assert micro(logits, labels.to(dtype), 0.25).item() == pytest.approx(0.25 * wanted.item(), rel=1e-14)


def test_ignored_labels_and_weights():
    """The ignored label can be another one; weights multiply item losses, and the divisor stays the number of items."""
    logits, labels = torch.randn(8, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 9, 9, 1, 0, 2])
    weights = (0.5, 2.0, 3.0)
    each = functional.cross_entropy(
        logits, labels, torch.tensor(weights, dtype=torch.float64), ignore_index=9, reduction="none"
    )
    found = micro(logits, labels, ignore_index=9, weights=weights)
    assert found.item() == pytest.approx(each.sum().item() / 6, rel=1e-14)


def test_half_precision_logits_are_summed_in_float32():
    """A sum over bfloat16 logits has float32's precision."""
    logits, labels = torch.randn(4096, 11).bfloat16(), torch.randint(0, 11, (4096,))
    found = micro(logits, labels)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(functional.cross_entropy(logits.double(), labels).item(), rel=1e-6)


def test_model_without_loss_trains_as_one_with_it():
    """A model that returns bare logits ends where the one that computes the same loss itself does."""
    data = columns()
    _, own = fit(net(), [SGD(lr=0.1)], data, steps=7)
    _, ours = fit(Bare(), [named(), SGD(lr=0.1)], data, steps=7)
    assert ours.of("loss") == pytest.approx(own.of("loss"), rel=1e-6)


def test_rows_that_are_tuples():
    """The last part of a tuple is the labels, and the model gets the others."""
    data = columns()
    rows = list(zip(data["features"], data["labels"], strict=True))
    _, own = fit(net(), [SGD(lr=0.1)], data, steps=7)
    _, ours = fit(Bare(), [named(), SGD(lr=0.1)], rows, steps=7)
    assert ours.of("loss") == pytest.approx(own.of("loss"), rel=1e-6)


def test_labels_are_kept_from_the_model_and_put_back():
    """The model computes no loss of its own, unless asked to; metrics see the labels either way."""
    seen = []
    model = model_of("tagger")
    model.register_forward_hook(lambda _m, _i, outputs: seen.append(outputs.get("loss")))
    rows = token_rows("classes")
    for withheld in (True, False):
        seen.clear()
        plugins = [Pad(Words()), named(withhold_labels=withheld), SGD(), Evaluate(), Accuracy()]
        _, record = fit(model, plugins, rows, rows, steps=1)
        assert all((loss is None) == withheld for loss in seen)
        assert 0 <= record.of("evaluate/accuracy")[0] <= 1


def test_evaluation_loss_is_the_mean_over_items_in_any_batches():
    """The loss of an evaluation does not depend on its batch size."""
    rows = token_rows("classes")
    losses = []
    for size in (1, 4, 11):
        plugins = [Pad(Words()), named(), Loader(batch_size=11, evaluate_batch_size=size), SGD(lr=1e-12), Evaluate()]
        losses += fit(model_of("tagger"), plugins, rows, rows, steps=1)[1].of("evaluate/loss")
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) == pytest.approx(losses[2], rel=1e-12)


def test_shift_follows_the_model_unless_told():
    """A causal model's labels are shifted by themselves; a plain one's and those said not to be are not."""
    counts = {
        (kind, said): CrossEntropy(shifted=said).build_count(cpu_run(model=model_of(kind), facts=CrossEntropy(shifted=said).facts))({"labels": torch.ones(2, 5, dtype=torch.int64)})
        for kind in ("gpt2", "llama", "tagger", "bert") for said in (None, True, False)
    }  # fmt: skip
    assert {key for key, number in counts.items() if number == 8} == {
        ("gpt2", None), ("llama", None), *((kind, True) for kind in ("gpt2", "llama", "tagger", "bert"))
    }  # fmt: skip
    assert set(counts.values()) == {8, 10}


def test_works_under_bfloat16():
    """Autocast covers the loss: it is float32 and near the exact one."""
    data = columns()
    _, exact = fit(Bare(), [named(), SGD(lr=0.1)], data, steps=3)
    _, half = fit(Bare(), [BF16(), named(), SGD(lr=0.1)], data, steps=3)
    assert half.of("loss") == pytest.approx(exact.of("loss"), rel=0.03)


def test_hook_objects_travel_to_workers():
    """Count and check can be pickled."""
    run, plugin = cpu_run(model=model_of("tagger")), CrossEntropy()
    for made in (plugin.build_count(run), *plugin.batch_checks(run)):
        assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize("bad", [5, 99, -1])
def test_label_that_is_no_class_is_told_with_its_row(bad):
    """A transformers model says how many classes there are, so that the row is named before the step."""
    rows = token_rows("classes")
    rows[4]["labels"] = [*rows[4]["labels"][:-1], bad]
    trainer = Trainer(model_of("tagger"), [Pad(Words()), named(), Loader(batch_size=11), SGD()], steps=1)
    with pytest.raises(DataError, match=rf"train row 4: cross-entropy.*'labels'.*at least 0 and below 5.*{bad}"):
        trainer.fit(rows)


def test_label_that_is_no_class_of_a_plain_model():
    """Where nobody says how many classes there are, the loss does."""
    with pytest.raises(DataError, match=f"no class of the {CLASSES} there are"):
        fit(Bare(), [named(), SGD()], {**columns(), "labels": torch.full((40,), 8)}, steps=1)


def test_labels_that_are_missing_or_no_integers():
    """Both are errors of the data, and say what was received."""
    data = columns()
    with pytest.raises(DataError, match=r"needs labels.*'labels'.*\['features'\]"):
        fit(Bare(), [named(), SGD()], {"features": data["features"]}, steps=1)
    with pytest.raises(DataError, match="must be integers"):
        fit(Bare(), [named(), SGD()], {**data, "labels": data["labels"].float()}, steps=1)


def test_shapes_that_do_not_fit():
    """Logits and labels of other shapes, and outputs without logits, are told."""
    with pytest.raises(TrainingError, match=r"logits \(4, 3\), labels \(4, 1\)"):
        micro(torch.randn(4, 3), torch.zeros(4, 1, dtype=torch.int64))
    with pytest.raises(TrainingError, match="dimension of tokens"):
        micro(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), shifted=True)
    with pytest.raises(TrainingError, match="hold one under 'scores'"):
        micro(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), logits="scores")


def test_weights_must_be_one_for_each_class():
    """Too few weights are an error of the configuration, before step 0."""
    trainer = Trainer(model_of("tagger"), [Pad(Words()), named(weights=(1.0, 2.0)), SGD()], steps=1)
    with pytest.raises(ConfigError, match="each of the model's 5 classes"):
        trainer.fit(token_rows("classes"))
