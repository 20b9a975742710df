"""`parquet`: Arrow's columns, whole or as a stream, and files that do not fit together."""

from __future__ import annotations

import io

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_helpers import assert_goes_on, drain, standard_library, strict_run
from plugin_helpers import assert_same_weights, fit, net

from drivetrain import ConfigError, DataError
from drivetrain_plugins import SGD
from drivetrain_plugins.data.parquet import Parquet
from drivetrain_plugins.shared.table import Ragged, Table

ROWS = [{**row, "ids": [len(word) for word in row["text"].split()]} for row in standard_library(60)]


def write(path, rows, group=None):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


def test_rows_are_those_of_the_files(tmp_path):
    """Several files are one table of columns, in order, whose rows are what was written."""
    write(tmp_path / "1.parquet", ROWS[:70], 9)
    write(tmp_path / "2.parquet", ROWS[70:])
    table = Parquet(str(tmp_path / "*.parquet")).build_dataset(strict_run(), "train")
    assert isinstance(table, Table)
    assert isinstance(table.columns["ids"], Ragged)
    assert list(table) == ROWS
    some = Parquet(str(tmp_path / "*.parquet"), columns=["label"]).build_dataset(strict_run(), "train")
    assert list(some) == [{"label": row["label"]} for row in ROWS]


def test_a_stream_goes_on_in_any_row_group(tmp_path):
    """The rows of a stream are those of the files, from every position on, which names file, row group and row."""
    write(tmp_path / "1.parquet", ROWS[:70], 9)
    write(tmp_path / "2.parquet", ROWS[70:], 1000)
    stream = Parquet(str(tmp_path / "*.parquet"), stream=True).build_dataset(strict_run(), "train")
    assert assert_goes_on(stream, every=7) == ROWS
    assert drain(stream, count=21)[1] == [0, "1.parquet", 2, 3]
    one = Parquet(str(tmp_path / "2.parquet"), columns=["text"], stream=True).build_dataset(strict_run(), "train")
    assert drain(one)[0] == [{"text": row["text"]} for row in ROWS[70:]]


def test_other_file_systems_are_read():
    """Any fsspec URL will do, whole and as a stream."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    with fsspec.open("memory://test_parquet/rows.parquet", "wb") as file:
        file.write(buffer.getvalue())
    url = "memory://test_parquet/*.parquet"
    assert list(Parquet(url).build_dataset(strict_run(), "train")) == ROWS
    assert drain(Parquet(url, stream=True).build_dataset(strict_run(), "train"))[0] == ROWS


@pytest.mark.parametrize("stream", [False, True])
def test_files_with_other_columns_are_named(stream, tmp_path):
    """Files whose columns or types differ from the first's are named with both, before anything is read."""
    write(tmp_path / "1.parquet", [{"a": 1, "b": "x"}])
    write(tmp_path / "2.parquet", [{"a": 1.5, "b": "x"}])
    write(tmp_path / "3.parquet", [{"a": 1, "b": "x"}])
    write(tmp_path / "4.parquet", [{"a": 1}])
    with pytest.raises(
        DataError, match=r"1.parquet: a \(int64\), b \(string\); but .*2.parquet: a \(double\)"
    ) as caught:
        Parquet(str(tmp_path / "*.parquet"), stream=stream).build_dataset(strict_run(), "train")
    assert "4.parquet: a (int64)" in str(caught.value)
    assert "3.parquet" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "page"])
def test_a_file_that_cannot_be_read_is_named(damage, tmp_path):
    """A missing file, a download that was cut, one that is no Parquet and one with a damaged page are named."""
    path = tmp_path / "rows.parquet"
    if damage != "missing":
        pq.write_table(pa.Table.from_pylist(ROWS), path, compression="gzip", use_dictionary=False)
        raw = bytearray(path.read_bytes())
        if damage == "page":
            raw[200:300] = b"\xff" * 100
        path.write_bytes({"cut": bytes(raw[:-50]), "text": b"a,b\n1,2\n", "page": bytes(raw)}[damage])
    for stream in (False, True):
        with pytest.raises(DataError, match=r"rows.parquet: cannot be read: \w+"):
            drain_if(Parquet(str(path), stream=stream).build_dataset(strict_run(), "train"))


def drain_if(data):
    return drain(data)[0] if hasattr(data, "open") else list(data)


def test_a_column_that_is_not_there_is_named(tmp_path):
    """A column that no file has is refused with those there are."""
    path = write(tmp_path / "1.parquet", [{"a": 1, "b": "x"}])
    with pytest.raises(ConfigError, match=r"there is no column \['c'\]. .*1.parquet has: \['a', 'b'\]"):
        Parquet(path, columns=["a", "c"]).build_dataset(strict_run(), "train")


def test_a_file_that_became_shorter_is_refused(tmp_path):
    """A position beyond a row group's end is refused by name."""
    path = write(tmp_path / "1.parquet", ROWS)
    stream = Parquet(path, stream=True).build_dataset(strict_run(), "train")
    _, position = drain(stream, count=50)
    write(path, ROWS[:20])
    with pytest.raises(DataError, match="row group 0 has 20 rows, and the run is to go on after row 50"):
        drain(stream, 0, position)


def test_a_run_trains_on_it_as_on_its_rows(tmp_path):
    """A run on Parquet files is the run on the same rows."""
    rows = [{"features": [float(n % 7 + k) for k in range(6)], "labels": n % 3} for n in range(24)]
    path = write(tmp_path / "1.parquet", rows)

    class Stacked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, features, labels):
            return self.net(torch.stack(features, 1).float(), labels)

    ours, theirs = Stacked(), Stacked()
    fit(ours, [Parquet(path), SGD(lr=0.1)], None, epochs=2)
    fit(theirs, [SGD(lr=0.1)], rows, epochs=2)
    assert_same_weights(ours, theirs)
