"""Columns of rows: `Ragged` and `Table` against plain lists, and columns over Arrow's memory."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain_plugins.data._arrow import table_of
from drivetrain_plugins.shared.table import Ragged, Table, column_of

LISTS = st.lists(st.lists(st.integers(-(2**40), 2**40), max_size=5), min_size=1, max_size=8)


def plain(ragged):
    return [ragged[i].tolist() for i in range(len(ragged))]


@settings(max_examples=60, deadline=None)
@given(LISTS, st.data())
def test_ragged_is_its_lists(lists, data):
    """Laid back to back, picked in any order, with repeats and from the end, and joined, the lists stay what they are."""
    ragged = Ragged.of(lists)
    assert plain(ragged) == lists
    assert ragged.lengths.tolist() == [len(each) for each in lists]
    picks = data.draw(st.lists(st.integers(-len(lists), len(lists) - 1), max_size=10))
    taken = ragged.take(np.array(picks, np.int64))
    assert plain(taken) == [lists[i] for i in picks]
    assert plain(Ragged.concat([taken, ragged, Ragged(ragged.values, ragged.offsets[1:])])) == [
        *(lists[i] for i in picks), *lists, *lists[1:],
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int32, np.bool_, np.float16, np.float64])
def test_batches_have_the_types_of_batches(kind):
    """However narrow the columns are kept, what is taken of them is int64 or float32."""
    wanted = np.float32 if np.dtype(kind).kind == "f" else np.int64
    table = Table({"r": Ragged(np.array([1, 0, 1], kind), np.array([0, 2, 3])), "a": np.array([1, 0], kind)})
    batch = table.take([1, 0])
    assert batch.columns["r"].values.dtype == wanted
    assert batch.columns["a"].dtype == (np.bool_ if kind is np.bool_ else wanted)
    assert batch.columns["r"].values.tolist() == [1, 1, 0]


def test_a_table_is_its_rows():
    """Rows, slices, picks and joins of a table are those of the list of rows."""
    rows = [
        {"ids": list(range(n)), "n": n, "x": n / 2, "text": f"t{n}", "nested": [[n], []], "none": None}
        for n in range(7)
    ]
    table = Table.of(rows)
    assert list(table) == rows
    assert list(table[2:5]) == rows[2:5]
    assert list(table[::-2]) == rows[::-2]
    assert list(table.__getitems__([6, 0, 0])) == [rows[6], rows[0], rows[0]]
    assert list(Table.concat([table[:3], table[5:]])) == rows[:3] + rows[5:]
    assert table.lengths("ids").tolist() == list(range(7))
    assert table.lengths("nested").tolist() == [2] * 7
    assert table[-1] == rows[-1]
    with pytest.raises(IndexError):
        table[7]


def test_what_is_no_number_stays_a_list():
    """Text, None among numbers, words, nested lists and numbers beyond 64 bits are kept as they are given."""
    for values in (["a"], [1, None], [["a", "b"], []], [[[1], [2]], [[3]]], [2**70, 1], [{"a": 1}]):
        assert column_of(values) == values
    assert isinstance(column_of([[1], []]), Ragged)
    assert column_of([True, False]).dtype == np.bool_


def test_columns_must_share_their_length():
    """Columns of different lengths are refused with their lengths."""
    with pytest.raises(ValueError, match=r"equally long. Received: \{'a': 2, 'b': 1\}"):
        Table({"a": [1, 2], "b": [1]})
    with pytest.raises(ValueError, match="flat lists of numbers"):
        Ragged.of([["a"]])


def test_arrow_columns_are_views_of_its_memory():
    """Lists of numbers and numbers without nulls are read where Arrow has them, also in a slice."""
    ids = pa.array([[1, 2], [], [3], [4, 5, 6]], pa.list_(pa.int32()))
    numbers = pa.array([1.5, 2.5, 3.5, 4.5])
    arrow = pa.table({"ids": ids, "n": numbers}).slice(1, 3)
    table = table_of(arrow, plugin="test")
    assert [table[i] for i in range(3)] == arrow.to_pylist()
    assert table.columns["ids"].values.ctypes.data == ids.values.buffers()[1].address + 2 * 4
    assert table.columns["n"].ctypes.data == numbers.buffers()[1].address + 8


@pytest.mark.parametrize("chunks", [1, 3])
def test_arrow_columns_of_every_kind_are_their_rows(chunks):
    """Nulls, text, nested and fixed lists, chunks and empty tables come back as Arrow itself gives them."""
    part = {
        "ids": pa.array([[1, 2], [], [3]], pa.list_(pa.uint8())),
        "large": pa.array([[1], [2, 3], []], pa.large_list(pa.int64())),
        "fixed": pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float64(), 2)),
        "holes": pa.array([[1, None], None, [3]], pa.list_(pa.int64())),
        "text": pa.array(["ä", None, "c"]),
        "words": pa.array([["a"], [], ["b", "c"]]),
        "nested": pa.array([[[1]], [], [[2], [3]]]),
        "n": pa.array([1, 2, 3], pa.int16()),
        "gap": pa.array([1, None, 3]),
        "flag": pa.array([True, False, None]),
        "struct": pa.array([{"a": 1}, {"a": None}, None]),
        "which": pa.array(["x", "y", "x"]).dictionary_encode(),
    }
    arrow = pa.concat_tables([pa.table(part)] * chunks).slice(1)
    table = table_of(arrow, plugin="test")
    rows = arrow.to_pylist()
    assert list(table) == rows
    picks = [len(rows) - 1, 0, -1, 1 % len(rows)]
    assert list(table.take(picks)) == [rows[i] for i in picks]
    assert list(table.columns["text"]) == [row["text"] for row in rows]
    assert isinstance(table.columns["ids"], Ragged)
    assert isinstance(table.columns["fixed"], Ragged)
    assert len(table_of(arrow.slice(0, 0), plugin="test")) == 0
