"""BLEU and chrF of a whole set, by sacrebleu."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import ConfigError, Problem, hookimpl, option, plugin, require
from drivetrain_plugins.evaluate import _texts

if TYPE_CHECKING:
    from drivetrain import Run


@attrs.define(eq=False)
class StreamingScore:
    """Add up a score's sufficient statistics: counts of matches, which sum over texts, batches and ranks."""

    name: str
    library: Any  # one of sacrebleu.metrics
    run: Run
    sums: _texts.Sums | None = None

    def update(self, predictions: list[str], references: list[str]) -> None:
        """Add the counts of each text against its own reference."""
        # The library's own corpus_score is these two calls; public is only what does both at once.
        for counts in self.library._extract_corpus_statistics(predictions, [references]):  # noqa: SLF001
            if self.sums is None:
                self.sums = _texts.Sums.zeros(self.run, len(counts))
            self.sums.add(counts)

    def compute(self) -> dict[str, float]:
        """Return the score of all texts as one corpus, from 0 to 100."""
        if self.sums is None:  # the number of counts is the same with any text
            self.sums = _texts.Sums.zeros(self.run, len(self.library._extract_corpus_statistics(["a"], [["a"]])[0]))  # noqa: SLF001
        counts = [round(count) for count in self.sums.total()]
        if not any(counts):
            return {}
        return {self.name: float(self.library._compute_score_from_stats(counts).score)}  # noqa: SLF001


@plugin(
    role="evaluate",
    effect="observes",
    requires=["texts"],
    rows="copies",
    companions=_texts.COMPANIONS,
)
class Bleu(_texts.OfTexts):
    """Measure the n-grams shared with the references, over the set as one corpus: BLEU, and chrF if wanted."""

    tokenize: str = option("13a", help='how sacrebleu splits words: "13a", "intl", "char", "none", ...')
    lowercase: bool = option(False, help="ignore case")
    smooth: str = option("exp", choices=["exp", "floor", "add-k", "none"], help="what is done to counts of 0")
    chrf: bool = option(False, help="measure chrF2, of n-grams of characters, too")
    _made: tuple[tuple[str, Any], ...] = option((), init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:  # noqa: ARG002
        """Find the library, and let it see the options."""
        library = require("sacrebleu.metrics", plugin="bleu", extra="metrics")
        if self.tokenize not in library.BLEU.TOKENIZERS:
            do = f"take one of {', '.join(library.BLEU.TOKENIZERS)}"
            raise ConfigError([Problem("bleu: sacrebleu has no such tokenizer", f"tokenize={self.tokenize!r}", do)])
        bleu = library.BLEU(tokenize=self.tokenize, lowercase=self.lowercase, smooth_method=self.smooth, force=True)
        self._made = (("bleu", bleu), *([("chrf", library.CHRF(lowercase=self.lowercase))] if self.chrf else []))

    @hookimpl
    def text_metrics(self, run: Run) -> list[StreamingScore]:
        """Return fresh counts for this evaluation."""
        return [StreamingScore(name, made, run) for name, made in self._made]
