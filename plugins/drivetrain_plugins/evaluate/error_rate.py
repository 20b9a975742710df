"""Edit distance between generated texts and their references: character and word error rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.evaluate import _texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain import Run

UNITS = ("character", "word", "token")


def distance(made: Sequence[str], wanted: Sequence[str]) -> int:
    """Return the least number of units to insert, delete or replace (Levenshtein, 1966).

    A row of the table at a time: what is left of a cell reaches it by one edit a place, so a running minimum of
    `cost - place` finds all insertions at once.
    """
    ids: dict[str, int] = {}
    columns = np.array([ids.setdefault(unit, len(ids)) for unit in wanted], np.int64)
    places = np.arange(len(columns) + 1)
    costs = places.copy()
    for number, unit in enumerate(made, 1):
        row = np.minimum(costs[1:] + 1, costs[:-1] + (columns != ids.get(unit, -1)))
        costs = np.minimum.accumulate(np.concatenate(([number], row)) - places) + places
    return int(costs[-1])


@attrs.define(eq=False)
class StreamingErrorRate:
    """Add up edits and lengths."""

    unit: str
    counts: _texts.Sums

    def update(self, predictions: list[str], references: list[str]) -> None:
        """Add the edits from each text to its own reference."""
        for made, wanted in zip(predictions, references, strict=True):
            whole = self.unit == "character"
            one, other = (made, wanted) if whole else (made.split(), wanted.split())
            self.counts.add([distance(one, other), len(other)])

    def compute(self) -> dict[str, float]:
        """Return all edits over the length of all references; it may be above 1."""
        edits, length = self.counts.total()
        return {f"{self.unit}_error_rate": edits / length} if length else {}


@plugin(
    role="evaluate",
    effect="observes",
    requires=["texts"],
    rows="copies",
    companions=_texts.COMPANIONS,
)
class ErrorRate(_texts.OfTexts):
    """Measure the edits a set's texts need, over the length of its references (CER, WER)."""

    unit: str = option("word", choices=UNITS, help='"word" and "token" lie between spaces; they differ in name only')

    @hookimpl
    def text_metrics(self, run: Run) -> list[StreamingErrorRate]:
        """Return a fresh count for this evaluation."""
        return [StreamingErrorRate(self.unit, _texts.Sums.zeros(run, 2))]
