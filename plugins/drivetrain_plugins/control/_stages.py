"""Stages of a run: a list of tables, each with a number and an end but the last; and steps counted epoch by epoch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from drivetrain import ConfigError, Problem
from drivetrain.errors import nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain import Run


def read_stages(plugin: str, given: Sequence[Any], name: str, end: Callable[[Any], Any]) -> list[tuple[Any, int]]:
    """Return (end or None, number) of each stage.

    Args:
        plugin: whose they are.
        given: tables with "until" and `name`; the last without "until".
        name: of the number, a whole one from 1 on.
        end: reads an "until"; raises ValueError.

    Raises:
        ValueError: a stage is not of this form.
    """
    if not given:
        raise ValueError(f"{plugin}: there are no stages. Received: {given!r}")
    made: list[tuple[Any, int]] = []
    for number, table in enumerate(given, 1):
        is_last, where = number == len(given), f"{plugin}: stage {number}"
        if not isinstance(table, dict):
            raise ValueError(f"{where} must be a table such as {{until = ..., {name} = 2}}. Received: {table!r}")  # noqa: TRY004
        if unknown := [key for key in table if key not in ("until", name)]:
            hint = nearest(unknown[0], ("until", name))
            raise ValueError(f"{where} has no option {unknown[0]!r}: {hint}. Received: {table}")
        if is_last == ("until" in table):
            what = "is the last and must have no `until`" if is_last else "needs `until`, as it is not the last"
            raise ValueError(f"{where} {what}. Received: {table}")
        size = table.get(name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{where}: {name} must be a whole number from 1 on. Received: {size!r}")
        made.append((None if is_last else end(table["until"]), size))
    return made


def rising(plugin: str, ends: Sequence[float]) -> None:
    """Refuse ends that do not rise.

    Raises:
        ValueError: a stage ends before it begins.
    """
    for number, (before, after) in enumerate(zip([0, *ends], ends, strict=False), 1):
        if after <= before:
            raise ValueError(f"{plugin}: stage {number} ends where it begins, or before. Received: {list(ends)}")


def micro_batches(run: Run, epoch: int) -> int:
    """Return how many micro-batches a rank takes in an epoch; where an order cuts them, epochs may differ."""
    batches = run.batches["train"]
    bounds = getattr(getattr(batches, "sampler", None), "bounds", None)
    return len(batches) if bounds is None else math.ceil((len(bounds(epoch)) - 1) / run.world_size)


def steps_of(run: Run, plugin: str, steps_in: Callable[[int, int], int]) -> int:
    """Return the run's steps: as given, or those of its epochs.

    Args:
        run: with its data.
        plugin: whose rule it is.
        steps_in: from (an epoch's micro-batches, steps before it) to the epoch's steps.

    Raises:
        ConfigError: the run is given in epochs of a stream.
    """
    if run.settings.steps is not None:
        return int(run.settings.steps)
    if run.rows_per_epoch is None:
        what = f"{plugin}: nobody knows the length of the training data, a stream"
        raise ConfigError([Problem(what, f"epochs={run.settings.epochs}", "give steps instead of epochs")])
    whole, part = divmod(run.settings.epochs or 0, 1)
    total = 0
    for epoch in range(int(whole)):
        total += steps_in(micro_batches(run, epoch), total)
    return total + (math.ceil(part * steps_in(micro_batches(run, int(whole)), total)) if part else 0)
