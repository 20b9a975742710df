"""`pad` is transformers' padding, without touching its input."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from collate_rows import FORMS, assert_input_unchanged, assert_same_batch, docstring_rows, in_form, minilm, token_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import cpu_run, fit

from drivetrain import ConfigError, DataError, PlanError, Trainer, hookimpl
from drivetrain_plugins import SGD, Loader, Pad
from drivetrain_plugins.shared.table import Ragged, Table


def features(lengths, seed=0, labels=None):
    """Return tokenized rows of the given lengths."""
    draws = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        row = {
            "input_ids": torch.randint(5, 16, (length,), generator=draws).tolist(),
            "token_type_ids": torch.randint(0, 2, (length,), generator=draws).tolist(),
            "attention_mask": [1] * length,
        }
        rows.append(row if labels is None else {**row, "label": labels[number]})
    return rows


def collator(tokenizer, multiple=1):
    return Pad(tokenizer, multiple=multiple).build_collator(cpu_run())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("lengths", [[3, 7, 1], [8, 8], [9], [1, 1, 2, 16]])
def test_batch_equals_transformers_padding(lengths, multiple, side, tokenizer):
    """Ids, types, mask and labels are those of DataCollatorWithPadding, on either side and in multiples."""
    from transformers import DataCollatorWithPadding

    tokenizer.padding_side = side
    rows = features(lengths, labels=list(range(len(lengths))))
    theirs = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)(copy.deepcopy(rows))
    assert_same_batch(collator(tokenizer, multiple)(rows), dict(theirs))


@pytest.mark.parametrize("side", ["right", "left"])
def test_ragged_labels_are_padded_with_the_ignored_label(side, tokenizer):
    """Labels for each token are padded with -100, as DataCollatorForTokenClassification does."""
    from transformers import DataCollatorForTokenClassification

    tokenizer.padding_side = side
    rows = features([2, 5, 4], labels=[[0, 1], [1, 2, 0, 1, -100], [2, 2, 2, 2]])
    renamed = [{"labels" if name == "label" else name: value for name, value in row.items()} for row in rows]
    theirs = DataCollatorForTokenClassification(tokenizer)(copy.deepcopy(renamed))
    assert_same_batch(collator(tokenizer)(rows), dict(theirs))


def test_special_tokens_mask_is_padded_with_ones(tokenizer):
    """Padding counts as special tokens, as transformers says, so that masking never picks it."""
    rows = [{"input_ids": [2, 7, 3], "special_tokens_mask": [1, 0, 1]}, {"input_ids": [2], "special_tokens_mask": [1]}]
    theirs = tokenizer.pad(copy.deepcopy(rows), return_tensors="pt")
    assert_same_batch(collator(tokenizer)(rows), dict(theirs))


def test_input_is_never_changed(tokenizer):
    """The rows are the same after collating, so that a row can be read again in the next epoch."""
    rows = features([3, 6], labels=[[1, 1, 1], [2] * 6])
    before = copy.deepcopy(rows)
    make = collator(tokenizer, multiple=4)
    first = make(rows)
    assert rows == before
    assert_same_batch(first, make(rows))


def test_missing_attention_mask_is_made(tokenizer):
    """Rows with ids alone get a mask that hides the padding."""
    rows = [{"input_ids": [4, 0, 5]}, {"input_ids": [0]}]  # 0 is the padding id, and a real id here
    batch = collator(tokenizer)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("name", ["label", "labels", "label_ids"])
def test_labels_have_one_name(name, tokenizer):
    """However rows call them, the batch calls them labels; floats stay floats."""
    batch = collator(tokenizer)([{"input_ids": [1], name: 0.5}, {"input_ids": [1], name: 2}])
    assert torch.equal(batch["labels"], torch.tensor([0.5, 2.0]))


def test_tensors_and_text_in_rows(tokenizer):
    """Tensors are padded like lists; text, and fields that hold nothing, are left out."""
    rows = [
        {"input_ids": torch.tensor([5, 6]), "text": "a", "note": None, "label": torch.tensor(1)},
        {"input_ids": torch.tensor([7]), "text": "b", "note": None, "label": torch.tensor(0)},
    ]
    batch = collator(tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_collator_is_picklable(tokenizer):
    """Worker processes can be given the collator."""
    rows, make = features([2, 4]), collator(tokenizer)
    assert_same_batch(pickle.loads(pickle.dumps(make))(rows), make(rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"input_ids": [1], "label": 1}, {"input_ids": [2]}],
            r"the same fields, but row 1 of the batch lacks .'label'",
        ),
        (
            [{"input_ids": [1]}, {"input_ids": [2], "label": 1}],
            r"the same fields, but row 0 of the batch lacks .'label'",
        ),
        ([{"input_ids": [1], "label": 1}, {"input_ids": [2], "label": None}], r"'label' makes no tensor .row 1 .*null"),
        ([{"input_ids": [1], "label": None}, {"input_ids": [2], "label": 1}], r"'label' makes no tensor .row 0 .*null"),
        ([{"input_ids": [1], "label": None}], r"'label' makes no tensor .row 0 of the batch: it is null"),
        ([{"input_ids": [1], "label": "cat"}, {"input_ids": [2], "label": "dog"}], r"'label' makes no tensor.*'cat'"),
        ([{"input_ids": [1]}, {"input_ids": ["x"]}], r"field 'input_ids' makes no tensor .row 1 .*'x'"),
        ([{"input_ids": [1]}, {"input_ids": None}], r"field 'input_ids' makes no tensor .row 1 .*it is null"),
        ([{"input_ids": None}, {"input_ids": [1]}], r"field 'input_ids' makes no tensor .row 0 .*it is null"),
        ([{"input_ids": [1]}, {"input_ids": 3}], r"field 'input_ids' makes no tensor .row 1 .*it is no list but int"),
        ([{"input_ids": [1]}, {"input_ids": [2**63]}], r"field 'input_ids' makes no tensor .row 1 "),
        ([{"input_ids": [1], "label": 2**63}], r"field 'label' makes no tensor .row 0 .*64 bits"),
        ([{"input_ids": [1], "label": 1}, {"input_ids": [1], "label": [1]}], r"'label' makes no tensor .row 1 "),
        ([{"input_ids": [1], "extra": {"a": 1}}], r"field 'extra' makes no tensor .row 0 "),
        ([[1, 2], [3]], r"a row must be a mapping of fields. Received: list \[1, 2\]"),
        ([{"input_ids": [[1], [1, 2]]}, {"input_ids": [[1], [2]]}], "field 'input_ids' makes no tensor"),
    ],
)
def test_rows_that_make_no_batch_are_named(rows, message, tokenizer):
    """Rows that differ in their fields, and values that are no numbers, are refused with what was received."""
    with pytest.raises(DataError, match="(?s)pad: .*" + message):
        collator(tokenizer)(rows)


def test_tokenizer_without_padding_is_refused(tokenizer):
    """A tokenizer without a padding token is refused with what to do."""
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match=r"no padding token. Set one, e.g. tokenizer.pad_token = eos_token"):
        collator(tokenizer)


def test_the_run_brings_the_tokenizer_or_the_plan_says_so(tokenizer):
    """Without a tokenizer of its own it takes the model's; where there is none, the plan refuses."""
    run = cpu_run(processor=tokenizer)
    assert Pad().build_collator(run)([{"input_ids": [1, 2]}, {"input_ids": [3]}])["input_ids"].tolist() == [
        [1, 2],
        [3, 0],
    ]
    with pytest.raises(PlanError, match="'pad' requires 'processor'"):
        Trainer(torch.nn.Linear(1, 1), [Pad(), SGD()], steps=1).fit([{"input_ids": [1]}])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_real_rows_equal_transformers(side, form):
    """Tokenized docstrings make the batches of DataCollatorWithPadding, as lists, arrays, tensors and columns."""
    from transformers import DataCollatorWithPadding

    rows, make = docstring_rows(), collator(minilm(side), multiple=8)
    theirs = DataCollatorWithPadding(minilm(side), pad_to_multiple_of=8)
    for start in range(0, len(rows), 7):
        batch = rows[start : start + 7]
        assert_same_batch(make(in_form(batch, form)), dict(theirs(copy.deepcopy(batch))))


