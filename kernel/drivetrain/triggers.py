"""Moments in a run, written as people write them: "500 steps", "1 epoch", "10 minutes", "1M tokens"."""

from __future__ import annotations

import math
import re
import time
from typing import TYPE_CHECKING

import attrs

from drivetrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    from drivetrain.state import Run

_UNITS = {
    "steps": "steps", "step": "steps", "epochs": "epochs", "epoch": "epochs", "samples": "samples",
    "sample": "samples", "tokens": "tokens", "token": "tokens", "seconds": "seconds", "second": "seconds",
    "s": "seconds", "minutes": "minutes", "minute": "minutes", "min": "minutes", "hours": "hours",
    "hour": "hours", "h": "hours",
}  # fmt: skip
_SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
_SCALE = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_FORM = re.compile(r"\s*(?:(\d+(?:_\d+)*(?:\.\d+)?)\s*([kKMGB]?)\s+)?([a-z]+)\s*")


@attrs.define(eq=False)
class Trigger:
    """A recurring moment; `due(run)` is True once for each multiple of `count` that the run has passed.

    Steps, epochs, samples and tokens are measured from the start of training, so a resumed run fires where the
    uninterrupted one would. Wall-clock units are measured from the last firing in this process.
    """

    count: float
    unit: str
    _seen: int = attrs.field(init=False, default=0)
    _since: float = attrs.field(init=False, default=0.0)

    @classmethod
    def parse(cls, value: Trigger | str | int) -> Trigger:
        """Read "500 steps", "epoch", "0.5 epochs", "1M tokens", "10 minutes" or a plain number of steps."""
        if isinstance(value, Trigger):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            count, unit = float(value), "steps"
        else:
            match = _FORM.fullmatch(value) if isinstance(value, str) else None
            if match is None:
                raise ValueError(f'{value!r} is no moment: write "500 steps", "1 epoch", "10 minutes" or "1M tokens"')
            if match[3] not in _UNITS:
                raise ValueError(f"unknown unit {match[3]!r} in {value!r}: {nearest(match[3], set(_UNITS.values()))}")
            count = float(match[1].replace("_", "")) * _SCALE[match[2]] if match[1] else 1.0
            unit = _UNITS[match[3]]
        if count <= 0 or (unit in ("steps", "samples", "tokens") and count != int(count)):
            raise ValueError(f"{value!r}: the number of {unit} must be positive{'' if count <= 0 else ' and whole'}")
        return cls(count, unit)

    def _passed(self, run: Run) -> int:
        progress = run.progress
        counted = {"steps": progress.step, "samples": progress.rows, "tokens": progress.items}
        if self.unit in counted:
            return int(counted[self.unit] // self.count)
        if self.unit == "epochs":
            rows = run.rows_per_epoch
            if rows is None:  # a stream
                return int(progress.epoch // self.count)
            return (progress.epoch * rows + progress.rows_in_epoch) // math.ceil(self.count * rows)
        return 0

    def start(self, run: Run) -> Trigger:
        """Count from where `run` stands; call it when a run starts or has resumed."""
        if self.unit == "epochs" and run.rows_per_epoch is None and self.count != int(self.count):
            raise ConfigError(f"{str(self)!r}: the data is a stream, of which nobody knows where a part of it ends")
        self._seen, self._since = self._passed(run), time.monotonic()
        return self

    def due(self, run: Run) -> bool:
        """Return True if the moment has come since the last call."""
        if self.unit in _SECONDS:
            now = time.monotonic()
            if now - self._since < self.count * _SECONDS[self.unit]:
                return False
            self._since = now
            return True
        before, self._seen = self._seen, self._passed(run)
        return self._seen != before

    def __str__(self) -> str:
        """Write the trigger the way it is read."""
        return f"{self.count:.15g} {self.unit}"
