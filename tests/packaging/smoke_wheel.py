"""Run by the Python of an environment in which the wheel is installed, away from the checkout: does it work alone?"""

from __future__ import annotations

import importlib.util
import math
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

import drivetrain
import drivetrain_plugins
from drivetrain import Catalogue, Trainer
from drivetrain_plugins import AdamW, Checkpoint, JsonlLog, Linear


class Regression(torch.nn.Module):
    """Fit a line."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error of (B, 3) against (B,)."""
        return torch.nn.functional.mse_loss(self.linear(x).squeeze(-1), y)


def expect(truth: object, what: str) -> None:
    """End with `what` unless it holds."""
    if not truth:
        sys.exit(f"the wheel is wrong: {what}")


def main() -> None:
    """Check files, names and catalogue, then train five steps."""
    home = Path(sys.prefix).resolve()
    for package in (drivetrain, drivetrain_plugins):
        folder = Path(str(package.__file__)).resolve().parent
        expect(folder.is_relative_to(home), f"{package.__name__} comes from {folder}, not from {home}")
        expect((folder / "py.typed").is_file(), f"{package.__name__} has no py.typed")
    for name in ("kernel", "plugins", "tests", "examples"):
        expect(importlib.util.find_spec(name) is None, f"{name!r} can be imported")
    distribution = metadata.distribution("drivetrain")
    tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in {"..", "__pycache__"}}
    packages = {top for top in tops if not top.endswith(".dist-info")}
    expect(packages == {"drivetrain", "drivetrain_plugins"}, f"it installs {sorted(packages)}")
    expect(any(file.name == "LICENSE" for file in distribution.files or ()), "it has no LICENSE")
    expect(distribution.version == drivetrain.__version__, "its version is not the package's")
    catalogue = Catalogue()
    own = [entry for entry in map(catalogue.entry, catalogue.names) if entry.distribution == "drivetrain"]
    loaded = {entry.load().__name__ for entry in own}
    expect(loaded == set(drivetrain_plugins.__all__), f"the catalogue has {sorted(loaded)}")
    with tempfile.TemporaryDirectory() as output:
        plugins = [AdamW(lr=0.1), Linear(), Checkpoint(), JsonlLog()]
        trainer = Trainer(Regression(), plugins, output=output, steps=5, log_every="1 step")
        x = torch.randn(40, 3)
        result = trainer.fit({"x": x, "y": x.sum(1)})
        expect(result.steps == 5, f"it took {result.steps} steps of 5")
        expect(math.isfinite(result.metrics["loss"]), f"the loss is {result.metrics['loss']}")
        expect((Path(output) / "checkpoints" / "step-00000005" / "manifest.json").is_file(), "there is no checkpoint")
    print(f"the wheel works: {len(own)} plugins, 5 steps, loss {result.metrics['loss']:.3f}")


if __name__ == "__main__":
    main()
