"""Skipping steps that jump, which PaLM's authors did by hand (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311)."""

from __future__ import annotations

import collections
import math
import statistics
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from drivetrain import hookimpl, option, plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from drivetrain import Run, Step

CENTRES: dict[str, Callable[[Sequence[float]], float]] = {"mean": statistics.fmean, "median": statistics.median}


@plugin(
    role="optim",
    conflicts=["lomo", "adalomo", "optimizer-in-backward", "lbfgs"],
    example={"factor": 1.02, "window": 3, "warmup": 2},
)
class SpikeSkip:
    """Skip a step whose gradient norm (or loss) is many times what it lately was.

    The measure is compared with the centre of its last `window` values; those of skipped steps are not among them. It
    is taken when the gradients are complete, before they are clipped, and read from the device: one number a step.
    """

    facts: ClassVar = {"may_skip": True}

    factor: float = option(4.0, gt=1, lt=float("inf"), help="skip above so many times the centre")
    measure: str = option(
        "norm", choices=("norm", "loss"), help="what is watched: the total gradient norm, or the loss"
    )
    centre: str = option("median", choices=tuple(CENTRES), help="of the window")
    window: int = option(64, ge=2, help="values that are remembered")
    warmup: int = option(32, ge=2, help="values that must be there before a step can be skipped")
    limit: int = option(8, ge=1, help="skipped steps in a row after which the new level is taken for normal")
    _values: Any = option(None, init=False)
    _skipped: int = option(0, init=False)  # in a row

    def __attrs_post_init__(self) -> None:
        """Refuse a warm-up that never ends."""
        if self.warmup > self.window:
            raise ValueError(f"warmup cannot be longer than window. Received: {self.warmup=}, {self.window=}")

    @hookimpl
    def assembled(self, run: Run) -> None:  # noqa: ARG002
        """Forget an earlier run."""
        self._values, self._skipped = collections.deque(maxlen=self.window), 0

    @hookimpl(wrapper=True)
    def clip_gradients(self, step: Step) -> Generator[None, Any, Any]:
        """Measure what is about to be clipped, and skip the step if it has jumped."""
        if step.skipped is None:
            self._judge(step, self._measured(step))
        return (yield)

    def _measured(self, step: Step) -> float:
        run = step.run
        value = step.loss
        if self.measure == "norm":
            value = step.grad_norm = run.hooks.grad_norm(step)
        if run.world_size > 1:  # the loss is each rank's share of the mean; a norm is the same on all, or is made so
            value = value.detach().clone()
            torch.distributed.all_reduce(value)
        return float(value)

    def _judge(self, step: Step, value: float) -> None:
        values = self._values
        if len(values) >= self.warmup and not value <= self.factor * CENTRES[self.centre](values):  # NaN is a spike
            step.skip(f"a spike of the {self.measure}")
            self._skipped += 1
            if self._skipped >= self.limit:
                values.clear()
                self._skipped = 0
            return
        self._skipped = 0
        if math.isfinite(value):
            values.append(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the window."""
        return {"values": list(self._values or ()), "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with it."""
        self._values, self._skipped = collections.deque(state["values"], maxlen=self.window), state["skipped"]
