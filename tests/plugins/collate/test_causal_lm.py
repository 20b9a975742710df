"""`causal-lm` is transformers' collator, and keeps the real ends of text among the targets."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from language_rows import PAD, assert_same_batch, assert_sound, bert, build, ragged_rows, seen_by, token_rows, wordpiece

from drivetrain import DataError, PlanError, Trainer
from drivetrain_plugins import SGD
from drivetrain_plugins.collate.causal_lm import CausalLM

TOKENIZER = wordpiece()


def theirs(rows, tokenizer=TOKENIZER, multiple=None):
    from transformers import DataCollatorForLanguageModeling

    return dict(DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=multiple)(copy.deepcopy(rows)))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("lengths", [[3, 7, 1], [6, 6], [9]])
def test_batch_equals_transformers(lengths, multiple, side):
    """Ids, mask and labels are those of DataCollatorForLanguageModeling(mlm=False), where no real token is padding."""
    tokenizer = wordpiece(padding_side=side)
    rows = token_rows(lengths)
    assert_same_batch(
        assert_sound(build(CausalLM(tokenizer, multiple=multiple)), rows), theirs(rows, tokenizer, multiple)
    )


@settings(max_examples=60, deadline=None)
@given(ragged_rows())
def test_labels_are_the_ids_wherever_there_is_a_token(rows):
    """For any rows, the labels without padding are the rows' ids: also where those have the padding's id."""
    batch = assert_sound(build(CausalLM(TOKENIZER)), rows)
    for labels, mask, row in zip(batch["labels"], batch["attention_mask"].bool(), rows, strict=True):
        assert labels[mask].tolist() == row["input_ids"]
        assert (labels[~mask] == -100).all()
    if all(PAD not in row["input_ids"] for row in rows):
        assert_same_batch(batch, theirs(rows))


def test_a_real_end_of_text_stays_a_target():
    """Where padding and end of text are one token, transformers ignores every end; only padding is ignored here."""
    tokenizer = wordpiece(pad_token="[SEP]", eos_token="[SEP]")
    rows = token_rows([2, 4])
    reference = theirs(rows, tokenizer)["labels"]
    ours = build(CausalLM(tokenizer))(rows)["labels"]
    assert (reference == tokenizer.eos_token_id).sum() == 0
    assert [row[row != -100].tolist() for row in ours] == [row["input_ids"] for row in rows]


def test_given_labels_are_kept_and_class_labels_left_out():
    """Labels for each token stay, but for padding; transformers overwrites them. A class label is no token."""
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 9]}, {"input_ids": [8], "labels": [8]}]
    assert build(CausalLM(TOKENIZER))(rows)["labels"].tolist() == [[-100, 6, 9], [8, -100, -100]]
    rows = [{"input_ids": [5, 6], "label": 1, "weight": 0.5, "text": "x"}]
    batch = assert_sound(build(CausalLM(TOKENIZER)), rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "weight"}
    assert batch["labels"].tolist() == [[5, 6]]


def test_hidden_tokens_are_no_targets():
    """What the row's own attention mask hides is ignored, like padding."""
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}]
    assert build(CausalLM(TOKENIZER))(rows)["labels"].tolist() == [[5, -100, 7]]


def test_without_a_padding_token_rows_must_be_equally_long():
    """Equal rows need no padding; others are refused with what to do, and any id given will do."""
    tokenizer = wordpiece()
    tokenizer.pad_token = None
    make = build(CausalLM(tokenizer))
    assert make(token_rows([3, 3]))["input_ids"].shape == (2, 5)
    with pytest.raises(
        DataError, match=r"causal-lm: rows of 5 to 6 tokens.*no padding token. Set one, give padding_id"
    ):
        make(token_rows([3, 4]))
    with pytest.raises(DataError, match="to a multiple of 4"):
        build(CausalLM(tokenizer, multiple=4))(token_rows([3]))
    batch = build(CausalLM(tokenizer, padding_id=9))(token_rows([3, 4]))
    assert (batch["input_ids"][0, -1], batch["labels"][0, -1]) == (9, -100)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], r"a row needs token ids in 'input_ids'. Received: rows with \['text'\]"),
        ([{"input_ids": [5]}, {"input_ids": []}], r"a row has no tokens \(number 1 of the batch\)"),
        ([{"input_ids": [5.5]}], "'input_ids' must hold lists of token ids"),
        ([{"input_ids": 5}], "'input_ids' must hold lists of token ids"),
        (
            [{"input_ids": [5], "labels": [5, 6]}],
            "'labels' must have an entry for each token. Received: 2 entries for 1",
        ),
        ([{"input_ids": [5], "weight": None}, {"input_ids": [5], "weight": 1}], "'weight' makes no tensor"),
    ],
)
def test_rows_that_make_no_batch_are_told(rows, message):
    """Rows without tokens, or whose fields do not fit them, are refused with what was received."""
    with pytest.raises(DataError, match="causal-lm: .*" + message):
        build(CausalLM(TOKENIZER))(rows)


def test_training_equals_a_loop_by_hand(tmp_path):
    """A tiny decoder trains on the batches to the weights of a loop over transformers' batches."""
    rows = token_rows([3, 5, 2, 6])
    trainer, batches = seen_by(
        bert("BertLMHeadModel", is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        CausalLM(TOKENIZER),
        rows,
        tmp_path,
    )
    model = bert("BertLMHeadModel", is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in batches:
        given_rows = [
            {"input_ids": ids[mask.bool()].tolist()}
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        model(**theirs(given_rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trainer.run.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def test_the_run_brings_the_tokenizer_or_the_plan_says_so():
    """Without a tokenizer of its own it takes the model's; where there is none, the plan refuses."""
    assert build(CausalLM(), TOKENIZER)([{"input_ids": [5]}])["labels"].tolist() == [[5]]
    with pytest.raises(PlanError, match="requires 'processor'"):
        Trainer(torch.nn.Linear(1, 1), [("causal-lm", CausalLM()), SGD(lr=1.0)], steps=1).fit([{"input_ids": [1]}])
