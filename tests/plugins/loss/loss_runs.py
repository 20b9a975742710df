"""Tiny models in float64, ragged rows, and one step's gradient taken from a run or computed by hand."""

from __future__ import annotations

import numpy as np
import torch

from drivetrain import Trainer, hookimpl
from drivetrain_plugins import SGD, Accumulate, Loader
from drivetrain_plugins.collate.flatten import Flatten
from drivetrain_plugins.collate.pack import Pack

VOCABULARY, CLASSES = 37, 5
LENGTHS = (3, 9, 1, 6, 12, 2, 7, 5, 4, 8, 2)


class Words:
    """Stands where a tokenizer would: `pad` asks it for the padding."""

    pad_token_id, pad_token_type_id, padding_side = 0, 0, "right"


def model_of(kind, dtype=torch.float64, **changed):
    """Return a random model without dropout: "gpt2", "llama", "bert" with a head over words, or a classifier."""
    import transformers

    small = {"vocab_size": VOCABULARY, "initializer_range": 0.2}
    bert = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **small}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 32}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    of = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**gpt2, **drops, **small, **ends, **changed})),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**bert, "num_key_value_heads": 1, **changed})),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**{**bert, **none, **changed})),
        "tagger": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**{**bert, **none, "num_labels": CLASSES, **changed})),
        "classifier": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**{**bert, **none, "num_labels": CLASSES, **changed})),
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = of[kind]()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # biases start at 0, and would hide a mistake
                torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def token_rows(labels="words", lengths=LENGTHS, seed=1):
    """Return rows of tokens with a label each: the words themselves, classes (some -100), or numbers."""
    draws = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = draws.integers(2, VOCABULARY, length)
        if labels == "words":
            wanted = np.where(draws.random(length) < 0.2, -100, ids)
        elif labels == "classes":
            wanted = np.where(draws.random(length) < 0.3, -100, draws.integers(0, CLASSES, length))
        else:
            wanted = draws.normal(size=length).astype(np.float32)
        rows.append({"input_ids": ids.tolist(), "labels": wanted.tolist()})
    return rows


class Gradient:
    """A plugin that keeps the gradient of every step, and the step's loss."""

    def __init__(self):
        self.steps, self.losses = [], []

    @hookimpl
    def gradients_ready(self, step):
        model = step.run.model
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        self.losses.append(step.loss.item())


# How the same rows are made into batches: rows of a micro-batch, micro-batches of a step, collator.
def arrangements(pad, packed=True):
    """Return (rows of a micro-batch, micro-batches, collator) by name; all of them make one step of all rows."""
    made = {
        "all rows at once": (11, 1, pad(1)),
        "padded to more": (11, 1, pad(32)),
        "one row at a time": (1, 11, pad(1)),
        "ragged windows": (4, 3, pad(8)),
    }
    if packed:
        made["flattened"] = (11, 1, ("flatten", Flatten()))
        made["flattened in windows"] = (3, 4, ("flatten", Flatten()))
        made["packed"] = (11, 1, ("pack", Pack(tokens=16)))
        made["packed in windows, fixed"] = (4, 3, ("pack", Pack(tokens=20, fixed=True, mask=True)))
    return made


def step_gradient(model, rows, loss, way):
    """Return the gradient and the loss of one step over all rows."""
    (size, windows, collate), keep = way, Gradient()
    plugins = [collate, ("loss", loss), Loader(batch_size=size), Accumulate(windows), SGD(lr=0.1), keep]
    Trainer(model, plugins, steps=1, device="cpu").fit(rows)
    return keep.steps[0], keep.losses[0]


def by_hand(model, rows, items):
    """Return gradient and mean loss of `rows`, one by one: `items(outputs, row)` gives each row's item losses (n,)."""
    total, number = 0.0, 0
    model.zero_grad()
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        losses = items(model(input_ids=ids).logits[0], row)
        losses.sum().backward()
        total, number = total + losses.sum().item(), number + len(losses)
    return {n: p.grad / number for n, p in model.named_parameters() if p.grad is not None}, total / number


def log_softmax(logits):
    """Return log p of logits (..., C), written out."""
    top = logits.max(-1, keepdim=True).values.detach()
    return logits - top - (logits - top).exp().sum(-1, keepdim=True).log()


def nll(logits, labels):
    """Return -log p of the labels that are not -100, (n,)."""
    labels = torch.as_tensor(labels)
    kept = labels != -100
    return -log_softmax(logits[kept]).gather(1, labels[kept][:, None])[:, 0]


def distance(left, right):
    """Return the largest difference of two gradients over the largest entry of the second."""
    assert left.keys() == right.keys()
    largest = max(g.abs().max().item() for g in right.values())
    return max((left[n].double() - right[n].double()).abs().max().item() for n in left) / largest
