"""What padding costs, and how much of it each order saves: `python tests/benchmarks/padding.py [--small]`.

Paragraphs of the standard library's docstrings as bytes (72 to 512 each), labelled byte by byte by a small BERT that is told
whether the next byte ends a word; one epoch, AdamW, one thread. The same weights, rows and optimizer in `transformers.Trainer` (its
default order and `group_by_length`) and here (`random`, `group-by-length`, `token-budget` with as many tokens a batch as the
others have on average, and random batches packed into rows of 512). Every contender runs in fresh processes (with
`--small`, in one), interleaved; reported are medians of the CPU time from the third step to the last, for real tokens only: the share of
padding, and microseconds a sample of mean length. A round takes about eight minutes. `transformers.Trainer` needs `accelerate`.
Not a test: it asserts no time.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import numpy as np
import torch

BATCH, SHORTEST, LONGEST, RATE, WARM, HELD_OUT = 16, 72, 512, 3e-4, 2, 64
SIZES = {"small": (240, 2, 64), "real": (1200, 4, 128)}  # rows, layers, width


def paragraphs(rows: int) -> list[bytes]:
    """Return paragraphs of docstrings, a fixed choice of the files at hand."""
    folder, found = Path(os.__file__).parent, []
    for file in sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py")):
        if "site-packages" in file.parts or "test" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_text())
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in (n for n in ast.walk(tree) if isinstance(n, kinds)):
            for part in (ast.get_docstring(node) or "").split("\n\n"):
                text = part.strip().encode()
                if len(text) >= SHORTEST:
                    found.append(text[:LONGEST])
    found = list(dict.fromkeys(found))
    picked = np.random.default_rng(0).permutation(len(found))[:rows]
    return [found[i] for i in picked]


def columns(texts: list[bytes]) -> dict[str, list[list[int]]]:
    """Return ids (a byte and 1, as 0 pads) and labels: whether the next byte is white space, or the text ends."""
    ids = [[byte + 1 for byte in text] for text in texts]
    return {"input_ids": ids, "labels": [[int(n in b" \n\t") for n in text[1:] + b"\n"] for text in texts]}


def build(size: str) -> torch.nn.Module:
    """Return the model, which counts what it is given."""
    from transformers import BertConfig, BertForTokenClassification

    _, layers, width = SIZES[size]

    class Counting(BertForTokenClassification):
        """Count real and padded tokens after the warm-up, and note when that was over."""

        seen = real = padded = total = 0
        started = 0.0

        def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None):
            """Count in training, then do what a BERT does."""
            if self.training:
                real = int((labels != -100).sum())
                if self.seen == WARM:
                    self.started = time.process_time()
                if self.seen >= WARM:
                    self.real, self.padded = self.real + real, self.padded + labels.numel()
                self.seen, self.total = self.seen + 1, self.total + real
            return super().forward(input_ids, attention_mask, position_ids=position_ids, labels=labels)

    torch.manual_seed(0)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 32}
    config = BertConfig(vocab_size=257, intermediate_size=4 * width, max_position_embeddings=LONGEST, **shape)
    return Counting(config)


def tokenizer(folder: str):
    """Return what collators ask a tokenizer for: how to pad."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"[PAD]": 0}, unk_token="[PAD]"))
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", model_input_names=names)


def ours(order: str, model: torch.nn.Module, rows: dict[str, list[list[int]]], folder: str) -> None:
    """Train with drivetrain."""
    from drivetrain import Trainer
    from drivetrain_plugins import AdamW, Loader
    from drivetrain_plugins.collate.pack import Pack
    from drivetrain_plugins.collate.pad import Pad
    from drivetrain_plugins.order.group_by_length import GroupByLength
    from drivetrain_plugins.order.random import Random
    from drivetrain_plugins.order.token_budget import TokenBudget
    from drivetrain_plugins.shared.table import Ragged, Table

    data = Table({name: Ragged.of(lists) for name, lists in rows.items()})
    mean = data.lengths("input_ids").mean()
    tokens = max(LONGEST, round(BATCH * mean))
    orders = {"group-by-length": GroupByLength(), "token-budget": TokenBudget(tokens=tokens)}
    collator = Pack(tokens=LONGEST) if order == "pack" else Pad(tokenizer(folder))
    batches = Loader(batch_size=None if order == "token-budget" else BATCH)
    plugins = [orders.get(order, Random()), batches, collator, AdamW(lr=RATE, weight_decay=0.0)]
    Trainer(model, plugins, epochs=1, device="cpu").fit(data)


