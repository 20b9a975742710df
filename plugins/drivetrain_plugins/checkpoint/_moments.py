"""Several recurring moments as one: "500 steps or 10 minutes"."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import Trigger

if TYPE_CHECKING:
    from drivetrain import Run


@attrs.frozen(eq=False)
class Moments:
    """Comes whenever one of its triggers does."""

    triggers: tuple[Trigger, ...]

    @classmethod
    def parse(cls, value: Any) -> Moments:
        """Read "500 steps", "500 steps or 10 minutes", a number of steps, or a list of such."""
        if isinstance(value, Moments):
            return value
        if isinstance(value, str):
            value = re.split(r"\s+or\s+", value)
        parts = value if isinstance(value, (list, tuple)) else [value]
        if not parts:
            raise ValueError('a cadence names at least one moment, for instance "500 steps". Received: []')
        return cls(tuple(Trigger.parse(part) for part in parts))

    def start(self, run: Run) -> None:
        """Count from where `run` stands."""
        for trigger in self.triggers:
            trigger.start(run)

    def due(self, run: Run) -> bool:
        """Return True if one of the moments has come since the last call; all of them are asked."""
        return sum(trigger.due(run) for trigger in self.triggers) > 0

    def __str__(self) -> str:
        """Write the moments the way they are read."""
        return " or ".join(map(str, self.triggers))
