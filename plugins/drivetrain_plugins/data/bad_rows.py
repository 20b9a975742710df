"""Rows that cannot be used: left out up to a limit, each told once, counted."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import DataError, hookimpl, option, plugin

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from drivetrain import Run

log = logging.getLogger("drivetrain")
SHOWN = 5  # bad rows in an error


@attrs.frozen
class Finite:
    """Refuse a batch whose floats are not all finite; masks and biases, in which infinity has a meaning, are passed."""

    def __call__(self, batch: Any) -> None:
        """Look at every float tensor of `batch`, of any shape.

        Raises:
            DataError: one holds NaN or infinity; it says in which field.
        """
        for name, tensor in _floats(batch, ""):
            # The sum of finite numbers may be infinite, but a sum that is finite has no other terms.
            if not math.isfinite(tensor.sum().item()) and not torch.isfinite(tensor).all():
                wrong = int((~torch.isfinite(tensor)).sum())
                raise DataError(f"field {name!r} holds NaN or infinity. Received: {wrong} of {tensor.numel()} values")


def _floats(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and "mask" not in name and "bias" not in name:
            yield name, value
    elif hasattr(value, "items"):
        for key, each in value.items():
            yield from _floats(each, str(key))
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from _floats(each, name or str(number))


@plugin(role="data", effect="observes", example={"limit": 2})
class BadRows:
    """Leave out rows that cannot be used, up to a limit: each is told once by name and counted."""

    limit: int = option(0, ge=0, help="how many different rows may be left out; one more ends the run")
    finite: bool = option(True, help="a row with NaN or infinity in a float field cannot be used either")
    _seen: dict[str, None] = option(factory=dict, init=False)

    @hookimpl(wrapper=True)
    def build_model(self) -> Generator[None, Any, Any]:
        """Forget the rows of a run before: this is the first that an assembly does."""
        self._seen.clear()
        return (yield)

    @hookimpl
    def batch_checks(self) -> list[Finite]:
        """Look for numbers that would spoil the weights."""
        return [Finite()] if self.finite else []

    @hookimpl
    def bad_row(self, run: Run, reason: str) -> None:
        """Leave the row out, or end the run when there are too many.

        A row is known by its reason, so that one seen again in the next epoch, or after resuming, counts once. Every
        rank reads and counts its own rows.

        Raises:
            DataError: more than `limit` rows cannot be used; it shows the first of them.
        """
        if reason in self._seen:
            return
        if len(self._seen) >= self.limit:
            raise DataError(self._too_many(reason))
        self._seen[reason] = None
        log.warning("bad-rows: left out (%d of at most %d): %s", len(self._seen), self.limit, reason)
        self._show(run)

    def _too_many(self, reason: str) -> str:
        if not self.limit:
            return f"{reason}\n(bad-rows: a larger limit leaves such rows out. Received: limit=0)"
        rows = "".join(f"\n    {each}" for each in [*self._seen, reason][:SHOWN])
        last = f"\n    ...\n    {reason}" if len(self._seen) >= SHOWN else ""
        count = len(self._seen) + 1
        return f"bad-rows: {count} rows cannot be used. Received: limit={self.limit}. Mend or remove them:{rows}{last}"

    def _show(self, run: Run) -> None:
        if self._seen:
            run.extras["bad_rows"] = len(self._seen)

    @hookimpl
    def loaded(self, run: Run, path: Path) -> None:  # noqa: ARG002 - the count came with the state
        """Show the count that goes on."""
        self._show(run)

    def state_dict(self) -> dict[str, Any]:
        """Return the reasons of the rows left out so far."""
        return {"seen": list(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting; rows that this assembly found besides stay counted."""
        self._seen = dict.fromkeys([*state["seen"], *self._seen])
