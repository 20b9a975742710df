"""`predict`: rows as a hand-written loop predicts them, in the order of the data, and files that say the same."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow.parquet
import pytest
import torch
from plugin_helpers import assert_same_weights

from drivetrain import ConfigError, Trainer, TrainingError, hookimpl
from drivetrain.testing.files import ensure
from drivetrain.testing.kinds import kit_rows
from drivetrain.testing.ranks import run_ranks
from drivetrain_plugins import (
    BCE,
    EMA,
    SGD,
    Accuracy,
    BadRows,
    CompletionOnly,
    Evaluate,
    Flatten,
    Generate,
    GroupByLength,
    HFModel,
    Loader,
    Pad,
    Predict,
    Seq2Seq,
    Tokenize,
)
from drivetrain_plugins.evaluate._kinds import _span
from drivetrain_plugins.evaluate._rows_out import RowsFile, read_rows

NAMES = ("river", "engine", "melody")


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """Return a folder with the kit's small model."""
    folder = tmp_path_factory.mktemp("predict-kit")
    ensure(folder, "model")
    return folder


def hf_model(kit, **options):
    return HFModel(path=str(kit / "model"), **{"labels": NAMES, **options})


def trained(kit, rows, held, *plugins, model=None, steps=2, **settings):
    """Return a trainer that has fitted a small transformers model."""
    plugins = [model or hf_model(kit), Pad(), Loader(4), SGD(lr=0.05), Evaluate(), *plugins]
    trainer = Trainer(plugins=plugins, steps=steps, device="cpu", **settings)
    trainer.fit(rows, held)
    return trainer


def one_by_one(run, rows):
    """Return the logits of each row by itself, with transformers alone."""
    run.model.eval()
    with torch.no_grad():
        return [run.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].numpy() for row in rows]


def test_classes_are_those_of_a_hand_written_loop(kit):
    """Logits, labels and metrics are those of the rows one by one, in the order of the data, whatever the batches."""
    held = kit_rows("tokens", 11, start=1000)
    plugins = [Predict(), Accuracy(), GroupByLength()]
    trainer = trained(kit, kit_rows("tokens", 40), held, *plugins)
    before = {name: value.clone() for name, value in trainer.run.model.state_dict().items()}
    found = trainer.predict()
    by_hand = np.stack(one_by_one(trainer.run, held))
    np.testing.assert_allclose(found.outputs, by_hand, atol=1e-6)
    assert found.labels.tolist() == [row["labels"] for row in held]
    assert found.rows.tolist() == list(range(11))
    assert (found.kind, found.classes, found.split) == ("class", NAMES, "evaluate")
    hits = np.mean(by_hand.argmax(1) == found.labels)
    assert found.metrics == {"loss": trainer.evaluate()["loss"], "accuracy": pytest.approx(hits)}
    assert all(torch.equal(before[name], value) for name, value in trainer.run.model.state_dict().items())
    of_train = trainer.predict("train")
    np.testing.assert_allclose(of_train.outputs, np.stack(one_by_one(trainer.run, kit_rows("tokens", 40))), atol=1e-6)


def test_nothing_is_logged_and_nobody_is_told(kit):
    """A prediction is no evaluation of the run: no log, no `evaluated`."""
    heard = []

    class Hear:
        @hookimpl
        def log(self, metrics):
            heard.append(metrics)

        @hookimpl
        def evaluated(self, split):
            heard.append(split)

    trainer = trained(kit, kit_rows("tokens", 8), kit_rows("tokens", 4), Predict(), Hear())
    heard.clear()
    trainer.predict()
    assert heard == []


