"""`f1`: precision, recall and F-score as scikit-learn has them."""

from __future__ import annotations

import warnings

import pytest
import torch
from plugin_helpers import columns, cpu_run, fit, net

from drivetrain import ConfigError, Micro, PlanError, Run, TrainingError
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import F1, SGD, Evaluate, Loader

SCORES = ("f1", "precision", "recall")


def sklearn():
    """Import it where a reference is needed: the ranks need none."""
    return pytest.importorskip("sklearn.metrics")


def micro(logits, labels):
    return Micro({"labels": labels}, len(labels), len(labels), outputs={"logits": logits})


def measure(batches, run=None, split="evaluate", **options):
    """Stream (logits, labels) through a fresh metric, as the evaluation does."""
    (metric,) = F1(**options).metrics(run or cpu_run(), split)
    for logits, labels in batches:
        metric.update(micro(logits, labels))
    return metric.compute()


def theirs(average, true, made, beta=1.0, **more):
    """Return scikit-learn's F-score, precision and recall."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision, recall, score, _ = sklearn().precision_recall_fscore_support(
            true, made, beta=beta, average=average, zero_division=0, **more
        )
    return score, precision, recall


def drawn(shape, classes, seed, ignored=0.2):
    """Return four batches of logits and labels; class 1 never occurs and is never predicted."""
    draws = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(4):
        logits, labels = (
            torch.randn(*shape, classes, generator=draws),
            torch.randint(0, classes, shape, generator=draws),
        )
        logits[..., 1] = -9.0
        labels[labels == 1] = 0
        labels[torch.rand(shape, generator=draws) < ignored] = -100
        batches.append((logits, labels))
    return batches


def flattened(batches):
    """Return labels and predictions that count."""
    true = torch.cat([labels.flatten() for _, labels in batches])
    made = torch.cat([logits.argmax(-1).flatten() for logits, _ in batches])
    return true[true != -100].numpy(), made[true != -100].numpy()


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@pytest.mark.parametrize("shape", [(7,), (3, 5)], ids=["rows", "tokens"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_classes_are_scored_as_scikit_learn_does(average, shape, beta):
    """Over several batches, without ignored labels and with a class that does not occur, it is the library's number."""
    for seed in range(5):
        batches = drawn(shape, 5, seed)
        wanted = theirs(average, *flattened(batches), beta=beta)
        found = measure(batches, average=average, beta=beta, all=True)
        assert found == {
            f"f{beta:g}" if n == "f1" else n: pytest.approx(v, abs=1e-12) for n, v in zip(SCORES, wanted, strict=True)
        }


def test_each_class_has_its_number():
    """With average="none" every class has its own, 0 where it does not occur."""
    batches = drawn((9,), 4, 3)
    wanted = theirs(None, *flattened(batches), labels=range(4))
    found = measure(batches, average="none", all=True)
    assert found == {
        f"{score}_{c}": pytest.approx(value, abs=1e-12)
        for score, values in zip(SCORES, wanted, strict=True)
        for c, value in enumerate(values)
    }


@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "none"])
@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_several_labels_an_item_are_scored_as_scikit_learn_does(average, threshold):
    """Labels of the logits' shape are flags, compared with sigmoid above the threshold."""
    draws = torch.Generator().manual_seed(2)
    batches = [
        (torch.randn(6, 3, generator=draws), (torch.rand(6, 3, generator=draws) < 0.4).float()) for _ in range(3)
    ]
    true = torch.cat([labels for _, labels in batches]).numpy()
    made = (torch.cat([logits for logits, _ in batches]).sigmoid() > threshold).numpy()
    wanted = theirs(None if average == "none" else average, true, made)
    found = measure(batches, average=average, threshold=threshold, all=True)
    values = [v for score in wanted for v in (score if average == "none" else [score])]
    assert list(found.values()) == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize("shape", [(8,), (8, 1)])
def test_one_logit_says_whether_it_holds(shape):
    """A model with a single logit is scored by its positive class."""
    logits, labels = torch.linspace(-1, 1, 8), torch.tensor([0, 1, 0, 1, 1, -100, 0, 1])
    kept = labels != -100
    wanted = sklearn().f1_score(labels[kept].numpy(), (logits > 0)[kept].numpy())
    assert measure([(logits.reshape(shape), labels)]) == {"f1": pytest.approx(wanted)}


def test_nothing_counted_is_nothing_said():
    """Where every label is ignored, or there is no batch, there is no score."""
    assert measure([(torch.zeros(2, 3), torch.tensor([-100, -100]))]) == {}
    assert measure([]) == {}


