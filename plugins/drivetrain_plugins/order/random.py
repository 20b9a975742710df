"""A permutation of the rows in every epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain import Sequential as InTurn
from drivetrain import Shuffled, hookimpl, plugin

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="order")
class Random:
    """Train on a permutation of the rows, drawn from seed and epoch (the default, by name)."""

    @hookimpl
    def build_sampler(self, run: Run, split: str) -> Shuffled | InTurn:
        """Shuffle what is trained on; evaluate as the rows come."""
        rows = len(run.datasets[split])
        return Shuffled(rows, run.settings.seed) if split == "train" else InTurn(rows)
