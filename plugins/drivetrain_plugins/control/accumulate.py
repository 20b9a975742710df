"""Gradient accumulation: several micro-batches for one optimizer step."""

from __future__ import annotations

from typing import Any

from drivetrain import option, plugin


@plugin(role="control", provides=["accumulation"], example={"batches": 2})
class Accumulate:
    """Make each step of several micro-batches; the gradient is that of one big batch, however ragged they are."""

    batches: int = option(2, ge=1, help="micro-batches in one optimizer step")

    @property
    def facts(self) -> dict[str, Any]:
        """Declare the number; the kernel's `plan_step` reads it."""
        return {"accumulation": self.batches}
