"""ROUGE, by the package rouge-score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import ConfigError, Problem, hookimpl, option, plugin, require
from drivetrain_plugins.evaluate import _texts

if TYPE_CHECKING:
    from drivetrain import Run


@attrs.define(eq=False)
class StreamingRouge:
    """Add up each text's F-measures."""

    scorer: Any
    types: tuple[str, ...]
    sums: _texts.Sums

    def update(self, predictions: list[str], references: list[str]) -> None:
        """Score each text against its own reference."""
        for made, wanted in zip(predictions, references, strict=True):
            scores = self.scorer.score(wanted, made)
            self.sums.add([*(scores[name].fmeasure for name in self.types), 1])

    def compute(self) -> dict[str, float]:
        """Return the means over texts, from 0 to 1."""
        *sums, rows = self.sums.total()
        return {name: value / rows for name, value in zip(self.types, sums, strict=True)} if rows else {}


@plugin(
    role="evaluate",
    effect="observes",
    requires=["texts"],
    rows="copies",
    companions=_texts.COMPANIONS,
)
class Rouge(_texts.OfTexts):
    """Measure the words (rouge1), pairs (rouge2) and longest subsequence (rougeL) shared with the reference.

    Words are runs of the letters a to z and digits, as in the original; other scripts have none.
    """

    types: tuple[str, ...] = option(
        ("rouge1", "rouge2", "rougeL"), converter=tuple, help="which: rouge1, rouge2, ..., rougeL, rougeLsum"
    )
    use_stemmer: bool = option(False, help="compare the stems of English words (Porter)")
    _scorer: Any = option(None, init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:  # noqa: ARG002
        """Find the library, and let it see the types."""
        library = require("rouge_score.rouge_scorer", plugin="rouge", extra="metrics")
        self._scorer = library.RougeScorer(list(self.types), use_stemmer=self.use_stemmer)
        try:
            self._scorer.score("a", "a")
        except ValueError as error:
            do = "take of rouge1 to rouge9, rougeL and rougeLsum"
            raise ConfigError([Problem(f"rouge: {error}", f"types={list(self.types)}", do)]) from error
        if not self.types:
            raise ConfigError([Problem("rouge: there is no type to measure", "types=[]", "name some, such as rougeL")])

    @hookimpl
    def text_metrics(self, run: Run) -> list[StreamingRouge]:
        """Return fresh sums for this evaluation."""
        return [StreamingRouge(self._scorer, self.types, _texts.Sums.zeros(run, len(self.types) + 1))]
