"""Files of rows: globs and URLs, compressed or not, read from any byte on."""

from __future__ import annotations

import itertools
import lzma
import zlib
from typing import TYPE_CHECKING, Any

import attrs
import fsspec

from drivetrain import BadRow, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from drivetrain import Reader, Run

# What a missing, damaged or cut file raises, compressed or not; ValueError and ImportError come of unknown URLs.
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, ImportError)
Chunk = tuple[int, bytes, int]  # (number of its first line, bytes, number of lines)


def names_of(url: str | list[str] | dict[str, Any] | None, split: str) -> list[str] | None:
    """Return what an `evaluate` option says of `split`: a file or several, or those of a named set; None for none."""
    named = url if isinstance(url, dict) else {"": url}
    found = named.get(split.removeprefix("evaluate").removeprefix("/"))
    return [found] if isinstance(found, str) else found


def chosen(train: str | list[str], evaluate: Any, split: str) -> list[str] | None:
    """Return the files of `split`, globs filled in, or None where there is no such split."""
    given = names_of(train, "") if split == "train" else names_of(evaluate, split)
    return None if given is None else list(itertools.chain.from_iterable(map(expand, given)))


def splits(evaluate: Any) -> dict[str, Any]:
    """Return the facts of a source whose `evaluate` may be several named sets."""
    return {"splits": [f"evaluate/{name}" for name in evaluate]} if isinstance(evaluate, dict) else {}


def expand(url: str) -> list[str]:
    """Return the files that a path or URL with wildcards matches, sorted; one without is taken as it stands.

    Raises:
        DataError: nothing matches.
    """
    if not any(sign in url for sign in "*?["):
        return [url]
    try:
        system, path = fsspec.url_to_fs(url)
        if system.exists(path):  # a bracket may belong to the name
            return [url]
        found = sorted(system.glob(path))
    except UNREADABLE as error:
        raise unreadable(url, error) from error
    if not found:
        raise DataError(f"{url}: no file matches. Give a path or an fsspec URL; * and ** are filled in")
    return [system.unstrip_protocol(path) if "://" in url else path for path in found]


def unreadable(url: str, error: BaseException) -> DataError:
    """Return the error of a file that cannot be read (to the end)."""
    return DataError(f"{url}: cannot be read: {type(error).__name__}: {error}")


def place(files: tuple[str, ...], position: Any, plugin: str) -> int:
    """Return the number of the file that a position [number, name, ...] stands in.

    Raises:
        DataError: the files are not those that the position was made with.
    """
    number, name = position[:2]
    if number >= len(files) or tail(files[number]) != name:
        raise DataError(
            f"{plugin}: the position to go on from is in {name!r}, which was file {number + 1} of the stream. "
            f"Received: {len(files)} files, {[tail(f) for f in files[: number + 1]][-3:]}. Give the same files in order"
        )
    return int(number)


def tail(url: str) -> str:
    """Return a file's own name."""
    return url.rstrip("/").rpartition("/")[2]


def each_line(lines: Iterable[bytes], number: int) -> Iterator[Chunk]:
    """Yield every line."""
    for line in lines:
        number += 1
        yield number, line, 1


@attrs.frozen(eq=False)
class FileStream:
    """The rows of text files, one file after the other; a position is [number of the file, its name, byte, line].

    Bytes are those of the text: in a compressed file, going on decompresses what lies before.
    """

    files: tuple[str, ...]
    plugin: str
    parse: Callable[[bytes, str], Any]  # (bytes, "file:line") -> a row, a `BadRow`, or None for no row
    cut: Callable[[Iterable[bytes], int], Iterator[Chunk]] = each_line

    def open(self, epoch: int, position: Any = None) -> Reader:  # noqa: ARG002 - the same in every epoch
        """Stand at `position`."""
        return _FileReader(self, position)

    def rows(self, run: Run) -> list[Any]:
        """Read everything; the run is asked what becomes of bad rows."""
        kept = []
        for row in self.open(0):
            if isinstance(row, BadRow):
                run.hooks.bad_row(run, row.reason)
            else:
                kept.append(row)
        return kept


class _FileReader:
    def __init__(self, stream: FileStream, position: Any) -> None:
        self._stream, self._number, self._byte, self._line = stream, 0, 0, 0
        if position is not None:
            self._number = place(stream.files, position, stream.plugin)
            self._byte, self._line = position[2:]
        self._rows = self._read()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._rows)

    def position(self) -> list[Any]:
        return [self._number, tail(self._stream.files[self._number]), self._byte, self._line]

    def _read(self) -> Iterator[Any]:
        stream = self._stream
        for number in range(self._number, len(stream.files)):
            if number != self._number:
                self._number, self._byte, self._line = number, 0, 0
            chunks = self._chunks(stream.files[number])
            for first, raw, lines in chunks:
                self._byte, self._line = self._byte + len(raw), self._line + lines
                row = stream.parse(raw, f"{stream.files[number]}:{first}")
                if row is not None:
                    yield row

    def _chunks(self, url: str) -> Iterator[Chunk]:
        try:
            with fsspec.open(url, "rb", compression="infer") as file:
                self._seek(file, url)
                yield from self._stream.cut(file, self._line)
        except UNREADABLE as error:
            raise unreadable(url, error) from error

    def _seek(self, file: Any, url: str) -> None:
        """Go to the byte where a row ended, and see that one still does."""
        if not self._byte:
            return
        file.seek(self._byte - 1)
        before, after = file.read(1), file.read(1)
        if not before or (before != b"\n" and after):
            raise DataError(
                f"{url}: no row ends at byte {self._byte} (line {self._line}), where the run is to go on. The file has "
                f"changed since. Give the same file, or start a new run"
            )
        file.seek(self._byte)


def decoded(raw: bytes) -> str:
    """Return the text of `raw`.

    Raises:
        ValueError: it is no UTF-8, or holds a byte order mark or NUL.
    """
    text = raw.decode("utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("it starts with a byte order mark (BOM): save the file without one")
    if "\0" in text:
        raise ValueError("it holds NUL characters")
    return text


def start(raw: bytes) -> str:
    """Return the beginning of `raw` for a message."""
    return repr(raw[:80].decode("utf-8", errors="backslashreplace"))
