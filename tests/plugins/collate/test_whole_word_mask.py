"""`whole-word-mask` hides all tokens of a word or none, as transformers does from the same generator."""

from __future__ import annotations

import copy
import time
import warnings

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
    assert_same_batch,
    assert_sound,
    bert,
    build,
    draws,
    ragged_rows,
    token_rows,
    wordpiece,
)

from drivetrain import ConfigError, DataError
from drivetrain_plugins.collate.whole_word_mask import WholeWordMask, continuations

TOKENIZER = wordpiece()
GOES_ON = np.array([False] * FIRST + [piece.startswith("##") for piece in PIECES])
TEXTS = ("unbreakable birds", "the red bird sings . singing faster", "birds", "sky sky skys", "unbreakables the")


def encoded(texts, tokenizer=TOKENIZER, **fields):
    made = tokenizer(list(texts), return_offsets_mapping=True, **fields)
    return [{name: made[name][row] for name in ("input_ids", "offset_mapping")} for row in range(len(texts))]


def theirs(rows, seed, probability):
    """Return transformers' batch; it wants offsets of equal length, so rows come one length at a time."""
    from transformers import DataCollatorForLanguageModeling

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made = DataCollatorForLanguageModeling(
            TOKENIZER,
            whole_word_mask=True,
            mlm_probability=probability,
            mask_replace_prob=1.0,
            random_replace_prob=0.0,
            seed=seed,
        )
        return dict(made(copy.deepcopy(rows)))


def words_of(ids):
    """Return each token's word by a plain loop; -1 for special tokens."""
    words, word = [], -1
    for place, token in enumerate(ids):
        if token < FIRST:
            words.append(-1)
            continue
        if not GOES_ON[token] or place == 0 or ids[place - 1] < FIRST:
            word += 1
        words.append(word)
    return words


@pytest.mark.parametrize("text", TEXTS)
def test_batches_equal_transformers_from_the_same_generator(text):
    """From offsets, and from the vocabulary's marks, the masks are transformers', seed by seed."""
    rows = encoded([text] * 3)
    bare = [{"input_ids": row["input_ids"]} for row in rows]
    make = build(WholeWordMask(TOKENIZER, probability=0.5, mask=1.0, random=0.0))
    for seed in range(12):
        reference = theirs(rows, seed, 0.5)
        assert_same_batch(make(rows, generator=draws(seed)), reference)
        assert_same_batch(assert_sound(make, bare, seed=seed), reference)


def test_offsets_join_what_touches():
    """By offsets, a full stop belongs to the word it touches, as in transformers; by word ids it stands alone."""
    rows = encoded(["the bird sings. singing"])
    make = build(WholeWordMask(TOKENIZER, probability=0.5, mask=1.0, random=0.0))
    apart = 0
    for seed in range(20):
        batch = make(rows, generator=draws(seed))
        assert_same_batch(batch, theirs(rows, seed, 0.5))
        hidden = (batch["labels"] != -100)[0]
        words = [{"input_ids": rows[0]["input_ids"], "word_ids": TOKENIZER(["the bird sings. singing"]).word_ids(0)}]
        other = (make(words, generator=draws(seed))["labels"] != -100)[0]
        stop = rows[0]["input_ids"].index(FIRST + PIECES.index("."))
        assert hidden[stop] == hidden[stop - 1]
        apart += int(other[stop] != other[stop - 1])
    assert apart > 0


def test_words_from_three_sources_are_the_same():
    """Rows with word ids, with offsets, or with ids alone give the same batch, ragged and on either side."""
    for side in ("right", "left"):
        tokenizer = wordpiece(padding_side=side)
        make = build(WholeWordMask(tokenizer, probability=0.5))
        rows = [row for row in encoded(TEXTS, tokenizer) if row]
        made = tokenizer(list(TEXTS))
        by_words = [{"input_ids": row["input_ids"], "word_ids": made.word_ids(n)} for n, row in enumerate(rows)]
        bare = [{"input_ids": row["input_ids"]} for row in rows]
        for seed in range(6):
            batch = assert_sound(make, bare, seed=seed)
            assert_same_batch(make(rows, generator=draws(seed)), batch)
            assert_same_batch(assert_sound(make, by_words, seed=seed), batch)


@settings(max_examples=80, deadline=None)
@given(ragged_rows(), st.integers(0, 2**31))
def test_all_tokens_of_a_word_or_none(rows, seed):
    """For any rows, the targets are whole words by a plain loop over the tokens, and never special."""
    batch = assert_sound(build(WholeWordMask(TOKENIZER, probability=0.5)), rows, seed=seed)
    for row, labels in zip(rows, batch["labels"].numpy(), strict=True):
        words = np.array(words_of(row["input_ids"]))
        picked = labels[: len(words)] != -100
        assert not picked[words < 0].any()
        for word in range(words.max(initial=-1) + 1):
            assert len(set(picked[words == word].tolist())) == 1
        assert (labels[: len(words)][picked] == np.array(row["input_ids"])[picked]).all()


