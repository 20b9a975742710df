"""`masked-lm` masks as transformers does from the same generator, but for special tokens and padding."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language_rows import (
    CLS,
    FIRST,
    MASK,
    PAD,
    SEP,
    SIZE,
    UNK,
    assert_draws_differ,
    assert_resumes,
    assert_same_batch,
    assert_sound,
    bert,
    build,
    draws,
    ragged_rows,
    token_rows,
    wordpiece,
)

from drivetrain import ConfigError, DataError, Trainer
from drivetrain_plugins import SGD
from drivetrain_plugins.collate.masked_lm import MaskedLM

TOKENIZER = wordpiece()


def theirs(rows, seed, *, probability=0.15, mask=0.8, random=0.1, tokenizer=TOKENIZER, multiple=None):
    """Return transformers' batch, drawn from an equal generator."""
    from transformers import DataCollatorForLanguageModeling

    shares = {"mlm_probability": probability, "mask_replace_prob": mask, "random_replace_prob": random}
    made = DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=multiple, seed=seed, **shares)
    return dict(made(copy.deepcopy(rows)))


def ours(rows, seed, *, tokenizer=TOKENIZER, **options):
    return assert_sound(build(MaskedLM(tokenizer, **options)), rows, seed=seed)


def test_batches_equal_transformers_from_the_same_generator():
    """Over 60 seeds, the batch is transformers' but where that put in a special token: then another token stands."""
    rows, put_in = token_rows([12, 3, 8, 10]), 0
    for seed in range(60):
        mine, reference = (
            ours(rows, seed, probability=0.5, mask=0.4, random=0.5),
            theirs(rows, seed, probability=0.5, mask=0.4, random=0.5),
        )
        fault = (reference["input_ids"] < FIRST) & (reference["labels"] >= FIRST) & (reference["input_ids"] != MASK)
        masks = (reference["input_ids"] == MASK) & (mine["input_ids"] != MASK)  # drawn as a random token
        put_in += int((fault | masks).sum())
        assert (mine["input_ids"][fault | masks] >= FIRST).all()
        mine["input_ids"][fault | masks] = reference["input_ids"][fault | masks]
        assert_same_batch(mine, reference)
    assert put_in > 60


@pytest.mark.parametrize("shares", [(0.8, 0.0), (1.0, 0.0), (0.0, 0.0), (0.5, 0.0)])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_batches_without_random_tokens_equal_transformers_exactly(shares, side, multiple):
    """With no random replacement nothing is left out of the comparison, on either side and in multiples."""
    tokenizer, (mask, random) = wordpiece(padding_side=side), shares
    for seed in range(5):
        rows = token_rows([5, 9, 1], seed=seed)
        options = {"probability": 0.4, "mask": mask, "random": random, "tokenizer": tokenizer, "multiple": multiple}
        assert_same_batch(ours(rows, seed, **options), theirs(rows, seed, **options))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_certain_masks(probability):
    """With chance 0 nothing is picked and with 1 all but special tokens is, as in transformers."""
    rows = token_rows([4, 2])
    options = {"probability": probability, "mask": 1.0, "random": 0.0}
    batch = ours(rows, 0, **options)
    assert_same_batch(batch, theirs(rows, 0, **options))
    assert int((batch["labels"] != -100).sum()) == 6 * probability


@settings(max_examples=80, deadline=None)
@given(ragged_rows(), st.integers(0, 2**31), st.booleans())
def test_what_is_never_masked(rows, seed, marked):
    """For any rows: special tokens and padding stay and are no targets, all else is a target or as it was."""
    if marked:
        rows = [{**row, "special_tokens_mask": [int(i % 3 == 0) for i in row["input_ids"]]} for row in rows]
    batch = ours(rows, seed, probability=0.9, mask=0.3, random=0.6)
    for number, row in enumerate(rows):
        ids, size = np.array(row["input_ids"]), len(row["input_ids"])
        special = np.array(row["special_tokens_mask"], bool) if marked else ids < FIRST
        got, labels = batch["input_ids"][number].numpy(), batch["labels"][number].numpy()
        picked = labels[:size] != -100
        assert not (picked & special).any()
        assert (got[:size][~picked] == ids[~picked]).all()
        assert (labels[:size][picked] == ids[picked]).all()
        assert (
            (got[:size][picked] == MASK) | (got[:size][picked] >= FIRST) | (got[:size][picked] == ids[picked])
        ).all()
        assert (got[size:] == PAD).all()
        assert (labels[size:] == -100).all()


def test_given_special_tokens_mask_is_used_as_transformers_does():
    """The field decides, is padded with 1 and does not reach the model."""
    rows = token_rows([6, 3])
    rows = [{**row, "special_tokens_mask": [0, *[1, 0] * 10][: len(row["input_ids"])]} for row in rows]
    options = {"probability": 0.6, "mask": 1.0, "random": 0.0}
    for seed in range(8):
        batch = ours(rows, seed, **options)
        assert_same_batch(batch, theirs(rows, seed, **options))
        assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_padding_is_told_by_the_mask_and_not_by_its_id():
    """Where a tokenizer pads with an ordinary token, the real ones are masked like others and padding never is."""
    tokenizer = wordpiece()
    tokenizer.pad_token = "red"
    red = tokenizer.pad_token_id
    rows = [
        {"input_ids": [CLS, red, 12, 8, SEP], "special_tokens_mask": [1, 0, 0, 0, 1]},
        {"input_ids": [CLS], "special_tokens_mask": [1]},
    ]
    batch = ours(rows, 0, probability=1.0, mask=1.0, random=0.0, tokenizer=tokenizer)
    assert batch["input_ids"].tolist() == [[CLS, MASK, MASK, MASK, SEP], [CLS, red, red, red, red]]
    assert batch["labels"].tolist() == [[-100, red, 12, 8, -100], [-100] * 5]


