"""Programs that are run as processes of their own, and get signals."""

from __future__ import annotations

import subprocess
import sys

from conftest import environment

IMPORTING = """
import os, signal, sys

class Send:
    def find_spec(self, name, path=None, target=None):
        if name == "drivetrain.trainer":
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))

sys.meta_path.insert(0, Send())
from drivetrain import Trainer
Trainer
"""


OPEN = """
import faults_worker
from drivetrain_plugins import AdamW, Loader
from drivetrain import Trainer

loader = Loader(workers=2)
run = Trainer(faults_worker.Tiny(), [AdamW(lr=1e-3), loader], steps=3).assemble(faults_worker.Augmented())
stream = run.batches["train"].iterate(0)
next(stream)
"""


MODULE = """
import os, signal
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = torch.nn.Linear(4, 2), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3 and "SEND" in os.environ:
            os.killpg(0, getattr(signal, os.environ["SEND"]))
        return self.layer(x).square().mean()

def build():
    return Model()

def rows(split):
    return None if split != "train" else [{"x": torch.arange(4.0) + number} for number in range(40)]
"""

RECIPE = """
[run]
output = "run"
steps = 8
seed = 3
[plugins.module]
factory = "their_model:build"
[plugins.rows]
function = "their_model:rows"
[plugins.loader]
workers = 1
[plugins.sgd]
lr = 0.01
[plugins.preemption]
[plugins.checkpoint]
every = "100 steps"
"""


def command(folder, *arguments, **variables):
    """Run the command line in `folder`, in a process group of its own."""
    run = [sys.executable, "-m", "drivetrain.cli", *arguments]
    return subprocess.run(
        run,
        cwd=folder,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        start_new_session=True,
    )


def their(folder):
    """Make `folder`, with a recipe and the module that it names."""
    folder.mkdir()
    (folder / "their_model.py").write_text(MODULE)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder
