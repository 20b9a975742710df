"""The evaluation loop and its cadence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem, Trigger, hookimpl, option, plugin
from drivetrain.loop import evaluate as evaluate_split
from drivetrain_plugins.shared.generators import kept_generators

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Metric, Run, Step


@plugin(role="evaluate", effect="observes", provides=["evaluation"], example={"every": "3 steps"})
class Evaluate:
    """Evaluate at a cadence: the loss weighted by items, and every metric that plugins bring."""

    every: Trigger = option("1 epoch", converter=Trigger.parse, help="when to evaluate")
    at_start: bool = option(False, help="evaluate before the first step")
    at_end: bool = option(True, help="evaluate after the last step")

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse a run that has nothing to evaluate."""
        if not any(split != "train" for split in run.batches):
            do = "give fit() `evaluate=`, let the data plugin bring the split, or take `evaluate` out"
            raise ConfigError([Problem("evaluate: there is no evaluation data", f"splits: {list(run.batches)}", do)])

    @hookimpl(wrapper=True, trylast=True)  # innermost: whoever writes the log has opened it before the first evaluation
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Start the cadence."""
        self.every.start(run)
        if self.at_start and run.progress.step == 0:
            for split in [s for s in run.batches if s != "train"]:
                evaluate_split(run, split)
        return (yield)

    @hookimpl
    def step_end(self, step: Step) -> None:
        """Ask for an evaluation when it is due."""
        run = step.run
        due = self.every.due(run)
        if due or (self.at_end and run.finished):
            run.request_evaluate(f"every {self.every}" if due else "the end of the run")

    @hookimpl
    def evaluate(self, run: Run, split: str) -> dict[str, float]:
        """Return the mean loss over items and the metrics; weights, modes and streams stay as they were."""
        hooks = run.hooks
        metrics: list[Metric] = [m for ms in hooks.metrics(run, split) for m in ms]
        training = [m for m in run.model.modules() if m.training]
        run.model.eval()
        try:
            with kept_generators(run.device), torch.no_grad():
                totals = self._loop(run, split, metrics)
        finally:
            for module in training:
                module.training = True
        if run.world_size > 1:
            torch.distributed.all_reduce(totals)
        loss, items = totals.tolist()
        result = {"loss": loss / items} if items else {}
        for metric in metrics:
            result.update(metric.compute())
        return result

    @staticmethod
    def _loop(run: Run, split: str, metrics: list[Metric]) -> torch.Tensor:
        """Return [sum of item losses, items] in float64."""
        hooks = run.hooks
        totals = torch.zeros(2, dtype=torch.float64, device=run.device)
        for micro in run.micros(split):
            if micro.num_items == 0:
                continue
            micro.run = run
            hooks.prepare(micro)
            micro.outputs = hooks.forward(micro)
            micro.loss = hooks.compute_loss(micro)
            totals[0] += micro.loss.double() * micro.num_items
            totals[1] += micro.num_items
            for metric in metrics:
                metric.update(micro)
        return totals