def test_rates_on_a_million_tokens():
    """Of 1,000,000 tokens 15 % are picked, and of these 80 % masked and 10 % replaced evenly: within 5 sigma."""
    size = 1000
    tokenizer = wordpiece(pieces=[f"w{number}" for number in range(size)])
    ids = torch.randint(FIRST, FIRST + size, (1000, 1000), generator=draws(1))
    batch = build(MaskedLM(tokenizer))([{"input_ids": row} for row in ids], generator=draws(2))

    def near(count, total, rate):
        return abs(count - total * rate) <= 5 * (total * rate * (1 - rate)) ** 0.5

    picked = batch["labels"] != -100
    assert torch.equal(batch["labels"][picked], ids[picked])
    count = int(picked.sum())
    assert near(count, ids.numel(), 0.15)
    got, was = batch["input_ids"][picked], ids[picked]
    assert near(int((got == MASK).sum()), count, 0.8)
    assert near(int(((got != MASK) & (got != was)).sum()), count, 0.1 * (1 - 1 / size))
    assert near(int((got == was).sum()), count, 0.1 + 0.1 / size)
    replaced = got[(got != MASK) & (got != was)]
    assert int(replaced.min()) >= FIRST
    counts = torch.bincount(replaced - FIRST, minlength=size).double()
    chi = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    assert abs(chi - (size - 1)) <= 5 * (2 * (size - 1)) ** 0.5
    rows, columns = picked.double().mean(1), picked.double().mean(0)
    for means in (rows, columns):  # no row or place is preferred
        assert float((means - 0.15).abs().max()) <= 5 * (0.15 * 0.85 / 1000) ** 0.5


def test_only_the_given_generator_is_drawn_from():
    """The global generators of torch, numpy and Python stand where they stood."""

    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = state()
    ours(token_rows([5, 6]), 3)
    assert state() == before


def test_masks_differ_by_epoch_position_and_rank():
    """The same row is masked otherwise at each position of each epoch, and two ranks share the batches of one."""
    assert_draws_differ(lambda: bert("BertForMaskedLM"), lambda: MaskedLM(TOKENIZER, probability=0.5), "labels")


def test_masks_are_the_same_after_resume_with_any_workers(tmp_path):
    """Stopped in an epoch and gone on with 0 and 2 workers, every batch and the final weights are the same."""
    rows = token_rows([4, 6, 3, 8, 5, 2, 7, 9, 4, 5, 6, 3], seed=2)
    batches = assert_resumes(
        lambda: bert("BertForMaskedLM"), lambda: MaskedLM(TOKENIZER, probability=0.3), rows, tmp_path
    )
    assert len({batch["labels"].numpy().tobytes() for batch in batches}) == len(batches) == 6


def test_a_batch_without_masks_is_passed_over():
    """Rows of special tokens alone give no target items, and the step is skipped instead of dividing by 0."""
    trainer = Trainer(bert("BertForMaskedLM"), [("masked-lm", MaskedLM(TOKENIZER)), SGD(lr=0.1)], device="cpu", steps=2)
    result = trainer.fit([{"input_ids": [CLS, UNK, SEP]}] * 8)
    assert (result.steps, trainer.run.progress.applied, trainer.run.skipped_steps) == (2, 0, 2)


def test_class_labels_of_rows_are_left_out():
    """A row's own label is replaced by the tokens to predict."""
    batch = ours([{"input_ids": [CLS, 7, SEP], "label": 2}], 0, probability=1.0, mask=1.0, random=0.0)
    assert batch["labels"].tolist() == [[-100, 7, -100]]


def test_wrong_options_and_tokenizers_are_refused_at_assembly():
    """Shares above 1, and a tokenizer without a mask token, are told before anything is trained."""
    with pytest.raises(
        ConfigError, match=r"(?s)masked-lm: mask and random add up to more than 1.*mask=0.9, random=0.2"
    ):
        build(MaskedLM(TOKENIZER, mask=0.9, random=0.2))
    tokenizer = wordpiece()
    tokenizer.mask_token = None
    with pytest.raises(ConfigError, match="masked-lm: the tokenizer has no mask token"):
        build(MaskedLM(tokenizer))
    with pytest.raises(ValueError, match="probability must be a number"):
        MaskedLM(TOKENIZER, probability=1.5)


def test_ids_beyond_the_vocabulary_are_told():
    """An id that the tokenizer does not have is named."""
    with pytest.raises(DataError, match=f"below the vocabulary's {SIZE}. Received: {SIZE}"):
        ours([{"input_ids": [5, SIZE]}], 0)
