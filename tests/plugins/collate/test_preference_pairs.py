"""`preference-pairs` makes one batch of chosen and rejected answers, as its docstring says."""

from __future__ import annotations

import pickle

import pytest
import torch
from collate_rows import FORMS, assert_input_unchanged, assert_same_batch, docstring_rows, in_form, minilm
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import cpu_run

from drivetrain import DataError
from drivetrain_plugins.collate.preference_pairs import PreferencePairs

IDS = st.lists(st.integers(1, 30000), max_size=6)


def collator(side="right", **options):
    return PreferencePairs(minilm(side), **options).build_collator(cpu_run())


def by_hand(rows, side="right", multiple=1):
    """Return the batch row by row: transformers' padding of prompt + answer, labels by Python's lists."""
    prompts = [list(row.get("prompt_input_ids", [])) for row in rows] * 2
    answers = [list(row["chosen_input_ids"]) for row in rows] + [list(row["rejected_input_ids"]) for row in rows]
    whole = [{"input_ids": p + a} for p, a in zip(prompts, answers, strict=True)]
    batch = dict(minilm(side).pad(whole, pad_to_multiple_of=multiple, return_tensors="pt"))
    width, labels = batch["input_ids"].shape[1], []
    for prompt, answer in zip(prompts, answers, strict=True):
        row, rest = [-100] * len(prompt) + answer, [-100] * (width - len(prompt) - len(answer))
        labels.append(row + rest if side == "right" else rest + row)
    return {**batch, "labels": torch.tensor(labels)}


def real_pairs():
    """Return docstrings in threes: a prompt, a chosen and a rejected answer."""
    ids = [row["input_ids"] for row in docstring_rows()]
    names = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
    return [dict(zip(names, ids[i : i + 3], strict=True)) for i in range(0, len(ids) - 2, 3)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_real_pairs_equal_padding_by_hand(side, form):
    """Row i is the chosen and row B + i the rejected answer behind the prompt, padded as the tokenizer pads."""
    rows = real_pairs()
    assert_same_batch(collator(side, multiple=8)(in_form(rows, form)), by_hand(rows, side, 8))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"prompt_input_ids": IDS, "chosen_input_ids": IDS, "rejected_input_ids": IDS.filter(bool)}
        ),
        min_size=1,
        max_size=5,
    ),
    multiple=st.integers(1, 5),
    side=st.sampled_from(["right", "left"]),
)
def test_any_pairs_equal_padding_by_hand(rows, multiple, side):
    """Empty prompts and answers, single rows, and either side make the batch that lists make."""
    for form in ("lists", "table"):
        assert_same_batch(collator(side, multiple=multiple)(in_form(rows, form)), by_hand(rows, side, multiple))


def test_without_a_prompt_every_id_is_a_label():
    """Rows that hold whole sequences are padded as they stand."""
    rows = [{k: v for k, v in row.items() if k != "prompt_input_ids"} for row in real_pairs()]
    batch = collator()(rows)
    assert_same_batch(batch, by_hand(rows))
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"] == 1)


def test_numbers_stay_beside_and_fields_have_any_name():
    """A reference's log-probabilities become (B,); text is left out; the three fields may be called otherwise."""
    rows = [
        {"q": [1], "good": [2, 3], "bad": [4], "margin": 0.5, "text": "x", "note": None, "other": [1, 2]},
        {"q": [5], "good": [6], "bad": [7], "margin": 2.0, "text": "y", "note": None, "other": [1]},
    ]
    batch = collator(prompt="q", chosen="good", rejected="bad")(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 6, 0], [1, 4, 0], [5, 7, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 6, -100], [-100, 4, -100], [-100, 7, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]]
    assert torch.equal(batch["margin"], torch.tensor([0.5, 2.0]))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "margin"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen_input_ids": [1]}, r"rows lack \['rejected_input_ids'\]"),
        ({"chosen_input_ids": [1], "rejected_input_ids": None}, "'rejected_input_ids' must hold a list of token ids"),
        ({"chosen_input_ids": [1], "rejected_input_ids": [0.5]}, "'rejected_input_ids' must hold a list of token ids"),
        ({"chosen_input_ids": "text", "rejected_input_ids": [1]}, "'chosen_input_ids' must hold a list of token ids"),
    ],
)
def test_rows_that_make_no_pair_are_named(row, message):
    """A missing half, a null and what is no id are refused with the field."""
    with pytest.raises(DataError, match="preference-pairs: .*" + message):
        collator()([row])


def test_input_is_unchanged_and_the_collator_pickles():
    """Lists, arrays, tensors and columns hold the same after collating; a copy for a worker makes the same batch."""
    rows, make = real_pairs()[:4], collator(length=700)
    assert_input_unchanged(make, rows)
    assert make(rows)["labels"].shape == (8, 700)
    assert_same_batch(pickle.loads(pickle.dumps(make))(rows), make(rows))
