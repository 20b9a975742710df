"""The evaluation loop and its cadence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem, TrainingError, Trigger, hookimpl, option, plugin
from drivetrain.errors import nearest
from drivetrain.loop import evaluate as evaluate_split
from drivetrain_plugins.evaluate import _beginning
from drivetrain_plugins.shared.generators import kept_generators

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Metric, Run, Step


def _names(value: Any) -> tuple[str, ...] | None:
    return None if value is None else (value,) if isinstance(value, str) else tuple(value)


@plugin(role="evaluate", effect="observes", provides=["evaluation"], example={"every": "3 steps"})
class Evaluate:
    """Evaluate at a cadence: the loss weighted by items, and every metric that plugins bring.

    Several sets, `fit(evaluate={"dev": ..., "test": ...})`, are evaluated one after the other, each under its name. A
    set whose name starts with "predict" has no labels to score: its rows go through the model and the metrics alone.
    """

    every: Trigger = option("1 epoch", converter=Trigger.parse, help="when to evaluate")
    delay: Trigger | None = option(
        None, converter=_beginning.parse, help='nothing is due before: "100 steps"; the end and requests do not wait'
    )
    sets: tuple[str, ...] | None = option(
        None, converter=_names, help='which of the sets are evaluated: "dev" of {"dev": ..., "test": ...}; all if None'
    )
    at_start: bool = option(False, help="evaluate before the first step")
    at_end: bool = option(True, help="evaluate after the last step")

    @hookimpl(tryfirst=True)  # whoever follows a metric finds out from the fact whether its set is evaluated
    def assembled(self, run: Run) -> None:
        """Choose the sets.

        Raises:
            ConfigError: there is nothing to evaluate, or no such set.
        """
        there = [split for split in run.batches if split.startswith("evaluate")]
        if not there:
            do = "give fit() `evaluate=`, let the data plugin bring the split, or take `evaluate` out"
            raise ConfigError([Problem("evaluate: there is no evaluation data", f"splits: {list(run.batches)}", do)])
        run.facts["evaluated_sets"] = there if self.sets is None else self._chosen(there)
        _beginning.check(self.delay, run)

    def _chosen(self, there: list[str]) -> list[str]:
        """Return the splits of `sets`, whose names may be given with "evaluate/" or without."""
        names = {split.removeprefix("evaluate/"): split for split in there}
        wanted = [name.removeprefix("evaluate/") for name in self.sets or ()]
        if unknown := [name for name in wanted if name not in names]:
            what = f"evaluate: there is no evaluation set {', '.join(map(repr, unknown))}"
            do = f"{nearest(unknown[0], names)}; or give the set to fit(evaluate={{...}})"
            raise ConfigError([Problem(what, f"sets: {list(names)}", do, kind="missing")])
        if not wanted:
            raise ConfigError([Problem("evaluate: no set is chosen", "sets = []", f"choose from {list(names)}")])
        return [split for name, split in names.items() if name in wanted]

    @hookimpl(wrapper=True, trylast=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Start the cadence."""
        self.every.start(run)
        return (yield)

    @hookimpl(wrapper=True, trylast=True)  # within `fit`: logs are open, and a failure is told to `failed`
    def epoch(self, run: Run) -> Generator[None, Any, Any]:
        """Evaluate before the first step, if asked to."""
        if self.at_start and run.progress.step == 0:
            for split in run.evaluated:
                evaluate_split(run, split)
        return (yield)

    @hookimpl
    def step_end(self, step: Step) -> None:
        """Ask for an evaluation when it is due."""
        run = step.run
        due = self.every.due(run) and _beginning.is_past(self.delay, run)
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
            made = metric.compute()
            if twice := sorted(result.keys() & made.keys()):
                raise TrainingError(
                    f"evaluate: two metrics of this run are called {', '.join(twice)}. "
                    f"Received: {type(metric).__name__} as the second. "
                    "Give one of their plugins another name or prefix, or take one out"
                )
            result.update(made)
        return result

    @staticmethod
    def _loop(run: Run, split: str, metrics: list[Metric]) -> torch.Tensor:
        """Return [sum of item losses, items] in float64; both are 0 where nothing is scored."""
        prepare, forward, compute_loss = run.hooks.prepare, run.hooks.forward, run.hooks.compute_loss
        updates = [metric.update for metric in metrics]
        scored = not split.startswith("predict")
        total, items = torch.zeros((), dtype=torch.float64, device=run.device), 0
        for number, micro in enumerate(run.micros(split)):
            num_items = micro.num_items
            if micro.batch is None or (scored and num_items == 0):  # others have more rows; a mean would be 0/0
                continue
            micro.run, micro.number = run, number
            prepare(micro)
            micro.outputs = forward(micro)
            if scored:
                micro.loss = compute_loss(micro)
                if isinstance(num_items, int):
                    total.add_(micro.loss, alpha=num_items)  # one operation; it is done in float64
                else:  # counted on the device: it is not to be waited for
                    total += micro.loss.double() * num_items
                items += num_items
            for update in updates:
                update(micro)
        return torch.stack([total, torch.as_tensor(items, dtype=torch.float64, device=run.device)])
