"""Exponential moving average of the weights (Polyak & Juditsky 1992; Tarvainen & Valpola 2017, arXiv:1703.01780)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._averages import AveragedWeights, Averages

if TYPE_CHECKING:
    from pathlib import Path

    from drivetrain import Run, Step


@plugin(
    role="optim",
    effect="observes",
    provides=["averaged-weights"],
    conflicts=["averaged-weights"],
    example={"decay": 0.9},
)
class EMA(AveragedWeights):
    """Keep an exponential moving average of the weights, and evaluate and export it.

    average = d average + (1 - d) weights after every update that was applied, starting from the run's first weights,
    with d = min(decay, (1 + n) / (10 + n)) after n of them where `warmup` is on. Training itself is not touched: the
    trained weights are the same bit for bit with and without it, unless `in_model` replaces them at the very end.
    Averages of half-precision weights are kept in float32.
    """

    decay: float = option(0.999, ge=0, lt=1, help="share of the old average that each update keeps")
    warmup: bool = option(True, help="keep less of it at first: (1 + n) / (10 + n) after n updates of the average")
    every: int = option(1, ge=1, help="applied optimizer steps from one update of the average to the next")
    buffers: bool = option(False, help="average buffers of real numbers, too (BatchNorm); else they are the newest")
    in_exports: bool = option(True, help="exports hold the average; else the trained weights")
    in_model: bool = option(False, help="leave the average in the model when fit has ended, instead of the weights")
    _averages: Averages = option(None, init=False)
    _updates: int = option(0, init=False)
    _restored: bool = option(False, init=False)
    _asking: bool = option(False, init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Start from the run's weights."""
        self._averages, self._updates, self._restored = Averages.of_parameters(run, buffers=self.buffers), 0, False

    @hookimpl
    def loaded(self, run: Run, path: Path) -> None:
        """Start from the weights that were loaded, where no average was: the run had none then."""
        del path
        if not self._restored:
            self._averages, self._updates = Averages.of_parameters(run, buffers=self.buffers), 0

    @hookimpl
    def step_end(self, step: Step) -> None:
        """Update the average, unless the step was skipped."""
        if step.skipped is None and step.run.progress.applied % self.every == 0:
            decay, n = self.decay, self._updates
            if self.warmup:
                decay = min(decay, (1 + n) / (10 + n))
            self._averages.lerp(1 - decay)
            self._updates = n + 1

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of its updates."""
        return {"updates": self._updates, "average": self._averages.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._updates, self._restored = int(state["updates"]), True
        self._averages.load_state_dict(state["average"])
