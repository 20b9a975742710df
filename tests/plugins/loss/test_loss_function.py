"""`loss-function` calls what the user wrote."""

from __future__ import annotations

import pickle

import pytest
import torch
from plugin_helpers import columns, cpu_run, fit, net

from drivetrain import ConfigError, TrainingError
from drivetrain_plugins import SGD, Accumulate, Loader
from drivetrain_plugins.loss.loss_function import LossFunction


def from_logits(outputs, batch):
    return torch.nn.functional.cross_entropy(outputs["logits"], batch["labels"])


def even(batch):
    return torch.count_nonzero(batch["labels"] % 2 == 0)


def of_even(outputs, batch):
    kept = batch["labels"] % 2 == 0
    return torch.nn.functional.cross_entropy(outputs["logits"][kept], batch["labels"][kept])


def test_function_by_object_and_by_name():
    """Both ways train as the model's own loss, which is the same function."""
    _, own = fit(net(), [SGD(lr=0.1)], columns(), steps=5)
    for function in (from_logits, f"{__name__}:from_logits"):
        loss = ("loss-function", LossFunction(function, withhold=()))
        _, ours = fit(net(), [loss, SGD(lr=0.1)], columns(), steps=5)
        assert ours.of("loss") == own.of("loss")


def test_count_weighs_ragged_windows():
    """With a count of what its mean is over, accumulation gives the gradient of one batch."""
    losses = {}
    for size, windows in ((40, 1), (7, 6)):
        loss = ("loss-function", LossFunction(of_even, even, withhold=()))
        plugins = [loss, Loader(batch_size=size), Accumulate(windows), SGD(lr=0.5)]
        losses[size] = fit(net().double(), plugins, {**columns(), "features": columns()["features"].double()}, steps=4)[1].of("loss")  # fmt: skip
    assert losses[7] == pytest.approx(losses[40], rel=1e-12)


def test_function_of_tuples():
    """The function gets the whole tuple, the model all but its last part."""
    data = columns()
    rows = list(zip(data["features"], data["labels"].float(), strict=True))
    model = torch.nn.Linear(6, 1)
    loss = LossFunction(lambda outputs, batch: (outputs[:, 0] - batch[1]).abs().mean())
    _, record = fit(model, [("loss-function", loss), SGD(lr=0.01)], rows, epochs=20)
    assert record.of("loss")[-1] < record.of("loss")[0]


def test_count_travels_to_workers():
    """A count that is importable can be pickled."""
    count = LossFunction(from_logits, even).build_count(cpu_run())
    assert pickle.loads(pickle.dumps(count))({"labels": torch.tensor([0, 1, 2])}) == 2


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"function": 3}, ConfigError, "function must be callable"),
        ({"function": "torch:no_such"}, ConfigError, "has no 'no_such'"),
        ({"function": from_logits, "count": "torch:float32"}, ConfigError, "count must be callable"),
        ({"function": lambda _o, _b: 1.0}, TrainingError, "must return a 0-dim tensor, a mean. Received: float"),
        ({"function": lambda o, _b: o["logits"]}, TrainingError, r"Received: shape \(8, 3\)"),
        ({"function": from_logits, "count": lambda _b: 0.5}, TrainingError, "a whole number of items. Received: 0.5"),
    ],
)
def test_what_is_no_loss_is_told(options, error, told):
    """Wrong objects are refused before step 0, wrong values when they come."""
    with pytest.raises(error, match=told):
        fit(net(), [("loss-function", LossFunction(**options, withhold=())), SGD()], columns(), steps=1)
