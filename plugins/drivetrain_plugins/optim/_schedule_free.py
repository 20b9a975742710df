"""What the schedule-free plugins share (Defazio et al. 2024, https://arxiv.org/abs/2405.15682).

The model is trained at y, between the gradient steps z and their average x; x is what is worth evaluating, saving and
handing on. The library computes x from y and z and, on the way back, y from x and z, which is not the y it was. Here y
is kept while x is in the model, so that looking at x leaves training bit for bit as it was.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from drivetrain import ConfigError, Problem, hookimpl

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from drivetrain import Run

WARMUP = "the rate rises from 0 over it; below 1: share of all steps; from 1 on: number of steps"
# They put other weights than y where this method reads y, or change it behind its back.
CONFLICTS = ("averaged-weights", "lookahead")


class ScheduleFree:
    """The hooks of a plugin whose optimizer is of the library `schedulefree`; a base class of it."""

    NAME: ClassVar[str]
    _run: Run
    _training: dict[str, torch.Tensor] | None = None  # y by the optimizer's numbering, while the model holds x

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse a schedule, and say how many steps the warm-up has; the model holds the training weights.

        Raises:
            ConfigError: there is a schedule, or the warm-up is longer than the run.
        """
        if run.schedule is not None:
            owner = run.plan.hooks["build_schedule"].owner
            what = f"{self.NAME!r} averages instead of lowering the rate, so it cannot be combined with {owner!r}"
            raise ConfigError(
                [Problem(what, f"a schedule by {owner!r}", f"take out {owner!r}; a warm-up is an option")]
            )
        self._run, self._training = run, None
        for group in run.optimizer.param_groups:
            group["train_mode"] = True
            if "warmup_steps" in group:
                group["warmup_steps"] = self._warmup_steps(run, getattr(self, "warmup", 0.0))

    def _warmup_steps(self, run: Run, warmup: float) -> int:
        steps = math.ceil(warmup * run.total_steps) if warmup < 1 else int(warmup)
        if steps > run.total_steps:
            what, received = (
                f"the warm-up of {self.NAME!r} is longer than the run",
                f"{warmup=} for {run.total_steps} steps",
            )
            raise ConfigError([Problem(what, received, "give fewer, or a share below 1 such as 0.1")])
        return steps

    # --- the switch ----------------------------------------------------------------------------------------------

    def _to_average(self) -> None:
        """Put x into the model and keep y: x = y + (1 - 1 / momentum) (z - y), the library's own formula."""
        if self._training is not None:
            return
        optimizer, kept = self._run.optimizer, {}
        with torch.no_grad():
            for number, (group, p) in enumerate(_updated(optimizer)):
                if "z" in optimizer.state.get(p, ()):
                    kept[str(number)] = p.detach().clone()
                    p.lerp_(optimizer.state[p]["z"], weight=1 - 1 / _momentum(group))
        self._training = kept
        self._mark(training=False)

    def _to_training(self) -> None:
        """Put y back, bit for bit."""
        if self._training is None:
            return
        with torch.no_grad():
            for number, (_, p) in enumerate(_updated(self._run.optimizer)):
                if str(number) in self._training:
                    p.copy_(self._training[str(number)])
        self._training = None
        self._mark(training=True)

    def _mark(self, *, training: bool) -> None:
        for group in self._run.optimizer.param_groups:
            group["train_mode"] = training

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Hold the average in the model, then what was there."""
        training = self._training is None
        self._to_average()
        try:
            yield
        finally:
            if training:
                self._to_training()

    @hookimpl(wrapper=True, trylast=True)  # innermost: who exports when the run has ended finds the average
    def fit(self, run: Run) -> Generator[None, Any, Any]:  # noqa: ARG002 - the hook's argument
        """Train at y, and leave x in the model, however the run ends."""
        self._to_training()
        try:
            return (yield)
        finally:
            self._to_average()

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run, split: str) -> Generator[None, Any, Any]:  # noqa: ARG002 - the hook's arguments
        """Evaluate x."""
        with self._averaged():
            return (yield)

    @hookimpl(wrapper=True)
    def save(self, run: Run, path: Path) -> Generator[None, Any, Any]:  # noqa: ARG002 - the hook's arguments
        """Save x as the model, and y as this plugin's state."""
        with self._averaged():
            return (yield)

    def state_dict(self) -> dict[str, Any]:
        """Return y where the model holds x, else None."""
        return {"training": self._training}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take y over; it goes into the model when training starts."""
        kept, device = state["training"], self._run.device
        self._training = None if kept is None else {number: tensor.to(device) for number, tensor in kept.items()}


def _updated(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    return ((group, p) for group in optimizer.param_groups for p in group["params"])


def _momentum(group: dict[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def check_warmup(warmup: float) -> None:
    """Refuse a number of steps that is not whole."""
    if warmup >= 1 and warmup != int(warmup):
        raise ValueError(f"from 1 on, warmup is a number of steps, which must be whole. Received: {warmup!r}")
