"""Streams have an order of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain import ConfigError, Problem

if TYPE_CHECKING:
    from drivetrain import Run


def refuse_streams(run: Run, *, plugin: str) -> None:
    """Say that an order cannot be given to data that is read from front to back.

    Raises:
        ConfigError: the training data is a stream.
    """
    data = run.datasets["train"]
    if hasattr(data, "open"):
        do = f"shuffle the stream where it is read, or take {plugin!r} out; rows with a length can be ordered"
        what = f"{plugin}: the training data is a stream, which comes in its own order"
        raise ConfigError([Problem(what, type(data).__name__, do)])
