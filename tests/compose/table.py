"""What each plugin that changes a run means for the hand-written loop.

An entry is a function from (the plugin's instance, the kit's folder) to arguments of `reference.train`, or to parts of
them. A plugin that observes needs no entry: the reference stays as it is.
"""

from __future__ import annotations

import torch

from drivetrain.testing.carriers import tiny_module
from drivetrain.testing.files import TRAIN_ROWS, TinyModule, ensure
from drivetrain.testing.kinds import tensor_rows, text_rows, token_rows

STEPS = 6


def adamw(plugin, folder):
    def optimizer(decayed, spared):
        groups = [{"params": decayed, "weight_decay": plugin.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=plugin.lr, betas=plugin.betas, eps=plugin.eps, fused=True)

    return {"optimizer": optimizer}


def sgd(plugin, folder):
    def optimizer(decayed, spared):
        groups = [{"params": decayed, "weight_decay": plugin.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        return torch.optim.SGD(groups, lr=plugin.lr, momentum=plugin.momentum, nesterov=plugin.nesterov, fused=True)

    return {"optimizer": optimizer}


def base_optimizer(decayed, spared):
    return torch.optim.SGD([*decayed, *spared], lr=0.1, momentum=0.9)


def linear(plugin, folder):
    warm = -(-STEPS * plugin.warmup // 1)
    return {"schedule": lambda step: step / warm if step < warm else (STEPS - step) / (STEPS - warm)}


def constant(plugin, folder):
    return {"schedule": lambda step: min(1.0, step / plugin.warmup)}


def hf_model(plugin, folder):
    def build_model():
        import transformers

        auto = transformers.AutoModelForSequenceClassification
        return auto.from_pretrained(folder / "model", num_labels=len(plugin.labels))

    return {"build_model": build_model, "tokens": True}


TABLE = {
    "accumulate": lambda plugin, folder: {"accumulation": plugin.batches},
    "adamw": adamw,
    "bf16": lambda plugin, folder: {"autocast": torch.bfloat16},
    "clip": lambda plugin, folder: {"clip": plugin.norm},
    "constant": constant,
    "hf-dataset": lambda plugin, folder: {"words": None, "text": True},
    "hf-model": hf_model,
    "jsonl": lambda plugin, folder: {"words": None, "text": True},
    "linear": linear,
    "loader": lambda plugin, folder: {"batch_size": plugin.batch_size, "drop_last": plugin.drop_last},
    "module": lambda plugin, folder: {"build_model": lambda: TinyModule(0.1)},
    "pad": lambda plugin, folder: {},
    "rows": lambda plugin, folder: {"words": None, "text": True},
    "sgd": sgd,
    "stack": lambda plugin, folder: {},
    "tokenize": lambda plugin, folder: {"text": True, "tokens": True, "max_length": plugin.max_length},
}


def batches(folder, *, text, tokens, words, max_length=None):
    """Return a function from row numbers to a batch, made with the original libraries where there is text."""
    if not text and not tokens:
        columns = tensor_rows(TRAIN_ROWS)
        return lambda numbers: {name: column[torch.tensor(numbers)] for name, column in columns.items()}
    rows = text_rows(TRAIN_ROWS, words=words)
    if not tokens:
        return lambda numbers: {"text": [rows[i]["text"] for i in numbers], "label": labels(rows, numbers, "label")}
    if text:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(ensure(folder, "model"))

        def from_text(numbers):
            chosen = [rows[i]["text"] for i in numbers]
            made = tokenizer(chosen, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            return {**made, "labels": labels(rows, numbers, "label")}

        return from_text
    ids = token_rows(TRAIN_ROWS, words=words)

    def from_ids(numbers):
        given = [torch.as_tensor(ids[i]["input_ids"]) for i in numbers]
        padded = torch.nn.utils.rnn.pad_sequence(given, batch_first=True)
        batch = {"input_ids": padded, "labels": labels(ids, numbers, "labels")}
        return batch if words is not None else {**batch, "attention_mask": (padded != 0).long()}

    return from_ids


def labels(rows, numbers, key):
    return torch.tensor([rows[i][key] for i in numbers])


def arguments(plugins, words, folder):
    """Return the arguments of `reference.train` that stand for `plugins` (instances by name)."""
    found = {"text": False, "tokens": False, "words": words, "max_length": None}
    for name, plugin in plugins.items():
        if name in TABLE:
            found.update(TABLE[name](plugin, folder))
    about = {key: found.pop(key) for key in ("text", "tokens", "words", "max_length")}
    return {
        "build_model": tiny_module,
        "make_batch": batches(folder, **about),
        "optimizer": base_optimizer,
        "rows": TRAIN_ROWS,
        "steps": STEPS,
        **found,
    }