@settings(max_examples=60, deadline=None)
@given(rows=token_rows(labels=lambda _: st.integers(-5, 5) | st.floats(-2, 2, width=32)), multiple=st.integers(1, 9))
def test_any_rows_equal_transformers(rows, multiple):
    """Whatever the lengths, masks and labels, lists and columns make the batch of DataCollatorWithPadding."""
    from transformers import DataCollatorWithPadding

    theirs = dict(DataCollatorWithPadding(minilm(), pad_to_multiple_of=multiple)(copy.deepcopy(rows)))
    for form in ("lists", "table"):
        assert_same_batch(collator(minilm(), multiple)(in_form(rows, form)), theirs)


@pytest.mark.parametrize("multiple", [1, 8])
def test_fixed_length_equals_transformers(multiple):
    """With a length every batch has that width, in multiples; a longer row is refused by name."""
    from transformers import DataCollatorWithPadding

    rows = [row for row in docstring_rows() if len(row["input_ids"]) <= 50]
    make = Pad(minilm(), length=50, multiple=multiple).build_collator(cpu_run())
    theirs = DataCollatorWithPadding(minilm(), "max_length", 50, pad_to_multiple_of=multiple)(copy.deepcopy(rows))
    assert_same_batch(make(rows), dict(theirs))
    with pytest.raises(DataError, match=r"pad: field 'input_ids': row 1 of the batch has 51 items.*length of 50"):
        make([{"input_ids": [1]}, {"input_ids": [1] * 51}])


