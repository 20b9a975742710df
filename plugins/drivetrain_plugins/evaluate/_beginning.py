"""A moment before which something does not happen, written as triggers are: "100 steps", "2 epochs"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import Trigger

if TYPE_CHECKING:
    from drivetrain import Run

UNITS = ("steps", "epochs", "samples", "tokens")  # what is a function of the run's progress: time is not


def parse(value: Any) -> Trigger | None:
    """Read a moment that is a function of the run's progress, or None for its start."""
    if value is None:
        return None
    trigger = Trigger.parse(value)
    if trigger.unit not in UNITS:
        raise ValueError(f"must be measured in {', '.join(UNITS)}, or a resumed run differs. Received: {value!r}")
    return trigger


def check(moment: Trigger | None, run: Run) -> None:
    """Refuse a part of an epoch of a stream, of which nobody knows where it ends."""
    if moment is not None:
        Trigger(moment.count, moment.unit).start(run)


def is_past(moment: Trigger | None, run: Run) -> bool:
    """Tell whether `run` has come so far."""
    # A trigger that was not started is due as soon as its first time has come, in a resumed run too.
    return moment is None or Trigger(moment.count, moment.unit).due(run)
