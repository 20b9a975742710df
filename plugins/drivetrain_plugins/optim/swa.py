"""Stochastic weight averaging (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407)."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem, Trigger, hookimpl, option, plugin
from drivetrain_plugins.optim._averages import AveragedWeights, Averages
from drivetrain_plugins.optim._moment import HELP, Moment, cadence
from drivetrain_plugins.shared.generators import kept_generators

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from drivetrain import Run, Step

log = logging.getLogger("drivetrain")
BatchNorm = torch.nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - the base of all of them


@plugin(
    role="optim",
    effect="observes",
    provides=["averaged-weights"],
    conflicts=["averaged-weights"],
    example={"start": "2 steps", "every": "1 step"},
)
class SWA(AveragedWeights):
    """Average snapshots of the weights from a moment on, all with the same weight, and evaluate and export the mean.

    A snapshot is taken at each multiple of `every`, counted from the start of training, from `start` on; where that
    step was skipped, after the next one that is applied. Until there is one, the trained weights are evaluated.
    Training itself is not touched: the constant or cyclic rate that the paper combines it with is a schedule's matter
    (one that decays up to `start` and is constant afterwards, for which the plugin `chain` joins two schedules).

    BatchNorm's statistics belong to other weights than the mean, so they are made anew over the training data before
    the mean is evaluated or exported: the mean over batches, as `torch.optim.swa_utils.update_bn` makes it, with
    everything but BatchNorm in eval mode, so that nothing is drawn. That is a pass over the data for each evaluation
    that has a new mean.
    """

    start: Moment = option(0.75, converter=Moment.parse, help=f"when it begins; {HELP}")
    every: Trigger = option("1 epoch", converter=cadence, help="from one snapshot to the next")
    update_batch_norm: bool = option(True, help="make BatchNorm's statistics anew for the mean, from training data")
    batch_norm_batches: int | None = option(
        None, ge=1, help="micro-batches for these statistics; None takes an epoch, which a stream may not have"
    )
    in_exports: bool = option(True, help="exports hold the mean; else the trained weights")
    in_model: bool = option(False, help="leave the mean in the model when fit has ended, instead of the weights")
    _averages: Averages = option(None, init=False)
    _statistics: Averages = option(None, init=False)  # of BatchNorm, for the mean
    _measured: int = option(0, init=False)  # for which number of snapshots
    _snapshots: int = option(0, init=False)
    _owed: bool = option(False, init=False)
    _asking: bool = option(False, init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Start without a snapshot.

        Raises:
            ConfigError: it would begin when the run has ended.
        """
        steps = self.start.steps(run)
        if steps is not None and steps > run.total_steps:
            received, do = f"start={self.start} for {run.total_steps} steps", "let it start earlier"
            raise ConfigError([Problem("swa: it would start when the run has ended", received, do)])
        norms = [(n, m) for n, m in run.model.named_modules() if isinstance(m, BatchNorm) and m.track_running_stats]
        named = [(f"{name}.{part}", b) for name, module in norms for part, b in module.named_buffers(recurse=False)]
        self._averages, self._snapshots, self._owed = Averages.of_parameters(run), 0, False
        self._statistics, self._measured = Averages(named if self.update_batch_norm else []), 0
        self._look(run)

    @hookimpl
    def loaded(self, run: Run, path: Path) -> None:
        """Look where the run goes on."""
        del path
        self._look(run)

    def _look(self, run: Run) -> None:
        self.start.start(run)
        self.every.start(run)

    @hookimpl
    def step_end(self, step: Step) -> None:
        """Take a snapshot if one is due."""
        run = step.run
        if self.every.due(run) and self.start.passed(run):
            self._owed = True
        if self._owed and step.skipped is None:
            self._owed = False
            self._snapshots += 1
            self._averages.lerp(1 / self._snapshots)

    @hookimpl(wrapper=True, trylast=True, specname="fit")
    def fit_inside(self, run: Run) -> Generator[None, Any, Any]:
        """Put the mean into the model for the exports that are made at the end of the run."""
        result = yield
        if not self._snapshots:
            log.warning("swa: the run has ended without a snapshot (start=%s, every=%s)", self.start, self.every)
        elif self.in_exports:
            self.enter(run)
        return result

    # --- the mean in the model -----------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Tell whether there is a snapshot."""
        return self._snapshots > 0

    def enter(self, run: Run) -> None:
        """Put the mean into the model, with BatchNorm's statistics for it."""
        self._averages.enter()
        if self._statistics.tensors:
            self._statistics.enter()
            if self._measured != self._snapshots:
                self._measure(run)
                self._measured = self._snapshots

    def leave(self) -> None:
        """Take them out."""
        self._averages.leave()
        self._statistics.leave()

    def held(self) -> list[torch.Tensor]:
        """Return the parameters and BatchNorm's statistics."""
        return self._averages.tensors + self._statistics.tensors

    @torch.no_grad()
    def _measure(self, run: Run) -> None:
        """Make BatchNorm's statistics: the mean over batches, and over ranks."""
        hooks, norms = run.hooks, [m for m in run.model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
        modes, momenta = [(m, m.training) for m in run.model.modules()], [m.momentum for m in norms]
        run.model.eval()
        try:
            for module in norms:
                module.reset_running_stats()
                module.training, module.momentum = True, None
            with kept_generators(run.device):
                for micro in itertools.islice(run.batches["train"].iterate(0, 0), self.batch_norm_batches):
                    if micro.batch is not None:
                        micro.run = run
                        hooks.prepare(micro)
                        hooks.forward(micro)
        finally:
            for module, training in modes:
                module.training = training
            for module, momentum in zip(norms, momenta, strict=True):
                module.momentum = momentum
        if run.world_size > 1:
            for buffer in [b for b in self._statistics.tensors if b.is_floating_point()]:
                torch.distributed.all_reduce(buffer)
                buffer.div_(run.world_size)

    # --- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the mean and the number of snapshots; statistics are made anew when they are needed."""
        return {"snapshots": self._snapshots, "owed": self._owed, "mean": self._averages.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._snapshots, self._owed = int(state["snapshots"]), bool(state["owed"])
        self._averages.load_state_dict(state["mean"])
        self._statistics.forget()
        self._measured = 0
