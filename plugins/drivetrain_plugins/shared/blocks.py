"""Streams made of streams, block by block."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import BadRow
from drivetrain_plugins.shared.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from drivetrain import Reader, Stream


@attrs.frozen(eq=False)
class Mapped:
    """A stream each of whose rows is made by `apply(row)`; a `BadRow` passes."""

    stream: Stream
    apply: Callable[[Any], Any]

    def open(self, epoch: int, position: Any = None) -> Reader:
        """Open the inner stream there."""
        return _MappedReader(self.stream.open(epoch, position), self.apply)


@attrs.frozen(eq=False)
class _MappedReader:
    reader: Reader
    apply: Callable[[Any], Any]

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        row = next(self.reader)
        return row if isinstance(row, BadRow) else self.apply(row)

    def position(self) -> Any:
        return self.reader.position()


@attrs.frozen(eq=False)
class Blocks:
    """A stream read in blocks of up to `size` rows, each made into rows (more or fewer) by `make(rows, epoch, block)`.

    Shuffling, tokenizing and packing a stream are all this. Going on reads one block again.
    """

    stream: Stream
    size: int
    make: Callable[[list[Any], int, int], Sequence[Any]]

    def open(self, epoch: int, position: Any = None) -> Reader:
        """Open the inner stream where the block begins."""
        return _BlockReader(self, epoch, *(position or (None, 0, 0)))


class _BlockReader:
    def __init__(self, blocks: Blocks, epoch: int, start: Any, block: int, given: int) -> None:
        self._blocks, self._epoch, self._block, self._given = blocks, epoch, block - 1, given
        self._reader, self._start = blocks.stream.open(epoch, start), start
        self._rows: list[Any] = []
        self._fill()

    def _fill(self) -> bool:
        self._start = self._reader.position()
        self._block += 1
        rows = list(itertools.islice(self._reader, self._blocks.size))
        made = self._blocks.make(rows, self._epoch, self._block) if rows else ()
        self._rows = [made.row(i) for i in range(len(made))] if isinstance(made, Table) else list(made)
        return bool(rows)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while self._given >= len(self._rows):
            if not self._fill():
                raise StopIteration
            self._given = 0
        self._given += 1
        return self._rows[self._given - 1]

    def position(self) -> list[Any]:
        return [self._start, self._block, self._given]
