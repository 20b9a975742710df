"""Rows written to a file, JSON lines or Parquet: in groups, and there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from drivetrain import ConfigError, Problem, require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Groups = Iterable[list[dict[str, Any]]]

SUFFIXES = (".jsonl", ".parquet")
GROUP = 1000  # rows that are Python objects at a time, and a Parquet row group


class RowsFile:
    """A file of rows that takes its name when all of them are in it.

    It is opened when it is made, so that a place that cannot be written to is told before the rows are computed.
    """

    def __init__(self, path: str | Path, plugin: str = "predict") -> None:
        """Open a temporary file beside `path`.

        Raises:
            ConfigError: the suffix is neither .jsonl nor .parquet, or nothing can be written there.
        """
        self.path, self._plugin = checked(path, plugin), plugin
        self._fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}.new")
        try:
            if self.path.is_dir():
                raise IsADirectoryError(21, "it is a folder")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fresh.touch()
        except OSError as error:
            raise self._refused(error) from error

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing half-written behind."""
        self._fresh.unlink(missing_ok=True)

    def write(self, groups: Callable[[], Groups]) -> int:
        """Write the rows of all groups, and give the file its name; return their number.

        Args:
            groups: returns the rows in groups, anew each time: Parquet is asked for its columns' types first.

        Raises:
            ConfigError: it cannot be written, or a value is of no type that the file can hold.
        """
        write = self._parquet if self.path.suffix == ".parquet" else self._jsonl
        try:
            count = write(groups)
            self._fresh.replace(self.path)
        except OSError as error:
            raise self._refused(error) from error
        return count

    def _jsonl(self, groups: Callable[[], Groups]) -> int:
        count = 0
        with self._fresh.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half a surrogate pair
            for rows in groups():
                file.writelines(f"{as_json(row)}\n" for row in rows)
                count += len(rows)
        return count

    def _parquet(self, groups: Callable[[], Groups]) -> int:
        pa, parquet = (require(name, extra="hf", plugin=self._plugin) for name in ("pyarrow", "pyarrow.parquet"))
        count = 0
        try:
            schemas = [pa.Table.from_pylist(_same_keys(plain_rows(rows))).schema for rows in groups()]
            schema = pa.unify_schemas(schemas, promote_options="permissive")
            with parquet.ParquetWriter(self._fresh, schema) as file:
                for rows in groups():
                    file.write_table(pa.Table.from_pylist(plain_rows(rows), schema=schema))
                    count += len(rows)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            what = f"{self._plugin}: a column of {self.path} has values of several types"
            do = "leave that column out, or write .jsonl"
            raise ConfigError([Problem(what, str(error).splitlines()[0], do)]) from error
        return count

    def _refused(self, error: OSError) -> ConfigError:
        what = f"{self._plugin}: {self.path} cannot be written"
        return ConfigError([Problem(what, error.strerror or str(error), "choose another place, or make room there")])


def checked(path: str | Path, plugin: str) -> Path:
    """Return `path`, if a file of that suffix can be written.

    Raises:
        ConfigError: it has another suffix.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        what = f"{plugin}: the file's suffix says how rows are written"
        raise ConfigError([Problem(what, str(path), f"end its name with one of {', '.join(SUFFIXES)}")])
    if path.suffix == ".parquet":
        require("pyarrow.parquet", extra="hf", plugin=plugin)
    return path


def _same_keys(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every row all keys: Arrow takes those of the first and drops the others."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{**keys, **row} for row in rows]


def probe(path: str | Path, plugin: str) -> None:
    """Refuse a place that cannot be written to, and leave nothing there."""
    with RowsFile(path, plugin):
        pass


def grouped(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows in groups."""
    group: list[dict[str, Any]] = []
    for row in rows:
        group.append(row)
        if len(group) == GROUP:
            yield group
            group = []
    if group:
        yield group


def as_json(row: dict[str, Any]) -> str:
    """Return a row as a line of JSON, where numbers that are not finite are strings.

    Raises:
        ConfigError: a value is none of JSON's.
    """
    try:
        return json.dumps(finite(plain(row)), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"a row cannot be written as JSON: {error}. Leave that column out, or write .parquet"
        ) from error


def plain(value: Any) -> Any:
    """Return `value` with Python's numbers and lists in place of arrays and tensors."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else value


def plain_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows as pyarrow takes them."""
    return [plain(row) for row in rows]


def finite(value: Any) -> Any:
    """Return `value` with "nan", "inf" and "-inf" for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: str | Path, plugin: str) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl or .parquet file.

    Raises:
        ConfigError: it is not there, has another suffix or none of its rows, or a line is no JSON object.
    """
    path = checked(path, plugin)
    do = "give a .jsonl file with an object a line, or a .parquet file"
    try:
        if path.suffix == ".parquet":
            parquet = require("pyarrow.parquet", extra="hf", plugin=plugin)
            rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        else:
            rows = list(_lines(path))
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ConfigError([Problem(f"{plugin}: {path} cannot be read", str(error), do)]) from error
    if not rows:
        raise ConfigError([Problem(f"{plugin}: {path} has no rows", do=do)])
    return rows


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row: Any = None
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object: {line[:80]!r}")  # noqa: TRY004
            yield row
