"""`metrics-function`: the user's function on all rows, in the data's order, on one rank or several."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from plugin_helpers import columns, cpu_run, net

from drivetrain import ConfigError, Micro, PlanError, Trainer, TrainingError, hookimpl
from drivetrain.testing import run_ranks
from drivetrain_plugins import SGD, Evaluate, Loader, MetricsFunction
from drivetrain_plugins.evaluate import _gather


class Seen:
    """A function of metrics that keeps what it is called with, and says how many rows there were."""

    def __init__(self):
        self.calls = []

    def __call__(self, predictions, labels, inputs=None):
        self.calls.append((predictions, labels, inputs))
        return {"rows": len(labels)}


def evaluated(plugin, held, *, size=8, model=None, train=None):
    """Evaluate `held` once; return the metrics."""
    plugins = [SGD(lr=0.1), Evaluate(), plugin, Loader(4, evaluate_batch_size=size)]
    trainer = Trainer(model or net(), plugins, steps=1, device="cpu")
    trainer.assemble(train or columns(8), held)
    return trainer.evaluate()


def f1(predictions, labels):
    return {"f1": macro_f1(labels, predictions.argmax(-1))}


def macro_f1(labels, predicted):
    from sklearn.metrics import f1_score

    return f1_score(labels, predicted, average="macro")


def f1_of_an_object(given):
    return f1(given.predictions, given.label_ids)


def f1_unpacked(given):
    predictions, labels = given
    assert given[0] is predictions
    return f1(predictions, labels)


@pytest.mark.parametrize("function", [f1, f1_of_an_object, f1_unpacked])
@pytest.mark.parametrize("size", [1, 5, 30])
def test_the_function_gets_all_rows(function, size):
    """A score that is no mean over rows is scikit-learn's over the whole set, whatever the batch size and form."""
    held, model = columns(23, seed=8), net()
    with torch.no_grad():
        predicted = model.eval()(**held)["logits"].numpy().argmax(-1)
    expected = macro_f1(held["labels"].numpy(), predicted)
    assert evaluated(MetricsFunction(function), held, size=size)["f1"] == expected


def test_rows_come_in_the_order_of_the_data():
    """Predictions are the model's logits and labels the set's, row by row; other fields come where they are asked for."""
    held, model, seen = columns(23, seed=8), net(), Seen()
    assert evaluated(MetricsFunction(seen, inputs=True, prefix="my_"), held, model=model)["my_rows"] == 23
    ((predictions, labels, inputs),) = seen.calls
    with torch.no_grad():
        wanted = [model.eval()(held["features"][i : i + 8], held["labels"][i : i + 8])["logits"] for i in (0, 8, 16)]
    np.testing.assert_array_equal(predictions, torch.cat(wanted).numpy(), strict=True)
    np.testing.assert_array_equal(labels, held["labels"].numpy(), strict=True)
    assert inputs.keys() == {"features"}
    np.testing.assert_array_equal(inputs["features"], held["features"].numpy(), strict=True)


def test_two_evaluations_share_nothing():
    """The second evaluation of a run sees its own rows only."""
    seen = Seen()
    trainer = Trainer(net(), [SGD(lr=0.1), Evaluate(), MetricsFunction(seen)], steps=1, device="cpu")
    trainer.assemble(columns(8), columns(9))
    assert [trainer.evaluate()["rows"], trainer.evaluate()["rows"]] == [9, 9]
    np.testing.assert_array_equal(seen.calls[0][0], seen.calls[1][0])


def test_preprocess_says_what_is_kept():
    """The argmax of each batch is kept in place of the logits."""
    held, model, seen = columns(10), net(), Seen()
    evaluated(MetricsFunction(seen, preprocess=lambda logits, labels: logits.argmax(-1) == labels), held, model=model)
    with torch.no_grad():
        wanted = model.eval()(**held)["logits"].argmax(-1) == held["labels"]
    np.testing.assert_array_equal(seen.calls[0][0], wanted.numpy(), strict=True)


