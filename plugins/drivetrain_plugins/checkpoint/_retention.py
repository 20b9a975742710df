"""Which checkpoints stay: the newest, the best, the milestones, and what the run went on from.

What a checkpoint is worth is read from its manifest, never from a list that could be lost or lag behind: so a run that
was killed, went on elsewhere or fell back to an older checkpoint keeps the same ones.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _saved
from drivetrain_plugins.checkpoint._format import decode
from drivetrain_plugins.checkpoint._shelf import step_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from drivetrain_plugins.checkpoint._shelf import Shelf

log = logging.getLogger("drivetrain")


@attrs.frozen
class Entry:
    """What retention needs to know of a checkpoint."""

    name: str
    step: int
    metrics: dict[str, float]
    milestone: bool

    @classmethod
    def of(cls, name: str, manifest: dict[str, Any]) -> Entry:
        """Read it from a manifest."""
        return cls(name, manifest["step"], decode(manifest["metrics"], {}), manifest["milestone"])


@attrs.frozen
class Retention:
    """The rule: `keep` newest, `best` of `metric`, every milestone."""

    keep: int
    best: int = 0
    metric: str = ""
    maximize: bool = False

    def newest_of(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return the newest `keep` entries, the newest one first."""
        return sorted(entries, key=lambda e: -e.step)[: self.keep]

    def best_of(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return the best `best` entries, the best one first; a value that is not finite is worse than any other."""
        sign = -1 if self.maximize else 1
        measured = [e for e in entries if math.isfinite(e.metrics.get(self.metric, math.nan))]
        return sorted(measured, key=lambda e: (sign * e.metrics[self.metric], e.step))[: self.best]

    def is_best(self, value: float, step: int, entries: Iterable[Entry]) -> bool:
        """Tell whether a checkpoint of this step with this value of the metric would be kept for it.

        Later ones are of a course that the run has left, and will be replaced.
        """
        now = Entry("", step, {self.metric: value}, milestone=False)
        return now in self.best_of([*(e for e in entries if e.step < step), now])

    def victims(self, entries: Iterable[Entry], last: int, protected: Iterable[str] = ()) -> list[str]:
        """Return which checkpoints may go, oldest first, once the one of step `last` is complete.

        Later ones than `last` belong to a course that the run has left; they are not counted and stay, until a save
        of their step replaces them.
        """
        counted = sorted((e for e in entries if e.step <= last), key=lambda e: e.step)
        stay = {e.name for e in (*self.newest_of(counted), *self.best_of(counted))} | set(protected)
        return [e.name for e in counted if e.name not in stay and not e.milestone]


@attrs.define
class Kept:
    """What stands on a shelf, remembered so that a save does not read every manifest again."""

    shelf: Shelf
    _entries: dict[str, Entry] = attrs.field(factory=dict)

    def entries(self) -> list[Entry]:
        """Return the checkpoints that this plugin wrote, damaged and strange ones left out."""
        names = [n for n in self.shelf.names() if step_of(n) is not None]
        for name in names:
            if name not in self._entries:
                try:
                    self._entries[name] = Entry.of(name, _saved.read_manifest(self.shelf, name))
                except CheckpointError:
                    continue
        return [self._entries[n] for n in names if n in self._entries]

    def add(self, entry: Entry) -> None:
        """Remember one that has just been written."""
        self._entries[entry.name] = entry

    def remove(self, names: Iterable[str]) -> None:
        """Remove checkpoints; a failure is told and no more: the new one is complete."""
        for name in names:
            try:
                self.shelf.remove(name)
            except OSError as error:
                self.complain(error)
            self._entries.pop(name, None)

    def complain(self, error: OSError) -> None:
        """Say that old checkpoints stay."""
        log.warning("checkpoint: old checkpoints in %s could not be removed: %s", self.shelf.where(""), error)
