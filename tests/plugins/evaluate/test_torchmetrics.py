"""`torchmetrics`: the library's metrics over whole splits, and over ranks whatever they saw."""

from __future__ import annotations

import pytest
import torch
from plugin_helpers import columns, cpu_run, fit, net

from drivetrain import ConfigError, Micro, Run, TrainingError
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import SGD, Evaluate, Loader, Regression, Retrieval, TorchMetrics
from drivetrain_plugins.evaluate._torchmetrics import numbers
from drivetrain_plugins.evaluate.torchmetrics import snake


def feed(metric, batches):
    for logits, labels in batches:
        metric.update(Micro({"labels": labels}, len(labels), len(labels), outputs={"logits": logits}))
    return metric.compute()


def measure(batches, metric, run=None, **options):
    """Stream (logits, labels) through a fresh metric, as the evaluation does."""
    plugin, run = TorchMetrics(metric, **options), run or cpu_run()
    plugin.assembled(run)
    (streamed,) = plugin.metrics(run, "evaluate")
    return feed(streamed, batches)


def drawn(classes=4, sizes=(6, 1, 9)):
    """Return batches of logits and labels; the first label of each is ignored, but of the batch with one."""
    draws = torch.Generator().manual_seed(8)
    batches = []
    for size in sizes:
        labels = torch.randint(0, classes, (size,), generator=draws)
        labels[0] = -100 if size > 1 else labels[0]
        batches.append((2 * torch.randn(size, classes, generator=draws), labels))
    return batches


def joined(batches):
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return logits[labels != -100], labels[labels != -100]


@pytest.mark.parametrize("inputs", ["probabilities", "classes", "logits"])
def test_inputs_are_what_the_metric_is_given(inputs):
    """A metric of classes, probabilities or logits has the number of the library's function on all rows."""
    from torchmetrics import functional

    logits, labels = joined(drawn())
    name, function, given = {
        "probabilities": ("MulticlassAUROC", functional.classification.multiclass_auroc, logits.softmax(-1)),
        "classes": ("MulticlassCohenKappa", functional.classification.multiclass_cohen_kappa, logits.argmax(-1)),
        "logits": ("MulticlassHingeLoss", functional.classification.multiclass_hinge_loss, logits),
    }[inputs]
    found = measure(drawn(), f"classification:{name}", arguments={"num_classes": 4}, inputs=inputs)
    assert found == {snake(name): pytest.approx(float(function(given, labels, num_classes=4)), rel=1e-6)}


def test_two_classes_are_one_number():
    """A binary metric takes the probability of the second of two logits, or a single logit's."""
    from torchmetrics.functional.classification import binary_auroc

    logits, labels = joined(drawn(2))
    wanted = {"binary_auroc": pytest.approx(float(binary_auroc(logits.softmax(-1)[:, 1], labels)), rel=1e-6)}
    assert measure(drawn(2), "classification:BinaryAUROC") == wanted
    single = [(a[:, 1:] - a[:, :1], b) for a, b in drawn(2)]
    assert measure(single, "classification:AUROC", arguments={"task": "binary"}, name="binary_auroc") == wanted


def test_labels_of_the_logits_shape():
    """They are flags for metrics of several labels, and numbers for metrics of numbers."""
    from torchmetrics.functional.classification import multilabel_f1_score
    from torchmetrics.functional.regression import mean_squared_error

    logits = torch.linspace(-2, 2, 24).reshape(8, 3).sin() * 2
    flags = (torch.arange(24).reshape(8, 3) % 5 < 2).float()
    wanted = float(multilabel_f1_score(logits.sigmoid(), flags.long(), num_labels=3))
    found = measure([(logits, flags)], "classification:MultilabelF1Score", arguments={"num_labels": 3})
    assert found == {"multilabel_f1_score": pytest.approx(wanted)}
    found = measure([(logits, flags)], "regression:MeanSquaredError", inputs="logits", name="error")
    assert found == {"error": pytest.approx(float(mean_squared_error(logits, flags)))}


def test_several_values_have_a_name_each():
    """What gives a vector, a matrix, a tuple or a mapping is named by place and key."""
    found = measure(
        drawn(), "classification:MulticlassAccuracy", arguments={"num_classes": 4, "average": "none"}, name="hit"
    )
    assert list(found) == ["hit_0", "hit_1", "hit_2", "hit_3"]
    value = {"a": torch.tensor([[1.0, 2.0]]), "b": (torch.tensor(3.0), torch.tensor([4.0]))}
    assert numbers("m", value) == {"m_a_0_0": 1.0, "m_a_0_1": 2.0, "m_b_0": 3.0, "m_b_1_0": 4.0}


def test_names_of_classes():
    """A metric is called as its class, word by word."""
    names = [snake(name) for name in ("MulticlassF1Score", "BinaryAUROC", "R2Score", "RetrievalMRR", "JaccardIndex")]
    assert names == ["multiclass_f1_score", "binary_auroc", "r2_score", "retrieval_mrr", "jaccard_index"]


