"""Tag addresses with what the run exported, with transformers alone: tag accuracy and entity F1.

    python examples/addresses/score.py runs/addresses

An entity is a longest run of words with one tag; it is right if its first word, its last and its tag are.
Baseline: each word has the tag that it has most often in the training rows, an unknown one the most frequent of all.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from itertools import groupby
from pathlib import Path

import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

DATA = Path(__file__).parent / "data"
EXAMPLE = "Dr. Ada King, 12 St James Square Apt 3B, Springfield, IL 62701"


def read(name: str) -> list[dict[str, list[str]]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """Return (first word, last word, tag) of every run."""
    runs = [list(run) for _, run in groupby(enumerate(tags), key=lambda word: word[1])]
    return {(run[0][0], run[-1][0], run[0][1]) for run in runs}


def score(guessed: list[list[str]], wanted: list[list[str]]) -> tuple[float, float]:
    """Return tag accuracy and micro-averaged F1 over entities."""
    pairs = list(zip(guessed, wanted, strict=True))
    hits = sum(a == b for guess, true in pairs for a, b in zip(guess, true, strict=True))
    both = sum(len(entities(guess) & entities(true)) for guess, true in pairs)
    either = sum(len(entities(guess)) + len(entities(true)) for guess, true in pairs)
    return hits / sum(map(len, wanted)), 2 * both / either


def look_up(rows: list[dict[str, list[str]]], words: list[list[str]]) -> list[list[str]]:
    """Return the baseline's tags."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for word, tag in zip(row["words"], row["tags"], strict=True):
            seen[word.lower()][tag] += 1
    usual = sum(seen.values(), Counter[str]()).most_common(1)[0][0]
    best = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
    return [[best.get(word.lower(), usual) for word in row] for row in words]


class Tagger:
    """A folder that transformers loads, asked about words."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForTokenClassification.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def __call__(self, rows: list[list[str]]) -> list[list[str]]:
        """Return a tag for each word: that of its first token."""
        tagged = []
        for start in range(0, len(rows), 32):
            part = rows[start : start + 32]
            batch = self.tokenizer(part, is_split_into_words=True, padding=True, return_tensors="pt")
            with torch.no_grad():
                best = self.model(**batch).logits.argmax(-1).tolist()
            for number, words in enumerate(part):
                owners = batch.word_ids(number)
                firsts = [owners.index(word) for word in range(len(words))]
                tagged.append([self.model.config.id2label[best[number][token]] for token in firsts])
        return tagged


if __name__ == "__main__":
    run = Path(sys.argv[1])
    kept_aside, tagger = read("evaluate"), Tagger(run / "export-hf")
    words, tags = [row["words"] for row in kept_aside], [row["tags"] for row in kept_aside]
    accuracy, f1 = score(tagger(words), tags)
    print(f"{len(kept_aside)} addresses that were kept aside, {sum(map(len, words))} words")
    for name, (right, measure) in {
        "look-up": score(look_up(read("train"), words), tags),
        "the export": (accuracy, f1),
    }.items():
        print(f"  {name:12} {right:.1%} of the tags right, entity F1 {measure:.3f}")
    print("  " + ", ".join(f"{w}: {t}" for w, t in zip(EXAMPLE.split(), tagger([EXAMPLE.split()])[0], strict=True)))
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [line["evaluate/accuracy"] for line in logged if "evaluate/accuracy" in line][-1]
    print(f"the run logged an accuracy of {expected:.4f}; the export has {accuracy:.4f}")
    if abs(accuracy - expected) > 0.001:
        sys.exit("the export does not do what the run measured")
