"""English that is on every machine: what the standard library's modules, classes and functions say about themselves.

Whole packages and modules are kept aside, so that no text to be measured on has a neighbour that was learned from.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from functools import cache
from pathlib import Path

NUM_WORDS = 6  # shorter docstrings say too little
KEPT_ASIDE = 0.1
NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@cache
def docstrings() -> dict[str, str]:
    """Return {docstring: package or module} of the standard library; one that several have belongs to the first."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if any(part in NOT_READ or "-" in part for part in parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text.split()) >= NUM_WORDS:
                    found.setdefault(text, parts[0].removesuffix(".py"))
    return found


def is_aside(package: str) -> bool:
    """Tell whether a package or module is kept aside: it depends on its name only."""
    return int(hashlib.sha256(package.encode()).hexdigest(), 16) % 1000 < 1000 * KEPT_ASIDE


def rows(split: str, limit: int | None = None) -> list[dict[str, str]] | None:
    """Return the rows of `split`, or the first `limit` of them."""
    if split not in {"train", "evaluate"}:
        return None
    aside = split == "evaluate"
    return [{"text": text} for text, package in docstrings().items() if is_aside(package) == aside][:limit]
