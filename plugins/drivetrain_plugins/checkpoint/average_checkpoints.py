"""The plugin `average-checkpoints`: exports hold the mean of several checkpoints' weights (Vaswani et al. 2017)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import CheckpointError, ConfigError, Problem, Stage, Transform, hookimpl, option, plugin
from drivetrain_plugins.checkpoint import _saved
from drivetrain_plugins.checkpoint.checkpoint import Checkpoint
from drivetrain_plugins.shared import exports

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pluggy

    from drivetrain import Run

log = logging.getLogger("drivetrain")


@plugin(
    role="checkpoint",
    effect="observes",
    provides=["averaged-weights"],
    requires=["checkpoint"],
    conflicts=["averaged-weights"],
    example={"count": 2},
)
class AverageCheckpoints:
    """Export the mean of the weights in the newest (or the best) checkpoints, each parameter averaged in float64.

    The run's own model is left as it is: the mean is made in a copy when an export is written. Buffers of real numbers
    are averaged too, others are those of the newest checkpoint.
    """

    count: int = option(3, ge=2, help="how many checkpoints; `checkpoint` must keep as many")
    which: str = option(
        "newest", choices=["newest", "best"], help="by step, or by the metric that `checkpoint` ranks by"
    )

    @hookimpl
    def add_hooks(self, manager: pluggy.PluginManager) -> None:
        """Declare what exporters ask."""
        manager.add_hookspecs(exports.ExportHooks)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse a run that will not have so many checkpoints.

        Raises:
            ConfigError: the checkpoint plugin removes them before.
        """
        option_of = "keep" if self.which == "newest" else "best"
        kept = getattr(_keeper(run), option_of)
        if kept < self.count:
            what = f"average-checkpoints takes the {self.which} {self.count}, and checkpoint keeps {kept}"
            do = f"set checkpoint.{option_of} = {self.count} or more"
            raise ConfigError([Problem(what, f"checkpoint.{option_of} = {kept}", do)])

    @hookimpl
    def export_transforms(self, run: Run) -> list[Transform]:
        """Put the mean into a copy of the model."""
        return [Transform(Stage.ADAPT, lambda model: self._averaged(run, model))]

    def _averaged(self, run: Run, model: torch.nn.Module) -> torch.nn.Module:
        kept, rule = _keeper(run).ranked(run)
        choose = rule.newest_of if self.which == "newest" else rule.best_of
        names = [entry.name for entry in choose(kept.entries())[: self.count]]
        if len(names) < self.count:
            raise CheckpointError(
                f"average-checkpoints needs {self.count} checkpoints, and there are {len(names)} in "
                f"{kept.shelf.where('')}: {', '.join(names) or 'none'}. Save more often, or lower `count`"
            )
        made: torch.nn.Module = exports.remade(run, model, torch.clone)
        mean_into(made, (_saved.read(kept.shelf, name).tree["model"] for name in sorted(names)), len(names))
        log.info("average-checkpoints: the export holds the mean of %s", ", ".join(names))
        return made


def _keeper(run: Run) -> Checkpoint:
    return next(p for p in run.plugins.values() if isinstance(p, Checkpoint))


@torch.no_grad()
def mean_into(model: torch.nn.Module, weights: Iterable[Mapping[str, Any]], count: int) -> None:
    """Give `model` the mean of `count` sets of weights, one of which is in memory at a time; tied ones stay tied.

    Raises:
        CheckpointError: a set lacks a weight of the model.
    """
    own = dict(model.state_dict(keep_vars=True))
    sums: dict[str, torch.Tensor] = {}
    for given in weights:
        lacking = sorted(own.keys() - given.keys())
        if lacking:
            raise CheckpointError(f"average-checkpoints: a checkpoint lacks {lacking[:8]} ({len(lacking)} names)")
        for name, tensor in own.items():
            if not tensor.is_floating_point():
                tensor.copy_(given[name])
            elif name in sums:
                sums[name] += given[name]
            else:
                sums[name] = given[name].to(torch.float64)
    for name, total in sums.items():
        own[name].copy_(total / count)
