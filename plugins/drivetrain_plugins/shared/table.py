"""Rows kept as columns: ragged lists of numbers lie back to back, so that a batch is gathered without Python lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@attrs.frozen(eq=False)
class Ragged:
    """Lists of numbers: list i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray[Any, Any]  # (sum of lengths,)
    offsets: np.ndarray[Any, Any]  # int64 (N + 1,)

    @classmethod
    def of(cls, lists: Iterable[Sequence[Any]]) -> Ragged:
        """Lay lists of numbers back to back; integers become int64, others float32."""
        arrays = [np.asarray(each) for each in lists]
        filled = [a for a in arrays if len(a)]
        values = np.concatenate(filled) if filled else np.zeros(0, np.int64)
        if values.ndim != 1 or values.dtype.kind not in "iubf":
            raise ValueError(f"a ragged column holds flat lists of numbers. Received: {values.dtype}, {values.ndim}-d")
        offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int64)
        return cls(values.astype(_kept(values.dtype), copy=False), offsets)

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Lengths, int64 (N,)."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        """Return N."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        """Return list `index`, a view."""
        index = range(len(self))[index]
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, indices: np.ndarray[Any, Any]) -> Ragged:
        """Return the lists at `indices` (B,), copied back to back; integers become int64, others float32."""
        indices = np.where(indices < 0, indices + len(self), indices)
        starts, ends = self.offsets[indices], self.offsets[indices + 1]
        offsets = np.zeros(len(indices) + 1, np.int64)
        np.cumsum(ends - starts, out=offsets[1:])
        parts = [self.values[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        values = np.concatenate(parts) if parts else self.values[:0]
        return Ragged(values.astype(_kept(values.dtype), copy=False), offsets)

    @classmethod
    def concat(cls, parts: Sequence[Ragged]) -> Ragged:
        """Return the lists of all parts, one part after the other."""
        values = [part.values[part.offsets[0] : part.offsets[-1]] for part in parts]
        starts = np.cumsum([0, *(len(each) for each in values)])
        offsets = [p.offsets[:-1] - p.offsets[0] + start for p, start in zip(parts, starts[:-1].tolist(), strict=True)]
        return cls(np.concatenate(values), np.concatenate([*offsets, starts[-1:]]).astype(np.int64))


class Table(Sequence[dict[str, Any]]):
    """A map-style dataset of columns: `Ragged`, or arrays and lists whose item i belongs to row i.

    A column may be anything else with a length and items, best with `take(indices)`.

    A collator gets its batch as a smaller `Table`: it may read `columns`, or take it for a list of dicts.
    """

    def __init__(self, columns: Mapping[str, Any]) -> None:
        """Take columns that share their length."""
        self.columns = dict(columns)
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns must be equally long. Received: {lengths}")

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Table:
        """Make columns of rows that have the same fields: lists of numbers become `Ragged`, numbers an array."""
        return cls({name: column_of([row[name] for row in rows]) for name in rows[0]})

    @classmethod
    def concat(cls, parts: Sequence[Table]) -> Table:
        """Return the rows of all parts, which have the same columns, one part after the other."""
        return cls({name: _joined([part.columns[name] for part in parts]) for name in parts[0].columns})

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: Any) -> Any:
        """Return one row as lists and numbers, or a slice as a `Table`."""
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return {
            name: v.tolist() if isinstance(v, (np.ndarray, np.generic)) else v for name, v in self.row(index).items()
        }

    def row(self, index: int) -> dict[str, Any]:
        """Return one row whose lists are views of the columns."""
        return {name: column[index] for name, column in self.columns.items()}

    def take(self, indices: Any) -> Table:
        """Return the rows at `indices`, int (B,); integers become int64, floats float32, as batches have them."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Table({name: _take(column, chosen) for name, column in self.columns.items()})

    __getitems__ = take_rows = take

    def lengths(self, field: str) -> np.ndarray[Any, Any]:
        """Return how long each row's list in `field` is, int64 (N,)."""
        column = self.columns[field]
        return column.lengths if isinstance(column, Ragged) else np.array([len(v) for v in column], np.int64)


def column_of(values: Sequence[Any]) -> Any:
    """Return a column of a value a row: `Ragged` for flat lists of numbers, an array for numbers, else the list."""
    listed = (list, tuple, np.ndarray)
    try:
        if all(isinstance(v, listed) for v in values):
            return Ragged.of(values)
        if all(isinstance(v, (bool, int, float)) for v in values):
            array = np.asarray(values)
            return list(values) if array.dtype.kind == "O" else array
    except (ValueError, TypeError, OverflowError):  # nested lists, words, numbers beyond 64 bits
        return list(values)
    return list(values)


def _kept(dtype: np.dtype[Any]) -> type[np.generic]:
    """Return the type of numbers in a batch."""
    return np.float32 if dtype.kind == "f" else np.int64


def _joined(columns: list[Any]) -> Any:
    if all(isinstance(column, Ragged) for column in columns):
        return Ragged.concat(columns)
    if all(isinstance(column, np.ndarray) for column in columns):
        return np.concatenate(columns)
    return [value for column in columns for value in column]


def _take(column: Any, indices: np.ndarray[Any, Any]) -> Any:
    if isinstance(column, np.ndarray):
        taken = column[indices]
        return taken.astype(_kept(taken.dtype), copy=False) if taken.dtype.kind in "iuf" else taken
    return column.take(indices) if hasattr(column, "take") else [column[i] for i in indices.tolist()]