@pytest.mark.parametrize("size", [1, 5, 30])
def test_run_logs_the_number_of_the_whole_split(size):
    """The logged numbers are the library's over all rows, whatever the batch size; a label names a second one."""
    from torchmetrics.functional.classification import multiclass_auroc, multiclass_calibration_error

    first = TorchMetrics("classification:MulticlassAUROC", arguments={"num_classes": 3})
    second = TorchMetrics("torchmetrics.classification:MulticlassCalibrationError", arguments={"num_classes": 3})
    held, model = columns(23, seed=8), net()
    plugins = [SGD(lr=0.3), Evaluate(), first, ("torchmetrics:ece", second), Loader(8, evaluate_batch_size=size)]
    trainer, _ = fit(model, plugins, columns(), held, steps=5)
    with torch.no_grad():
        chances = model.eval()(**held)["logits"].softmax(-1)
    logged = trainer.run.metrics
    assert logged["evaluate/multiclass_auroc"] == pytest.approx(
        float(multiclass_auroc(chances, held["labels"], 3)), rel=1e-6
    )
    wanted = float(multiclass_calibration_error(chances, held["labels"], 3))
    assert logged["evaluate/ece"] == pytest.approx(wanted, rel=1e-5)


def everything(rank, world_size, shares):
    """Return the numbers of metrics of every kind of state, each fed this rank's share of three batches."""
    run = Run(device=torch.device("cpu"), rank=rank, world_size=world_size)
    arguments = {"num_classes": 4}
    plugins = [
        TorchMetrics("classification:MulticlassAUROC", arguments=arguments),  # lists of tensors, concatenated
        TorchMetrics("classification:MulticlassConfusionMatrix", arguments=arguments, inputs="classes"),  # a sum
        Regression(("mse", "r2", "pearson", "spearman")),  # moments that are combined; lists; several outputs
        Retrieval(("mrr", "map", "ndcg", "recall@2")),  # lists that are not concatenated, of integers too
    ]
    for plugin in plugins:
        plugin.assembled(run)
    found = []
    for plugin in plugins:
        batches = [(a, b % 3) for a, b in drawn()] if isinstance(plugin, Retrieval) else drawn()
        if isinstance(plugin, Regression):
            batches = [(a, a.flip(1) + 0.1 * b[:, None]) for a, b in batches]
        (metric,) = plugin.metrics(run, "evaluate")
        found.append(feed(metric, [batches[at] for at in shares[rank]]))
    return found


def on_rank(*divisions):
    return [everything(torch.distributed.get_rank(), 2, shares) for shares in divisions]


def test_ranks_whatever_they_saw():
    """Two ranks have the numbers of all rows, with different numbers of batches, and where one of them had none."""
    (wanted,) = (
        [
            {name: pytest.approx(value, rel=1e-5) for name, value in one.items()}
            for one in everything(0, 1, [[0, 1, 2]])
        ],
    )
    for found in run_ranks(on_rank, [[0, 1], [2]], [[], [0, 1, 2]]):
        assert found == [wanted, wanted]


def test_nothing_counted_is_nothing_said():
    """Without a label that counts there is no number, and no warning of the library."""
    labels = torch.tensor([-100, -100])
    assert measure([(torch.zeros(2, 4), labels)], "classification:MulticlassAUROC", arguments={"num_classes": 4}) == {}
    assert TorchMetrics("classification:BinaryAUROC").metrics(cpu_run(), "predict") == []


@pytest.mark.parametrize(
    ("metric", "arguments", "message"),
    [
        ("clasification:MulticlassAUROC", {}, r"no module 'clasification'\n.*\n.*did you mean 'classification'"),
        ("classification:MulticlasAUROC", {}, r"no metric 'MulticlasAUROC'\n.*\n.*did you mean 'MulticlassAUROC'"),
        ("MulticlassAUROC", {}, r"a metric is module of torchmetrics and class"),
        ("torch.nn:Linear", {}, r"'torch.nn:Linear' is no metric\n.*\n.*subclass of torchmetrics.Metric"),
        ("nowhere.at:All", {}, r"plugin 'torchmetrics': 'nowhere.at:All' cannot be imported"),
        ("classification:MulticlassAUROC", {}, r"refuses its arguments\n.*MulticlassAUROC\(\): .*num_classes"),
        ("classification:MulticlassAUROC", {"num_classes": "x"}, r"refuses its arguments\n.*num_classes='x'"),
    ],
)
def test_metrics_that_there_are_not_are_refused_before_the_run(metric, arguments, message):
    """Unknown modules and classes are told with the nearest, bad arguments with what the library says."""
    with pytest.raises(ConfigError, match=message):
        TorchMetrics(metric, arguments=arguments).assembled(cpu_run())


def test_outputs_that_do_not_fit_are_refused():
    """The library's complaint about a batch comes with the plugin, the metric and the shapes."""
    with pytest.raises(
        TrainingError,
        match=r"torchmetrics: multiclass_auroc cannot be measured .* Received: \(2, 3\) torch.float32, \(2,\)",
    ):
        measure(
            [(torch.zeros(2, 3), torch.zeros(2).long())], "classification:MulticlassAUROC", arguments={"num_classes": 4}
        )


def test_two_of_one_name_are_refused():
    """Two whose numbers would overwrite each other are refused."""
    made = [TorchMetrics("classification:MulticlassAUROC", name="a", arguments={"num_classes": 3}) for _ in range(2)]
    plugins = [SGD(), Evaluate(), made[0], ("torchmetrics:b", made[1])]
    with pytest.raises(ConfigError, match="torchmetrics and torchmetrics:b give their metrics the same names"):
        fit(net(), plugins, columns(), columns(8), steps=1)
