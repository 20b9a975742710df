"""Questions and answers on every machine: which package of Python's standard library has this docstring?

A row is a `prompt` (what is asked) and a `completion` (the package's name), which `chat-template` puts into the words
of the model. Rows that are kept aside depend on their text only.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

NUM_PACKAGES = 16
NUM_WORDS, MOST_WORDS = 6, 40  # shorter docstrings say too little; longer ones cost time
KEPT_ASIDE = 0.15
NOT_READ = {"site-packages", "test", "idlelib", "lib2to3", "dist-packages", "__pycache__"}
QUESTION = 'Which package of Python\'s standard library has this docstring? Answer with its name alone.\n"{text}"'


@cache
def docstrings() -> dict[str, str]:
    """Return {the first words of a docstring: package}; a text that several have belongs to the first."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*/**/*.py")):
        package = file.relative_to(folder).parts[0]
        if package in NOT_READ or "-" in package:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                words = (ast.get_docstring(node) or "").split()
                if len(words) >= NUM_WORDS:
                    found.setdefault(" ".join(words[:MOST_WORDS]), package)
    return found


@cache
def packages() -> tuple[str, ...]:
    """Return the packages with the most docstrings."""
    return tuple(sorted(name for name, _ in Counter(docstrings().values()).most_common(NUM_PACKAGES)))


def rows(split: str, limit: int | None = None, evaluate: int | None = None) -> list[dict[str, str]] | None:
    """Return the rows of `split`, packages mixed: at most `limit`, and at most `evaluate` of those kept aside."""
    if split not in {"train", "evaluate"}:
        return None
    made = []
    for text, package in docstrings().items():
        key = int(hashlib.sha256(text.encode()).hexdigest(), 16)
        if package in packages() and (key % 1000 < 1000 * KEPT_ASIDE) == (split == "evaluate"):
            made.append((key, {"prompt": QUESTION.format(text=text), "completion": package}))
    return [row for _, row in sorted(made, key=lambda pair: pair[0])][
        : _least(limit, evaluate if split == "evaluate" else None)
    ]


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
