"""A graph of the model in PyTorch's own format, which runs without the model's code."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar

import torch

from drivetrain import option, plugin
from drivetrain_plugins.export._examples import trace
from drivetrain_plugins.export._exporting import DTYPES, AtEnd
from drivetrain_plugins.export._paths import replace_whole

if TYPE_CHECKING:
    from pathlib import Path

    from drivetrain import Run
    from drivetrain_plugins.export._examples import Traced

log = logging.getLogger("drivetrain")


@plugin(role="export", effect="observes", example={"at_end": False, "check": False})
class ExportTorch(AtEnd):
    """Export a .pt2 program (torch.export) that takes a batch's tensors by name and returns logits.

    The inputs are those of the first evaluation batch (or training batch) of the run, without labels; their number of
    rows and their lengths stay free where the model leaves them free. `torch.export.load(path).module()` runs it.
    """

    plugin: ClassVar[str] = "export-torch"
    format: ClassVar[str] = "torch"
    suffix: ClassVar[str] = ".pt2"
    default: ClassVar[str] = "model.pt2"
    to: str | None = option(None, help="file; default: model.pt2 in the run's folder")
    at_end: bool = option(True, help="write when the run has ended; else only when asked to")
    check: bool = option(True, help="make the graph before the first step too, so that a failure comes first")
    dtype: str | None = option(None, choices=DTYPES, help="type of weights and inputs; default: as trained")
    inputs: tuple[str, ...] = option((), help="names of the batch's tensors to take; default: all but labels")

    def rehearse(self, run: Run) -> None:
        """Make the graph of the untrained model."""
        if self.at_end and self.check:
            self._traced(run)

    def write(self, run: Run, path: Path) -> None:
        """Save the program to the file `path`."""
        program = self._traced(run).program

        def save(fresh: Path) -> None:
            with fresh.open("wb") as file:
                torch.export.save(program, file)

        replace_whole(path, save)

    def _traced(self, run: Run) -> Traced:
        traced = trace(run, self.plugin, dtype=self.dtype, inputs=self.inputs)
        if traced.fixed:
            log.warning("export-torch: the program takes only as many rows as the example: %s", traced.fixed)
        return traced