def test_averaged_weights_are_what_predicts(kit):
    """Where a plugin keeps an average, the average predicts, and the trained weights are back afterwards."""
    held = kit_rows("tokens", 5, start=1000)
    trainer = trained(kit, kit_rows("tokens", 40), held, EMA(decay=0.5), Predict(), steps=4)
    ema, model = trainer.run.plugins["ema"], trainer.run.model
    found, own = trainer.predict().outputs, np.stack(one_by_one(trainer.run, held))
    assert np.abs(found - own).max() > 1e-5
    model.load_state_dict({**model.state_dict(), **ema._averages.state_dict()})
    np.testing.assert_allclose(found, np.stack(one_by_one(trainer.run, held)), atol=1e-6)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_without_labels(kit, tmp_path, suffix):
    """Unlabelled rows of a file are tokenized, predicted and written at the end of the run, with columns of the data."""
    texts = [row["text"] for row in kit_rows("text", 9, start=500)]
    rows = [{"text": text, "key": f"k{number}", "score": number / 0.7} for number, text in enumerate(texts)]
    with RowsFile(tmp_path / f"new{suffix}") as file:
        file.write(lambda: [rows[:4], rows[4:]])
    to = tmp_path / f"made/out{suffix}"
    predict = Predict(data={"predict": str(tmp_path / f"new{suffix}")}, to=str(to), columns=["key", "score"])
    train = kit_rows("text", 16)
    trainer = trained(kit, train, kit_rows("text", 4), Tokenize(), Accuracy(), predict)
    written = read_rows(to, "test")
    tokenizer = trainer.run.processor
    by_hand = one_by_one(trainer.run, [{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
    for number, (row, logits) in enumerate(zip(written, by_hand, strict=True)):
        best = int(logits.argmax())
        probability = torch.tensor(logits).double().softmax(0)[best].item()
        assert row == {
            "row": number, "key": f"k{number}", "score": number / 0.7, "prediction": NAMES[best],
            "prediction_id": best, "probability": pytest.approx(probability, abs=1e-6),
        }  # fmt: skip
    found = trainer.predict("predict")
    assert (found.labels, found.metrics) == (None, {})
    assert trainer.run.batches["predict"].fetch.split == "predict"
    assert [p.name for p in to.parent.iterdir()] == [to.name]
    assert set(trainer.evaluate()) == {"loss", "accuracy"}


def test_the_loop_never_evaluates_a_set_without_labels(kit, tmp_path):
    """Only sets that start with "evaluate" are measured in training."""
    (tmp_path / "new.jsonl").write_text('{"text": "the river"}\n')
    heard = []

    class Hear:
        @hookimpl
        def evaluated(self, split):
            heard.append(split)

    predict = Predict(data={"predict/new": str(tmp_path / "new.jsonl")})
    trained(kit, kit_rows("text", 8), kit_rows("text", 4), Tokenize(), predict, Hear())
    assert heard == ["evaluate"]


def test_training_is_bit_identical_with_and_without(kit, tmp_path):
    """Writing predictions at the end changes no weight."""
    runs = []
    for plugins in ([Predict(to=str(tmp_path / "p.jsonl"))], []):
        runs.append(trained(kit, kit_rows("tokens", 20), kit_rows("tokens", 6), *plugins).run)
    assert_same_weights(runs[0].model, runs[1].model)


class Tagger(torch.nn.Module):
    """A class for each token, by the token alone."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(torch.arange(64 * 3.0).reshape(64, 3).cos(), freeze=False)

    def forward(self, input_ids, labels=None, **_):
        logits = self.table(input_ids)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def fitted(model, rows, held, *plugins, steps=1):
    trainer = Trainer(model, [Loader(4), SGD(lr=0.1), Evaluate(), *plugins], steps=steps, device="cpu")
    trainer.fit(rows, held)
    return trainer


def test_tokens_have_a_class_each_and_padding_has_none(tokenizer, tmp_path):
    """Of labelled rows only labelled tokens count; of others all that are no padding; rows are as long as they are."""
    held = kit_rows("tagged", 7, start=1000)
    held[2]["labels"] = [-100] * len(held[2]["labels"])
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"input_ids": row["input_ids"]}) + "\n" for row in held))
    predict = Predict(to=str(tmp_path / "out.jsonl"), splits=["evaluate", "predict"])
    predict.data["predict"] = str(tmp_path / "new.jsonl")
    trainer = fitted(Tagger(), kit_rows("tagged", 8), held, Pad(tokenizer), predict)
    best = trainer.run.model.table.weight.argmax(1)
    written = read_rows(tmp_path / "out.jsonl", "test")
    for row, data in zip(written, [*held, *held], strict=True):
        pairs = zip(data["input_ids"], data["labels"], strict=True)
        wanted = [best[i].item() for i, label in pairs if row["split"] == "predict" or label != -100]
        assert row["prediction"] == row["prediction_ids"] == wanted
    assert [row["row"] for row in written] == [*range(7), *range(7)]
    assert trainer.predict().outputs.shape == (7, max(len(row["input_ids"]) for row in held))


def test_rows_whose_labels_do_not_count_are_predicted(tokenizer):
    """A batch that an evaluation passes over, as it has no target items, is predicted like the others, once."""
    held = kit_rows("tagged", 4, start=1000) + [
        {**row, "labels": [-100] * len(row["labels"])} for row in kit_rows("tagged", 4, start=2000)
    ]
    trainer = fitted(Tagger(), kit_rows("tagged", 8), held, Pad(tokenizer), Predict(kind="logits"))
    found, table = trainer.predict(), trainer.run.model.table.weight.detach().numpy()
    assert found.rows.tolist() == list(range(8))
    for logits, row in zip(found.outputs, held, strict=True):
        length = len(row["input_ids"])
        np.testing.assert_array_equal(logits[:length], table[row["input_ids"]])
        assert (logits[length:] == -100).all()
    assert found.metrics["loss"] == trainer.evaluate()["loss"]


class Regressor(torch.nn.Module):
    """Numbers from features."""

    def __init__(self, count=1):
        super().__init__()
        self.layer = torch.nn.Linear(8, count)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": (logits - labels.reshape(logits.shape)).square().mean(), "logits": logits}


@pytest.mark.parametrize("count", [1, 3])
def test_numbers_are_predicted_as_they_are(count, tmp_path):
    """Regression: one number a row, or a list; numbers that are not finite are text."""
    draws = torch.Generator().manual_seed(5)
    data = {"x": torch.randn(10, 8, generator=draws), "labels": torch.randn(10, count, generator=draws)}
    data["x"][3] = math.inf
    to = {suffix: tmp_path / f"out{suffix}" for suffix in (".jsonl", ".parquet")}
    predict = Predict()
    trainer = fitted(Regressor(count), {k: v[4:] for k, v in data.items()}, data, predict)
    assert predict.write(trainer.run, ["evaluate"], to[".jsonl"]) == 10
    predict.write(trainer.run, ["evaluate"], to[".parquet"])
    with torch.no_grad():
        by_hand = trainer.run.model.layer(data["x"]).squeeze(1).tolist()
    jsonl, parquet = (read_rows(path, "test") for path in to.values())
    assert [row["row"] for row in jsonl] == list(range(10))
    for number, wanted in enumerate(by_hand):
        if number == 3:
            assert jsonl[3] == {"row": 3, "prediction": json.loads(json.dumps(wanted), parse_constant=_named)}
            assert np.array_equal(parquet[3]["prediction"], wanted, equal_nan=True)
        else:
            assert jsonl[number]["prediction"] == parquet[number]["prediction"] == pytest.approx(wanted, abs=1e-6)
    assert trainer.predict().kind == "values"


def _named(constant):
    return {"Infinity": "inf", "-Infinity": "-inf", "NaN": "nan"}[constant]


def test_several_labels_are_those_above_the_threshold(kit, tmp_path):
    """With bce, or a model configured for several labels, every class from the threshold on is named."""
    for plugins, options in (
        ([BCE()], {}),
        ([], {"arguments": {"problem_type": "multi_label_classification"}}),
        ([], {}),
    ):
        predict = Predict(threshold=0.4, to=str(tmp_path / "out.jsonl"))
        held = kit_rows("flags", 6, start=1000)
        model = hf_model(kit, **options)
        trainer = trained(kit, kit_rows("flags", 8), held, *plugins, predict, model=model)
        for row, logits in zip(read_rows(tmp_path / "out.jsonl", "test"), one_by_one(trainer.run, held), strict=True):
            probabilities = torch.tensor(logits).double().sigmoid()
            ids = [index for index, p in enumerate(probabilities.tolist()) if p >= 0.4]
            assert (row["prediction_ids"], row["prediction"]) == (ids, [NAMES[i] for i in ids])
            np.testing.assert_allclose(row["probabilities"], probabilities, atol=1e-6)


def test_a_span_is_the_best_pair_that_can_be():
    """The answer starts before it ends, and is no longer than allowed; compared with all pairs."""
    draws = np.random.default_rng(4)
    for longest in (1, 3, 30):
        logits = {name: draws.normal(size=12).astype(np.float32) for name in ("start_logits", "end_logits")}
        pairs = [(a, b) for a in range(12) for b in range(a, min(12, a + longest))]
        best = max(pairs, key=lambda p: float(logits["start_logits"][p[0]]) + float(logits["end_logits"][p[1]]))
        found = _span(logits, longest)
        assert (found["prediction_start"], found["prediction_end"]) == best
        assert found["prediction_score"] == pytest.approx(
            sum(float(v[i]) for v, i in zip(logits.values(), best, strict=True))
        )


def test_spans_of_a_model(kit, tmp_path):
    """Question answering gives both logits by name; an answer never lies in the padding."""
    rows = kit_rows("sequences", 8)
    rows = [{**row, "start_positions": 1, "end_positions": 2} for row in rows]
    model = hf_model(kit, task="question-answering", labels=(), arguments={"num_labels": 2})
    trainer = trained(kit, rows, rows[:5], Predict(to=str(tmp_path / "out.jsonl")), model=model)
    found = trainer.predict()
    assert found.kind == "span"
    trainer.run.model.eval()
    for place, row in enumerate(rows[:5]):
        with torch.no_grad():
            made = trainer.run.model(input_ids=torch.tensor([row["input_ids"]]))
        for name in ("start_logits", "end_logits"):
            np.testing.assert_allclose(found.outputs[name][place][: len(row["input_ids"])], made[name][0], atol=1e-5)
    for row, data in zip(read_rows(tmp_path / "out.jsonl", "test"), rows, strict=False):
        assert 0 <= row["prediction_start"] <= row["prediction_end"] < len(data["input_ids"])


@pytest.mark.parametrize("name", ["causal", "seq2seq"])
def test_texts_are_those_of_the_library(tmp_path, name):
    """With `generate`, a row becomes the text that transformers makes of it alone: of its prompt, or of its source."""
    rows = kit_rows("completions" if name == "causal" else "pairs", 9)
    new = [{"input_ids": row["input_ids"]} for row in rows]
    if name == "causal":
        new = [{**row, "completion_mask": [0] * len(row["input_ids"])} for row in new]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    model = HFModel(path=str(ensure(tmp_path, name)), task=f"{name}-lm".replace("lm-lm", "lm"))
    data = {"predict": str(tmp_path / "new.jsonl")}
    collate = CompletionOnly() if name == "causal" else Seq2Seq()
    plugins = [model, collate, Loader(4), SGD(lr=0.1), Evaluate(), Generate(max_new_tokens=6, num_beams=1)]
    trainer = Trainer(plugins=[*plugins, Predict(data=data)], steps=1, device="cpu")
    run = trainer.assemble(rows, rows)
    for split in ["evaluate", *data]:
        found = trainer.predict(split)
        run.model.eval()
        assert found.kind == "text"
        for row, text in zip(rows, found.texts, strict=True):
            ids = row["input_ids"]
            if name == "causal" and split == "evaluate":
                ids = ids[: row["completion_mask"].index(1)]
            made = run.model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0]
            made = made[len(ids) :] if name == "causal" else made
            assert text == run.processor.decode(made, skip_special_tokens=True)


class Averaging:
    """Stands for a plugin that trains on several ranks: gradients are averaged."""

    provides = ("data-parallel",)

    @hookimpl
    def gradients_ready(self, step):
        for parameter in step.run.parameters:
            torch.distributed.all_reduce(parameter.grad)


class Padded:
    """Pad with zeros and -100."""

    @hookimpl
    def build_collator(self):
        return padded


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "labels": -100}
    batch = {n: torch.tensor([row[n] + [f] * (longest - len(row[n])) for row in rows]) for n, f in fills.items()}
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


def of_ranks(to):
    held = kit_rows("tagged", 13, start=1000)
    plugins = [Loader(4), SGD(lr=0.1), Evaluate(), Padded(), Averaging(), Predict(to=to, kind="logits")]
    trainer = Trainer(Tagger(), plugins, steps=1, device="cpu")
    trainer.fit(kit_rows("tagged", 16), held)
    found = trainer.predict()
    return None if found is None else (found, trainer.run.model.table.weight.detach().numpy())


def test_two_ranks_give_the_rows_of_one(tmp_path):
    """With rows that do not come out even, rank 0 has all of them in order, and writes the file; the other has none."""
    to = tmp_path / "out.jsonl"
    first, second = run_ranks(of_ranks, str(to))
    assert second is None
    found, table = first
    held = kit_rows("tagged", 13, start=1000)
    longest = max(len(row["input_ids"]) for row in held)
    assert found.rows.tolist() == list(range(13))
    assert found.labels.tolist() == [row["labels"] + [-100] * (longest - len(row["labels"])) for row in held]
    for logits, row in zip(found.outputs, held, strict=True):
        length = len(row["input_ids"])
        np.testing.assert_array_equal(logits[:length], table[row["input_ids"]])
        assert (logits[length:] == -100).all()
    written = read_rows(to, "test")
    assert [row["row"] for row in written] == list(range(13))
    np.testing.assert_array_equal([row["logits"] for row in written], found.outputs)


def test_streams_and_bad_rows_keep_their_numbers(tokenizer):
    """Rows of a stream are numbered as they come; a bad row is left out, and the others keep their numbers."""
    held = kit_rows("tagged", 10, start=1000)
    for row, bad in ((3, True), (0, False)):
        rows = [dict(r) for r in held]
        if bad:
            rows[row]["labels"] = ["x"]
        plugins = [Pad(tokenizer), Predict(), *([BadRows(limit=5)] if bad else [])]
        given = rows if bad else Iterable(rows)
        trainer = fitted(Tagger(), kit_rows("tagged", 8), given, *plugins)
        assert trainer.predict().rows.tolist() == [n for n in range(10) if not (bad and n == row)]


class Iterable:
    """Rows that can only be iterated."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_what_cannot_be_predicted_is_refused(kit, tmp_path, tokenizer):
    """Each message says what was received and what to do; files and sets are checked before step 0."""
    rows = kit_rows("tokens", 8)
    trainer = trained(kit, rows, rows, Predict())
    with pytest.raises(ConfigError, match=r"no split 'dev'.*\n?.*evaluate"):
        trainer.predict("dev")
    with pytest.raises(ConfigError, match="add `predict`"):
        trained(kit, rows, rows).predict()
    for options, said in (
        ({"to": str(tmp_path)}, "jsonl"),
        ({"columns": ["row"]}, "Rename"),
        ({"data": {"test": "x.jsonl"}}, "predict/NAME"),
    ):
        with pytest.raises(ValueError, match=said):
            Predict(**options)
    (tmp_path / "file").write_text("")
    for options, said in (
        ({"to": str(tmp_path / "file/out.jsonl")}, "cannot be written"),
        ({"to": str(tmp_path / "out.jsonl"), "columns": ["text"]}, r"no column 'text'.*\n?.*input_ids"),
        ({"to": str(tmp_path / "out.jsonl"), "splits": ["evaluate/x"]}, "no split 'evaluate/x'"),
        ({"data": {"predict": str(tmp_path / "gone.jsonl")}}, "gone.jsonl"),
    ):
        with pytest.raises(ConfigError, match=said):
            trained(kit, rows, rows, Predict(**options))
    packed = fitted(Tagger(), kit_rows("tagged", 8), kit_rows("tagged", 8), Flatten(), Predict())
    with pytest.raises(TrainingError, match="flatten"):
        packed.predict()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    """A file keeps its old content when writing fails; types that differ by group are joined, or refused."""
    path = tmp_path / "out.parquet"
    with RowsFile(path) as file:
        file.write(lambda: [[{"a": None, "b": [1]}], [{"a": "x", "b": [1.5]}]])
    assert read_rows(path, "test") == [{"a": None, "b": [1.0]}, {"a": "x", "b": [1.5]}]
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 2
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="several types"), RowsFile(path) as file:
        file.write(lambda: [[{"a": 1}], [{"a": "x"}]])
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="cannot be written as JSON"), RowsFile(tmp_path / "o.jsonl") as file:
        file.write(lambda: [[{"a": 1}, {"a": b"x"}]])
    assert [p.name for p in tmp_path.iterdir()] == ["out.parquet"]


def test_parquet_has_the_columns_of_every_row(tmp_path):
    """A key that only a later row of a group has is a column, too."""
    with RowsFile(tmp_path / "out.parquet") as file:
        file.write(lambda: [[{"a": 1}, {"a": 2, "b": 0.5}]])
    assert read_rows(tmp_path / "out.parquet", "test") == [{"a": 1, "b": None}, {"a": 2, "b": 0.5}]


def test_a_column_that_is_no_json_is_told_before_training(kit, tmp_path):
    """Dates cannot be written as JSON lines: that is known before the first step."""
    import datetime as dt

    rows = [{**row, "when": dt.date(2026, 1, 1)} for row in kit_rows("text", 8)]
    predict = Predict(to=str(tmp_path / "out.jsonl"), columns=["when"])
    plugins = [hf_model(kit), Tokenize(), Pad(), Loader(4), SGD(lr=0.05), Evaluate(), predict]
    trainer = Trainer(plugins=plugins, steps=2, device="cpu")
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        trainer.fit(rows, rows)
    assert trainer.run.progress.step == 0
