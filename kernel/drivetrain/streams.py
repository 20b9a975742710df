"""Data that can only be read one row after the other: from where, in which batches, and how to go on later.

A stream is anything with `open(epoch, position)`. Its reader gives rows, and `position()` says, in JSON values, where a
later `open` goes on after the rows given so far. All ranks and workers read the same rows in the same order and
make only their own batches, so the order does not depend on how many they are.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain.errors import DataError
from drivetrain.rng import derive_seed, seed_globals

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from drivetrain.data import Fetch
    from drivetrain.protocols import Reader
    from drivetrain.state import Micro


@attrs.frozen
class BadRow:
    """Stands in a stream or a list of rows for one that cannot be used; `reason` names source, row and field."""

    reason: str


@attrs.frozen(eq=False)
class Iterated:
    """An iterable as a stream; going on passes over the rows given before, so it costs what reading them costs."""

    data: Iterable[Any]

    def open(self, epoch: int, position: Any = None) -> Reader:
        """Iterate again; `set_epoch` is called where there is one."""
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)
        return Counted(iter(self.data), position or 0)


class Counted:
    """A reader whose position is the number of rows given.

    The global generators are seeded before each row, from the seed that torch's had when the reader was made: rows
    that are drawn or augmented are the same after going on, and in batches of any size.
    """

    def __init__(self, rows: Iterator[Any], start: int = 0) -> None:
        """Pass over the first `start` rows."""
        self._rows, self._given, self._seed = rows, 0, torch.initial_seed()
        while self._given < start and next(self, self) is not self:
            pass

    def __iter__(self) -> Iterator[Any]:
        """Return itself."""
        return self

    def __next__(self) -> Any:
        """Return the next row."""
        seed_globals(derive_seed(self._seed, "row", self._given))
        row = next(self._rows)
        self._given += 1
        return row

    def position(self) -> int:
        """Return how many rows have been given."""
        return self._given


@attrs.define(eq=False)
class Streamed:
    """Batches of a stream: `batch_size` rows for each rank from every `batch_size * world_size` that are read."""

    fetch: Fetch
    batch_size: int
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1
    part: int = 0  # of `parts` workers, which make every parts-th batch
    parts: int = 1
    rows_per_epoch: None = None  # nobody knows

    def iterate(self, epoch: int, start: int = 0, position: Any = None) -> Iterator[Micro]:
        """Yield this rank's micro-batches from row `start` on, which stands at `position` in the stream."""
        fetch, whole = self.fetch, self.batch_size * self.world_size
        with fetch.kept_generators():
            fetch.seed_globals(epoch, 0)
            reader = fetch.dataset.open(epoch, position)
            if position is None:
                next(itertools.islice(reader, start, start), None)
            rows, row = self._read(reader, epoch, start), start
        number = 0
        while rows and not (self.drop_last and len(rows) < whole):
            after = reader.position()
            following = self._read(reader, epoch, row + len(rows))
            if number % self.parts == self.part:
                first = self.rank * self.batch_size
                mine = rows[first : first + self.batch_size]
                numbers = range(row + first, row + first + len(mine))
                micro = fetch.make(mine, numbers, epoch, row + first)
                micro.position, micro.ends = after, not following or (self.drop_last and len(following) < whole)
                yield micro
            rows, row, number = following, row + len(rows), number + 1
        if not number:  # at whatever row: the files may have become shorter since
            what = f"the {fetch.split} stream gave no {'whole batch' if rows else 'rows'} in epoch {epoch}"
            raise DataError(what if position is None else f"{what} after row {row}, at {position}")

    def _read(self, reader: Reader, epoch: int, row: int) -> list[Any]:
        fetch = self.fetch
        with fetch.kept_generators():
            fetch.seed_globals(epoch, row)
            return list(itertools.islice(reader, self.batch_size * self.world_size))
