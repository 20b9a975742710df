"""Use what the run exported, with transformers alone: fill in hidden words of the kept-aside text, and count.

    python examples/masked_lm/use_export.py runs/masked_lm

Baseline: the frequencies of tokens in the text that was learned from, whatever stands around the hidden one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from docstrings_data import rows
from transformers import AutoModelForMaskedLM, AutoTokenizer

MAX_LENGTH, HIDDEN = 128, 0.15
SENTENCES = (
    "Return a list of the files in this [MASK].",
    "Raise an [MASK] if the argument is not a string.",
    "If the key is not found, the default [MASK] is returned.",
)
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="the run's folder")
parser.add_argument("--limit", type=int, help="use this many rows only, as a run with rows.arguments={limit=...} did")
given = parser.parse_args()

model = AutoModelForMaskedLM.from_pretrained(given.run / "export-hf").eval()
tokenizer = AutoTokenizer.from_pretrained(given.run / "export-hf")
draws = torch.Generator().manual_seed(0)


def ids_of(split: str) -> list[list[int]]:
    texts = [row["text"] for row in rows(split, limit=given.limit) or []]
    made: list[list[int]] = tokenizer(texts, truncation=True, max_length=MAX_LENGTH).input_ids
    return made


counts = torch.ones(len(tokenizer))  # every token was seen once more than it was
for ids in ids_of("train"):
    counts.index_add_(0, torch.tensor(ids[1:-1]), torch.ones(len(ids) - 2))
unigram = (counts / counts.sum()).log()

losses, hits, baseline_losses, baseline_hits, items = 0.0, 0, 0.0, 0, 0
kept_aside = sorted(ids_of("evaluate"), key=len)
for start in range(0, len(kept_aside), 16):
    batch = tokenizer.pad({"input_ids": kept_aside[start : start + 16]}, return_tensors="pt")
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    hidden = torch.bernoulli(torch.full(ids.shape, HIDDEN).masked_fill_(special, 0), generator=draws).bool()
    # Of the hidden tokens 80 % are masked, 10 % are another token, 10 % are as they were: as in training.
    kind = torch.rand(ids.shape, generator=draws)
    anything = torch.randint(len(tokenizer), ids.shape, generator=draws)
    batch["input_ids"] = torch.where(
        hidden & (kind < 0.8),
        tokenizer.mask_token_id,
        torch.where(hidden & (kind >= 0.9), anything, ids),
    )
    with torch.no_grad():
        logits = model(**batch).logits[hidden]
    wanted = ids[hidden]
    losses += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
    hits += int((logits.argmax(-1) == wanted).sum())
    baseline_losses -= unigram[wanted].sum().item()
    baseline_hits += int((wanted == unigram.argmax()).sum())
    items += len(wanted)

loss = losses / items
print(f"{items} hidden tokens of {len(kept_aside)} docstrings that were kept aside")
print(f"  frequencies   {baseline_losses / items:.3f} nats a token, {baseline_hits / items:.1%} right")
print(f"  the export    {loss:.3f} nats a token, {hits / items:.1%} right")
for sentence in SENTENCES:
    batch = tokenizer(sentence, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits[batch["input_ids"] == tokenizer.mask_token_id]
    print(f"  {sentence} {tokenizer.convert_ids_to_tokens(logits[0].topk(3).indices.tolist())}")

logged = [json.loads(line) for line in (given.run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
expected = [line["evaluate/loss"] for line in logged if "evaluate/loss" in line][-1]
print(f"the run logged {expected:.3f} nats for the same docstrings, with other tokens hidden")
if abs(loss - expected) > 0.1 * expected:  # a few thousand tokens tell a mean to some hundredths
    sys.exit("the export does not do what the run measured")
