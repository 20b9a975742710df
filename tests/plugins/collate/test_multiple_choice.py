"""`multiple-choice` is transformers' collator of that name, with labels optional."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from collate_rows import assert_same_batch, docstring_rows, minilm, token_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import cpu_run

from drivetrain import DataError
from drivetrain_plugins.collate.multiple_choice import MultipleChoice
from drivetrain_plugins.shared.table import Table


def collator(side="right", **options):
    return MultipleChoice(minilm(side), **options).build_collator(cpu_run())


def grouped(rows, choices, name="label"):
    """Return rows that hold `choices` of the given rows each."""
    made = []
    for start in range(0, len(rows) - choices + 1, choices):
        part = rows[start : start + choices]
        row = {key: [each[key] for each in part] for key in part[0] if key not in ("label", "labels")}
        made.append({**row, name: start % choices})
    return made


def theirs(rows, side="right", **options):
    """Return the batch of DataCollatorForMultipleChoice."""
    from transformers import DataCollatorForMultipleChoice

    return dict(DataCollatorForMultipleChoice(minilm(side), **options)(copy.deepcopy(rows)))


@pytest.mark.parametrize("name", ["label", "labels"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("choices", [1, 2, 5])
def test_real_rows_equal_transformers(choices, side, name):
    """Groups of docstrings make the same batch (B, C, L), from lists and from columns."""
    rows = grouped(docstring_rows(), choices, name)
    wanted = theirs(rows, side, pad_to_multiple_of=8)
    assert wanted["input_ids"].shape[:2] == (len(rows), choices)
    assert_same_batch(collator(side, multiple=8)(rows), wanted)
    table = Table({key: [row[key] for row in rows] for key in rows[0]})
    assert_same_batch(collator(side, multiple=8)(table), wanted)


@settings(max_examples=40, deadline=None)
@given(rows=token_rows(most=8), choices=st.integers(1, 4), multiple=st.integers(1, 9))
def test_any_rows_equal_transformers(rows, choices, multiple):
    """Whatever the lengths, the batch is that of DataCollatorForMultipleChoice."""
    nested = grouped(rows * choices, choices)
    assert_same_batch(collator(multiple=multiple)(nested), theirs(nested, pad_to_multiple_of=multiple))


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_arrays_and_tensors_of_candidates(make):
    """A row's candidates may be one array (C, L), or a list of arrays of any length."""
    lists = [{"input_ids": [[1, 2], [3, 4]], "label": 1}, {"input_ids": [[5, 6], [7, 8]], "label": 0}]
    wanted = theirs(lists)
    whole = [{**row, "input_ids": make(row["input_ids"])} for row in lists]
    parts = [{**row, "input_ids": [make(each) for each in row["input_ids"]]} for row in lists]
    before = copy.deepcopy(whole)
    for rows in (whole, parts):
        made = collator()(rows)
        assert_same_batch({k: made[k] for k in wanted}, wanted)
        made["input_ids"].zero_()
    assert all((old["input_ids"] == new["input_ids"]).all() for old, new in zip(before, whole, strict=True))


def test_labels_are_optional_and_text_is_left_out():
    """Rows without labels make the batch of rows with them, less the labels; texts and nulls are passed over."""
    rows = grouped(docstring_rows(), 2)
    bare = [{**{k: v for k, v in row.items() if k != "label"}, "texts": ["a", "b"], "note": None} for row in rows]
    wanted = theirs(rows)
    del wanted["labels"]
    assert_same_batch(collator()(bare), wanted)


def test_fixed_length_equals_transformers():
    """Candidates are padded to a length if one is given."""
    rows = grouped([row for row in docstring_rows() if len(row["input_ids"]) <= 60], 2)
    assert_same_batch(collator(length=60)(rows), theirs(rows, padding="max_length", max_length=60))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input_ids": [[1], [2]]}, {"input_ids": [[1]]}], "2 before, and 1 in field 'input_ids' of row 1"),
        ([{"input_ids": [[1], [2]]}, {"input_ids": []}], "2 before, and 0 in field 'input_ids' of row 1"),
        ([{"input_ids": [[1], [2]], "attention_mask": [[1]]}], "2 before, and 1 in field 'attention_mask' of row 0"),
        ([{"input_ids": [[1], [2]]}, {"input_ids": None}], "2 before, and 0 in field 'input_ids' of row 1"),
        ([{"input_ids": [1, 2]}], "needs 'input_ids' with a list of token ids for each candidate"),
        ([{"input_ids": [[1], ["x"]]}], "field 'input_ids' makes no tensor .row 1"),
        ([{"input_ids": [[1]], "label": None}], "field 'label' makes no tensor .row 0 of the batch: it is null"),
        ([{"input_ids": [[1]], "label": 0}, {"input_ids": [[1]]}], "row 1 of the batch lacks .'label'"),
    ],
)
def test_rows_that_make_no_batch_are_named(rows, message):
    """Rows that differ in the number of their candidates, or hold no candidates, are refused."""
    with pytest.raises(DataError, match="multiple-choice: .*" + message):
        collator()(rows)


def test_input_is_unchanged_and_the_collator_pickles():
    """Nested lists hold the same after collating; a copy for a worker makes the same batch."""
    rows = grouped(docstring_rows(), 3)
    before, make = copy.deepcopy(rows), collator(multiple=8)
    batch = make(rows)
    assert rows == before
    assert_same_batch(pickle.loads(pickle.dumps(make))(rows), batch)