def test_rates_of_words():
    """Of 60,000 words 15 % are picked whatever their length, 80 % of their tokens masked: within 5 sigma."""
    rows = token_rows([300] * 400, seed=4)
    batch = build(WholeWordMask(TOKENIZER))(rows, generator=draws(9))
    ids = torch.tensor([row["input_ids"] for row in rows])
    words = [words_of(row) for row in ids.tolist()]
    starts = torch.tensor([[w >= 0 and w != b for w, b in zip(line, [-1, *line[:-1]], strict=True)] for line in words])
    picked = batch["labels"] != -100

    def near(count, total, rate):
        return abs(count - total * rate) <= 5 * (total * rate * (1 - rate)) ** 0.5

    assert int(starts.sum()) > 60_000
    assert near(int(picked[starts].sum()), int(starts.sum()), 0.15)
    for length in (1, 2, 3):  # words of one, two, three tokens
        sizes = torch.tensor([np.bincount(np.array(line) + 1)[np.array(line) + 1].tolist() for line in words])
        chosen = starts & (sizes == length)
        assert near(int(picked[chosen].sum()), int(chosen.sum()), 0.15)
    got = batch["input_ids"][picked]
    assert near(int((got == MASK).sum()), len(got), 0.8)
    assert int(got.min()) >= MASK


def test_cost_grows_with_the_length_and_not_its_square():
    """Eight times as long rows take less than 24 times as long; the reference's word matrix takes 64."""
    make = build(WholeWordMask(TOKENIZER))

    def best(length):
        rows = [{"input_ids": torch.tensor(row["input_ids"])} for row in token_rows([length] * 8)]
        times = []
        for _ in range(7):
            begin = time.process_time()
            make(rows, generator=draws(0))
            times.append(time.process_time() - begin)
        return min(times)

    assert best(16_384) < 24 * best(2_048)


def test_vocabularies_tell_words_by_their_marks():
    """Beginnings marked with "Ġ" or "▁", continuations marked otherwise, and word-level vocabularies are understood."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def of(model):
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), mask_token="<m>", pad_token="<p>")

    for mark in "Ġ▁":
        words = [f"{mark}the", f"{mark}un", "break", ".", "##"]
        table = continuations(of(models.BPE({word: n for n, word in enumerate(words)}, [])), None)
        assert table[:5].tolist() == [False, False, True, True, True]
    other = wordpiece(pieces=("a", "@@b"))
    assert continuations(other, "@@").tolist() == [False] * 6 + [True]
    with pytest.raises(ConfigError, match="no token of the vocabulary begins with the prefix"):
        continuations(other, "++")
    assert not continuations(of(models.WordLevel({"a": 0, "b": 1})), None).any()
    bare = of(models.BPE({"a": 0, "b": 1}, []))
    assert continuations(bare, None) is None
    make = build(WholeWordMask(bare, probability=1.0, mask=1.0, random=0.0))
    with pytest.raises(DataError, match=r"the vocabulary does not tell where words begin.*return_offsets_mapping"):
        make([{"input_ids": [0, 1]}], generator=draws())
    batch = make([{"input_ids": [0, 1], "word_ids": [0, 0]}], generator=draws())
    assert batch["labels"].tolist() == [[0, 1]]


@pytest.mark.parametrize("field", ["word_ids", "offset_mapping"])
def test_fields_that_do_not_fit_are_told(field):
    """A field with too few entries, or with words in it, is named."""
    make = build(WholeWordMask(TOKENIZER))
    with pytest.raises(DataError, match=f"'{field}' must have an entry for each token"):
        make([{"input_ids": [CLS, 5, SEP], field: [0, 1]}], generator=draws())
    with pytest.raises(DataError, match=f"'{field}' must hold numbers"):
        make([{"input_ids": [CLS, 5, SEP], field: ["a", "b", "c"]}], generator=draws())


def test_masks_differ_by_epoch_position_and_rank():
    """The same row is masked otherwise at each position of each epoch, and two ranks share the batches of one."""
    assert_draws_differ(lambda: bert("BertForMaskedLM"), lambda: WholeWordMask(TOKENIZER, probability=0.5), "labels")


def test_masks_are_the_same_after_resume_with_any_workers(tmp_path):
    """Stopped in an epoch and gone on with 0 and 2 workers, every batch and the final weights are the same."""
    rows = token_rows([4, 6, 3, 8, 5, 2, 7, 9, 4, 5, 6, 3], seed=2)
    make = lambda: WholeWordMask(TOKENIZER, probability=0.4)  # noqa: E731
    assert len(assert_resumes(lambda: bert("BertForMaskedLM"), make, rows, tmp_path)) == 6
