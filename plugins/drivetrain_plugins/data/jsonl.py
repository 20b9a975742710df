"""Rows from JSON-lines files, local or on any fsspec URL."""

from __future__ import annotations

import json
from typing import Any

import fsspec

from drivetrain import DataError, hookimpl, option, plugin


def read_jsonl(url: str) -> list[dict[str, Any]]:
    """Return the objects in the file, one a line; empty lines are passed over.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object; it names file and line.
    """
    rows = []
    try:
        with fsspec.open(url, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{url}:{number}: not JSON in UTF-8 ({error}). Received: {_start(line)}") from None
                if not isinstance(row, dict):
                    raise DataError(f"{url}:{number}: a row must be a JSON object. Received: {_start(line)}")
                rows.append(row)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{url}: cannot be read: {type(error).__name__}: {error}") from error
    return rows


def _start(line: bytes) -> str:
    return repr(line[:80].decode("utf-8", errors="backslashreplace"))


@plugin(role="data", provides=["data"], example={"train": "{kit}/{rows}-train.jsonl", "evaluate": "{kit}/{rows}-dev.jsonl"})
class Jsonl:
    """Read JSON-lines files: one object a line, from a path or any fsspec URL."""

    train: str = option(help="file with the training rows")
    evaluate: str | dict[str, str] | None = option(None, help="file with the evaluation rows, or several by name")

    @property
    def facts(self) -> dict[str, Any]:
        """Declare the named evaluation sets."""
        return {"splits": [f"evaluate/{n}" for n in self.evaluate]} if isinstance(self.evaluate, dict) else {}

    @hookimpl
    def build_dataset(self, split: str) -> list[dict[str, Any]] | None:
        """Read the file of `split`."""
        if split == "train":
            return read_jsonl(self.train)
        named = self.evaluate if isinstance(self.evaluate, dict) else {"": self.evaluate}
        url = named.get(split.removeprefix("evaluate").removeprefix("/"))
        return None if url is None else read_jsonl(url)
