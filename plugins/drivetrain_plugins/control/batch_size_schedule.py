"""Batches that grow over the run (Smith et al. 2018, https://arxiv.org/abs/1711.00489)."""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import ConfigError, Problem, Trigger, hookimpl, option, plugin
from drivetrain_plugins.control._stages import read_stages, rising, steps_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Run

NAME = "batch-size-schedule"


@attrs.frozen(eq=False)
class Growing:
    """An order of rows, cut into micro-batches whose size depends on the rows that the run has consumed."""

    within: Any  # the order
    rows: int  # of an epoch
    ends: list[int]  # of the stages but the last, in rows
    sizes: list[int]
    world_size: int

    def order(self, epoch: int) -> torch.Tensor:
        """Return int64 (N,): the order as it is."""
        rows: torch.Tensor = self.within.order(epoch)
        return rows

    def bounds(self, epoch: int) -> torch.Tensor:
        """Return int64 (M + 1,): where micro-batches end; all ranks' of one step have the size of its first row."""
        begun, cuts = epoch * self.rows, [0]
        while cuts[-1] < self.rows:
            size = self.sizes[bisect.bisect_right(self.ends, begun + cuts[-1])]
            for _ in range(self.world_size):
                if cuts[-1] < self.rows:
                    cuts.append(min(self.rows, cuts[-1] + size))
        return torch.tensor(cuts)


def _moment(value: Any) -> Trigger:
    made = Trigger.parse(value)
    if made.unit not in ("samples", "epochs"):
        raise ValueError(f'{NAME}: until is measured in rows or epochs: "10k samples", "2 epochs". Received: {value!r}')
    return made


@plugin(
    role="control",
    provides=["batch-bounds"],
    conflicts=["batch-bounds"],
    example={"stages": [{"until": "16 samples", "size": 4}, {"size": 8}]},
)
class BatchSizeSchedule:
    """Give micro-batches the size of the stage that the run is in; the order of rows stays as it is.

    A stage ends when that many rows have been trained on, over all ranks: a function of the position, so that resuming
    and workers change nothing. `batch_size` of the loader is left out; evaluations are as they were.
    """

    stages: list[dict[str, Any]] = option(help='[{until = "2 epochs", size = 8}, {size = 32}]: rows or epochs, rows')
    _stages: list[tuple[Any, int]] = option(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        """Read the stages."""
        self._stages = read_stages(NAME, self.stages, "size", _moment)

    @hookimpl(wrapper=True)
    def build_sampler(self, run: Run, split: str) -> Generator[None, Any, Any]:
        """Cut what is trained on."""
        order = yield
        if split != "train":
            return order
        rows = getattr(order, "rows", None) or len(run.datasets[split])
        ends = [
            math.ceil(end.count * (rows if end.unit == "epochs" else 1)) for end, _ in self._stages if end is not None
        ]
        try:
            rising(NAME, ends)
        except ValueError as error:
            raise ConfigError(f"{error} rows, of {rows} in an epoch") from error
        return Growing(order, rows, ends, [size for _, size in self._stages], run.world_size)

    @hookimpl
    def count_steps(self, run: Run) -> int:
        """Count each epoch's own batches.

        Raises:
            ConfigError: the data is a stream, which has no order to cut.
        """
        sampler = getattr(run.batches["train"], "sampler", None)
        if not isinstance(sampler, Growing):
            received = type(run.datasets["train"]).__name__ + " in " + type(run.batches["train"]).__name__
            do = "train on rows with a length, or take it out"
            raise ConfigError([Problem(f"{NAME}: the training data is not cut by an order, as a stream", received, do)])
        together = run.facts.get("accumulation", 1)
        return steps_of(run, NAME, lambda micros, _: math.ceil(micros / together))
