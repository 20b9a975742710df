"""The share of generated texts that equal their references."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

import attrs

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.evaluate import _texts

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def squad(text: str) -> str:
    """Return lower-case words without punctuation and English articles, as the SQuAD benchmark compares answers."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


NORMALIZED: dict[str, Callable[[str], str]] = {
    "nothing": str,
    "strip": str.strip,
    "lower": lambda text: text.strip().lower(),
    "squad": squad,
}


@attrs.define(eq=False)
class StreamingExactMatch:
    """Count texts that are right, and all."""

    normalize: str
    counts: _texts.Sums

    def update(self, predictions: list[str], references: list[str]) -> None:
        """Compare each with its own."""
        made = NORMALIZED[self.normalize]
        hits = sum(made(one) == made(other) for one, other in zip(predictions, references, strict=True))
        self.counts.add([hits, len(references)])

    def compute(self) -> dict[str, float]:
        """Return the share of right texts."""
        hits, rows = self.counts.total()
        return {"exact_match": hits / rows} if rows else {}


@plugin(
    role="evaluate",
    effect="observes",
    requires=["texts"],
    rows="copies",
    companions=_texts.COMPANIONS,
)
class ExactMatch(_texts.OfTexts):
    """Measure how often the generated text is the reference."""

    normalize: str = option("strip", choices=list(NORMALIZED), help="what is done to both texts before")

    @hookimpl
    def text_metrics(self, run: Run) -> list[StreamingExactMatch]:
        """Return a fresh count for this evaluation."""
        return [StreamingExactMatch(self.normalize, _texts.Sums.zeros(run, 2))]
