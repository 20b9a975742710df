"""`token-classification` is transformers' collator of that name, with one name for labels and checked lengths."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from collate_rows import FORMS, assert_input_unchanged, assert_same_batch, docstring_rows, in_form, minilm, token_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import cpu_run, fit

from drivetrain import DataError, PlanError, Trainer
from drivetrain_plugins import SGD, Loader
from drivetrain_plugins.collate.token_classification import TokenClassification


def collator(side="right", **options):
    return TokenClassification(minilm(side), **options).build_collator(cpu_run())


def tagged(count=16, name="labels"):
    """Return docstrings whose tokens are labelled by the parity of their ids, and -100 at both ends."""
    rows = []
    for row in docstring_rows(count):
        ids = row["input_ids"]
        made = {k: v for k, v in row.items() if k != "label"}
        rows.append({**made, name: [-100, *(i % 2 for i in ids[1:-1]), -100]})
    return rows


def theirs(rows, side="right", **options):
    """Return the batch of DataCollatorForTokenClassification."""
    from transformers import DataCollatorForTokenClassification

    batch = dict(DataCollatorForTokenClassification(minilm(side), **options)(copy.deepcopy(rows)))
    return {"labels" if name == "label" else name: values for name, values in batch.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["label", "labels"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_real_rows_equal_transformers(side, name, form):
    """Tagged docstrings make the same batch on either side and in multiples, always with the key "labels"."""
    rows = tagged(name=name)
    ours = collator(side, multiple=8, label_padding=-1)(in_form(rows, form))
    assert_same_batch(ours, theirs(rows, side, pad_to_multiple_of=8, label_pad_token_id=-1))


@settings(max_examples=60, deadline=None)
@given(
    rows=token_rows(labels=lambda n: st.lists(st.integers(-100, 50), min_size=n, max_size=n)),
    multiple=st.integers(1, 9),
    side=st.sampled_from(["right", "left"]),
)
def test_any_rows_equal_transformers(rows, multiple, side):
    """Whatever the lengths and labels, lists and columns make the batch of DataCollatorForTokenClassification."""
    wanted = theirs(rows, side, pad_to_multiple_of=multiple)
    for form in ("lists", "table"):
        assert_same_batch(collator(side, multiple=multiple)(in_form(rows, form)), wanted)


def test_fixed_length_and_no_labels_equal_transformers():
    """Rows are padded to a length if one is given, and rows without labels make a batch without."""
    rows = [row for row in tagged() if len(row["input_ids"]) <= 60]
    wanted = theirs(rows, padding="max_length", max_length=60)
    assert_same_batch(collator(length=60)(rows), wanted)
    bare = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    assert_same_batch(collator()(bare), theirs(bare))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1, 0], [1, 1]], "row 1 of the batch has 2 labels in 'label' and 3 input_ids"),
        ([[1, 0], [1, 1, 1, 1]], "row 1 of the batch has 4 labels in 'label' and 3 input_ids"),
        ([1, 0], "field 'label' must hold a list of label ids, one for each token. Received: .1, 0"),
        ([None, None], r"field 'label' must hold a list of label ids, one for each token. Received: .None"),
        ([[1, 0], None], "field 'label' makes no tensor .row 1 of the batch: it is null"),
        ([[0.5, 0.5], [1.0, 0.0, 1.0]], "Received: float32 values"),
        ([["O", "B"], ["O", "O", "I"]], "field 'label' makes no tensor .row 0 of the batch"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, message):
    """Labels of another length than the ids, or of another kind, are refused with field and row."""
    rows = [{"input_ids": [1, 2], "label": labels[0]}, {"input_ids": [1, 2, 3], "label": labels[1]}]
    with pytest.raises(DataError, match="token-classification: .*" + message):
        collator()(rows)


def test_labels_without_ids_are_refused():
    """Rows with labels and no ids make no batch."""
    with pytest.raises(DataError, match="token-classification: rows with 'labels' need a list of 'input_ids'"):
        collator()([{"labels": [1, 2]}])


def test_input_is_unchanged_and_the_collator_pickles():
    """Lists, arrays, tensors and columns hold the same after collating; a copy for a worker makes the same batch."""
    assert_input_unchanged(collator(multiple=8), tagged(6))
    make = collator(multiple=8)
    assert_same_batch(pickle.loads(pickle.dumps(make))(tagged(6)), make(tagged(6)))


def test_a_run_trains_on_it_or_the_plan_asks_for_a_tokenizer():
    """A tagger learns the parity of ids from padded rows; without a tokenizer the plan says what is missing."""

    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            table = torch.cat([torch.tensor([[1.0, 0.0], [0.0, 1.0]])] * 15261)
            self.register_buffer("parity", table)
            self.head = torch.nn.Linear(2, 2)
            torch.nn.init.zeros_(self.head.weight)

        def forward(self, input_ids, labels, attention_mask, token_type_ids):
            logits = self.head(self.parity[input_ids])
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    _, record = fit(Tagger(), [TokenClassification(minilm()), Loader(4), SGD(lr=1.0)], tagged(16), epochs=5)
    losses = record.of("loss")
    assert losses[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=0.1)
    assert losses[-1] < losses[0] / 3
    with pytest.raises(PlanError, match="'token-classification' requires 'processor'"):
        Trainer(torch.nn.Linear(1, 1), [TokenClassification(), SGD()], steps=1).fit([{"input_ids": [1]}])