class Tokens(torch.nn.Module):
    """Logits for each token and one number a row."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(7, 4)

    def forward(self, input_ids, labels):
        logits = self.table(input_ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits, "pooled": logits.mean(1)}


class Lengthwise:
    """Batches of rows that are as long as their longest."""

    @hookimpl
    def build_collator(self):
        return self

    def __call__(self, rows):
        longest = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "labels": labels.clamp(max=3)}


def test_texts_of_different_lengths_are_padded():
    """Logits (B, L, C) and labels (B, L) of different L become one array each, with -100 where rows end."""
    rows, seen, model = [[1] * 2, [2] * 5, [3] * 3, [1] * 7, [2] * 1], Seen(), Tokens()
    plugins = [SGD(lr=0.1), Evaluate(), MetricsFunction(seen, keep=["logits", "pooled"]), Lengthwise(), Loader(2)]
    trainer = Trainer(model, plugins, steps=1, device="cpu")
    trainer.assemble(rows, rows)
    trainer.evaluate()
    ((predictions, labels, _),) = seen.calls
    assert {name: array.shape for name, array in predictions.items()} == {"logits": (5, 7, 4), "pooled": (5, 4)}
    assert labels.tolist() == [row + [-100] * (7 - len(row)) for row in rows]
    table = model.table.weight.detach().numpy()
    for row, kept in zip(rows, predictions["logits"], strict=True):
        np.testing.assert_array_equal(kept[: len(row)], table[row])
    lengths = [5, 5, 7, 7, 1]  # of the batches
    for length, kept in zip(lengths, predictions["logits"], strict=True):
        assert (kept[length:] == -100).all()
        assert (kept[:length] != -100).all()


class Tuples(torch.nn.Module):
    """A model of (features, labels) that returns (loss, logits), as many do."""

    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, features, labels):
        found = self.inner(features, labels)
        return found["loss"], found["logits"]


class FirstIsLoss:
    """Take the loss out of a tuple."""

    @hookimpl
    def compute_loss(self, micro):
        return micro.outputs[0] * micro.scale


def test_models_of_tuples():
    """Batches and outputs without names: labels are the last of the batch, logits the first that is no scalar."""
    data, seen = columns(9), Seen()
    rows = torch.utils.data.TensorDataset(data["features"], data["labels"])
    plugins = [SGD(lr=0.1), Evaluate(), MetricsFunction(seen), FirstIsLoss()]
    model = Tuples()
    trainer = Trainer(model, plugins, steps=1, device="cpu")
    trainer.assemble(rows, rows)
    trainer.evaluate()
    with torch.no_grad():
        wanted = model.inner.eval()(**data)["logits"].numpy()
    np.testing.assert_allclose(seen.calls[0][0], wanted, rtol=1e-6)
    np.testing.assert_array_equal(seen.calls[0][1], data["labels"].numpy())


def test_beyond_the_limit_predictions_are_on_disk():
    """With a limit of 0 the function gets memory maps with the same numbers."""
    held, model = columns(23), net()
    inside, outside = Seen(), Seen()
    evaluated(MetricsFunction(inside), held, model=model)
    evaluated(MetricsFunction(outside, limit_mb=0), held, model=model)
    for kept, mapped in zip(inside.calls[0][:2], outside.calls[0][:2], strict=True):
        assert isinstance(mapped, np.memmap)
        np.testing.assert_array_equal(kept, mapped)


def micro(labels, logits=None, number=None):
    labels = torch.tensor(labels)
    logits = torch.nn.functional.one_hot(labels.clamp(min=0), 5).float() if logits is None else logits
    return Micro({"labels": labels}, len(labels), len(labels), outputs={"logits": logits}, number=number)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (0.5, r"given' must return numbers by name, a dict. Received: float"),
        ({"a": 1.0, "b": "high"}, r"given' must return plain numbers by name. Received: \{'b': 'str'\}"),
        ({"each": np.ones(3)}, r"must return plain numbers by name. Received: \{'each': 'ndarray'\}"),
        ({"loss": 0.1}, "returns a 'loss', which the evaluation has"),
    ],
)
def test_results_that_are_no_numbers_are_refused(returned, message):
    """The message names the function and what it returned."""

    def given(predictions, labels):
        return returned

    with pytest.raises(TrainingError, match=message):
        measured(MetricsFunction(given), micro([1, 2]))


def measured(plugin, *micros):
    run = cpu_run()
    plugin.assembled(run)
    (metric,) = plugin.metrics(run)
    for each in micros:
        metric.update(each)
    return metric.compute()


def test_numbers_of_all_libraries_become_floats():
    """Scalars of Python, numpy and torch are plain numbers by name; a prefix goes before them."""
    found = {"a": 1, "b": np.float32(0.5), "c": torch.tensor(2), "d": np.array(0.25), "e": True}
    plugin = MetricsFunction(lambda predictions, labels: found, prefix="x/")
    result = measured(plugin, micro([1]))
    assert result == {"x/a": 1.0, "x/b": 0.5, "x/c": 2.0, "x/d": 0.25, "x/e": 1.0}
    assert {type(value) for value in result.values()} == {float}


def test_nothing_evaluated_is_nothing_said():
    """Without rows the function is not called."""
    assert measured(MetricsFunction(Seen())) == {}


def test_what_the_function_raises_keeps_its_traceback():
    """The user sees the line that failed."""

    def broken(predictions, labels):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        measured(MetricsFunction(broken), micro([1, 2]))
    assert caught.traceback[-1].name == "broken"


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (MetricsFunction("nowhere_at_all:f"), "cannot be imported"),
        (MetricsFunction(3), "function must be callable"),
        (MetricsFunction(Seen(), preprocess=3), "preprocess must be callable"),
        (MetricsFunction(Seen(), keep=[]), "keep must name an output"),
        (MetricsFunction(lambda **_: {}), r"cannot be called: .*\n.*let it take \(predictions, labels\)"),
        (MetricsFunction(lambda a, b, c: {}), "cannot be called: missing a required argument"),
        (MetricsFunction(f1, inputs=True), r"let it take \(predictions, labels, inputs\)"),
    ],
)
def test_functions_that_cannot_be_called_are_refused_before_the_run(plugin, message):
    """Assembly says what is wrong with the function."""
    with pytest.raises(ConfigError, match=message):
        plugin.assembled(cpu_run())


@pytest.mark.parametrize(
    ("plugin", "given", "message"),
    [
        (
            MetricsFunction(Seen(), keep="scores"),
            {},
            r"keeps the output 'scores', a tensor. Received: dict \['logits'\]",
        ),
        (
            MetricsFunction(Seen()),
            {"batch": {"x": torch.ones(2)}},
            r"needs batches with 'labels'. Received: dict \['x'\]",
        ),
        (MetricsFunction(Seen(), preprocess=lambda *_: 1.0), {}, r"keeps tensors \(B, ...\).* Received: float"),
        (MetricsFunction(Seen(), preprocess=lambda *_: torch.ones(())), {}, r"Received: shape \(\)"),
    ],
)
def test_what_cannot_be_kept_is_refused(plugin, given, message):
    """The message says what was there."""
    with pytest.raises(TrainingError, match=message):
        measured(plugin, attrs.evolve(micro([1, 2]), **given))


def test_without_an_evaluation_the_plan_refuses():
    """A metric that nobody computes is refused before the run."""
    with pytest.raises(PlanError, match="'metrics-function' requires 'evaluation'"):
        Trainer(net(), [SGD(), MetricsFunction(f1)], steps=1).assemble(columns())


class Parallel:
    """Stands for a plugin that trains on all ranks."""

    provides = ("data-parallel",)


def ignoring(data, rows):
    """Return columns in which `rows` have no label."""
    labels = data["labels"].clone()
    labels[list(rows)] = -100
    return {**data, "labels": labels}


def of_rank(rows, ignored, limit, gather="rank-0"):
    """Evaluate on this rank; return the metrics, and what the function was called with."""
    _gather.MESSAGE_BYTES = 100  # so that there are several
    seen = Seen()
    held = ignoring(columns(rows, seed=8), ignored)
    plugin = MetricsFunction(seen, inputs=True, limit_mb=limit, gather=gather)
    plugins = [
        SGD(lr=0.1),
        Evaluate(),
        plugin,
        Loader(3),
        *([Parallel()] if torch.distributed.is_initialized() else []),
    ]
    trainer = Trainer(net(), plugins, steps=1, device="cpu")
    trainer.assemble(columns(12), held)
    metrics = trainer.evaluate()
    calls = [(*map(np.asarray, call[:2]), np.asarray(call[2]["features"])) for call in seen.calls]
    return metrics, calls


CASES = {
    "the last rank's last batch is short": (23, (), 1),
    "it is empty": (19, (), 0),
    "that rank has no rows at all": (2, (), 1),
    "a batch of the first rank is passed over": (23, range(6, 9), 1),
    "a batch of the second rank is passed over": (23, range(3, 6), 1),
}


def told(predictions, labels):
    FOUND.append((np.asarray(predictions), np.asarray(labels)))
    return {}


FOUND = []


def ragged_masks():
    """Keep bool masks (2, length): of lengths 1 and 4 on the first rank, of length 3 on the second."""
    rank = torch.distributed.get_rank()
    metric = fresh(MetricsFunction(told, limit_mb=0))
    for number, length in enumerate([[1, 4], [3]][rank]):
        metric.update(micro([rank, number], torch.ones(2, length, dtype=torch.bool), number))
    metric.compute()
    return FOUND


def failing(gather):
    """Let the function fail where there are rows, on rank 0; return what is raised here."""

    def broken(predictions, labels):
        raise KeyError("mine")

    metric = fresh(MetricsFunction(broken, gather=gather))
    if metric.run.rank == 0:
        metric.update(micro([1, 2]))
    try:
        metric.compute()
    except (KeyError, TrainingError) as error:
        return repr(error)


def fresh(plugin):
    run = cpu_run(rank=torch.distributed.get_rank(), world_size=2)
    plugin.assembled(run)
    (metric,) = plugin.metrics(run)
    return metric


def all_of_rank():
    """Do everything that takes two ranks, since starting them takes longest."""
    return {
        **{case: of_rank(*given) for case, given in CASES.items()},
        "sharded": of_rank(22, (), 1, "sharded"),
        "masks": ragged_masks(),
        "failing": [failing("rank-0"), failing("sharded")],
    }


@pytest.fixture(scope="module")
def ranks():
    """Return what two ranks made of everything."""
    return run_ranks(all_of_rank)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_rows_of_one(ranks, case):
    """All rows once, in the data's order, on rank 0 alone; and all ranks have its numbers."""
    rows, ignored, _ = CASES[case]
    wanted, ((predictions, labels, features),) = of_rank(*CASES[case])
    (metrics, calls), (others, none) = ranks[0][case], ranks[1][case]
    assert none == []
    assert metrics == others
    assert metrics["rows"] == wanted["rows"] == rows - len(ignored)
    ((found, found_labels, found_features),) = calls
    np.testing.assert_array_equal(found_labels, labels, strict=True)
    np.testing.assert_array_equal(found_features, features, strict=True)
    np.testing.assert_allclose(found, predictions, rtol=1e-6)
    data = columns(rows, seed=8)
    np.testing.assert_array_equal(found_labels, np.delete(data["labels"].numpy(), list(ignored)))


