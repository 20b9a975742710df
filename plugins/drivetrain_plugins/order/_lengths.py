"""How long rows are: read from columns where there are columns, and row by row where there is nothing else."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from drivetrain import BadRow, Columns, ConfigError, DataError, Problem, require, stack
from drivetrain.data import Fetch, count_labels
from drivetrain_plugins.shared.table import Ragged, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from drivetrain import Run

log = logging.getLogger("drivetrain")
PRECOMPUTED = "length"  # the field in which people keep lengths
BLOCK, LARGE = 1000, 20_000  # rows read at once; rows from which reading them all is told


def row_lengths(run: Run, split: str, field: str, *, plugin: str) -> np.ndarray[Any, Any]:
    """Return how many tokens each row of `split` has in `field`, int64 (N,); an empty place counts 0.

    Raises:
        ConfigError: the rows have no such field, or it has no length.
        DataError: a row cannot be read, or its length is no whole number >= 0.
    """
    values = row_values(run, split, field, plugin=plugin)
    whole = values.astype(np.int64)
    if len(wrong := np.flatnonzero((whole != values) | (whole < 0))):
        row = int(wrong[0])
        raise DataError(
            f"{plugin}: {split} row {row}: a length must be a whole number >= 0. "
            f"Received: {values[row]} in {field!r} or {PRECOMPUTED!r}"
        )
    return whole


def row_values(run: Run, split: str, field: str, *, plugin: str) -> np.ndarray[Any, Any]:
    """Return the length of each row's `field`, or the number that stands there, (N,).

    Looked for in this order: the columns of a `Table`, of tensors or of Arrow; the column "length"; the rows
    themselves, which is slow and told when they are many.
    """
    dataset = run.datasets[split]
    for name in dict.fromkeys((field, PRECOMPUTED)):
        for look in (_in_table, _in_tensors, _in_arrow):
            found = look(dataset, name)
            if found is not None:
                return found
    if len(dataset) >= LARGE:
        log.warning(
            "%s: reading all %d %s rows for the length of %r; a Table, an Arrow column or a field %r is read at once",
            plugin, len(dataset), split, field, PRECOMPUTED,
        )  # fmt: skip

    def value(row: Any) -> float:
        return _measure(row, field, split, plugin)

    return read_rows(run, split, value)


def read_rows(run: Run, split: str, value: Callable[[Any], float]) -> np.ndarray[Any, Any]:
    """Return `value(row)` of every row, (N,); 0 where a tolerant run meets a row that cannot be read.

    No global generator is moved; rows that draw see the generators seeded as the loader seeds them.
    """
    dataset = run.datasets[split]
    tolerant = run.plan is not None and run.plan.hooks["bad_row"].owner != "drivetrain"
    fetch = Fetch(dataset, stack, count_labels, run.settings.seed, split, tolerant=tolerant)
    with torch.random.fork_rng(devices=[]):
        rows = (row for start in range(0, len(dataset), BLOCK) for row in _block(fetch, start, len(dataset)))
        return np.array([0 if isinstance(row, BadRow) else value(row) for row in rows])


def _block(fetch: Fetch, start: int, end: int) -> Iterator[Any]:
    yield from fetch.rows(torch.arange(start, min(start + BLOCK, end)), 0)


def _measure(row: Any, field: str, split: str, plugin: str) -> float:
    """Return the length or number in one row."""
    known = sorted(row.keys()) if hasattr(row, "keys") else []
    name = next((n for n in (field, PRECOMPUTED) if n in known), None)
    if name is None:
        received = f"fields {known}" if hasattr(row, "keys") else type(row).__name__
        do = f"name the field whose length counts (field = ...), or add a field {PRECOMPUTED!r}"
        raise ConfigError([Problem(f"{plugin}: the {split} rows have no field {field!r}", received, do)])
    value = row[name]
    if hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0:
        return len(value)
    if value is None:
        return 0
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        do = "name a field that holds lists, text or numbers"
        what = f"{plugin}: field {name!r} of the {split} rows has no length"
        raise ConfigError([Problem(what, repr(value)[:80], do)]) from error


def _in_table(dataset: Any, field: str) -> np.ndarray[Any, Any] | None:
    """Read the offsets of a column of lists, or its numbers."""
    if not isinstance(dataset, Table):
        return None
    column = dataset.columns.get(field)
    if isinstance(column, Ragged):
        return column.lengths
    numbers = isinstance(column, np.ndarray) and column.ndim == 1 and column.dtype.kind in "iuf"
    return column if numbers else None


def _in_tensors(dataset: Any, field: str) -> np.ndarray[Any, Any] | None:
    """Read a column of numbers; rows of a tensor with more dimensions are all of one length."""
    if not isinstance(dataset, Columns) or field not in dataset.columns:
        return None
    column = dataset.columns[field]
    values: np.ndarray[Any, Any] = column.cpu().numpy() if column.ndim == 1 else np.full(len(column), column.shape[1])
    return values


def _in_arrow(dataset: Any, field: str) -> np.ndarray[Any, Any] | None:
    """Read the offsets of an Arrow column through the set's mapping of indices; no row is decoded."""
    library = sys.modules.get("datasets")  # a set of that library exists only where it was imported
    if library is None or not isinstance(dataset, library.Dataset) or field not in dataset.column_names:
        return None
    if dataset.format["type"] == "custom":  # a transform may make other rows than those stored
        return None
    arrow, compute = (require(m, extra="hf", plugin="hf-dataset") for m in ("pyarrow.types", "pyarrow.compute"))
    column = dataset.data.column(field)
    if arrow.is_list(column.type) or arrow.is_large_list(column.type) or arrow.is_fixed_size_list(column.type):
        column = compute.list_value_length(column)
    elif arrow.is_string(column.type) or arrow.is_large_string(column.type):
        column = compute.utf8_length(column)
    elif not (arrow.is_integer(column.type) or arrow.is_floating(column.type)):
        return None
    values: np.ndarray[Any, Any] = compute.fill_null(column, 0).to_numpy()
    mapped = dataset._indices  # noqa: SLF001 - `dataset.select` and `shuffle` keep the table and map its rows
    return values if mapped is None else values[mapped.column(0).to_numpy()]
