"""Use what the run exported, with transformers alone: answer questions, and compare the share of exact answers.

python examples/questions/use_export.py runs/questions
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from questions_data import LENGTH, facts
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

SHOWN = 5
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path, help="the run's folder")
parser.add_argument("--limit", type=int, help="ask the first questions only, as the run did")
given = parser.parse_args()

model = AutoModelForQuestionAnswering.from_pretrained(given.run / "export-hf").eval()
tokenizer = AutoTokenizer.from_pretrained(given.run / "export-hf")
asked = facts("evaluate", given.limit)
exact = 0
for number, row in enumerate(asked):
    batch = tokenizer(row["question"], row["context"], truncation="only_second", max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**batch)
    first = int(outputs.start_logits[0].argmax())
    last = first + int(outputs.end_logits[0, first:].argmax())
    marked = (batch.token_to_chars(0, first), batch.token_to_chars(0, last))
    inside = None not in marked and batch.sequence_ids(0)[first] == 1  # else it is a token of the question
    answer = row["context"][marked[0].start : marked[1].end] if inside else ""
    exact += answer == row["answer"] and marked[0].start == row["start"]
    if number < SHOWN:
        print(f"{row['question']}  {answer!r}  (it is {row['answer']!r})")
logged = [json.loads(line) for line in (given.run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
expected = [line["evaluate/exact"] for line in logged if "evaluate/exact" in line][-1]
print(f"exact answers of the export: {exact / len(asked):.4f}, logged at the end of the run: {expected:.4f}")
if abs(exact / len(asked) - expected) > 1 / len(asked):  # a tie may fall otherwise without padding
    sys.exit("the export does not do what the run measured")
