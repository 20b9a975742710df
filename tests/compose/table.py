"""What each plugin that changes a run means for the hand-written loop.

An entry is a function from (the plugin's instance, the kit's folder) to arguments of `reference.train`, or to parts of
them (see `arguments`). A plugin that observes needs no entry: the reference stays as it is.

What a collator makes of rows, in which order a sampler has them and what a stream or a mixture gives are proven beside
each plugin, against the original libraries: here their own objects are used by a loop that is not ours.
"""

from __future__ import annotations

import copy
import math
from functools import cache
from importlib import import_module
from pathlib import Path

import torch

from drivetrain.testing.carriers import tiny_module
from drivetrain.testing.compose import written_kind
from drivetrain.testing.files import TRAIN_ROWS, TinyLanguageModel, TinyModule, ensure
from drivetrain.testing.kinds import kit_rows

STEPS = 6


@cache
def tokenizer(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(ensure(folder, "model"))


# --- optimizers, schedules, the loop ----------------------------------------------------------------------------------


def adamw(plugin, folder):
    return {
        "optimizer": lambda groups: torch.optim.AdamW(groups, **given(plugin, "lr betas eps weight_decay"), fused=True)
    }


def sgd(plugin, folder):
    options = given(plugin, "lr momentum nesterov weight_decay")
    return {"optimizer": lambda groups: torch.optim.SGD(groups, **options, fused=True)}


def base_optimizer(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def given(plugin, names):
    """Return these options of a plugin."""
    return {name: getattr(plugin, name) for name in names.split()}


def linear(plugin, folder):
    start = warm(plugin)
    return {"schedule": lambda step: step / start if step < start else (STEPS - step) / (STEPS - start)}


def constant(plugin, folder):
    return {"schedule": lambda step: min(1.0, step / warm(plugin))}


# --- models -----------------------------------------------------------------------------------------------------------


_models = {}


def hf_model(plugin, folder):
    def build_model():
        key = (str(plugin.path), plugin.task, str(plugin.arguments), str(plugin.labels))
        if key not in _models:  # what is drawn is drawn from the same seed each time
            _models[key] = load()
        return copy.deepcopy(_models[key])

    def load():
        import transformers

        kind = {"causal-lm": "CausalLM", "masked-lm": "MaskedLM", "seq2seq-lm": "Seq2SeqLM"}.get(
            plugin.task, "".join(part.capitalize() for part in plugin.task.split("-"))
        )
        auto = getattr(transformers, f"AutoModelFor{kind}")
        return auto.from_pretrained(
            plugin.path, **plugin.arguments, **({"num_labels": len(plugin.labels)} if plugin.labels else {})
        )

    return {
        "build_model": build_model,
        "count": shifted if plugin.task == "causal-lm" and "xlnet" not in plugin.path else counted,
    }


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
    """Pad as the tokenizer of `transformers` does; labels are one a row, or one a token and -100 on padding."""
    own = [{key: value for key, value in row.items() if key not in ("text", "label", "labels")} for row in rows]
    batch = dict(tokenizer(folder).pad(own, return_tensors="pt"))
    key = next((key for key in ("labels", "label") if key in rows[0]), None)
    if key is None:
        return batch
    longest, labels = batch["input_ids"].shape[1], [row[key] for row in rows]
    if isinstance(labels[0], list) and isinstance(labels[0][0], int):
        labels = [each + [-100] * (longest - len(each)) for each in labels]
    return {**batch, "labels": torch.tensor(labels)}


def tokenized(rows, plugin, folder):
    """Tokenize as the tokenizer of `transformers` does, one row after the other."""
    made = []
    for row in rows:
        ids = dict(tokenizer(folder)(row[plugin.text], truncation=True, max_length=plugin.max_length))
        made.append({**ids, "labels": row["label"]})
    return made


def collates(plugin, folder):
    return {"own_collator": True}


def ordered(plugin, folder):
    return {"own_order": True}


def read(plugin, folder):
    return {"own_rows": True}


def unchanged(plugin, folder):
    return {}


# --- losses -----------------------------------------------------------------------------------------------------------


def outputs(model, batch):
    return model(**{name: value for name, value in batch.items() if name != "labels"})["logits"]


def classes(smoothing=0.0, shift=None):
    """Return the entry of a sum of cross-entropies; labels are shifted as the model's own loss does, or as `shift` says."""

    def loss(model, batch, shifts):
        logits, labels = outputs(model, batch), batch["labels"]
        if shifts:
            labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", label_smoothing=smoothing
        )

    return {"summed": loss, "shift": shift}


def kit_loss(model, batch):
    logits, labels = outputs(model, batch), batch["labels"]
    if labels.shape == logits.shape:
        return torch.nn.functional.cross_entropy(logits, labels)
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def mse(model, batch, shifts):
    return torch.square(outputs(model, batch) - batch["labels"]).sum()


def bce(model, batch, shifts):
    logits, labels = outputs(model, batch), batch["labels"]
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum()


def numbers(batch):
    return batch["labels"].numel()


def by_transformers(name, **arguments):
    """Return the entry of a schedule: its factors are those of the scheduler of `transformers`."""

    def entry(plugin, folder):
        from transformers import get_scheduler

        def factors(rate):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
            given = {theirs: getattr(plugin, ours) for theirs, ours in arguments.items()}
            steps = {"num_warmup_steps": warm(plugin), "num_training_steps": STEPS}
            return get_scheduler(name, optimizer, **steps, scheduler_specific_kwargs=given).lr_lambdas[0]

        return {"schedule_of": factors}

    return entry


def warm(plugin):
    warmup = plugin.warmup
    return math.ceil(warmup.count * STEPS) if warmup.unit == "share" else int(warmup.count)


def after_warmup(plugin, factor):
    start = warm(plugin)
    return {"schedule": lambda step: step / start if step < start else factor(step - start, step)}


def one_cycle(plugin, folder):
    made = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        made, max_lr=1.0, total_steps=STEPS, pct_start=plugin.rise, div_factor=plugin.first,
        final_div_factor=plugin.last, cycle_momentum=False,
    )  # fmt: skip
    rates = []
    for _ in range(STEPS):
        rates.append(made.param_groups[0]["lr"])
        made.step()
        if len(rates) < STEPS:
            schedule.step()
    return {"schedule": lambda step: rates[step] if step < STEPS else 0.0}


