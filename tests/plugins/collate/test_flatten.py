"""`flatten` is transformers' padding-free collator, and refuses models that would mix the rows."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_models import CAUSAL, alone, bert, gpt2, llama, roberta, samples, trained_on
from plugin_helpers import cpu_run

from drivetrain import ConfigError, DataError
from drivetrain_plugins.collate.flatten import Flatten, FlattenCollator
from drivetrain_plugins.shared.table import Table

token = st.integers(0, 1000)
row = st.lists(token, min_size=1, max_size=9)


def same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if isinstance(value, int):
            assert ours[name] == value
        else:
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(row, min_size=1, max_size=6),
    labels=st.booleans(),
    separator=st.sampled_from([-100, 0, 7]),
    start=st.sampled_from([0, 2]),
    positions=st.booleans(),
    seq_idx=st.booleans(),
    flash=st.booleans(),
)
def test_batch_equals_transformers(*, ids, labels, separator, start, positions, seq_idx, flash):
    """Ids, labels, positions, row numbers and boundaries are those of DataCollatorWithFlattening, types included."""
    from transformers import DataCollatorWithFlattening

    rows = [{"input_ids": r, **({"labels": [i % 5 for i in r]} if labels else {})} for r in ids]
    theirs = DataCollatorWithFlattening(
        return_position_ids=positions,
        separator_id=separator,
        return_flash_attn_kwargs=flash,
        return_seq_idx=seq_idx,
        position_ids_start=start,
    )(copy.deepcopy(rows))
    collate = pickle.loads(pickle.dumps(FlattenCollator(positions, start, separator, seq_idx, flash)))
    before = copy.deepcopy(rows)
    same(collate(rows), theirs)
    same(collate(Table.of(rows)), theirs)
    assert rows == before


def test_other_token_fields_are_kept_and_text_is_left_out():
    """Types of tokens are concatenated, which transformers drops; a mask of ones and text are not needed."""
    rows = [
        {"input_ids": [5, 6], "token_type_ids": [0, 1], "attention_mask": [1, 1], "text": "a", "label": [1, 2]},
        {"input_ids": [7], "token_type_ids": [1], "attention_mask": [1], "text": "b", "label": [3]},
    ]
    batch = FlattenCollator(separator=None)(rows)
    assert batch["token_type_ids"].tolist() == [[0, 1, 1]]
    assert batch["labels"].tolist() == [[1, 2, 3]]
    assert set(batch) == {"input_ids", "token_type_ids", "labels", "position_ids"}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"input_ids": [1, 2], "labels": 1}, {"input_ids": [3], "labels": 0}], "a label of the whole row"),
        ([{"input_ids": [1, 2], "labels": [1]}], "a number for each of the row's tokens"),
        ([{"input_ids": [1, 2], "length": 2}], "'length'"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], "must not be padded"),
        ([{"input_ids": [1]}, {"input_ids": []}], "at least one"),
        ([{"labels": [1]}], "must have 'input_ids'"),
        ([{"input_ids": "text"}], "list of ids"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}], "same fields"),
    ],
)
def test_rows_that_cannot_be_flattened_are_told(rows, told):
    """A label of a whole row, a field of another length, padding and rows without tokens are errors of the data."""
    with pytest.raises(DataError, match=told):
        FlattenCollator()(rows)


@pytest.mark.parametrize("make", CAUSAL)
def test_logits_of_flattened_rows_are_those_of_single_rows(make):
    """Tokens see their own row only, in training and evaluation, with the model's cache on by default."""
    model = make()
    assert model.config.use_cache
    collate = trained_on(Flatten(), model)
    for mode in (True, False):
        model.train(mode)
        batch = collate(samples())
        got = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
        wanted = torch.cat([alone(model, row["input_ids"]) for row in samples()])
        # Llama takes norms and rotations in float32, whatever its weights are.
        assert (got - wanted).abs().max() < (1e-12 if make is gpt2 else 1e-5) * wanted.abs().max()


@pytest.mark.parametrize("make", [bert, roberta])
def test_model_that_would_mix_the_rows_is_refused(make):
    """A model that looks both ways does not find rows by their positions: said before step 0, with what to take."""
    with pytest.raises(ConfigError, match=r"flatten: a token's output depends on the sample(.|\n)*take `pack`"):
        trained_on(Flatten(), make())


def test_model_with_one_output_a_row_is_refused():
    """A classifier of whole rows has no output for each of them."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    with pytest.raises(ConfigError, match="no output for each token"):
        trained_on(Flatten(), LlamaForSequenceClassification(config))


def test_positions_that_restart_nowhere_are_refused():
    """Without positions a causal model sees the rows as one text."""
    with pytest.raises(ConfigError, match="depends on the sample packed before"):
        trained_on(Flatten(position_ids=False), llama())


def test_a_model_that_is_not_of_transformers_is_taken_as_it_is():
    """Nothing is tried on a module of the user's own, and nothing is added to its batches."""
    run = cpu_run(model=torch.nn.Linear(2, 2))
    plugin = Flatten()
    collate = plugin.build_collator(run)
    plugin.assembled(run)
    assert set(collate(samples())) == {"input_ids", "labels", "position_ids"}