def theirs(order: str, model: torch.nn.Module, rows: dict[str, list[list[int]]], folder: str) -> None:
    """Train with transformers."""
    import datasets
    from transformers import DataCollatorForTokenClassification, PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=RATE, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=0.0, train_sampling_strategy=order, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    data = datasets.Dataset.from_dict(rows)
    collator = DataCollatorForTokenClassification(tokenizer(folder))
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


CONTENDERS = {
    "Trainer, random": (theirs, "random"),
    "Trainer, group_by_length": (theirs, "group_by_length"),
    "random": (ours, "random"),
    "group-by-length": (ours, "group-by-length"),
    "token-budget": (ours, "token-budget"),
    "random, pack": (ours, "pack"),
}


def held_out_loss(model: torch.nn.Module, texts: list[bytes]) -> float:
    """Return the mean loss over the bytes of paragraphs that nobody trained on."""
    model.eval()
    total = count = 0
    with torch.no_grad():
        for text in texts:
            batch = {name: torch.tensor(lists) for name, lists in columns([text]).items()}
            total, count = total + model(**batch).loss.item() * len(text), count + len(text)
    return total / count


def one(name: str, size: str, texts: list[bytes]) -> dict[str, float]:
    """Run one contender; return what it measured."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    model, (train, order) = build(size), CONTENDERS[name]
    before = held_out_loss(model, texts[:HELD_OUT])
    with tempfile.TemporaryDirectory() as folder:
        train(order, model, columns(texts[HELD_OUT:]), folder)
    seconds = time.process_time() - model.started
    result = {"real": model.real, "padded": model.padded, "total": model.total, "seconds": seconds, "steps": model.seen}
    return {**result, "before": before, "after": held_out_loss(model, texts[:HELD_OUT])}


def spawn(name: str, size: str, texts: list[bytes]) -> dict[str, float]:
    """Run one contender in a process of its own, which gets the paragraphs on its standard input."""
    command, given = [sys.executable, __file__, "--one", name, "--size", size], json.dumps([t.hex() for t in texts])
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, input=given)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", choices=CONTENDERS)
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=None)
    given = parser.parse_args()
    size = "small" if given.small else given.size
    if given.one:
        print(json.dumps(one(given.one, size, [bytes.fromhex(text) for text in json.load(sys.stdin)])))
        return
    rows, layers, width = SIZES[size]
    texts = paragraphs(rows + HELD_OUT)
    lengths = [len(text) for text in texts[HELD_OUT:]]
    mean = statistics.mean(lengths)
    print(
        f"{len(lengths)} paragraphs: mean {mean:.0f} bytes, median {statistics.median(lengths):.0f}, max {max(lengths)}"
    )
    print(f"BERT with {layers} layers of width {width}, batches of {BATCH} rows or as many tokens")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(given.rounds or (1 if given.small else 3)):
        for name, results in found.items():
            results.append((one if given.small else spawn)(name, size, texts))
    every = [result for results in found.values() for result in results]
    print(
        f"same tokens: {len({r['total'] for r in every}) == 1}, same weights before: {len({r['before'] for r in every}) == 1}"
    )
    print(f"{'contender':<26}{'tokens/CPU-s':>13}{'ratio':>7}{'padding':>9}{'us/sample':>11}{'steps':>7}{'loss':>8}")
    base = statistics.median(r["real"] / r["seconds"] for r in found["Trainer, random"])
    for name, results in found.items():
        speed = statistics.median(r["real"] / r["seconds"] for r in results)
        padding = statistics.median(1 - r["real"] / r["padded"] for r in results)
        steps, loss = results[0]["steps"], statistics.median(r["after"] for r in results)
        print(
            f"{name:<26}{speed:>13.0f}{speed / base:>7.2f}{padding:>9.3f}{mean / speed * 1e6:>11.0f}{steps:>7}{loss:>8.3f}"
        )


if __name__ == "__main__":
    main()