TABLE = {
    "bce": lambda plugin, folder: {"summed": bce, "count": numbers},
    "causal-lm": collates,
    "causal-lm-loss": lambda plugin, folder: {**classes(shift=True), "count": shifted},
    "chat-template": read,
    "chunked-cross-entropy": lambda plugin, folder: classes(),
    "columns": unchanged,
    "completion-only": collates,
    "cosine": by_transformers("cosine", num_cycles="cycles"),
    "cosine-min-lr": by_transformers("cosine_with_min_lr", num_cycles="cycles", min_lr_rate="min_share"),
    "cosine-restarts": by_transformers("cosine_with_restarts", num_cycles="cycles"),
    "cosine-warmup-min-lr": by_transformers("cosine_warmup_with_min_lr", num_cycles="cycles", min_lr_rate="min_share"),
    "cross-entropy": lambda plugin, folder: classes(),
    "curriculum": ordered,
    "exponential": lambda plugin, folder: after_warmup(plugin, lambda since, step: plugin.gamma**since),
    "flatten": collates,
    "group-by-length": ordered,
    "inverse-sqrt": by_transformers("inverse_sqrt", timescale="timescale"),
    "label-smoothing": lambda plugin, folder: classes(plugin.epsilon),
    "loss-function": lambda plugin, folder: {"loss": kit_loss},
    "masked-lm": collates,
    "mix": read,
    "model-loss": unchanged,
    "mse": lambda plugin, folder: {"summed": mse, "count": numbers},
    "multi-step": lambda plugin, folder: after_warmup(
        plugin, lambda since, step: plugin.gamma ** sum(step >= milestone for milestone in plugin.milestones)
    ),
    "multiple-choice": collates,
    "one-cycle": one_cycle,
    "pack": collates,
    "parquet": unchanged,
    "permutation-lm": collates,
    "polynomial": by_transformers("polynomial", power="power", lr_end="end"),
    "preference-pairs": collates,
    "random": unchanged,
    "rebalance": ordered,
    "sentence-order": collates,
    "seq2seq": collates,
    "sequential": ordered,
    "shuffle-buffer": read,
    "step": lambda plugin, folder: after_warmup(plugin, lambda since, step: plugin.gamma ** (since // plugin.size)),
    "text": read,
    "token-budget": ordered,
    "token-classification": collates,
    "torch-dataset": unchanged,
    "vision": collates,
    "warmup-stable-decay": by_transformers("warmup_stable_decay", num_decay_steps="decay"),
    "whole-word-mask": collates,
    "accumulate": lambda plugin, folder: {"accumulation": plugin.batches},
    "adamw": adamw,
    "bf16": lambda plugin, folder: {"autocast": torch.bfloat16},
    "clip": lambda plugin, folder: {
        "clip": lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), plugin.norm)
    },
    "constant": constant,
    "hf-dataset": lambda plugin, folder: {},
    "hf-model": hf_model,
    "jsonl": lambda plugin, folder: {},
    "linear": linear,
    "loader": lambda plugin, folder: {"batch_size": plugin.batch_size or 8, "drop_last": plugin.drop_last},
    "module": lambda plugin, folder: {
        "build_model": lambda: TinyLanguageModel(0.1) if plugin.factory.endswith("language") else TinyModule(0.1)
    },
    "pad": pad,
    "rows": lambda plugin, folder: {},
    "sgd": sgd,
    "stack": lambda plugin, folder: {},
    "tokenize": lambda plugin, folder: {"tokenized": lambda rows: tokenized(rows, plugin, folder)},
}


