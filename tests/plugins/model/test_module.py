"""`module`: any importable factory."""

from __future__ import annotations

import sys

import pytest
import torch
from plugin_helpers import assert_same_weights, columns, fit

from drivetrain import ConfigError, Trainer
from drivetrain_plugins import SGD, Module

SOURCE = """
import torch

class Model(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.Tanh(), torch.nn.Linear(width, 3))

    def forward(self, features, labels):
        return torch.nn.functional.cross_entropy(self.layers(features), labels)

def nothing():
    return "a model, honestly"
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """Put a module with a model on the path."""
    (tmp_path / "model_of_a_user.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("model_of_a_user", None)


def test_the_factory_is_called_with_the_arguments():
    """The model is what the factory makes of the arguments."""
    model = Module("model_of_a_user:Model", {"width": 7}).build_model()
    assert model.layers[0].weight.shape == (7, 6)


def trained(seed, draw=0):
    torch.manual_seed(draw)  # where the global generator stands must not matter
    trainer, _ = fit(None, [Module("model_of_a_user:Model"), SGD(lr=0.1)], columns(), steps=3, seed=seed)
    return trainer.run.model


def test_initial_weights_follow_the_seed_alone():
    """Two runs of a seed start, and end, with the same bits; another seed has others."""
    first, again, other = trained(1), trained(1, draw=5), trained(2)
    assert_same_weights(first, again)
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)


def test_initial_weights_are_those_of_the_stream():
    """The weights are drawn right after seeding torch from stream "model"."""
    from model_of_a_user import Model

    run = Trainer(plugins=[Module("model_of_a_user:Model"), SGD()], steps=1, seed=4).assemble(columns())
    torch.manual_seed(run.seed_for("model"))
    assert_same_weights(run.model, Model())


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("model_of_a_user", 'an importable object is written "package.module:name"'),
        ("no_such_module:Model", "install 'no_such_module', or put its folder on the path"),
        ("model_of_a_user:Modell", "has no 'Modell'[\\s\\S]*did you mean 'Model'"),
        ("model_of_a_user:nothing", "must return a torch.nn.Module. Received: str"),
    ],
)
def test_what_cannot_be_used_is_said_with_what_to_do(factory, message):
    """A name that cannot be imported, and a factory of something else, are refused by the plugin's name."""
    with pytest.raises(ConfigError, match=message) as caught:
        Module(factory).build_model()
    assert "module" in str(caught.value)
