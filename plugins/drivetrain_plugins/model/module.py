"""Any importable model."""

from __future__ import annotations

from typing import Any

import torch

from drivetrain import ConfigError, hookimpl, import_object, option, plugin


@plugin(role="model", provides=["model"], example={"factory": "kit_module:build"})
class Module:
    """Build the model by calling an importable factory."""

    factory: str = option(help='a class or function that returns a torch.nn.Module, as "package.module:name"')
    arguments: dict[str, Any] = option(factory=dict, help="keyword arguments of the factory")

    @hookimpl
    def build_model(self) -> torch.nn.Module:
        """Call the factory; the global generator was seeded from the run's stream "model"."""
        model = import_object(self.factory, plugin="module")(**self.arguments)
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(f"module: {self.factory} must return a torch.nn.Module. Received: {type(model).__name__}")
        return model
