"""What `hf-model` refuses in a batch: for each task the ids and labels that its model does not have."""

from __future__ import annotations

import copy

import pytest
import torch

from drivetrain import DataError
from drivetrain_plugins.model._batch_checks import Below, checks_for

SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


def classifier(**config):
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SIZES, **config))


def language(kind):
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    if kind == "masked-lm":
        return BertForMaskedLM(BertConfig(**SIZES))
    if kind == "causal-lm":
        config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2)
        return GPT2LMHeadModel(config)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, **sizes))


def look(model, task, **batch):
    """Run every check, as workers do it: the checks have travelled. Return how many looked."""
    made = checks_for(model, task)
    tensors = {n: v if isinstance(v, (torch.Tensor, str)) else torch.tensor(v) for n, v in batch.items()}
    for check in copy.deepcopy(made):
        check(tensors)
    return len(made)


@pytest.mark.parametrize("kind", ["masked-lm", "causal-lm", "seq2seq-lm"])
def test_a_language_model_takes_its_own_tokens(kind):
    """Ids and labels up to the vocabulary's end and -100 pass; one more, or below, is refused with what was found."""
    model = language(kind)
    look(model, kind, input_ids=[[0, 19]], labels=[[-100, 19]])
    with pytest.raises(
        DataError, match=r"field 'input_ids' .* 0 to 19, as the model has 20 token ids. Received: \[20\]"
    ):
        look(model, kind, input_ids=[[0, 20]], labels=[[0, 1]])
    with pytest.raises(DataError, match=r"field 'input_ids' .*Received: \[-100\]"):
        look(model, kind, input_ids=[[0, -100]], labels=[[0, 1]])
    with pytest.raises(DataError, match=r"field 'labels' .*Received: \[20, -1\]"):
        look(model, kind, input_ids=[[0, 1, 2]], labels=[[20, -1, -100]])
    with pytest.raises(DataError, match=r"field 'input_ids' .*Received: torch.float32 \(1, 2\)"):
        look(model, kind, input_ids=[[0.0, 1.0]])


def test_a_decoder_has_its_own_ids():
    """An encoder-decoder's decoder ids are looked at too."""
    with pytest.raises(DataError, match="decoder_input_ids"):
        look(language("seq2seq-lm"), "seq2seq-lm", input_ids=[[1]], decoder_input_ids=[[20]])


def test_a_grown_embedding_takes_more():
    """The embedding that the model has counts, not what its configuration began with."""
    model = classifier(num_labels=3)
    model.resize_token_embeddings(24)
    assert look(model, "sequence-classification", input_ids=[[23]])
    with pytest.raises(DataError, match="24 token ids"):
        look(model, "sequence-classification", input_ids=[[24]])


def test_labels_of_classes():
    """Integers below the number of labels and -100 pass, rows of floats for several labels too; all else is refused."""
    model, task = classifier(num_labels=3), "sequence-classification"
    look(model, task, labels=[0, 2, -100])
    look(model, task, labels=[[0.0, 1.0, 0.5]])
    for wrong in ([3], [-1], [0.5], [[0.0, 1.0]]):
        with pytest.raises(
            DataError, match=r"field 'labels' must hold integers from 0 to 2, as the model has 3 labels"
        ):
            look(model, task, labels=wrong)


@pytest.mark.parametrize("config", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}])
def test_labels_that_are_no_classes(config):
    """A model that regresses, or is told to find several labels, takes floats."""
    assert look(classifier(**config), "sequence-classification", labels=[0.5, 7.0, -1.0])


def test_choices():
    """The label of a multiple-choice row names one of its choices."""
    model, ids = classifier(num_labels=1), torch.zeros(1, 4, 2, dtype=torch.int64)
    look(model, "multiple-choice", input_ids=ids, labels=[3])
    with pytest.raises(DataError, match=r"as the model has 4 choices. Received: \[4\]"):
        look(model, "multiple-choice", input_ids=ids, labels=[4])


def test_what_forward_cannot_take():
    """Text and lists are refused; a number, as packing has for its longest row, passes."""
    model = classifier(num_labels=3)
    for check in checks_for(model, "sequence-classification"):
        check({"input_ids": torch.tensor([[1]]), "max_length_q": 5})
    with pytest.raises(DataError, match=r"field 'text' of a batch must be a tensor.*Received: str 'a bird'"):
        look(model, "sequence-classification", text="a bird")


def test_a_field_that_is_not_there():
    """A batch without the field, and one that is no mapping, have nothing to look at; an empty one neither."""
    check = Below("input_ids", 4, "token ids")
    batches = [{"labels": torch.tensor([9])}, [torch.tensor([9])], {"input_ids": torch.zeros(0, 3, dtype=torch.int64)}]
    assert [check(batch) for batch in batches] == [None] * 3
    with pytest.raises(DataError):
        check({"input_ids": torch.tensor([9])})
