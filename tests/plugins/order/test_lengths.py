"""Lengths of rows: the same from columns as from the rows themselves, without reading these."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from order_helpers import assembled, skewed, table

from drivetrain import Columns, ConfigError, DataError
from drivetrain_plugins.order import _lengths
from drivetrain_plugins.order._lengths import row_lengths, row_values
from drivetrain_plugins.shared.table import Table

datasets = pytest.importorskip("datasets")
ROWS = 90


def lengths(dataset, field="input_ids"):
    return row_lengths(assembled(dataset), "train", field, plugin="the-plugin").tolist()


@pytest.fixture
def unread(monkeypatch):
    """Fail where rows are read."""

    def refuse(*_):
        raise AssertionError("rows were read")

    monkeypatch.setattr(_lengths, "read_rows", refuse)


@pytest.fixture
def arrow():
    """Return a set of the `datasets` library with lists, text, numbers and an empty place."""
    rows = [table(ROWS)[i] | {"text": "é" * i, "odd": i % 7} for i in range(ROWS)]
    rows[3]["labels"] = None
    return datasets.Dataset.from_list(rows)


@pytest.mark.usefixtures("unread")
def test_a_table_is_not_read():
    """The offsets of a `Table` are its lengths."""
    assert lengths(table(ROWS)) == skewed(ROWS).tolist()


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("change", ["none", "select", "shuffle", "shard", "concatenate", "torch"])
def test_arrow_is_not_read(arrow, change):
    """Arrow's offsets are the lengths, through any mapping of indices, of several pieces and in any format."""
    wanted, picked = skewed(ROWS), np.arange(ROWS)
    if change == "select":
        picked = np.array([5, 3, 80, 3])
        arrow = arrow.select(picked.tolist())
    elif change == "shuffle":
        arrow = arrow.shuffle(seed=1)
        picked = np.array(arrow._indices.column(0))
        assert (picked != np.arange(ROWS)).any()
    elif change == "shard":
        arrow, picked = arrow.shard(4, 1, contiguous=True), np.array_split(np.arange(ROWS), 4)[1]
    elif change == "concatenate":
        arrow, picked = datasets.concatenate_datasets([arrow, arrow]), np.tile(np.arange(ROWS), 2)
    elif change == "torch":
        arrow = arrow.with_format("torch")
    assert lengths(arrow) == wanted[picked].tolist()


@pytest.mark.usefixtures("unread")
def test_other_arrow_columns(arrow):
    """Text counts characters, numbers are taken as they are, an empty place is 0, and so is it on any path."""
    assert lengths(arrow, "text") == list(range(ROWS))
    assert lengths(arrow, "odd") == [i % 7 for i in range(ROWS)]
    assert lengths(arrow, "labels")[2:5] == [skewed(ROWS)[2], 0, skewed(ROWS)[4]]


def test_a_transform_is_followed(arrow):
    """Where rows are made on the fly, those count, not the stored ones."""
    half = arrow.with_transform(lambda batch: {"input_ids": [ids[: len(ids) // 2] for ids in batch["input_ids"]]})
    assert lengths(half) == (skewed(ROWS) // 2).tolist()


@pytest.mark.usefixtures("unread")
def test_a_length_column_stands_in():
    """Where the field is not stored, a column "length" is."""
    assert lengths(Table({"length": np.array([3, 1, 2]), "text": ["a", "b", "c"]})) == [3, 1, 2]
    assert lengths(datasets.Dataset.from_dict({"length": [3, 1, 2]})) == [3, 1, 2]
    assert lengths(Columns({"length": torch.tensor([3, 1]), "x": torch.zeros(2, 4)})) == [3, 1]


@pytest.mark.usefixtures("unread")
def test_rows_of_a_tensor_have_one_length():
    """Equally long rows are told from the tensor's shape."""
    assert lengths(Columns({"input_ids": torch.zeros(3, 5)})) == [5, 5, 5]


class Drawing(torch.utils.data.Dataset):
    """Rows whose length is drawn from the global generators."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return {"input_ids": [0] * int(torch.randint(9, ()) + random.randrange(9) + np.random.randint(9))}  # noqa: NPY002


def test_rows_are_read_where_there_is_nothing_else():
    """Plain rows give the same lengths as a table of them; a field that some lack is looked for as "length" there."""
    rows = [table(ROWS)[i] for i in range(ROWS)]
    assert lengths(rows) == lengths(torch.utils.data.Subset(rows, range(ROWS))) == skewed(ROWS).tolist()
    assert lengths([{"length": 4}, {"input_ids": None}, {"input_ids": torch.zeros(3)}]) == [4, 0, 3]


def test_reading_draws_nothing():
    """Rows that draw have lengths from the run's seed, and the global generators stay as they were."""
    found = []
    for state in (1, 2):
        torch.manual_seed(state), random.seed(state), np.random.seed(state)  # noqa: NPY002
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        found.append(lengths(Drawing()))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # noqa: NPY002
    assert found[0] == found[1]
    assert len(set(found[0])) > 3


def test_many_rows_are_told(caplog, monkeypatch):
    """Reading every row of a large set is logged, with what would spare it."""
    monkeypatch.setattr(_lengths, "LARGE", 50)
    with caplog.at_level(logging.WARNING, "drivetrain"):
        lengths([{"input_ids": [1]}] * 49)
        assert not caplog.records
        lengths([{"input_ids": [1]}] * 50)
    assert "the-plugin: reading all 50 train rows for the length of 'input_ids'" in caplog.text


@pytest.mark.parametrize(
    ("rows", "error", "told"),
    [
        ([{"ids": [1]}], ConfigError, r"the-plugin: the train rows have no field 'input_ids'[\s\S]*fields \['ids'\]"),
        ([(1, 2)], ConfigError, r"no field 'input_ids'[\s\S]*tuple"),
        ([{"input_ids": object()}], ConfigError, "field 'input_ids' of the train rows has no length"),
        (
            [{"input_ids": 2}, {"input_ids": -1}],
            DataError,
            r"the-plugin: train row 1: a length must be .* >= 0\. Received: -1",
        ),
        ([{"input_ids": 2.5}], DataError, r"train row 0: a length must be a whole number"),
    ],
)
def test_what_has_no_length_is_told(rows, error, told):
    """Errors name plugin, split, row and field."""
    with pytest.raises(error, match=told):
        lengths(rows)


class Broken(list):
    """One row cannot be read."""

    def __getitem__(self, index):
        if index == 2:
            raise OSError("gone")
        return super().__getitem__(index)


def test_a_row_that_cannot_be_read():
    """It is named; a run that leaves bad rows out gives it length 0 and hears of it when a batch takes it."""
    rows = Broken([{"input_ids": [1] * n} for n in range(1, 5)])
    with pytest.raises(DataError, match="train row 2: OSError: gone"):
        lengths(rows)
    run = assembled(rows)
    run.plan.hooks["bad_row"].owner = "bad-rows"
    assert row_values(run, "train", "input_ids", plugin="the-plugin").tolist() == [1, 2, 0, 4]