def test_sharded_ranks_average_by_rows(ranks):
    """Each rank calls the function with its own rows; numbers are means weighed by rows, the same on both."""
    (metrics, first), (others, second) = ranks[0]["sharded"], ranks[1]["sharded"]
    assert [len(calls[0][1]) for calls in (first, second)] == [12, 10]
    assert metrics == others
    assert metrics["rows"] == pytest.approx((12 * 12 + 10 * 10) / 22)
    labels = columns(22, seed=8)["labels"].numpy()
    np.testing.assert_array_equal(second[0][1], np.concatenate([labels[3:6], labels[9:12], labels[15:18], labels[21:]]))


def test_ranks_with_texts_of_different_lengths(ranks):
    """What is padded on rank 0 is padded to the longest of all ranks, in a larger type where its own has no -100."""
    ((predictions, labels),) = ranks[0]["masks"]
    assert ranks[1]["masks"] == []
    assert labels.tolist() == [0, 0, 1, 0, 0, 1]
    lengths = [1, 1, 3, 3, 4, 4]
    assert predictions.tolist() == [[1] * length + [-100] * (4 - length) for length in lengths]


def test_a_function_that_fails_on_one_rank_fails_on_all(ranks):
    """Nobody waits for a rank that has failed, and who did not fail says who did."""
    assert ranks[0]["failing"] == ["KeyError('mine')"] * 2
    assert ranks[1]["failing"] == ["""TrainingError("metrics-function failed on rank 0: KeyError: 'mine'")"""] * 2


