"""`sentence-order` makes ALBERT's pairs: consecutive segments, half of them swapped, with masks on top."""

from __future__ import annotations

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
    assert_resumes,
    assert_same_batch,
    assert_sound,
    bert,
    build,
    draws,
    wordpiece,
)

from drivetrain import ConfigError, DataError
from drivetrain_plugins.collate.sentence_order import SentenceOrder
from drivetrain_plugins.shared.table import Table

TOKENIZER = wordpiece()
IDS = st.lists(st.integers(FIRST, FIRST + len(PIECES) - 1), min_size=1, max_size=9)


def plain(**options):
    return build(SentenceOrder(TOKENIZER, probability=0.0, **options))


def documents(count, seed=0):
    """Return rows of two to five sentences, whose ids tell their order."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        sizes = torch.randint(1, 5, (int(torch.randint(2, 6, (1,), generator=draw)),), generator=draw).tolist()
        rows.append(
            {"sentences": [torch.randint(FIRST, FIRST + len(PIECES), (n,), generator=draw).tolist() for n in sizes]}
        )
    return rows


def albert():
    from transformers import AlbertConfig, AlbertForPreTraining

    sizes = {"embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AlbertConfig(vocab_size=FIRST + len(PIECES), intermediate_size=16, max_position_embeddings=64, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return AlbertForPreTraining(config)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5), st.integers(0, 2**31), st.integers(5, 24))
def test_pairs_by_hand(pairs, seed, max_length):
    """For any segments: the tokenizer's own layout of the pair, in the order that the label says, touching where cut."""
    rows = [{"first": first, "second": second} for first, second in pairs]
    batch = assert_sound(plain(max_length=max_length), rows, seed=seed)
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "sentence_order_label"}
    for number, (first, second) in enumerate(pairs):
        one, two = list(first), list(second)
        while len(one) + len(two) > max_length - 3:  # a token at a time from the longer, at the outer ends
            if len(one) > len(two):
                one.pop(0)
            else:
                two.pop()
        swapped = int(batch["sentence_order_label"][number])
        ahead, after = (two, one) if swapped else (one, two)
        ids = [CLS, *ahead, SEP, *after, SEP]
        size = int(batch["attention_mask"][number].sum())
        assert batch["input_ids"][number, :size].tolist() == ids
        assert batch["token_type_ids"][number, :size].tolist() == [0] * (len(ahead) + 2) + [1] * (len(after) + 1)
        assert (batch["input_ids"][number, size:] == TOKENIZER.pad_token_id).all()


def test_documents_are_cut_between_sentences():
    """A document's segments are its sentences in order, every cut comes as often as another, and labels are a fair coin."""
    sentences = [[5, 6], [7], [8, 9, 10], [11]]
    rows = [{"sentences": sentences}] * 6000
    batch = plain()(rows, generator=draws(4))
    cuts = {1: 0, 2: 0, 3: 0}
    for ids, types, swapped in zip(
        batch["input_ids"].tolist(),
        batch["token_type_ids"].tolist(),
        batch["sentence_order_label"].tolist(),
        strict=True,
    ):
        middle = ids.index(SEP)
        one, two = ids[1:middle], ids[middle + 1 : ids.index(SEP, middle + 1)]
        first, second = (two, one) if swapped else (one, two)
        assert first + second == [5, 6, 7, 8, 9, 10, 11]
        cuts[{2: 1, 3: 2, 6: 3}[len(first)]] += 1
        assert types[: middle + 1] == [0] * (middle + 1)
    assert all(abs(count - 2000) <= 5 * (2000 * 2 / 3) ** 0.5 for count in cuts.values())
    assert abs(int(batch["sentence_order_label"].sum()) - 3000) <= 5 * 1500**0.5


def test_masks_lie_on_top():
    """Labels hold the hidden tokens, never special ones, and what is not hidden is the pair; at 0 there are none."""
    rows = documents(40)
    masked = build(SentenceOrder(TOKENIZER, probability=0.4))(rows, generator=draws(2))
    bare = plain()(rows, generator=draws(2))
    picked = masked["labels"] != -100
    assert torch.equal(torch.where(picked, masked["labels"], masked["input_ids"]), bare["input_ids"])
    assert picked.any()
    assert int(masked["labels"][picked].min()) >= FIRST
    assert (masked["input_ids"] == MASK).sum() > 0
    assert_same_batch(
        {k: v for k, v in masked.items() if k not in ("labels", "input_ids")},
        {k: v for k, v in bare.items() if k != "input_ids"},
    )


def test_tables_with_sentences_give_the_same():
    """A table whose column holds lists of sentences is collated like rows."""
    rows = documents(7)
    make = plain()
    table = Table({"sentences": [row["sentences"] for row in rows]})
    assert_same_batch(make(table, generator=draws(1)), make(rows, generator=draws(1)))


def test_other_fields_and_names():
    """Numbers of a row stay, its own labels do not; the order's label and the fields can be called otherwise."""
    rows = [{"a": [5, 6], "b": [7], "weight": 2, "label": 1, "text": "x"}]
    batch = assert_sound(plain(first="a", second="b", label="labels", multiple=4), rows, seed=0)
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels", "weight"}
    assert batch["input_ids"].shape == (1, 8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentences": [[5, 6]]}, "'sentences' must hold two sentences or more"),
        ({"sentences": [5, 6]}, "holds no token ids"),
        ({"sentences": "a b"}, "must hold two sentences or more.*'a b'"),
        ({"sentences": [["a"], ["b"]]}, "holds no token ids"),
        ({"first": [5]}, r"a row needs 'sentences' .*Received: rows with \['first'\]"),
        ({"first": [5], "second": []}, "a segment has no tokens"),
        ({"first": [5], "second": "b"}, "'second' must hold lists of token ids"),
    ],
)
def test_rows_that_make_no_pair_are_told(row, message):
    """What a row lacks is named with what was received."""
    with pytest.raises(DataError, match="sentence-order: .*" + message):
        plain()([row], generator=draws())


def test_wrong_options_are_refused_at_assembly():
    """Two kinds of labels under one name, and tokenizers without the tokens that stand around segments."""
    with pytest.raises(ConfigError, match=r"(?s)both the order and the masked tokens would be 'labels'.*probability=0"):
        build(SentenceOrder(TOKENIZER, label="labels"))
    for kind in ("cls", "sep", "mask"):
        tokenizer = wordpiece()
        setattr(tokenizer, f"{kind}_token", None)
        with pytest.raises(ConfigError, match=f"sentence-order: the tokenizer has no {kind} token"):
            build(SentenceOrder(tokenizer))


def test_albert_resumes_with_any_workers(tmp_path):
    """ALBERT trains on both losses; stopped in an epoch and gone on with 0 and 2 workers, all is the same."""
    batches = assert_resumes(albert, lambda: SentenceOrder(TOKENIZER, probability=0.3), documents(12), tmp_path)
    orders = [batch["sentence_order_label"].tolist() for batch in batches]
    assert len(orders) == 6
    assert len({tuple(order) for order in orders}) > 1


def test_a_classifier_learns_the_order_alone(tmp_path):
    """With the label called "labels" and no masks, any classifier of pairs trains on it."""
    make = lambda: SentenceOrder(TOKENIZER, probability=0.0, label="labels")  # noqa: E731
    model = lambda: bert("BertForSequenceClassification", num_labels=2)  # noqa: E731
    batches = assert_resumes(model, make, documents(12), tmp_path)
    assert {int(label) for batch in batches for label in batch["labels"]} == {0, 1}
