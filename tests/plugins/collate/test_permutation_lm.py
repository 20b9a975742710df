"""`permutation-lm` makes XLNet's batches as transformers does, without its faults."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language_rows import (
    CLS,
    FIRST,
    MASK,
    PIECES,
    SEP,
    assert_draws_differ,
    assert_resumes,
    assert_sound,
    build,
    draws,
    ragged_rows,
    token_rows,
    wordpiece,
)

from drivetrain import ConfigError, DataError, Trainer
from drivetrain_plugins import SGD
from drivetrain_plugins.collate.permutation_lm import PermutationLM, perm_mask

TOKENIZER = wordpiece()
KEYS = ("input_ids", "perm_mask", "target_mapping", "labels")


def theirs(rows, seed, tokenizer=TOKENIZER, **options):
    """Return transformers' batch, and the orders of its halves, drawn again from the same global seed."""
    from transformers import DataCollatorForPermutationLanguageModeling

    make = DataCollatorForPermutationLanguageModeling(tokenizer, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batch = make([dict(row) for row in rows])
        torch.manual_seed(seed)
        count, length = batch["labels"].shape
        for _ in range(count):
            done = 0
            while done < length:  # the draws of its spans come before those of its orders
                span = int(torch.randint(1, make.max_span_length + 1, (1,)))
                context = int(span / make.plm_probability)
                torch.randint(context - span + 1, (1,))
                done += context
        halves = torch.stack([torch.randperm(length // 2) for _ in range(count)])
    return batch, halves


def xlnet():
    from transformers import XLNetConfig, XLNetLMHeadModel

    config = XLNetConfig(vocab_size=FIRST + len(PIECES), d_model=16, n_layer=1, n_head=2, d_inner=16)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return XLNetLMHeadModel(config)


def ours(rows, seed=0, tokenizer=TOKENIZER, **options):
    return assert_sound(build(PermutationLM(tokenizer, **options)), rows, seed=seed)


@pytest.mark.parametrize("side", ["right", "left"])
def test_perm_mask_equals_transformers_for_its_spans_and_orders(side):
    """From the targets and orders that transformers drew, with special tokens and padding, the mask is its own."""
    tokenizer = wordpiece(padding_side=side)
    for seed in range(20):
        rows = token_rows([18, 11, 6, 1], seed=seed)
        batch, halves = theirs(rows, seed, tokenizer, plm_probability=1 / 3)
        original = ours(rows, tokenizer=tokenizer)
        ids = torch.where(original["labels"] == -100, original["input_ids"], original["labels"])
        made = perm_mask(batch["labels"] != -100, ids >= FIRST, halves)
        assert made.dtype == batch["perm_mask"].dtype
        assert torch.equal(made, batch["perm_mask"])
        assert 0 < made.mean() < 1


def test_certain_batches_equal_transformers():
    """With spans of one token and all picked, ids, labels and mapping are its own, and the mask one of its."""
    rows = token_rows([4, 2])
    batch = ours(rows, probability=1.0, max_span=1)
    possible = set()
    for seed in range(60):
        reference, _ = theirs(rows, seed, plm_probability=1.0, max_span_length=1)
        for name in ("input_ids", "target_mapping", "labels"):
            assert batch[name].dtype == reference[name].dtype
            assert torch.equal(batch[name], reference[name]), name
        possible.add(reference["perm_mask"].numpy().tobytes())
    make = build(PermutationLM(TOKENIZER, probability=1.0, max_span=1))
    found = {make(rows, generator=draws(seed))["perm_mask"].numpy().tobytes() for seed in range(300)}
    assert possible <= found
    assert len(found) == 36  # 3! orders of each row's half


def test_orders_are_drawn_evenly():
    """Each of the 24 orders of a half comes as often as another, within 5 sigma of 4,800 rows."""
    rows = token_rows([6]) * 4800
    batch = build(PermutationLM(TOKENIZER, probability=1.0, max_span=1))(rows, generator=draws(3))
    kinds = np.unique(batch["perm_mask"].numpy().reshape(4800, -1), axis=0, return_counts=True)[1]
    assert len(kinds) == 24
    assert np.abs(kinds - 200).max() <= 5 * (200 * 23 / 24) ** 0.5


def test_spans_are_distributed_as_transformers_says():
    """Span lengths, places and rates follow the description: exact chances by enumeration, within 5 sigma."""
    make = build(PermutationLM(TOKENIZER, probability=1 / 3, max_span=3))
    length, count = 12, 40_000
    picked = make.spans(torch.Size((count, length)), draws(5)).numpy()
    chances = np.zeros(length)

    def walk(begin, chance):
        for span in (1, 2, 3):
            context = 3 * span
            for start in range(context - span + 1):
                share = chance / 3 / (context - span + 1)
                chances[begin + start : begin + start + span] += share
            if begin + context < length:
                walk(begin + context, chance / 3)

    walk(0, 1.0)
    sigma = np.sqrt(chances * (1 - chances) / count)
    assert (np.abs(picked.mean(0) - chances) <= 5 * sigma).all()
    single = make.spans(torch.Size((count, 3)), draws(6)).numpy()  # one context where the span is 1
    runs = np.array([max((len(list(g)) for on, g in itertools.groupby(row) if on), default=0) for row in single])
    assert runs.max() == 3


@pytest.mark.parametrize("longest", [1, 2, 5])
def test_no_span_is_longer_than_it_may_be(longest):
    """Where a row is one context, its span is at most `max_span`; the reference's numpy path reaches one more."""
    make = build(PermutationLM(TOKENIZER, probability=1 / 40, max_span=longest))
    picked = make.spans(torch.Size((20_000, 40)), draws(1))
    assert int(picked.sum(1).max()) == longest


@settings(max_examples=80, deadline=None)
@given(ragged_rows(), st.integers(0, 2**31), st.booleans())
def test_targets_are_hidden_from_all_that_come_before_them(rows, seed, marked):
    """For any rows: no target sees itself or a later one, nobody ordinary sees a target, special tokens are never one."""
    if marked:
        rows = [{**row, "special_tokens_mask": [int(i % 3 == 0) for i in row["input_ids"]]} for row in rows]
    batch = ours(rows, seed, probability=0.5, max_span=3)
    targets, hidden = batch["labels"] != -100, batch["perm_mask"].bool()
    assert batch["input_ids"].shape[1] % 2 == 0
    assert not hidden[~targets[:, None, :].expand_as(hidden)].any()  # who is no target is seen by all
    seen = ~hidden & targets[:, None, :] & targets[:, :, None]
    assert not (seen & seen.transpose(1, 2)).any()  # of two targets at most one sees the other; none sees itself
    assert (batch["input_ids"][targets] == MASK).all()
    for number, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"])
        special = torch.tensor(row["special_tokens_mask"]).bool() if marked else ids < FIRST
        assert not targets[number, : len(ids)][special].any()
        assert not targets[number, len(ids) :].any()
        ordinary = torch.zeros_like(targets[number])
        ordinary[: len(ids)] = ~special
        ordinary &= ~targets[number]
        assert hidden[number][ordinary][:, targets[number]].all()
    assert torch.equal(batch["target_mapping"], torch.eye(targets.shape[1]).repeat(len(rows), 1, 1))


def test_odd_rows_are_padded_and_other_fields_kept():
    """Odd lengths are made even, where transformers refuses them, and fields that it loses stay."""
    rows = [{"input_ids": [CLS, 5, SEP], "token_type_ids": [0, 0, 1]}]
    with pytest.raises(ValueError, match="lengths be even"):
        theirs([{"input_ids": [CLS, 5, SEP]}], 0)
    batch = ours(rows)
    assert set(batch) == {*KEYS, "attention_mask", "token_type_ids"}
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0]]


def test_without_a_padding_token():
    """Equal even rows work, where transformers fails on an unbound name; others are told."""
    tokenizer = wordpiece()
    tokenizer.pad_token = None
    with pytest.raises(UnboundLocalError):
        theirs(token_rows([4, 4]), 0, tokenizer)
    assert ours(token_rows([4, 4]), tokenizer=tokenizer)["labels"].shape == (2, 6)
    for lengths in ([4, 6], [3, 3]):
        with pytest.raises(
            DataError, match="must be padded to a multiple of 2, and the tokenizer has no padding token"
        ):
            ours(token_rows(lengths), tokenizer=tokenizer)
    tokenizer.mask_token = None
    with pytest.raises(ConfigError, match="permutation-lm: the tokenizer has no mask token"):
        build(PermutationLM(tokenizer))


def test_draws_differ_by_epoch_position_and_rank():
    """The same row is drawn otherwise at each position of each epoch, and two ranks share the batches of one."""
    assert_draws_differ(xlnet, lambda: PermutationLM(TOKENIZER, probability=0.5), "perm_mask")


def test_batches_are_the_same_after_resume_with_any_workers(tmp_path):
    """XLNet trains; stopped in an epoch and gone on with 0 and 2 workers, all is the same."""
    rows = token_rows([4, 6, 3, 8, 5, 2, 7, 9, 4, 5, 6, 3], seed=2)
    assert len(assert_resumes(xlnet, lambda: PermutationLM(TOKENIZER, probability=0.4), rows, tmp_path)) == 6


def test_targets_are_counted_unshifted():
    """The step has as many items as there are targets, the first position included, whatever the model's loss does."""
    rows = [{"input_ids": [5, 6, 7, 8]}] * 4
    plugin = ("permutation-lm", PermutationLM(TOKENIZER, probability=1.0, max_span=1))
    trainer = Trainer(xlnet(), [plugin, SGD(lr=0.1)], device="cpu", steps=1)
    trainer.fit(rows)
    assert trainer.run.progress.items == 16
