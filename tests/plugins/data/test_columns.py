"""`columns`: what the model's forward takes, of rows of every kind."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from data_helpers import assert_goes_on, strict_run, wrapped
from plugin_helpers import assert_same_weights, fit, net

from drivetrain import Columns, ConfigError, DataError, Iterated
from drivetrain_plugins import SGD
from drivetrain_plugins.data.columns import UsedColumns
from drivetrain_plugins.shared.table import Table

ROWS = [{"features": [float(n), 1.0], "labels": n % 3, "id": n, "note": "x", "extra": n} for n in range(6)]
KEPT = [{"features": row["features"], "labels": row["labels"]} for row in ROWS]


def picked(rows, model=None, split="train", **options):
    return wrapped(UsedColumns(**options), rows, split, strict_run(model=net() if model is None else model))


@pytest.mark.parametrize("kind", [list, Table.of, datasets.Dataset.from_list, Iterated])
def test_only_what_forward_takes_is_left(kind, caplog):
    """Lists, columns, sets of the datasets library and streams keep the fields of forward, and what is dropped is told once."""
    caplog.set_level("INFO", "drivetrain")
    made = picked(kind(ROWS))
    assert (assert_goes_on(made) if kind is Iterated else [made[n] for n in range(6)]) == KEPT
    whose = "stream's" if kind is Iterated else "train"
    told = f"columns: the model's forward takes no extra, id, note; left out of the {whose} rows"
    assert [r.getMessage() for r in caplog.records if "columns:" in r.getMessage()] == [told]


def test_columns_are_not_copied():
    """A table's and a dict's columns that stay are the same objects."""
    table = Table.of(ROWS)
    assert picked(table).columns["features"] is table.columns["features"]
    tensors = {"features": torch.zeros(3, 2), "labels": torch.zeros(3), "id": torch.zeros(3)}
    made = picked(Columns(tensors))
    assert (list(made.columns), made.columns["features"] is tensors["features"]) == (["features", "labels"], True)


def test_whole_batches_are_fetched_whole():
    """A dataset's own `__getitems__` is used."""

    class Whole:
        asked: list = []  # noqa: RUF012

        def __len__(self):
            return 6

        def __getitem__(self, index):
            assert index == 0, "only the first row is looked at by itself"
            return ROWS[index]

        def __getitems__(self, indices):
            self.asked.append(list(indices))
            return [ROWS[i] for i in indices]

    made = picked(Whole())
    assert made.__getitems__([2, 4]) == [KEPT[2], KEPT[4]]
    assert Whole.asked == [[2, 4]]


def test_labels_of_any_name_and_named_fields_stay():
    """Fields label and label_ids stay whatever forward takes, and so does what `keep` names."""
    rows = [{"features": 1, "label": 2, "label_ids": 3, "id": 4, "note": 5}]
    assert picked(rows, keep=["note"])[0] == {"features": 1, "label": 2, "label_ids": 3, "note": 5}


def test_wrapped_models_are_looked_into():
    """The forward is that of the model inside torch.compile's, a parallel one's and an adapter's wrapper."""

    class Adapter(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base = model

        def get_base_model(self):
            return self.base

        def forward(self, *args, **kwargs):
            return self.base(*args, **kwargs)

    for model in (
        torch.compile(net(), backend="eager"),
        torch.nn.DataParallel(net()),
        Adapter(torch.nn.DataParallel(net())),
    ):
        assert picked(ROWS, model)[1] == KEPT[1]


@pytest.mark.parametrize("kind", [list, Table.of, datasets.Dataset.from_list])
def test_no_field_left_is_an_error(kind):
    """Rows of which forward takes nothing are refused with both lists, before the run."""
    with pytest.raises(
        ConfigError, match=r"none of the evaluate rows' (?s:.*)\['note', 'text'\]; forward takes \['features'"
    ):
        picked(kind([{"text": "a", "note": "b"}]), split="evaluate")


def test_no_field_left_in_a_stream_and_rows_without_fields_are_errors():
    """A stream's first row tells; rows that are no mappings have no fields."""
    with pytest.raises(DataError, match="none of the stream's rows' fields"):
        next(picked(Iterated([{"text": "a"}])).open(0))
    with pytest.raises(ConfigError, match=r"rows must be mappings of fields\. Received: tuple"):
        picked([(1, 2)])


def test_a_run_with_it_equals_the_run_on_the_fields_left():
    """Training on rows with more fields, picked, is training on rows without them."""
    draws = np.random.default_rng(0)
    kept = [{"features": torch.tensor(draws.normal(size=6), dtype=torch.float32), "labels": n % 3} for n in range(20)]
    ours, theirs = net(), net()
    fit(ours, [UsedColumns(), SGD(lr=0.1)], [{**row, "id": n} for n, row in enumerate(kept)], epochs=1)
    fit(theirs, [SGD(lr=0.1)], kept, epochs=1)
    assert_same_weights(ours, theirs)