@pytest.mark.parametrize("labels", [[0.0, 1.0, 0.5], [0, 1, 1]])
def test_labels_of_several_classes_are_stacked(labels):
    """A row's label of one number a class is not padded, whatever the multiple."""
    rows = [{"input_ids": [1, 2], "labels": labels}, {"input_ids": [3], "labels": labels[::-1]}]
    for form in FORMS:
        made = collator(minilm(), multiple=8)(in_form(rows, form))["labels"]
        assert torch.equal(made, torch.tensor([labels, labels[::-1]]))


def test_numbers_are_int64_or_float32():
    """Labels have the types losses take, whatever the rows have: narrow, wide, numpy's, booleans or tensors."""
    cases = {torch.int64: [np.int8(1), np.uint16(0), 1, True, torch.tensor(1)], torch.float32: [np.float64(1), 0.5]}
    for dtype, values in cases.items():
        for value in values:
            rows = [{"input_ids": [1], "label": value}, {"input_ids": [2], "label": value}]
            made = collator(minilm())(rows)["labels"]
            assert made.dtype == dtype
            assert made.tolist() == [float(value)] * 2
    table = Table({"input_ids": Table.of([{"a": [1]}, {"a": [2]}]).columns["a"], "label": np.array([1, 0], np.int32)})
    assert collator(minilm())(table)["labels"].dtype == torch.int64


def test_arrays_of_equal_shape_are_stacked():
    """A field that holds arrays of several dimensions is stacked; unequal shapes are refused."""
    boxes = [np.arange(6, dtype=np.float64).reshape(2, 3), np.ones((2, 3))]
    rows = [{"input_ids": [1], "boxes": box} for box in boxes]
    assert torch.equal(collator(minilm())(rows)["boxes"], torch.tensor(np.stack(boxes), dtype=torch.float32))
    rows[1]["boxes"] = np.ones((3, 3))
    with pytest.raises(DataError, match=r"field 'boxes' makes no tensor.*\(2, 3\).*\(3, 3\)"):
        collator(minilm())(rows)


def test_no_form_of_rows_is_changed():
    """Lists, arrays, tensors and columns hold the same after collating, also when the batch is overwritten."""
    assert_input_unchanged(collator(minilm(), multiple=4), docstring_rows(8))
    ragged = [{"input_ids": [1, 2], "labels": [1, 0]}, {"input_ids": [3], "labels": [2]}]
    assert_input_unchanged(collator(minilm()), ragged)


def test_slice_of_a_table_is_collated_where_it_stands():
    """Columns whose offsets do not begin at zero make the same batch as their rows."""
    rows = docstring_rows(9)
    whole = Table.of(rows)
    later = {k: Ragged(c.values, c.offsets[4:]) if isinstance(c, Ragged) else c[4:] for k, c in whole.columns.items()}
    assert_same_batch(collator(minilm())(Table(later)), collator(minilm())(rows[4:]))


def test_a_run_names_the_bad_row():
    """In a run the error has the split and the row's number, not only the place in a batch."""
    rows = [{"input_ids": [1, 2], "label": 0} for _ in range(12)]
    rows[9] = {"input_ids": [1, 2], "label": None}
    trainer = Trainer(torch.nn.Linear(1, 1), [Pad(minilm()), Loader(4), SGD()], steps=3, device="cpu")
    run = trainer.assemble(rows)
    with pytest.raises(
        DataError, match=r"train row 9: pad: field 'label' makes no tensor .row 0 of the batch: it is null"
    ):
        list(run.micros("train"))


def test_padding_does_not_change_training(tokenizer):
    """A model that honours the mask ends with the weights of unpadded single-row accumulation."""

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            table = torch.arange(48, dtype=torch.float64).reshape(16, 3).sin()
            self.table = torch.nn.Embedding.from_pretrained(table, freeze=False)

        def forward(self, input_ids, attention_mask, labels, token_type_ids=None):
            mask = attention_mask.unsqueeze(-1).double()
            logits = (self.table(input_ids) * mask).sum(1) / mask.sum(1)
            return torch.nn.functional.cross_entropy(logits, labels)

    class Accumulation:
        facts = {"accumulation": 4}  # noqa: RUF012

        @hookimpl
        def assembled(self, run):
            pass

    rows, weights = features([3, 7, 1, 5, 2, 8, 4, 6], labels=[0, 1, 2, 0, 1, 2, 0, 1]), []
    for plugins in ([Loader(4)], [Loader(1), Accumulation()]):
        trainer, _ = fit(Mean(), [*plugins, Pad(tokenizer, multiple=5), SGD(lr=1.0)], rows, epochs=2)
        weights.append(trainer.run.model.table.weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-12)
