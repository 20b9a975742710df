"""Say words with what the run exported, with transformers alone, and count how many are right.

    python examples/pronunciation/pronounce.py runs/pronunciation                 # the words that were kept aside
    python examples/pronunciation/pronounce.py runs/pronunciation tensor kernel   # yours

A word is right if it is said in one of the dictionary's ways; errors are counted against the nearest of them.
Baseline: each letter has the sound that it has most often.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from words_data import is_aside, pronunciations

SHOWN = 8


def distance(said: list[str], wanted: list[str]) -> int:
    """Return how many phonemes must be put in, taken out or exchanged (Levenshtein)."""
    row = list(range(len(wanted) + 1))
    for i, phoneme in enumerate(said, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(wanted, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (phoneme != other))
    return row[-1]


def score(said: dict[str, str]) -> str:
    """Return the share of right words and of wrong phonemes."""
    right = errors = phonemes = 0
    for word, answer in said.items():
        ways = [(distance(answer.split(), way.split()), len(way.split())) for way in pronunciations()[word]]
        nearest, length = min(ways)
        right, errors, phonemes = right + (nearest == 0), errors + nearest, phonemes + length
    return f"{right / len(said):.1%} of the words right, {errors / phonemes:.1%} phoneme errors"


def letter_by_letter() -> dict[str, str]:
    """Return the most frequent sound of each letter, counted in words that have as many sounds as letters."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for word, ways in pronunciations().items():
        phonemes = ways[0].split()
        if not is_aside(word) and len(word) == len(phonemes):
            for letter, phoneme in zip(word, phonemes, strict=True):
                seen[letter][phoneme] += 1
    return {letter: counts.most_common(1)[0][0] for letter, counts in seen.items()}


def unigram_loss(words: list[str]) -> float:
    """Return the cross-entropy (nats) of the words' phonemes, ends included, under the frequencies of the others'."""

    def count(chosen: list[str]) -> Counter[str]:
        return Counter(p for word in chosen for p in [*pronunciations()[word][0].split(), "</s>"])

    learned, wanted = count([word for word in pronunciations() if not is_aside(word)]), count(words)
    shares = {phoneme: times / learned.total() for phoneme, times in learned.items()}
    return -sum(times * math.log(shares[phoneme]) for phoneme, times in wanted.items()) / wanted.total()


def say(folder: Path, words: list[str]) -> dict[str, str]:
    """Return {word: phonemes} of the model in `folder`, the likeliest phoneme at each place."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    said: dict[str, str] = {}
    for start in range(0, len(words), 128):
        part = words[start : start + 128]
        batch = tokenizer(part, padding=True, return_tensors="pt")
        with torch.no_grad():
            made = model.generate(**batch, max_new_tokens=40, do_sample=False)
        said.update(zip(part, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True))
    return said


def main() -> None:
    """Say the words, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("words", nargs="*", help="words to say; none counts over the words that were kept aside")
    parser.add_argument("--limit", type=int, help="use this many words only")
    given = parser.parse_args()
    words = [word.lower() for word in given.words]
    words = words or [word for word in pronunciations() if is_aside(word)][: given.limit]
    said = say(given.run / "export-hf", words)
    for word in words if given.words else words[:: max(1, len(words) // SHOWN)][:SHOWN]:
        known = " / ".join(pronunciations().get(word, ["(not in the dictionary)"]))
        print(f"  {word:16} {said[word]:28} {known}")
    if not given.words:
        sounds = letter_by_letter()
        plain = {word: " ".join(sounds[letter] for letter in word if letter in sounds) for word in words}
        print(f"{len(words)} words that were kept aside; frequencies alone: {unigram_loss(words):.3f} nats a phoneme")
        print(f"  letter by letter   {score(plain)}")
        print(f"  the export         {score(said)}")


if __name__ == "__main__":
    main()
