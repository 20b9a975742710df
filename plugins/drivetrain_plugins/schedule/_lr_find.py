"""The learning rate range test (Smith 2017, https://arxiv.org/abs/1506.01186): the loss while the rate rises."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import statistics
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import ConfigError, Problem, Trainer, TrainingError, hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run, Step

LEFT_OUT = ("schedule", "evaluate", "report", "checkpoint", "export")  # roles that the sweep has no use for
ENOUGH = 5  # losses from which a rate can be read
SKIPPED = 0.1  # share of the sweep at its beginning in which no rate is suggested, or as long as the mean remembers
AROUND = 0.05  # share of the sweep to either side of a rate whose losses make its slope


@attrs.frozen
class Sweep:
    """What a sweep found: a rate and a loss for each step, and two rates to begin with."""

    rates: list[float]  # of the first group
    losses: list[float]
    smoothed: list[float]
    steepest: float | None  # where the smoothed loss falls fastest with the rate's logarithm
    tenth: float | None  # a tenth of the rate at which the smoothed loss is smallest
    ended: str  # why the sweep ended
    left_out: list[str]  # plugins of the run that were left out

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(attrs.asdict(self)), parse_constant=lambda _: None)
        return values

    def as_csv(self) -> str:
        """Return a table with a line for each step."""
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["step", "learning_rate", "loss", "smoothed_loss"])
        rows.writerows(zip(range(len(self.rates)), self.rates, self.losses, self.smoothed, strict=True))
        return out.getvalue()


@attrs.define(eq=False)
class _Sweeper:
    """The plugin of the sweep: it raises the rate and keeps the loss."""

    start: float
    end: float
    steps: int
    smoothing: float
    diverged: float
    rates: list[float] = attrs.field(factory=list)
    losses: list[float] = attrs.field(factory=list)
    smoothed: list[float] = attrs.field(factory=list)
    _mean: float = 0.0

    @hookimpl
    def build_schedule(self, run: Run) -> Callable[[int], float]:
        """Rise exponentially; groups keep the proportions of their rates."""
        first, ratio = run.optimizer.param_groups[0]["initial_lr"], self.end / self.start
        if first <= 0:
            what, do = "lr-find: the first group's rate must be above 0", "give the optimizer a rate, or unfreeze it"
            raise ConfigError([Problem(what, f"lr={first}", do)])
        return lambda step: self.start * ratio ** (step / max(1, self.steps - 1)) / first

    @hookimpl
    def step_end(self, step: Step) -> None:
        """Keep the loss, and stop where it has diverged."""
        if step.loss is None:
            return
        loss = step.loss.detach().clone()
        if step.run.world_size > 1:
            torch.distributed.all_reduce(loss)  # each rank's is its share of the mean
        self.losses.append(float(loss))
        self.rates.append(step.learning_rate)
        self._mean = self.smoothing * self._mean + (1 - self.smoothing) * self.losses[-1]
        self.smoothed.append(self._mean / (1 - self.smoothing ** len(self.losses)))
        if not self.smoothed[-1] <= self.diverged * min(self.smoothed):  # NaN too
            step.run.request_stop("the loss has diverged")


def lr_find(
    trainer: Trainer,
    train: Any = None,
    *,
    start: float = 1e-7,
    end: float = 1.0,
    steps: int = 100,
    smoothing: float = 0.9,
    diverged: float = 4.0,
) -> Sweep:
    """Train for some steps while the rate rises exponentially, and return the losses. Nothing of it is kept.

    The run is the trainer's own, without plugins of the roles schedule, evaluate, report, checkpoint and export, and
    those that require one of them. A model that the trainer was given is copied; no folder is written to. The trainer
    has to be fitted anew afterwards, not resumed in memory: its plugins have served another run.

    Args:
        trainer: with model and plugins as for the real run.
        train: the training data, if no plugin brings it.
        start: rate of the first group in the first step.
        end: rate of the first group in the last step.
        steps: how many.
        smoothing: share of the old mean in the running mean of the losses, corrected for its start at zero.
        diverged: the sweep ends when the smoothed loss is so many times its smallest value.

    Raises:
        ConfigError: the rates do not rise, or the composition cannot train.
        TrainingError: the run failed before there was anything to read from it.
    """
    checks = {
        "start must be above 0 and below end": 0 < start < end < math.inf,
        f"steps must be {ENOUGH} or more": steps >= ENOUGH,
        "smoothing must be from 0 on and below 1": 0 <= smoothing < 1,
        "diverged must be above 1": diverged > 1,
    }
    if wrong := [what for what, holds in checks.items() if not holds]:
        received = f"{start=}, {end=}, {steps=}, {smoothing=}, {diverged=}"
        raise ConfigError([Problem(f"lr-find: {what}", received) for what in wrong])
    kept = _kept(trainer.plugins)
    sweeper = _Sweeper(start, end, steps, smoothing, diverged)
    settings = {**attrs.asdict(trainer.settings, recurse=False), "output": None, "epochs": None, "steps": steps}
    plugins = [*kept.items(), ("lr-find", sweeper)]
    sweep = Trainer(copy.deepcopy(trainer.model), plugins, catalogue=trainer.catalogue, **settings)
    try:
        stopped = sweep.fit(train).stopped
    except TrainingError as error:  # a guard's
        if len(sweeper.losses) < ENOUGH:
            raise
        stopped = str(error)
    steepest, tenth = _suggestions(sweeper.rates, sweeper.smoothed, round(1 / (1 - smoothing)))
    left_out = [name for name in trainer.plugins if name not in kept]
    ended = stopped or f"all {steps} steps were taken"
    return Sweep(sweeper.rates, sweeper.losses, sweeper.smoothed, steepest, tenth, ended, left_out)


def _kept(plugins: dict[str, Any]) -> dict[str, Any]:
    """Return the plugins of the sweep: without some roles, and without those that require what went with them."""

    def words(of: dict[str, Any]) -> set[str]:
        names = {name.partition(":")[0] for name in of}
        return names | {word for plugin in of.values() for word in getattr(plugin, "provides", ())}

    before = words(plugins)
    kept = {name: plugin for name, plugin in plugins.items() if getattr(plugin, "role", "") not in LEFT_OUT}
    while True:
        gone = before - words(kept)
        still = {n: p for n, p in kept.items() if not gone & set(getattr(p, "requires", ()))}
        if len(still) == len(kept):
            return kept
        kept = still


def _suggestions(rates: list[float], losses: list[float], memory: int = 1) -> tuple[float | None, float | None]:
    """Return the rate of the steepest descent and a tenth of the rate of the smallest loss, where the loss falls.

    The slope at a rate is that of a line through the losses around it, as one step says little. Of the beginning
    nothing is suggested: there the running mean is of few losses, and over `memory` steps still forgets the first.
    """
    count = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    first = min(count // 3, max(int(SKIPPED * count), memory - 1))
    if count < ENOUGH:
        return None, None
    lowest = min(range(count), key=losses.__getitem__)
    if lowest <= first:
        return None, None
    around, logs = max(1, round(AROUND * count)), [math.log(rate) for rate in rates]
    slopes = {}
    for index in range(first, lowest + 1):
        part = slice(max(0, index - around), min(count, index + around + 1))
        slopes[index] = statistics.linear_regression(logs[part], losses[part]).slope
    steepest = min(slopes, key=slopes.__getitem__)
    return rates[steepest] if slopes[steepest] < 0 else None, rates[lowest] / 10
