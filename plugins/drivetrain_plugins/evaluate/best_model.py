"""The weights of the best evaluation, kept in memory and brought back at the end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import TrainingError, hookimpl, option, plugin
from drivetrain_plugins.evaluate._watched import METRIC, Watched
from drivetrain_plugins.shared.directions import DIRECTION

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from pathlib import Path

    from drivetrain import Run

log = logging.getLogger("drivetrain")


@plugin(
    role="evaluate",
    requires=["evaluation"],
    conflicts=["averaged-weights"],  # they are what is evaluated, and are not in the model when it is over
    companions={"evaluate": {"every": "3 steps"}},
    example={"mode": "max"},
)
class BestModel:
    """Keep the weights as they were when a metric was best, and put them into the model when the run ends.

    What the optimizer updates and all buffers are copied at each evaluation that is better than all before. The last
    checkpoint holds the last weights, so that a run can be gone on with; what is exported after training, and the
    model itself, are the best. "best/step" and the value stand among the run's metrics then. A run that was stopped
    before any evaluation keeps its weights, with a warning.
    """

    metric: str = option("evaluate/loss", help=METRIC)
    mode: str = option("auto", choices=("auto", "min", "max"), help=DIRECTION)
    device: str = option("cpu", choices=("cpu", "model"), help="where the copy is kept; model: where the weights are")
    _watched: Watched = option(None, init=False)
    _step: int = option(-1, init=False)  # of the best evaluation
    _best: float | None = option(None, init=False)
    _heard: str = option("", init=False)  # the newest value, in words
    _kept: dict[str, torch.Tensor] = option(factory=dict, init=False)
    _home: torch.device = option(None, init=False)
    _over: bool = option(False, init=False)

    def __attrs_post_init__(self) -> None:
        """Find out which way is better."""
        self._watched = Watched.of("best-model", self.metric, self.mode)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Forget the run before.

        Raises:
            ConfigError: the metric's set is not evaluated.
        """
        self._watched.start(run)
        self._step, self._best, self._heard, self._over = -1, None, "it was not evaluated", False
        self._kept = {}
        self._home = torch.device("cpu") if self.device == "cpu" else run.device

    @hookimpl
    def loaded(self, run: Run, path: Path | str) -> None:
        """Count from the next step's evaluation on: that of this one has been counted, or was none."""
        del path
        self._watched.last = run.progress.step

    @hookimpl
    def evaluated(self, run: Run, split: str, metrics: Mapping[str, float]) -> None:
        """Copy the weights, if they are the best so far."""
        value = None if self._over else self._watched.heard(run, split, metrics)
        if value is None:
            return
        self._heard = f"its last value was {value}"
        if self._watched.better(value, self._best):
            self._step, self._best = run.progress.step, value
            self._copy(run)

    @hookimpl(wrapper=True)
    def epoch(self, run: Run) -> Generator[None, Any, Any]:
        """Bring the best back where the run ends: after its last save, and before anything is exported.

        Raises:
            TrainingError: no evaluation of the run had a finite value.
        """
        result = yield
        if run.finished:
            self._restore(run)
        return result

    @hookimpl(wrapper=True, trylast=True)  # innermost: exports come after it
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Bring the best back where a run went on from its own end, and has no epoch left."""
        result = yield
        self._restore(run)
        return result

    @torch.no_grad()
    def _copy(self, run: Run) -> None:
        tensors = _tensors(run)
        if self._kept.keys() != tensors.keys():
            self._kept = {}
        for name, tensor in tensors.items():
            kept = self._kept.get(name)
            if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
                self._kept[name] = tensor.detach().to(self._home, copy=True)
            else:  # memory of the copy before
                kept.copy_(tensor)

    @torch.no_grad()
    def _restore(self, run: Run) -> None:
        if self._over:
            return
        self._over = True
        if self._best is None:
            what = f"best-model: {self.metric!r} never had a finite value: {self._heard}"
            if run.stopped is None:
                raise TrainingError(
                    f"{what}. Received: {run.progress.step} steps. Let `evaluate` evaluate the set within the run, or "
                    f"take best-model out: the last checkpoint, where one is saved, has the weights"
                )
            log.warning("%s; the weights are those of step %d, when the run was stopped", what, run.progress.step)
            return
        for name, tensor in _tensors(run).items():
            tensor.copy_(self._kept[name])
        run.metrics.update({"best/step": float(self._step), f"best/{self.metric}": self._best})

    def state_dict(self) -> dict[str, Any]:
        """Return the best evaluation and its weights."""
        return {"step": self._step, "best": self._best, "weights": dict(self._kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them."""
        self._step, self._best = int(state["step"]), state["best"]
        self._kept = {name: tensor.to(self._home, copy=True) for name, tensor in state["weights"].items()}
        if self._best is not None:
            self._heard = f"its best value was {self._best}"


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    """Return what training moves: the parameters that the optimizer updates, and all buffers."""
    updated = {id(parameter) for parameter in run.parameters}
    found: dict[str, torch.Tensor] = {n: p for n, p in run.model.named_parameters() if id(p) in updated}
    found.update(run.model.named_buffers())
    return found
