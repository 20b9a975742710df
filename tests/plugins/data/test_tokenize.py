"""`tokenize`: the tokenizer's ids, and labels by name; what is wrong is named by row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from plugin_helpers import cpu_run, fit

from drivetrain import DataError, PlanError, Trainer
from drivetrain_plugins import SGD, Evaluate, HFModel, Loader, Pad, Tokenize

ROWS = [
    {"text": "the red bird sings", "label": "bird"},
    {"text": "a blue fish", "label": "fish"},
    {"text": "the green unknown fish swims fast", "label": 1},
    {"text": "", "label": 0},
]
NAMES = {"bird": 0, "fish": 1}


def tokenized(plugin, rows, tokenizer, names=None, split="train"):
    """Send `rows` through the plugin's wrapper as the data plugin's result."""
    model = SimpleNamespace(config=SimpleNamespace(label2id=NAMES if names is None else names))
    wrapper = plugin.build_dataset(cpu_run(model=model, processor=tokenizer), split)
    next(wrapper)
    with pytest.raises(StopIteration) as stop:
        wrapper.send(rows)
    return stop.value.value


@pytest.mark.parametrize("max_length", [128, 4])
def test_ids_equal_the_tokenizer(max_length, tokenizer):
    """Each row has what the tokenizer gives for its text alone, cut to the longest length."""
    made = tokenized(Tokenize(max_length=max_length), ROWS, tokenizer)
    assert len(made) == len(ROWS)
    for number, row in enumerate(ROWS):
        expected = dict(tokenizer(row["text"], truncation=True, max_length=max_length))
        assert {k: v for k, v in made[number].items() if k != "labels"} == expected


def test_pairs_equal_the_tokenizer(tokenizer):
    """Two texts of a row become one sequence with the tokenizer's types."""
    rows = [{"a": "the bird sings", "b": "a fish swims"}, {"a": "red", "b": "blue green"}]
    made = tokenized(Tokenize(text="a", pair="b", max_length=6), rows, tokenizer)
    for number, row in enumerate(rows):
        assert made[number] == dict(tokenizer(row["a"], row["b"], truncation=True, max_length=6))
    assert 1 in made[1]["token_type_ids"]


def test_labels_become_ids(tokenizer):
    """Names are looked up in the model's configuration; ids stay; the field can be called otherwise, or be absent."""
    assert [row["labels"] for row in tokenized(Tokenize(), ROWS, tokenizer)] == [0, 1, 1, 0]
    other = [{"text": "a", "kind": "fish"}]
    assert tokenized(Tokenize(label="kind"), other, tokenizer)[0]["labels"] == 1
    assert "labels" not in tokenized(Tokenize(label="kind"), ROWS, tokenizer)[0]
    assert "labels" not in tokenized(Tokenize(label=None), ROWS, tokenizer)[0]


def test_ignored_label_and_unknown_classes_pass(tokenizer):
    """-100 is no class but is allowed; a model that names no classes takes any id."""
    assert tokenized(Tokenize(), [{"text": "a", "label": -100}], tokenizer)[0]["labels"] == -100
    assert tokenized(Tokenize(), [{"text": "a", "label": 7}], tokenizer, names={})[0]["labels"] == 7


def test_a_single_output_takes_numbers(tokenizer):
    """A model with one output regresses: whole numbers are made floats, and none is out of range."""
    rows = [{"text": "a", "label": 3}, {"text": "a", "label": 2.5}]
    labels = [row["labels"] for row in tokenized(Tokenize(), rows, tokenizer, names={"LABEL_0": 0})]
    assert labels == [3.0, 2.5]
    assert {type(label) for label in labels} == {float}


def test_rows_beyond_one_call_keep_their_order(tokenizer):
    """More rows than the tokenizer gets at once come out in order, labels beside their text."""
    words = ["red", "blue", "green"]
    rows = [{"text": words[n % 3], "label": n % 2} for n in range(2503)]
    made = tokenized(Tokenize(), rows, tokenizer)
    expected = [tokenizer(word)["input_ids"] for word in words]
    assert [row["input_ids"] for row in made.rows] == [expected[n % 3] for n in range(2503)]
    assert [row["labels"] for row in made.rows] == [n % 2 for n in range(2503)]
    assert made.__getitems__([2502, 0]) == [made[2502], made[0]]


def test_no_rows_stay_no_rows(tokenizer):
    """A split that the data plugin does not have stays absent."""
    assert tokenized(Tokenize(), None, tokenizer) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 1}, r"field 'text' must be text. Received: a row with the fields \['label'\]"),
        ({"text": None}, "field 'text' must be text. Received: None"),
        ({"text": 3}, "field 'text' must be text. Received: 3"),
        ({"text": ["a", "b"]}, r"field 'text' must be text. Received: \['a', 'b'\]"),
        ({"text": "a", "label": "cat"}, r"the model has no label 'cat'. It has: \['bird', 'fish'\]"),
        ({"text": "a", "label": 2}, "a label id must be below 2. Received: 2"),
        ({"text": "a", "label": -1}, "a label id must be below 2. Received: -1"),
        ({"text": "a", "label": None}, "a label id must be below 2. Received: None"),
    ],
)
def test_bad_rows_are_named(row, message, tokenizer):
    """A row that cannot be used is named by split and number, also beyond the first thousand."""
    for before in (3, 1001):
        rows = [{"text": "a", "label": 0}] * before + [row]
        with pytest.raises(DataError, match=f"tokenize: evaluate row {before}: {message}"):
            tokenized(Tokenize(), rows, tokenizer, split="evaluate")


def test_pair_field_is_checked_too(tokenizer):
    """A missing second text is named as well."""
    with pytest.raises(DataError, match="train row 0: field 'b' must be text"):
        tokenized(Tokenize(pair="b"), [{"text": "a"}], tokenizer)


def test_run_equals_training_on_ids_made_by_hand(bert_folder, tokenizer):
    """A run on text equals the run on rows that the tokenizer made beforehand, evaluation included."""
    names = ("bird", "fish", "other")
    by_hand = [{**tokenizer(row["text"]), "labels": NAMES.get(row["label"], row["label"])} for row in ROWS]
    ends = []
    for plugins, rows in (([Tokenize()], ROWS), ([], by_hand)):
        shared = [HFModel(str(bert_folder), labels=names), Pad(), Loader(2), SGD(lr=0.1), Evaluate()]
        trainer, _ = fit(None, [*shared, *plugins], rows, rows[:3], epochs=2)
        ends.append((trainer.run.model.classifier.weight.detach(), trainer.run.metrics["evaluate/loss"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_without_a_tokenizer_the_plan_refuses():
    """Somebody has to bring the tokenizer."""
    with pytest.raises(PlanError, match="'tokenize' requires 'processor'"):
        Trainer(torch.nn.Linear(1, 1), [Tokenize(), SGD()], steps=1).fit(ROWS)
