"""One safetensors file, for any module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import Exporter, hookimpl, option, plugin, require
from drivetrain_plugins.export._paths import replace_whole, target

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from drivetrain import Run


def write(run: Run, path: Path) -> None:
    """Save the weights to the file `path`; tied weights are stored once and tied again by `load_model`."""
    library = require("safetensors.torch", plugin="export-safetensors")
    replace_whole(path, lambda file: library.save_model(run.model, str(file)))


@plugin(role="export", effect="observes")
class ExportSafetensors:
    """Export the weights as one safetensors file at the end of the run."""

    to: str | None = option(None, help="file; default: model.safetensors in the run's folder")

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse a run with no place to export to, before any work is done."""
        target(run, self.to, "model.safetensors", "export-safetensors")

    @hookimpl(wrapper=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Export when the run has ended well."""
        result = yield
        if run.rank == 0:
            write(run, target(run, self.to, "model.safetensors", "export-safetensors"))
        return result

    @hookimpl
    def export(self) -> list[Exporter]:
        """Offer the format "safetensors"."""
        return [Exporter("safetensors", write, ".safetensors")]