def test_a_set_without_labels_is_not_scored():
    """Rows that are predicted have no labels to compare with."""
    assert F1().metrics(cpu_run(), "predict") == []


def on_rank(average, several):
    rank = torch.distributed.get_rank()
    batches = drawn((7,), 5, 1)
    if several:
        batches = [(logits, (labels[:, None] % 5 == torch.arange(5)).float()) for logits, labels in batches]
    mine = {
        0: [*batches[:3], tuple(part[:4] for part in batches[3])],
        1: [tuple(part[4:] for part in batches[3])],
        2: [],
    }[rank]
    return measure(mine, Run(device=torch.device("cpu"), rank=rank, world_size=3), average=average, all=True)


@pytest.mark.parametrize("several", [False, True])
def test_ranks_with_few_rows_and_with_none(several):
    """Each of several ranks has the numbers of all rows, a rank that saw no batch too."""
    batches = drawn((7,), 5, 1)
    if several:
        batches = [(logits, (labels[:, None] % 5 == torch.arange(5)).float()) for logits, labels in batches]
    wanted = measure(batches, average="macro", all=True)
    assert run_ranks(on_rank, "macro", several, world_size=3) == [wanted] * 3


@pytest.mark.parametrize("size", [1, 5, 30])
def test_run_logs_the_scores_of_the_whole_split(size):
    """The logged numbers are scikit-learn's over all rows, whatever the batch size; two averages stand apart."""
    held, model = columns(23, seed=8), net()
    plugins = [SGD(lr=0.3), Evaluate(), F1(), ("f1:micro", F1(average="micro")), Loader(8, evaluate_batch_size=size)]
    trainer, _ = fit(model, plugins, columns(), held, steps=5)
    with torch.no_grad():
        made = model.eval()(**held)["logits"].argmax(-1).numpy()
    logged = trainer.run.metrics
    assert logged["evaluate/f1"] == pytest.approx(sklearn().f1_score(held["labels"].numpy(), made, average="macro"))
    assert logged["evaluate/micro_f1"] == pytest.approx(sklearn().accuracy_score(held["labels"].numpy(), made))


def test_classes_have_the_models_names(bert_folder):
    """A transformers model's names stand in the numbers of its classes, without the slash that parts logs' names."""
    from transformers import AutoModelForSequenceClassification

    names = {0: "good", 1: "so/so", 2: "bad"}
    model = AutoModelForSequenceClassification.from_pretrained(bert_folder, id2label=names)
    batches = [(torch.eye(3), torch.tensor([0, 1, 1]))]
    found = measure(batches, cpu_run(model=model), average="none")
    assert found == {"f1_good": 1.0, "f1_so_so": pytest.approx(2 / 3), "f1_bad": 0.0}


def test_two_of_one_name_are_refused():
    """Two whose numbers would overwrite each other are refused, with a name to give."""
    plugins = [SGD(), Evaluate(), ("f1:a", F1(name="x")), ("f1:b", F1(name="x"))]
    with pytest.raises(ConfigError, match=r"f1:a and f1:b give their metrics the same names(.|\n)*name='x'"):
        fit(net(), plugins, columns(), columns(8), steps=1)


def test_labels_that_are_neither_are_refused():
    """Numbers are no flags, and a label must be a class of the model."""
    with pytest.raises(TrainingError, match=r"must be 0 or 1(.|\n)*2 that are not(.|\n)*regression"):
        measure([(torch.zeros(2, 2), torch.tensor([[0.5, 1.0], [3.0, 0.0]]))])
    with pytest.raises(TrainingError, match=r"f1: a label is no class .* labels 1 to 7, 3 logits"):
        measure([(torch.zeros(2, 3), torch.tensor([1, 7]))])
    with pytest.raises(TrainingError, match=r"f1 needs logits \(\.\.\., C\)"):
        measure([(torch.zeros(2, 3), torch.zeros(5))])


def test_without_an_evaluation_the_plan_refuses():
    """A metric that nobody computes is refused before the run."""
    with pytest.raises(PlanError, match="'f1' requires 'evaluation'"):
        fit(net(), [SGD(), F1()], columns(), steps=1)


def test_a_shifted_model_is_measured_at_the_next_label():
    """Where the run's loss predicts the next token, so does the score."""
    run = cpu_run()
    run.shifted_labels = True
    labels = torch.tensor([[3, 1, 0, -100], [3, 2, 2, 2]])
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 0, 3, 3], [2, 0, 2, 3]]), 4).float()
    assert measure([(logits, labels)], run, average="micro") == {"f1": pytest.approx(4 / 5)}
