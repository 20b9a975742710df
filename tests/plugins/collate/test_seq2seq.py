"""`seq2seq` is transformers' collator of that name, with decoder inputs that need no model."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from collate_rows import FORMS, assert_input_unchanged, assert_same_batch, docstring_rows, in_form, minilm, token_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import cpu_run

from drivetrain import ConfigError, DataError, Trainer
from drivetrain_plugins import SGD, Loader
from drivetrain_plugins.collate.seq2seq import Seq2Seq, Shift

TINY = {"vocab_size": 32000, "d_model": 8, "decoder_start_token_id": 101, "pad_token_id": 0}


def model(kind):
    """Return a tiny encoder-decoder of `kind`."""
    import transformers

    with torch.random.fork_rng():
        if kind == "t5":
            config = transformers.T5Config(**TINY, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            return transformers.T5ForConditionalGeneration(config)
        names = {"bart": "Bart", "mbart": "MBart", "marian": "Marian"}
        sizes = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        sizes |= {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 32}
        config = getattr(transformers, f"{names[kind]}Config")(**TINY, **sizes)
        name = "MarianMTModel" if kind == "marian" else f"{names[kind]}ForConditionalGeneration"
        return getattr(transformers, name)(config)


@pytest.fixture(scope="module", params=["t5", "bart", "mbart", "marian"])
def any_model(request):
    return model(request.param)


@pytest.fixture(scope="module")
def t5():
    return model("t5")


def collator(side="right", of=None, **options):
    return Seq2Seq(minilm(side), **options).build_collator(cpu_run(model=of))


def targeted(count=16, name="labels"):
    """Return docstrings whose target is the next one's ids."""
    rows = docstring_rows(count)
    return [
        {**{k: v for k, v in row.items() if k != "label"}, name: rows[i - 1]["input_ids"]} for i, row in enumerate(rows)
    ]


def theirs(rows, side="right", **options):
    """Return the batch of DataCollatorForSeq2Seq, without its key of None."""
    from transformers import DataCollatorForSeq2Seq

    batch = dict(DataCollatorForSeq2Seq(minilm(side), **options)(copy.deepcopy(rows)))
    return {name: values for name, values in batch.items() if values is not None}


@pytest.mark.parametrize("side", ["right", "left"])
def test_real_rows_equal_transformers_with_any_model(any_model, side):
    """Pairs of docstrings make the same sources, labels and decoder inputs, whichever way the model shifts."""
    rows = targeted()
    wanted = theirs(rows, side, model=any_model, pad_to_multiple_of=8)
    assert "decoder_input_ids" in wanted
    assert_same_batch(collator(side, any_model, multiple=8)(rows), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["label", "labels"])
def test_every_form_of_rows_equals_transformers(form, name, t5):
    """Lists, arrays, tensors and columns make the batch that lists make there."""
    rows = targeted(name=name)
    assert_same_batch(collator(of=t5)(in_form(rows, form)), theirs(rows, model=t5))


@settings(max_examples=60, deadline=None)
@given(
    rows=token_rows(labels=lambda _: st.lists(st.integers(0, 30000), min_size=1, max_size=12)),
    multiple=st.integers(1, 9),
    side=st.sampled_from(["right", "left"]),
)
def test_any_rows_equal_transformers(rows, multiple, side, t5):
    """Whatever the lengths, targets are padded apart from sources, also where both are equally long by chance."""
    wanted = theirs(rows, side, model=t5, pad_to_multiple_of=multiple)
    for form in ("lists", "table"):
        assert_same_batch(collator(side, t5, multiple=multiple)(in_form(rows, form)), wanted)


@settings(max_examples=100, deadline=None)
@given(
    labels=st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.sampled_from([-100, 0, 5, 9, 101]), min_size=n, max_size=n), min_size=1)
    )
)
def test_shift_equals_the_models_own_method(labels, any_model):
    """For all labels, with -100 and padding ids anywhere, the shift is what the model's method returns."""
    labels = torch.tensor(labels)
    if Shift.of(any_model).start is None:  # mBART fails on rows that hold padding alone
        labels[~((labels != -100) & (labels != 0)).any(1), 0] = 7
    assert torch.equal(Shift.of(any_model)(labels), any_model.prepare_decoder_input_ids_from_labels(labels=labels))


