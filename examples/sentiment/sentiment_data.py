"""The rows that `fetch.py` wrote: one set to train on, and one to measure on for each domain."""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "data"


def rows(split: str, limit: int | None = None) -> list[dict[str, str]] | None:
    """Return the rows of "train" or "evaluate/DOMAIN"; the first `limit`, if it is given."""
    if split in {"evaluate", "predict"}:
        return None
    file = FOLDER / f"{split.rpartition('/')[2]}.jsonl"
    if not file.is_file():
        sys.exit(f"{file} is missing: run `python examples/sentiment/fetch.py` once")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:limit]]
