"""Arrow tables as columns of a `Table`, without copying what lies in memory (or in a mapped file) already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from drivetrain import require
from drivetrain_plugins.shared.table import Ragged, Table

if TYPE_CHECKING:
    from collections.abc import Iterator


@attrs.frozen(eq=False)
class ArrowColumn:
    """Values that numpy has no room for (text, None, nested lists): Python objects are made where they are taken."""

    values: Any  # pyarrow.ChunkedArray

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        """Return one value."""
        return self.values[range(len(self.values))[index]].as_py()

    def __iter__(self) -> Iterator[Any]:
        """Return the values, made chunk by chunk."""
        for chunk in self.values.chunks:
            yield from chunk.to_pylist()

    def take(self, indices: np.ndarray[Any, Any]) -> list[Any]:
        """Return the values at `indices`, int64 (B,)."""
        whole = len(indices) and bool((np.diff(indices) == 1).all()) and indices[0] >= 0
        if whole:  # a slice copies nothing
            taken: list[Any] = self.values.slice(int(indices[0]), len(indices)).to_pylist()
            return taken
        count = len(self.values)
        return list(self.values.take(np.where(indices < 0, indices + count, indices)).to_pylist())


def table_of(arrow: Any, *, plugin: str) -> Table:
    """Return the columns of a `pyarrow.Table`: flat lists of numbers as `Ragged` and numbers as arrays, both views."""
    pa = require("pyarrow", extra="hf", plugin=plugin)
    return Table({name: _column(arrow.column(name), pa) for name in arrow.column_names})


def _column(column: Any, pa: Any) -> Any:
    types, kind = pa.types, column.type
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    inner = kind.value_type if lists else kind
    numbers = types.is_integer(inner) or types.is_floating(inner)
    if not numbers or column.null_count:
        return ArrowColumn(column)
    if not lists:
        parts = [chunk.to_numpy() for chunk in column.chunks]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.zeros(0, kind.to_pandas_dtype())])
    if any(chunk.flatten().null_count for chunk in column.chunks):
        return ArrowColumn(column)
    ragged = [_ragged(chunk, fixed=types.is_fixed_size_list(kind)) for chunk in column.chunks]
    return ragged[0] if len(ragged) == 1 else Ragged.concat(ragged) if ragged else Ragged.of([])


def _ragged(chunk: Any, *, fixed: bool) -> Ragged:
    values = chunk.flatten().to_numpy()  # of a slice, those of its rows
    if fixed:
        return Ragged(values, np.arange(len(chunk) + 1, dtype=np.int64) * chunk.type.list_size)
    offsets = chunk.offsets.to_numpy().astype(np.int64)
    return Ragged(values, offsets - offsets[0])
