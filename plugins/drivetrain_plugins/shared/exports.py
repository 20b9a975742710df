"""What exporters write: the run's model without training's wrappers, changed as plugins ask (merged adapters)."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import collect

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


class ExportHooks:
    """Hooks that exporters bring: `add_hooks` of an exporter, and of whoever implements one, adds them."""

    @collect
    def export_transforms(self, run: Run) -> Any:
        """Return a list of `Transform(stage, apply)` for the model that is about to be written, on rank 0.

        `apply` gets the model (without the wrappers of compilation and parallel training) and returns the one to write;
        it must leave the run's own model as it is. Averaged weights are in the model by then.
        """


def bare(model: Any) -> Any:
    """Return the model inside the wrappers of torch.compile and parallel training; adapters stay."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # noqa: SLF001 - where torch.compile keeps it
        elif type(model).__name__.endswith("DataParallel"):
            model = model.module
        else:
            return model


def remade(run: Run, model: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a copy of `model` that holds `change(tensor)` for each parameter and buffer; what is tied stays tied.

    Where `change` returns its argument the memory is shared, so the copy costs the modules and configuration alone.
    Hooks that plugins have hung on modules go on pointing to the plugins: neither they nor the run are copied.
    """
    kept = (run, run.hooks, run.plan, *run.plugins.values())
    memo: dict[int, Any] = {id(each): each for each in kept}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        made = change(tensor.detach())
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(made, requires_grad=False) if is_parameter else made
    return copy.deepcopy(model, memo)


def export_model(run: Run) -> torch.nn.Module:
    """Return the model to export; call it in `Exporter.write`, when averages are in place."""
    hooks: Any = run.hooks
    model = bare(run.model)
    for change in sorted((t for ts in hooks.export_transforms(run) for t in ts), key=lambda t: t.stage):
        model = change.apply(model)
    return model  # type: ignore[no-any-return]