# Groups of plugins have files of their own: `entries_NAME.py` with a dictionary ENTRIES.
for _file in sorted(Path(__file__).parent.glob("entries_*.py")):
    TABLE.update(import_module(_file.stem).ENTRIES)

LIMITS = {"chunked-cross-entropy": 1e-6}  # how far weights may be from the loop's: it sums in another order
LISTS = (
    "begins",
    "adapts",
    "prepares",
    "edits",
    "afters",
)  # of which each plugin may bring one or more, called in the order of the run's list


def arguments(composition, folder, run=None):
    """Return the arguments of `reference.train` that stand for a composition.

    A plugin's entry may hold, besides arguments of `reference.train`: "begins", called before any "prepares"; "adapts", called between them; "collate", from (rows, generator) to a batch;
    "tokenized", from the source's rows to those that are collated; "summed", from (model, batch, whether labels are
    shifted) to a sum of item losses; and whether the collator, the order or the rows of `run` are taken.
    """
    found = {"count": counted}
    # What a loss counts is the last word, wherever it stands in the list; what follows an evaluation comes after all.
    last = {"loss": 1, "evaluate": 2}
    for name, plugin in sorted(composition.plugins.items(), key=lambda item: last.get(item[1].role, 0)):
        if name in TABLE:
            entry = TABLE[name](plugin, folder)
            for key in LISTS:
                found.setdefault(key, []).extend(entry.pop(key, ()))
            found.update(entry)
    # Weights are given to a bare model, and others act on what adapters have made of it.
    found["prepares"] = [*found.pop("begins", ()), *found.pop("adapts", ()), *found.get("prepares", ())]
    fetch = run.batches["train"].fetch if run is not None else None
    collate = found.pop("collate", None) or (lambda rows, draws: torch.utils.data.default_collate(rows))
    if found.pop("own_collator", False):
        made, found["stream"] = fetch.collate, fetch.stream
        collate = (
            (lambda rows, draws: made(rows))
            if fetch.stream is None
            else lambda rows, draws: made(rows, generator=draws)
        )
    kind = composition.rows or written_kind(composition.plugins.values(), tokenized="tokenized" in found) or "text"
    streamed = run is not None and hasattr(run.datasets["train"], "open")
    tokenize = found.pop("tokenized", lambda rows: rows)
    if found.pop("own_rows", False) or found.get("stream") is not None or kind not in ("text", "tokens", "tensors"):
        data = run.datasets["train"]
        held = list(data.open(0)) if streamed else [data[index] for index in range(len(data))]
    else:
        held = kit_rows(kind, TRAIN_ROWS, words=composition.words if composition.rows else None)
        held = held if kind == "tensors" else tokenize(held)
    epochs = {0: held}

    def make_batch(numbers, draws, epoch=0):
        if streamed and "shuffle-buffer" in composition.plugins and epoch not in epochs:
            epochs[epoch] = list(run.datasets["train"].open(epoch))
        rows = epochs.get(epoch, held)
        if kind == "tensors" and isinstance(rows, dict):
            return {name: column[torch.tensor(numbers)] for name, column in rows.items()}
        return collate([rows[number] for number in numbers], draws)

    total = len(next(iter(held.values()))) if isinstance(held, dict) else len(held)
    if found.pop("own_order", False) and not streamed:
        sampler = run.batches["train"].sampler
        found["order"] = lambda epoch: sampler.order(epoch).tolist()
        if hasattr(sampler, "bounds"):
            found["bounds"] = lambda epoch: sampler.bounds(epoch).tolist()
    if streamed:
        found["order"] = lambda epoch: range(total)
    if "schedule_of" in found:
        found["schedule"] = found.pop("schedule_of")(run.optimizer.param_groups[0]["initial_lr"])
    shift = found.pop("shift", None)
    if "summed" in found:
        summed, shifts = found.pop("summed"), shift if shift is not None else found["count"] is shifted
        found["summed"] = lambda model, batch: summed(model, batch, shifts)
    return {
        "build_model": tiny_module,
        "make_batch": make_batch,
        "optimizer": base_optimizer,
        "rows": total,
        "steps": STEPS,
        **found,
    }
