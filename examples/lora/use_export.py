"""Ask the model that a run exported, with transformers alone: load, generate, and count right answers.

    python examples/lora/use_export.py runs/lora
    python examples/lora/use_export.py runs/lora --beside runs/smollm2    # and the model as it was

Baseline: the package with the most docstrings, whatever is asked.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from questions_data import rows
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 8


def answers(folder: Path, questions: list[str]) -> list[str]:
    """Return what the model in `folder` says, greedily, in batches of 16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    said = []
    for start in range(0, len(questions), 16):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + 16]]
        given = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            made = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
        said += tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="the run's folder")
parser.add_argument("--limit", type=int, default=48, help="how many of the docstrings that were kept aside")
parser.add_argument("--beside", type=Path, help="a model's folder to compare with")
given = parser.parse_args()

export = given.run / "export-hf"
if (export / "adapter_config.json").exists():
    sys.exit(f"{export} holds adapters alone: load them with peft, or add [plugins.merge-lora] to the recipe")
asked = rows("evaluate", limit=given.limit) or []
most = Counter(row["completion"] for row in rows("train") or []).most_common(1)[0][0]
print(f"always {most!r}: {sum(row['completion'] == most for row in asked) / len(asked):.1%} of {len(asked)} right")
for folder in filter(None, [given.beside, export]):
    said = answers(folder, [row["prompt"] for row in asked])
    right = sum(text == row["completion"] for text, row in zip(said, asked, strict=True))
    print(f"{folder}: {right / len(asked):.1%} right, for example {said[:4]}")
