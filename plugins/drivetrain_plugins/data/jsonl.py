"""Rows from JSON-lines files, local or on any fsspec URL."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from drivetrain import BadRow, hookimpl, option, plugin
from drivetrain_plugins.data._files import FileStream, chosen, decoded, splits, start

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drivetrain import Run


def parse(raw: bytes, where: str) -> Any:
    """Return the object in a line, None for an empty line, or a `BadRow` that says what is wrong with it."""
    if not raw.strip():
        return None
    try:
        row = _decoder.decode(decoded(raw).strip())
        if b"\\u" in raw:  # escapes can write what UTF-8 cannot
            _check(row)
    except (ValueError, RecursionError) as error:
        return BadRow(f"{where}: not JSON in UTF-8 ({error}). Received: {start(raw)}")
    if not isinstance(row, dict):
        return BadRow(f"{where}: a row must be a JSON object. Received: {start(raw)}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} stands there twice")
    return made


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value:
            yield from _texts(inner)
            if isinstance(value, dict):
                yield from _texts(value[inner])


def _check(row: Any) -> None:
    """Refuse strings that are no text.

    Raises:
        ValueError: a string has a NUL character or half of a surrogate pair.
    """
    for text in _texts(row):
        if "\0" in text:
            raise ValueError("a string holds a NUL character")
        text.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError


@plugin(
    role="data",
    provides=["data"],
    example={"train": "{kit}/{rows}-train.jsonl", "evaluate": "{kit}/{rows}-dev.jsonl"},
)
class Jsonl:
    """Read JSON-lines files: one object a line, from paths, globs or any fsspec URLs; .gz, .bz2 and .xz too."""

    train: str | list[str] = option(help="file with the training rows, or several; * is filled in")
    evaluate: str | list[str] | dict[str, str | list[str]] | None = option(
        None, help="files with the evaluation rows, or several sets by name"
    )
    stream: bool = option(False, help="read rows when they are needed, in the files' order, instead of into memory")

    @property
    def facts(self) -> dict[str, Any]:
        """Declare the named evaluation sets."""
        return splits(self.evaluate)

    @hookimpl
    def build_dataset(self, run: Run, split: str) -> Any:
        """Read the files of `split`, or return them as a stream."""
        files = chosen(self.train, self.evaluate, split)
        if files is None:
            return None
        rows = FileStream(tuple(files), "jsonl", parse)
        return rows if self.stream else rows.rows(run)
