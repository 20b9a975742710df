"""Real labelled text on every machine: which package does this docstring document?

`rows` is all that the recipe needs: a function from the name of a split to rows. Put your own in its place, or use
files: in the recipe, write [plugins.jsonl] with `train = "train.jsonl"` and `evaluate = "dev.jsonl"`.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

NUM_CLASSES = 16
NUM_WORDS = 6  # shorter docstrings say too little
KEPT_ASIDE = 0.15


@cache
def docstrings() -> list[tuple[str, str]]:
    """Return (package, docstring) of everything documented in the standard library's packages, without doubles."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*/**/*.py")):
        package = file.relative_to(folder).parts[0]
        if package in {"site-packages", "test", "idlelib", "lib2to3", "dist-packages", "__pycache__"} or "-" in package:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text.split()) >= NUM_WORDS:
                    found.setdefault(text, package)
    return [(package, text) for text, package in found.items()]


@cache
def topics() -> tuple[str, ...]:
    """Return the packages with the most docstrings: the classes."""
    return tuple(sorted(name for name, _ in Counter(p for p, _ in docstrings()).most_common(NUM_CLASSES)))


def rows(split: str) -> list[dict[str, object]] | None:
    """Return the rows of `split`; which rows are kept aside depends on their text only."""
    if split not in {"train", "evaluate"}:
        return None
    names = topics()
    made = []
    for package, text in docstrings():
        aside = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 1000 < 1000 * KEPT_ASIDE
        if package in names and aside == (split == "evaluate"):
            made.append({"text": text, "label": names.index(package)})
    return made
