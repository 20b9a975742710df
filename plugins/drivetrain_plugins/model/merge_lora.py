"""Exports without adapters: their additions are put into the weights of a copy."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import Stage, TrainingError, Transform, hookimpl, option, plugin
from drivetrain_plugins.shared import exports

if TYPE_CHECKING:
    import pluggy

    from drivetrain import Run

ADDED = re.compile(r"\.lora_|\.modules_to_save\.")


@plugin(role="model", effect="observes", requires=["adapters"])
class MergeLoRA:
    """Let every exporter write an ordinary model: W + alpha/rank B A in place of W and its adapters.

    Training and checkpoints keep the adapters; a copy of the model is merged for each export, in float32, and gets the
    types of the weights that it came with. Without this plugin
    `export-hf` writes the adapters alone, for `PeftModel.from_pretrained`.
    """

    on_cpu: bool = option(False, help="make the copy in the host's memory, where the device has no room for two models")

    @hookimpl
    def add_hooks(self, manager: pluggy.PluginManager) -> None:
        """Bring `export_transforms`."""
        manager.add_hookspecs(exports.ExportHooks)

    @hookimpl
    def export_transforms(self, run: Run) -> list[Transform]:
        """Merge a copy of the model, once others have put in the weights that count."""
        return [Transform(Stage.CONVERT, lambda model: self._merged(run, model))]

    def _merged(self, run: Run, model: Any) -> torch.nn.Module:
        """Return a merged copy.

        Raises:
            TrainingError: merged weights are not finite.
        """
        device = torch.device("cpu") if self.on_cpu else None
        copied = exports.remade(run, model, lambda tensor: tensor.to(device or tensor.device, copy=True))
        types = {_plain(name): p.dtype for name, p in copied.named_parameters() if not ADDED.search(name)}
        for parameter in copied.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):  # peft would round both B A and the sum
                parameter.data = parameter.data.float()
        try:
            merged: torch.nn.Module = copied.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise TrainingError(f"merge-lora: the adapters cannot be merged. Received: {error}") from error
        for name, parameter in merged.named_parameters():
            parameter.data = parameter.data.to(types.get(name, parameter.dtype))
        return merged.requires_grad_(True)


def _plain(name: str) -> str:
    """Return the name that a parameter has without adapters."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
