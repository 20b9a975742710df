"""`bleu`: what sacrebleu says of the set as one corpus."""

from __future__ import annotations

import pytest
import sacrebleu
from plugin_helpers import cpu_run
from text_metrics import compute, on_two_ranks, texts

from drivetrain import ConfigError
from drivetrain_plugins import Bleu


@pytest.mark.parametrize(
    "options",
    [{}, {"tokenize": "char"}, {"lowercase": True, "tokenize": "intl"}, {"smooth": "floor"}],
    ids=["plain", "characters", "lower case", "floor"],
)
@pytest.mark.parametrize("number", [1, 12])
def test_score_is_that_of_the_corpus(options, number):
    """It equals sacrebleu.corpus_bleu over all texts at once, which is no mean of batches."""
    predictions, references = texts(number, seed=number)
    predictions[-1] = predictions[-1].upper()
    given = {key.replace("smooth", "smooth_method"): value for key, value in options.items()}
    expected = sacrebleu.corpus_bleu(predictions, [references], **given).score
    for size in (1, 5, 12):
        assert compute(Bleu(**options), predictions, references, size=size) == {"bleu": expected}


def test_chrf_is_that_of_the_corpus():
    """It equals sacrebleu.corpus_chrf."""
    predictions, references = texts(12)
    expected = sacrebleu.corpus_chrf(predictions, [references]).score
    assert compute(Bleu(chrf=True), predictions, references)["chrf"] == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < 100


def test_nothing_made():
    """No texts have no score; texts that are all empty have the score 0."""
    assert compute(Bleu(chrf=True), [], []) == {}
    assert compute(Bleu(), [""], ["the cat"]) == {"bleu": 0.0}


def test_an_unknown_tokenizer_is_refused():
    """Before the first step, with those that there are."""
    with pytest.raises(ConfigError, match=r"no such tokenizer(?s:.*)tokenize='words'(?s:.*)13a, intl"):
        Bleu(tokenize="words").assembled(cpu_run())


def test_two_ranks_have_the_corpus_score():
    """Counts are summed over ranks, so that it is the same bit for bit; a rank may have no text."""
    for number in (1, 7):
        predictions, references = texts(number)
        assert on_two_ranks("Bleu", predictions, references) == [compute(Bleu(), predictions, references)] * 2
