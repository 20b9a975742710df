"""Rows from plain text: lines, paragraphs or whole files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import BadRow, hookimpl, option, plugin
from drivetrain_plugins.data._files import FileStream, chosen, decoded, each_line, splits, start

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from drivetrain import Run
    from drivetrain_plugins.data._files import Chunk


def paragraphs(lines: Iterable[bytes], number: int) -> Iterator[Chunk]:
    """Yield lines up to and with the blank ones after them; numbered by the first line with text."""
    held: list[bytes] = []
    first, blank = 0, False  # of the paragraph held: its first line with text (0 for none yet), and whether it ended
    for line in lines:
        number += 1
        if line.strip():
            if first and blank:
                yield first, b"".join(held), len(held)
                held, first = [], 0
            first, blank = first or number, False
        else:
            blank = True
        held.append(line)
    if held:
        yield first or number, b"".join(held), len(held)


def whole(lines: Iterable[bytes], number: int) -> Iterator[Chunk]:
    """Yield the file, unless it was read already."""
    held = list(lines)
    if held:
        yield number + 1, b"".join(held), len(held)


CUTS = {"line": each_line, "paragraph": paragraphs, "file": whole}


def parse(raw: bytes, where: str) -> Any:
    """Return the row of a piece of text without the line ends around it; None for white space alone."""
    if not raw.strip():
        return None
    try:
        return {"text": decoded(raw).replace("\r\n", "\n").strip("\n")}
    except ValueError as error:
        return BadRow(f"{where}: no text in UTF-8 ({error}). Received: {start(raw)}")


@plugin(
    role="data",
    provides=["data"],
    example={"train": "{kit}/train.txt", "evaluate": "{kit}/dev.txt"},
    companions={"masked-lm": {}, "tokenize": {"label": None}, "hf-model": {"path": "{kit}/model", "task": "masked-lm"}},
    rows="text",
)
class Text:
    """Read text files into rows {"text"}: a row a line, a paragraph (between blank lines) or a file."""

    train: str | list[str] = option(help="file with the training text, or several; * is filled in")
    evaluate: str | list[str] | dict[str, str | list[str]] | None = option(
        None, help="files with the evaluation text, or several sets by name"
    )
    by: str = option("line", choices=tuple(CUTS), help="what makes a row")
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
        rows = FileStream(tuple(files), "text", parse, CUTS[self.by])
        return rows if self.stream else rows.rows(run)
