"""`pack` fills rows by first-fit, and packed samples come out as single ones."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_models import alone, bert, gpt2, llama, roberta, samples, trained_on
from plugin_helpers import cpu_run

from drivetrain import ConfigError, DataError, Trainer
from drivetrain_plugins import SGD, Loader
from drivetrain_plugins.collate.pack import Pack, PackCollator, first_fit
from drivetrain_plugins.shared.table import Table


def unpacked(batch, name="input_ids"):
    """Return the samples of a packed batch, cut where positions restart, without the padding."""
    found = []
    for values, positions, mask in zip(batch[name], batch["position_ids"], batch["attention_mask"], strict=True):
        sees = mask[0]
        first = torch.tensor([int(line.nonzero()[0]) for line in sees])
        found += [
            values[first == start].tolist()
            for start in first.unique().tolist()
            if positions[first == start].tolist() == list(range(int((first == start).sum())))
        ]
    return found


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), fixed=st.booleans())
def test_every_token_comes_out_once_with_its_label(lengths, fixed):
    """Whatever the lengths, rows hold at most the budget, and cutting them again gives the samples and their labels."""
    rows = samples(lengths, seed=sum(lengths))
    before = copy.deepcopy(rows)
    collate = pickle.loads(pickle.dumps(PackCollator(12, fixed=fixed, causal=True)))
    batch = collate(rows)
    assert rows == before
    assert batch["input_ids"].shape[1] == (12 if fixed else batch["input_ids"].shape[1]) <= 12
    # Padding is one more part of a row: its position stays 0, so that it is a sample only if it is one token.
    padding = (batch["labels"] == -100).sum().item()
    assert padding == batch["input_ids"].numel() - sum(lengths)
    kept = [s for s in unpacked(batch, "labels") if s != [-100]]
    assert sorted(kept) == sorted(row["labels"] for row in rows)
    table = collate(Table.of(rows))
    assert all(torch.equal(batch[name], table[name]) for name in batch)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_first_fit_wastes_less_than_a_row_in_two(lengths):
    """Every sample has one place, no row is over the budget, and no two rows would fit into one."""
    rows = first_fit(np.array(lengths), 20)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    used = [sum(lengths[n] for n in row) for row in rows]
    assert max(used) <= 20
    assert all(a + b > 20 for i, a in enumerate(used) for b in used[i + 1 :])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("make", "mask"), [(llama, None), (llama, True), (gpt2, None), (gpt2, True), (bert, None)])
def test_logits_of_packed_rows_are_those_of_single_rows(make, mask, attention, dtype):
    """Tokens see their own sample only: by a boolean mask, an added one, or positions; in training and evaluation."""
    model = make(attn_implementation=attention).to(dtype)
    rows = samples((4, 1, 7, 3, 5, 2))
    collate = trained_on(Pack(tokens=9, mask=mask), model, shifted_labels=make is not bert)
    batch = collate(rows)
    assert batch["input_ids"].shape == (3, 9)
    assert ("attention_mask" in batch) == (mask is True or make is bert)
    order = [2, 5, 4, 0, 3, 1]  # first-fit from the longest on: 7+2, 5+4, 3+1
    for training in (True, False):
        model.train(training)
        got = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        got = torch.cat([got[0], got[1], got[2, :4]])
        wanted = torch.cat([alone(model, rows[n]["input_ids"]) for n in order])
        # float64 up to the sums' order; Llama norms and rotates, and eager attention weighs, in float32 (Llama).
        exact = dtype == torch.float64 and make is not llama
        assert (got - wanted).abs().max() < (1e-12 if exact else 1e-5) * wanted.abs().max()


def test_gradient_does_not_cross_samples():
    """The loss of one sample has no gradient at another's embeddings, not even at a boundary."""
    model = gpt2()
    batch = trained_on(Pack(tokens=16), model)(samples((4, 1, 7, 3)))
    embedded = model.transformer.wte(batch["input_ids"]).detach().requires_grad_()
    labels = torch.full_like(batch["labels"], -100)
    labels[0, 8:11] = batch["labels"][0, 8:11]  # the second sample, of four tokens, after seven
    model(inputs_embeds=embedded, position_ids=batch["position_ids"], labels=labels, use_cache=False).loss.backward()
    touched = embedded.grad[0].abs().sum(-1) > 0
    assert touched.nonzero().flatten().tolist() == [7, 8, 9]


def test_no_sample_predicts_the_next_ones_start():
    """Where labels are shifted, the first of each sample is -100; where they are not, all are kept."""
    rows = samples((2, 3))
    shifted = trained_on(Pack(tokens=8), llama())(rows)["labels"]
    a, b = rows[1]["labels"], rows[0]["labels"]
    assert shifted.tolist() == [[-100, *a[1:], -100, *b[1:]]]
    assert trained_on(Pack(tokens=8), bert())(rows)["labels"].tolist() == [[*a, *b]]
    ids = [{"input_ids": row["input_ids"]} for row in rows]
    assert torch.equal(trained_on(Pack(tokens=8), llama())(ids)["labels"], shifted)
    assert "labels" not in trained_on(Pack(tokens=8), bert())(ids)


def test_roberta_counts_positions_from_two():
    """Another first position than the model's own is refused; with it, packed rows are as single ones."""
    with pytest.raises(ConfigError, match="`start`"):
        trained_on(Pack(tokens=9), roberta())
    model = roberta()
    rows = samples((5, 3))
    got = model(**{k: v for k, v in trained_on(Pack(tokens=9, start=2), model)(rows).items() if k != "labels"}).logits
    wanted = torch.cat([alone(model, row["input_ids"]) for row in rows])
    assert torch.allclose(got[0], wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "plugin", "told"),
    [
        (bert, Pack(tokens=8, mask=False), "depends on the sample packed before"),
        (bert, Pack(tokens=8, causal=True), "not those of the sample alone"),
        (llama, Pack(tokens=8, mask=True, causal=False), "not those of the sample alone"),
    ],
)
def test_a_mask_that_does_not_fit_the_model_is_refused(make, plugin, told):
    """The model is tried at assembly: a missing mask and one of the wrong kind are found before step 0."""
    with pytest.raises(ConfigError, match=told):
        trained_on(plugin, make())


def test_attention_that_takes_no_mask_is_refused():
    """Flash attention takes no mask, and a sliding window is not in it."""
    model = bert()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="takes no 4-d mask"):
        Pack(tokens=8).build_collator(cpu_run(model=model))
    model = llama()
    model.config.sliding_window = 4
    with pytest.raises(ConfigError, match="sliding_window=4, tokens=8"):
        Pack(tokens=8, mask=True).build_collator(cpu_run(model=model))


def test_sample_over_the_budget_is_named():
    """A sample that is longer than a row is an error of the data: the run says which row it was."""
    rows = samples((3, 12, 4))
    trainer = Trainer(gpt2(), [Pack(tokens=8), Loader(batch_size=3), SGD()], steps=1, device="cpu")
    with pytest.raises(DataError, match=r"train row 1: pack: a sample of 12 tokens is longer than a row of 8"):
        trainer.fit(rows)


def test_label_of_a_whole_row_is_refused():
    """Rows with one label each cannot share a row."""
    with pytest.raises(DataError, match="pack: field 'labels' must have a number for each"):
        PackCollator(8)([{"input_ids": [1, 2], "labels": 1}])
