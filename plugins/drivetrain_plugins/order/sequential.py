"""The rows as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain import Sequential as InTurn
from drivetrain import hookimpl, plugin

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="order")
class Sequential:
    """Train on the rows in the order in which they come, in every epoch."""

    @hookimpl
    def build_sampler(self, run: Run, split: str) -> InTurn:
        """Keep the order."""
        return InTurn(len(run.datasets[split]))