def test_labels_are_optional(t5):
    """Rows without labels, or with null in every row, make a batch without labels and decoder inputs."""
    rows = targeted()
    bare = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
    null = [{**row, "labels": None} for row in bare]
    for each in (bare, null):
        batch = collator(of=t5)(each)
        assert "labels" not in batch
        assert_same_batch(batch, theirs(each, model=t5))


def test_lengths_and_switch(t5):
    """Sources and targets have lengths of their own; equal ones are transformers'; decoder inputs may be left out."""
    rows = [row for row in targeted() if max(len(row["input_ids"]), len(row["labels"])) <= 60]
    wanted = theirs(rows, model=t5, padding="max_length", max_length=60)
    assert_same_batch(collator(of=t5, length=60, label_length=60)(rows), wanted)
    batch = collator(of=t5, label_length=70, decoder_inputs=False)(rows)
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert batch["labels"].shape == (len(rows), 70)
    with pytest.raises(DataError, match="seq2seq: field 'labels': row 1 of the batch has 6 items"):
        collator(label_length=5)([{"input_ids": [1], "labels": [1] * n} for n in (5, 6)])


def test_a_model_without_the_method_gets_no_decoder_inputs():
    """Other models get labels alone."""
    assert set(collator(of=torch.nn.Linear(1, 1))([{"input_ids": [1], "labels": [2]}])) == {
        "input_ids",
        "attention_mask",
        "labels",
    }


def test_a_model_that_does_not_shift_is_refused_at_assembly(t5):
    """A method that does something else, or a configuration without the ids, is an error before step 0."""

    class Odd(torch.nn.Module):
        def prepare_decoder_input_ids_from_labels(self, labels):
            return labels.flip(1)

    with pytest.raises(ConfigError, match=r"seq2seq: Odd.prepare_decoder_input_ids_from_labels is no shift"):
        Trainer(Odd(), [Seq2Seq(minilm()), Loader(2), SGD()], steps=1, device="cpu").fit([{"input_ids": [1]}] * 4)
    lacking = copy.deepcopy(t5)
    lacking.config.pad_token_id = None
    with pytest.raises(ConfigError, match=r"(?s)pad_token_id has to be defined.*set decoder_start_token_id"):
        collator(of=lacking)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1], None], "field 'labels' makes no tensor .row 1 of the batch: it is null"),
        ([None, [1]], "'labels' must hold a list of target ids in every row, but not in row 0"),
        ([1, 2], "'labels' must hold a list of target ids"),
        ([[0.5], [1.0]], "'labels' must hold a list of target ids"),
        (["a", "b"], "'labels' must hold a list of target ids"),
    ],
)
def test_labels_that_are_no_ids_are_named(labels, message):
    """A null beside others, a number and text are refused with field and row."""
    with pytest.raises(DataError, match="seq2seq: .*" + message):
        collator()([{"input_ids": [1], "labels": each} for each in labels])


def test_input_is_unchanged_and_the_collator_pickles_without_weights(t5):
    """All forms of rows hold the same after collating; the pickle is small whatever the model."""
    make = collator(of=t5, multiple=8)
    assert_input_unchanged(make, targeted(6))
    pickled = pickle.dumps(make)
    assert len(pickled) < 1000
    assert_same_batch(pickle.loads(pickled)(targeted(6)), make(targeted(6)))


def test_padding_does_not_change_the_loss(t5):
    """The mean loss of a padded batch is the mean over all target tokens of single rows."""
    rows = [{"input_ids": row["input_ids"][:20], "labels": row["labels"][:12]} for row in targeted(5)]
    rows[2]["labels"] = rows[2]["labels"][:4]
    t5.eval()
    with torch.no_grad():
        whole = t5(**collator(of=t5, multiple=16)(rows)).loss.item()
        parts = [(t5(**collator(of=t5)([row])).loss.item(), len(row["labels"])) for row in rows]
    assert whole == pytest.approx(np.average([p[0] for p in parts], weights=[p[1] for p in parts]), rel=1e-5)
