"""Use what the run exported, with transformers alone, and compare its accuracy with the one that was logged.

python examples/topics/use_export.py runs/topics
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from topics_data import rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

run = Path(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained(run / "export-hf").eval()
tokenizer = AutoTokenizer.from_pretrained(run / "export-hf")
kept_aside = rows("evaluate") or []
hits = 0
for start in range(0, len(kept_aside), 32):
    part = kept_aside[start : start + 32]
    texts = [str(row["text"]) for row in part]
    batch = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
    with torch.no_grad():
        guesses = model(**batch).logits.argmax(-1).tolist()
    hits += sum(guess == row["label"] for guess, row in zip(guesses, part, strict=True))
accuracy = hits / len(kept_aside)
logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
expected = [line["evaluate/accuracy"] for line in logged if "evaluate/accuracy" in line][-1]
print(f"accuracy of the export: {accuracy:.4f}, logged at the end of the run: {expected:.4f}")
if accuracy != expected:
    sys.exit("the export does not do what the run measured")
