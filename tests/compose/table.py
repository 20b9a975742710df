"""What each plugin that changes a run means for the hand-written loop.

An entry is a function from (the plugin's instance, the kit's folder) to arguments of `reference.train`, or to parts of
them (see `arguments`). A plugin that observes needs no entry: the reference stays as it is.
"""

from __future__ import annotations

from functools import cache

import torch

from drivetrain.testing.carriers import tiny_module
from drivetrain.testing.compose import written_kind
from drivetrain.testing.files import TRAIN_ROWS, TinyModule, ensure
from drivetrain.testing.kinds import kit_rows

STEPS = 6


@cache
def tokenizer(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(ensure(folder, "model"))


# --- optimizers, schedules, the loop ----------------------------------------------------------------------------------


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


# --- models -----------------------------------------------------------------------------------------------------------


def hf_model(plugin, folder):
    def build_model():
        import transformers

        kind = {"causal-lm": "CausalLM", "masked-lm": "MaskedLM", "seq2seq-lm": "Seq2SeqLM"}.get(
            plugin.task, "".join(part.capitalize() for part in plugin.task.split("-"))
        )
        auto = getattr(transformers, f"AutoModelFor{kind}")
        return auto.from_pretrained(plugin.path, **({"num_labels": len(plugin.labels)} if plugin.labels else {}))

    return {"build_model": build_model, "count": shifted if plugin.task == "causal-lm" else counted}


def counted(batch):
    """Count the labels that are not -100; None where there are none, or numbers to come near to."""
    labels = batch.get("labels")
    if labels is None or labels.dtype.is_floating_point:
        return None
    return int((labels != -100).sum())


def shifted(batch):
    return counted({"labels": batch["labels"][..., 1:]})


# --- from rows to batches ---------------------------------------------------------------------------------------------


def pad(plugin, folder):
    return {"collate": lambda rows, draws: padded(rows, folder)}


def padded(rows, folder):
    """Pad as the tokenizer of `transformers` does; labels are one a row."""
    own = [{key: value for key, value in row.items() if key not in ("text", "label", "labels")} for row in rows]
    batch = dict(tokenizer(folder).pad(own, return_tensors="pt"))
    key = next((key for key in ("labels", "label") if key in rows[0]), None)
    return batch if key is None else {**batch, "labels": torch.tensor([row[key] for row in rows])}


def tokenized(rows, plugin, folder):
    """Tokenize as the tokenizer of `transformers` does, one row after the other."""
    made = []
    for row in rows:
        ids = dict(tokenizer(folder)(row[plugin.text], truncation=True, max_length=plugin.max_length))
        made.append({**ids, "labels": row["label"]})
    return made


TABLE = {
    "accumulate": lambda plugin, folder: {"accumulation": plugin.batches},
    "adamw": adamw,
    "bf16": lambda plugin, folder: {"autocast": torch.bfloat16},
    "clip": lambda plugin, folder: {"clip": plugin.norm},
    "constant": constant,
    "hf-dataset": lambda plugin, folder: {},
    "hf-model": hf_model,
    "jsonl": lambda plugin, folder: {},
    "linear": linear,
    "loader": lambda plugin, folder: {"batch_size": plugin.batch_size, "drop_last": plugin.drop_last},
    "module": lambda plugin, folder: {"build_model": lambda: TinyModule(0.1)},
    "pad": pad,
    "rows": lambda plugin, folder: {},
    "sgd": sgd,
    "stack": lambda plugin, folder: {},
    "tokenize": lambda plugin, folder: {"tokenized": lambda rows: tokenized(rows, plugin, folder)},
}


def arguments(composition, folder):
    """Return the arguments of `reference.train` that stand for a composition.

    A plugin's entry may hold, besides arguments of `reference.train`: "collate", from (rows, generator) to a batch;
    and "tokenized", from the source's rows to those that are collated.
    """
    found = {}
    for name, plugin in composition.plugins.items():
        if name in TABLE:
            found.update(TABLE[name](plugin, folder))
    collate = found.pop("collate", None) or (lambda rows, draws: torch.utils.data.default_collate(rows))
    kind = composition.rows or written_kind(composition.plugins.values(), tokenized="tokenized" in found) or "text"
    rows = kit_rows(kind, TRAIN_ROWS, words=composition.words if composition.rows else None)
    rows = found.pop("tokenized", lambda rows: rows)(rows)

    def make_batch(numbers, draws):
        if kind == "tensors":
            return {name: column[torch.tensor(numbers)] for name, column in rows.items()}
        return collate([rows[number] for number in numbers], draws)

    return {
        "build_model": tiny_module,
        "make_batch": make_batch,
        "optimizer": base_optimizer,
        "rows": TRAIN_ROWS,
        "steps": STEPS,
        "count": counted,
        **found,
    }