class Spans(torch.nn.Module):
    """Scores of where an answer begins and ends; its labels are two fields."""

    def __init__(self):
        super().__init__()
        self.scores = torch.nn.Linear(1, 2)

    def forward(self, x, start_positions, end_positions):
        starts, ends = self.scores(x[..., None]).unbind(-1)
        cross = torch.nn.functional.cross_entropy
        loss = cross(starts, start_positions) + cross(ends, end_positions)
        return {"loss": loss, "start_logits": starts, "end_logits": ends}


def test_several_fields_may_be_the_labels(tmp_path):
    """With two fields named, the function gets a dict of both, in the data's order."""
    generator = torch.Generator().manual_seed(3)
    places = {name: torch.randint(5, (11,), generator=generator) for name in ("start_positions", "end_positions")}
    data = {"x": torch.randn(11, 5, generator=generator), **places}
    seen = {}

    def spans(predictions, labels):
        seen.update(predictions=predictions, labels=labels)
        return {"begins": (predictions["start_logits"].argmax(1) == labels["start_positions"]).mean()}

    function = MetricsFunction(function=spans, keep=["start_logits", "end_logits"], labels=list(places))
    trainer = Trainer(Spans(), [SGD(), Evaluate(), function], output=tmp_path)
    trainer.fit(data, evaluate=data, steps=1)
    assert {name: list(array) for name, array in seen["labels"].items()} == {n: t.tolist() for n, t in places.items()}
    with torch.no_grad():
        wanted = trainer.run.model(**data)["start_logits"]
    np.testing.assert_allclose(seen["predictions"]["start_logits"], wanted.numpy(), rtol=1e-6)


def test_a_label_field_that_is_not_there(tmp_path):
    """The error names the field and those that the batch has."""
    data = {"x": torch.ones(8, 5), "start_positions": torch.zeros(8).long(), "end_positions": torch.zeros(8).long()}
    function = MetricsFunction(function=lambda p, labels: {}, keep="start_logits", labels=["begins"])
    with pytest.raises(TrainingError, match=r"'begins'.*start_positions"):
        Trainer(Spans(), [SGD(), Evaluate(), function], output=tmp_path).fit(data, evaluate=data, steps=1)
