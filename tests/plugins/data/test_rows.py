"""`rows`: the user's own function."""

from __future__ import annotations

import sys

import pytest
import torch
from plugin_helpers import as_rows, assert_same_weights, columns, fit, net

from drivetrain import ConfigError, PlanError
from drivetrain_plugins import SGD, Evaluate, Rows

SOURCE = """
import torch

def rows(split, count=12, evaluate=5):
    count = {"train": count, "evaluate": evaluate}[split]
    return [{"features": torch.full((6,), float(i)), "labels": i % 3} for i in range(count)] if count else None

def endless(split):
    return iter([])

def picky(split):
    raise KeyError("a mistake in the user's code")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Put a module with row functions on the path."""
    (tmp_path / "rows_of_a_user.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "rows_of_a_user"
    sys.modules.pop("rows_of_a_user", None)


def test_the_function_is_called_with_split_and_arguments(module):
    """The function gets the split and the keyword arguments; None means that there is no such split."""
    plugin = Rows(f"{module}:rows", {"count": 4, "evaluate": 0})
    assert [row["labels"] for row in plugin.build_dataset("train")] == [0, 1, 2, 0]
    assert plugin.build_dataset("evaluate") is None


def test_run_equals_the_rows_given_to_fit(module):
    """Training on the function's rows is training on those rows."""
    import rows_of_a_user

    ours, theirs = net(), net()
    trainer, _ = fit(ours, [Rows(f"{module}:rows"), SGD(lr=0.1), Evaluate()], None, epochs=1)
    rows, held = rows_of_a_user.rows("train"), rows_of_a_user.rows("evaluate")
    other, _ = fit(theirs, [SGD(lr=0.1), Evaluate()], rows, held, epochs=1)
    assert_same_weights(ours, theirs)
    assert trainer.run.metrics["evaluate/loss"] == other.run.metrics["evaluate/loss"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("rows_of_a_user.rows", 'an importable object is written "package.module:name"'),
        ("no_such_module:rows", "install 'no_such_module', or put its folder on the path"),
        ("rows_of_a_user:row", "has no 'row'[\\s\\S]*did you mean 'rows'"),
        ("rows_of_a_user:endless", "must return rows with a length. Received: list_iterator"),
    ],
)
def test_what_cannot_be_used_is_said_with_what_to_do(function, message, module):
    """A name that cannot be imported, and rows without a length, are refused by the plugin's name."""
    with pytest.raises(ConfigError, match=message) as caught:
        Rows(function).build_dataset("train")
    assert "rows" in str(caught.value)


def test_a_mistake_in_the_function_keeps_its_traceback(module):
    """An exception of the user's code comes out as it is."""
    with pytest.raises(KeyError, match="a mistake in the user's code"):
        Rows(f"{module}:picky").build_dataset("train")


def test_data_in_two_places_is_refused(module):
    """Data given to fit() as well would not be read, and the plan says so."""
    with pytest.raises(PlanError, match="'rows' brings the data"):
        fit(net(), [Rows(f"{module}:rows"), SGD()], as_rows(columns(8)), steps=1)


def test_columns_are_taken_too(module, monkeypatch):
    """A function may return equally long tensors by name."""
    sys.modules.pop(module, None)
    import rows_of_a_user

    data, ours, theirs = columns(16), net(), net()
    monkeypatch.setattr(rows_of_a_user, "rows", lambda split: data if split == "train" else None)
    fit(ours, [Rows(f"{module}:rows"), SGD(lr=0.1)], None, steps=2)
    fit(theirs, [SGD(lr=0.1)], data, steps=2)
    assert_same_weights(ours, theirs)
    assert torch.is_tensor(data["labels"])
