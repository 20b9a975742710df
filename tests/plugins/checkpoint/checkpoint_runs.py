"""Small runs for the tests of this folder."""

from __future__ import annotations

import attrs
import torch

from drivetrain import Trainer, plugin
from drivetrain_plugins import AdamW, Checkpoint


class Tied(torch.nn.Module):
    """Two names for one weight, a 0-dim buffer and a bfloat16 one."""

    def __init__(self, tied=True):
        super().__init__()
        self.one = torch.nn.Linear(4, 4)
        self.two = torch.nn.Linear(4, 4)
        if tied:
            self.two.weight = self.one.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("third", torch.tensor([1 / 3], dtype=torch.bfloat16))

    def forward(self, x):
        self.count += 1
        return self.two(torch.relu(self.one(x))).square().mean()


ROWS = {"x": torch.arange(128.0).reshape(32, 4) / 100}  # 4 steps an epoch


def trainer(folder, *plugins, tied=True, checkpoint=None, optimizer=None, **settings):
    torch.default_generator.manual_seed(0)
    own = [optimizer or AdamW(lr=0.01), checkpoint or Checkpoint(every="2 steps", keep=2), *plugins]
    return Trainer(Tied(tied), own, output=folder, seed=3, **settings)


def steps(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def named(*numbers):
    return [f"step-{n:08d}" for n in numbers]


@plugin(role="report", effect="observes")
class Odd:
    """State of every kind of value."""

    _value: object = attrs.field(init=False, default=None)

    def state_dict(self):
        return {"value": self._value}

    def load_state_dict(self, state):
        self._value = state["value"]
