"""One safetensors file, for any module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from drivetrain import option, plugin, require
from drivetrain_plugins.export._exporting import DTYPES, AtEnd, caster
from drivetrain_plugins.export._paths import replace_whole
from drivetrain_plugins.shared.exports import export_model

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from drivetrain import Run


@plugin(role="export", effect="observes")
class ExportSafetensors(AtEnd):
    """Export the weights as one safetensors file, at the end of the run."""

    plugin: ClassVar[str] = "export-safetensors"
    format: ClassVar[str] = "safetensors"
    suffix: ClassVar[str] = ".safetensors"
    default: ClassVar[str] = "model.safetensors"
    to: str | None = option(None, help="file; default: model.safetensors in the run's folder")
    at_end: bool = option(True, help="write when the run has ended; else only when asked to")
    dtype: str | None = option(None, choices=DTYPES, help="type of the stored weights; default: as trained")

    def write(self, run: Run, path: Path) -> None:
        """Save the weights to the file `path`; tied weights are stored once and tied again by `load_model`."""
        library = require("safetensors.torch", plugin=self.plugin)
        weights = _Weights(export_model(run), self.dtype)
        metadata = {"format": "pt"}  # of several entries the library writes the order at random
        replace_whole(path, lambda file: library.save_model(weights, str(file), metadata=metadata))


class _Weights:
    """What `save_model` asks a module for, cast."""

    def __init__(self, model: torch.nn.Module, dtype: str | None) -> None:
        self._model, self._dtype = model, dtype

    def state_dict(self) -> dict[str, Any]:
        """Return the module's state; tensors that are one in the module are one here."""
        state, cast = self._model.state_dict(), caster(self._dtype)
        made: dict[Any, torch.Tensor] = {}
        for name, tensor in state.items():
            key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            state[name] = made.setdefault(key, cast(tensor)) if tensor.numel() else cast(tensor)
        return state
