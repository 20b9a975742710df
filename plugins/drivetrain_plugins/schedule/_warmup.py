"""Warm-up, as every schedule here takes it: below 1 a share of all steps, from 1 on a number of steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from drivetrain import ConfigError, Problem

if TYPE_CHECKING:
    from drivetrain import Run


def warmup_steps(run: Run, warmup: float, plugin: str) -> int:
    """Return the number of warm-up steps of `run`, or refuse one that is longer than the run."""
    steps = math.ceil(warmup * run.total_steps) if warmup < 1 else int(warmup)
    if steps > run.total_steps:
        raise ConfigError(
            [
                Problem(
                    f"the warm-up of {plugin!r} is longer than the run",
                    f"warmup={warmup} for {run.total_steps} steps",
                    "give fewer steps, or a share below 1 such as 0.1",
                )
            ]
        )
    return steps
