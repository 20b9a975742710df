"""Several sources as one: of map-style data a table of whose row is whose, of streams a reader of readers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import BadRow, DataError
from drivetrain.rng import derive_seed, generator
from drivetrain_plugins.shared.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from drivetrain import Reader

BLOCK = 1024  # choices drawn together
PASS = 1_000_000  # the inner epoch of pass p in epoch e is e + p * PASS


def counts_of(sizes: Sequence[int], weights: Sequence[float], *, exhausted: str) -> list[int]:
    """Return how many rows of each source the mix has: in the weights' proportions, to a row.

    "first" ends where the first source would have to repeat; "all" repeats until every source has been seen whole.
    """
    reach = [size / weight for size, weight in zip(sizes, weights, strict=True)]
    total = min(reach) if exhausted == "first" else max(reach)
    exact = [total * weight for weight in weights]
    made = [round(count) for count in exact]
    if exhausted == "first":
        return [max(1, min(count, size)) for count, size in zip(made, sizes, strict=True)]
    bound = int(np.argmax(reach))
    return [sizes[i] if i == bound else max(1, count) for i, count in enumerate(made)]


def interleaved(counts: Sequence[int], seed: int) -> np.ndarray[Any, Any]:
    """Return which source row n is from, int32 (sum of counts,): each evenly spread, from a start that `seed` draws."""
    draws = generator(seed, "mix")
    starts = torch.rand(len(counts), dtype=torch.float64, generator=draws).tolist()
    places = np.concatenate([(np.arange(c) + s) / c for c, s in zip(counts, starts, strict=True)])
    source = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return source[np.argsort(places, kind="stable")]


def rows_of(size: int, count: int, seed: int, source: int) -> np.ndarray[Any, Any]:
    """Return the row numbers of a source's `count` rows, int64: whole passes, then a drawn part, each in order."""
    passes, rest = divmod(count, size)
    part = torch.randperm(size, generator=generator(seed, "mix", source))[:rest].sort().values.numpy()
    return np.concatenate([np.tile(np.arange(size), passes), part]).astype(np.int64)


class Mixture:
    """Rows of several map-style datasets, interleaved."""

    def __init__(
        self, sources: Sequence[Any], weights: Sequence[float], *, exhausted: str, seed: int, fields: list[str] | None
    ) -> None:
        """Lay out the rows; nothing is read. With `fields`, rows keep only those."""
        self.sources, self.fields = list(sources), fields
        sizes = [len(source) for source in sources]
        counts = counts_of(sizes, weights, exhausted=exhausted)
        self.source = interleaved(counts, seed)
        self.row = np.empty(len(self.source), np.int64)
        for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            self.row[self.source == number] = rows_of(size, count, seed, number)

    def __len__(self) -> int:
        """Return the number of rows of the mix."""
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        """Return one row."""
        return self._picked(self.sources[self.source[index]][int(self.row[index])])

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Any]:
        """Return many rows: of each source together, then in their order; a `Table` if all sources are."""
        at = np.asarray(indices, np.int64)
        source, row = self.source[at], self.row[at]
        parts = [(s, np.flatnonzero(source == s)) for s in np.unique(source).tolist()]
        fetched = [_many(self.sources[s], row[places]) for s, places in parts]
        back = np.argsort(np.concatenate([places for _, places in parts]))
        if all(isinstance(part, Table) and part.columns.keys() == fetched[0].columns.keys() for part in fetched):
            return Table.concat(fetched).take(back)
        rows = [self._picked(row) for part in fetched for row in part]
        return [rows[i] for i in back.tolist()]

    def _picked(self, row: Any) -> Any:
        return row if self.fields is None else {name: row[name] for name in self.fields}


def _many(source: Any, rows: np.ndarray[Any, Any]) -> Any:
    if hasattr(source, "take_rows"):
        return source.take_rows(rows)
    whole = getattr(source, "__getitems__", None)
    return whole(rows.tolist()) if whole else [source[i] for i in rows.tolist()]


@attrs.frozen(eq=False)
class Ordered:
    """A map-style dataset as a stream: shuffled by seed, number and epoch; a position is a count of rows."""

    rows: Any
    seed: int
    number: int

    def open(self, epoch: int, position: Any = None) -> Reader:
        """Go on after `position` rows."""
        draws = generator(self.seed, "mix/order", self.number, epoch)
        return _OrderedReader(self.rows, torch.randperm(len(self.rows), generator=draws), position or 0)


@attrs.define(eq=False)
class _OrderedReader:
    rows: Any
    order: torch.Tensor
    given: int

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.given >= len(self.order):
            raise StopIteration
        self.given += 1
        return self.rows[int(self.order[self.given - 1])]

    def position(self) -> int:
        return self.given


@attrs.frozen(eq=False)
class MixedStream:
    """Rows of several streams; which one row n is from is drawn from seed, epoch and n.

    A position is [rows given, for each source: [position, pass, whether it has ended once]].
    """

    streams: Sequence[Any]
    names: Sequence[str]
    weights: Sequence[float]
    exhausted: str
    seed: int
    fields: list[str] | None = None

    def open(self, epoch: int, position: Any = None) -> Reader:
        """Open every stream where it was."""
        return _MixedReader(self, epoch, position)


class _MixedReader:
    def __init__(self, mix: MixedStream, epoch: int, position: Any) -> None:
        self._mix, self._epoch = mix, epoch
        start: tuple[int, list[Any]] = position or (0, [[None, 0, False]] * len(mix.streams))
        self._given, inner = start
        self._passes = [passed for _, passed, _ in inner]
        self._ended = [ended for _, _, ended in inner]
        self._readers: list[Reader] = [self._open(i, at) for i, (at, _, _) in enumerate(inner)]
        self._block, self._choices = -1, torch.empty(0)

    def _open(self, number: int, position: Any = None) -> Reader:
        mix, epoch = self._mix, self._epoch + self._passes[number] * PASS
        torch.default_generator.manual_seed(derive_seed(mix.seed, "mix/open", number, epoch))
        reader: Reader = mix.streams[number].open(epoch, position)
        return reader

    def __iter__(self) -> Iterator[Any]:
        return self

    def _choice(self) -> int:
        block, place = divmod(self._given, BLOCK)
        if block != self._block:
            draws = generator(self._mix.seed, "mix", self._epoch, block)
            weights = torch.tensor(self._mix.weights, dtype=torch.float64)
            self._block, self._choices = block, torch.multinomial(weights, BLOCK, replacement=True, generator=draws)
        return int(self._choices[place])

    def __next__(self) -> Any:
        number = self._choice()
        row: Any = next(self._readers[number], self)
        if row is self:
            self._ended[number] = True
            if self._mix.exhausted == "first" or all(self._ended):
                raise StopIteration
            self._passes[number] += 1
            self._readers[number] = self._open(number)
            row = next(self._readers[number], self)
            if row is self:
                raise DataError(f"mix: the source {self._mix.names[number]!r} gave no rows")
        self._given += 1
        fields = self._mix.fields
        return row if fields is None or isinstance(row, BadRow) else {name: row[name] for name in fields}

    def position(self) -> list[Any]:
        inner = zip(self._readers, self._passes, self._ended, strict=True)
        return [self._given, [[reader.position(), passed, ended] for reader, passed, ended in inner]]
