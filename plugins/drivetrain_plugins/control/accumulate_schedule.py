"""Gradient accumulation that changes over the run."""

from __future__ import annotations

import bisect
import itertools
from typing import TYPE_CHECKING, Any

from drivetrain import Step, hookimpl, option, plugin
from drivetrain_plugins.control._stages import read_stages, rising, steps_of

if TYPE_CHECKING:
    from drivetrain import Run

NAME = "accumulate-schedule"


def _updates(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{NAME}: until must be a number of updates. Received: {value!r}")
    return value


@plugin(
    role="control",
    provides=["accumulation"],
    conflicts=["accumulation"],
    example={"stages": [{"until": 2, "batches": 1}, {"batches": 2}]},
)
class AccumulateSchedule:
    """Make each step of so many micro-batches as the stage says, so that batches grow (or shrink) over the run.

    A stage ends when `until` updates are done. Skipped steps are no updates and draw a stage out; a run that is given
    in epochs still has the steps that it would have without them. An epoch's last step takes what is left.
    """

    stages: list[dict[str, Any]] = option(help="[{until = 1000, batches = 1}, {batches = 4}]: updates, micro-batches")
    _ends: list[int] = option(factory=list, init=False)
    _batches: list[int] = option(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        """Read the stages."""
        made = read_stages(NAME, self.stages, "batches", _updates)
        self._ends, self._batches = [end for end, _ in made[:-1]], [number for _, number in made]
        rising(NAME, self._ends)

    def at(self, applied: int) -> int:
        """Return the number of micro-batches after so many updates."""
        return self._batches[bisect.bisect_right(self._ends, applied)]

    @hookimpl
    def plan_step(self, run: Run) -> Step | None:
        """Take as many micro-batches as it is time for."""
        micros = list(itertools.islice(run.stream or (), self.at(run.progress.applied)))
        return Step(run, run.progress.step, micros) if micros else None

    @hookimpl
    def count_steps(self, run: Run) -> int:
        """Take every epoch's micro-batches as `plan_step` will, no step skipped."""

        def steps_in(micros: int, before: int) -> int:
            steps = 0
            while micros > 0:
                micros -= self.at(before + steps)
                steps += 1
            return steps

        return steps_of(run, NAME, steps_in)
