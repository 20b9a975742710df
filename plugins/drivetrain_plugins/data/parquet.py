"""Rows from Parquet files, local or on any fsspec URL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import fsspec

from drivetrain import ConfigError, DataError, hookimpl, option, plugin, require
from drivetrain_plugins.data._arrow import table_of
from drivetrain_plugins.data._files import UNREADABLE, chosen, place, splits, tail, unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drivetrain import Reader, Run
    from drivetrain_plugins.shared.table import Table

AT_ONCE = 1000  # rows of a stream that are Python objects at a time


def _open(url: str) -> Any:
    """Return the file, read where it lies if it is a local one."""
    parquet = require("pyarrow.parquet", extra="hf", plugin="parquet")
    try:
        system, path = fsspec.url_to_fs(url)
        local = "file" in ([system.protocol] if isinstance(system.protocol, str) else system.protocol)
        if local and not system.isfile(path):
            raise FileNotFoundError(2, "there is no such file")
        return parquet.ParquetFile(path if local else system.open(path, "rb"), memory_map=local)
    except UNREADABLE as error:  # Arrow's own errors are ValueErrors and OSErrors
        raise unreadable(url, error) from error


def _checked(files: tuple[str, ...], columns: list[str] | None) -> list[Any]:
    """Return the opened files, which have the same columns.

    Raises:
        DataError: a file cannot be read, or has other columns than the first; all such files are named.
        ConfigError: a column that was asked for is not there.
    """
    opened = [_open(url) for url in files]
    first = opened[0].schema_arrow.remove_metadata()
    others = [(url, file.schema_arrow) for url, file in zip(files, opened, strict=True)]
    wrong = [f"{url}: {_shown(schema)}" for url, schema in others if not schema.remove_metadata().equals(first)]
    if wrong:
        raise DataError(
            f"parquet: files of a split must have the same columns. {files[0]}: {_shown(first)}; but {'; '.join(wrong)}"
        )
    if missing := [name for name in columns or () if name not in first.names]:
        raise ConfigError(f"parquet: there is no column {missing}. {files[0]} has: {first.names}")
    return opened


def _shown(schema: Any) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


@attrs.frozen(eq=False)
class ParquetStream:
    """The rows of Parquet files; a position is [number of the file, its name, row group, row in it]."""

    files: tuple[str, ...]
    columns: list[str] | None = None

    def open(self, epoch: int, position: Any = None) -> Reader:  # noqa: ARG002 - the same in every epoch
        """Stand at `position`; going on reads one row group again."""
        return _ParquetReader(self, position)


class _ParquetReader:
    def __init__(self, stream: ParquetStream, position: Any) -> None:
        self._stream, self._number, self._group, self._row = stream, 0, 0, 0
        if position is not None:
            self._number = place(stream.files, position, "parquet")
            self._group, self._row = position[2:]
        self._rows = self._read()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._rows)

    def position(self) -> list[Any]:
        return [self._number, tail(self._stream.files[self._number]), self._group, self._row]

    def _read(self) -> Iterator[dict[str, Any]]:
        files = self._stream.files
        for number in range(self._number, len(files)):
            if number != self._number:
                self._number, self._group, self._row = number, 0, 0
            file = _open(files[number])
            for group in range(self._group, file.num_row_groups):
                if group != self._group:
                    self._group, self._row = group, 0
                yield from self._of_group(file, group, files[number])

    def _of_group(self, file: Any, group: int, url: str) -> Iterator[dict[str, Any]]:
        try:
            table = file.read_row_group(group, columns=self._stream.columns, use_threads=False)
        except UNREADABLE as error:
            raise unreadable(url, error) from error
        if self._row > table.num_rows:
            raise DataError(
                f"{url}: row group {group} has {table.num_rows} rows, and the run is to go on after row {self._row}. "
                "The file has changed since. Give the same file, or start a new run"
            )
        for start in range(self._row, table.num_rows, AT_ONCE):
            for row in table.slice(start, AT_ONCE).to_pylist():
                self._row += 1
                yield row


@plugin(
    role="data",
    provides=["data"],
    example={"train": "{kit}/{rows}-train.parquet", "evaluate": "{kit}/{rows}-dev.parquet"},
)
class Parquet:
    """Read Parquet files; lists of numbers stay in Arrow's memory until a batch takes them."""

    train: str | list[str] = option(help="file with the training rows, or several; * is filled in")
    evaluate: str | list[str] | dict[str, str | list[str]] | None = option(
        None, help="files with the evaluation rows, or several sets by name"
    )
    columns: list[str] | None = option(None, help="the columns to read; None for all")
    stream: bool = option(False, help="read row groups when they are needed, in order, instead of all into memory")

    @property
    def facts(self) -> dict[str, Any]:
        """Declare the named evaluation sets."""
        return splits(self.evaluate)

    @hookimpl
    def build_dataset(self, run: Run, split: str) -> Table | ParquetStream | None:  # noqa: ARG002 - no row is bad
        """Read the files of `split`, or return them as a stream."""
        files = chosen(self.train, self.evaluate, split)
        if files is None:
            return None
        pa, opened = require("pyarrow", extra="hf", plugin="parquet"), _checked(tuple(files), self.columns)
        if self.stream:
            return ParquetStream(tuple(files), self.columns)
        tables = []
        for url, file in zip(files, opened, strict=True):
            try:
                tables.append(file.read(columns=self.columns))
            except UNREADABLE as error:
                raise unreadable(url, error) from error
        return table_of(pa.concat_tables(tables), plugin="parquet")
