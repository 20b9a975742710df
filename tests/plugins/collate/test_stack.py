"""`stack` is torch's default collation, by name."""

from __future__ import annotations

import torch
from plugin_helpers import as_rows, assert_same_weights, columns, fit, net

from drivetrain_plugins import SGD, Stack


def test_rows_are_stacked():
    """A batch holds torch.stack of each field, and a tensor of plain numbers."""
    rows = [{"x": torch.tensor([1.0, 2.0]), "n": 3}, {"x": torch.tensor([4.0, 5.0]), "n": 6}]
    batch = Stack().build_collator()(rows)
    assert torch.equal(batch["x"], torch.stack([row["x"] for row in rows]))
    assert torch.equal(batch["n"], torch.tensor([3, 6]))


def test_run_equals_the_default_and_gathered_columns():
    """Naming it changes nothing, and rows that are stacked train like columns that are gathered whole."""
    data, models = columns(20), [net() for _ in range(3)]
    fit(models[0], [Stack(), SGD(lr=0.1)], as_rows(data), epochs=2)
    fit(models[1], [SGD(lr=0.1)], as_rows(data), epochs=2)
    fit(models[2], [Stack(), SGD(lr=0.1)], data, epochs=2)
    assert_same_weights(models[0], models[1])
    assert_same_weights(models[0], models[2])
