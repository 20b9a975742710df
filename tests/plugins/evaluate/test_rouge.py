"""`rouge`: the mean of what rouge-score says of each text."""

from __future__ import annotations

import math

import pytest
from plugin_helpers import cpu_run
from text_metrics import compute, on_two_ranks, texts

from drivetrain import ConfigError
from drivetrain_plugins import Rouge


@pytest.mark.parametrize("stems", [False, True])
@pytest.mark.parametrize("types", [("rouge1", "rouge2", "rougeL"), ("rougeLsum",)])
def test_scores_are_means_over_texts(stems, types):
    """Each is the mean F-measure of rouge-score, whatever the batches."""
    from rouge_score.rouge_scorer import RougeScorer

    predictions, references = texts(11)
    predictions[3] = references[3].replace("ran", "running").replace("house", "houses")
    scorer = RougeScorer(list(types), use_stemmer=stems)
    scores = [scorer.score(target=b, prediction=a) for a, b in zip(predictions, references, strict=True)]
    expected = {name: math.fsum(score[name].fmeasure for score in scores) / 11 for name in types}
    for size in (1, 4, 11):
        made = compute(Rouge(types=list(types), use_stemmer=stems), predictions, references, size=size)
        assert made == pytest.approx(expected, rel=1e-12)
    assert 0.2 < expected[types[-1]] < 1


def test_closed_form():
    """Two of three words are right, in order: unigrams 2/3, bigrams 1/2."""
    made = compute(Rouge(), ["the cat ran"], ["the cat sat"])
    assert made == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3})
    assert compute(Rouge(), [], []) == {}


@pytest.mark.parametrize("types", [["rougeX"], []])
def test_types_that_are_none_are_refused(types):
    """What the library cannot measure is refused before the first step."""
    with pytest.raises(ConfigError, match=r"rouge: (?s:.*)types=\["):
        Rouge(types=types).assembled(cpu_run())


def test_two_ranks_score_together():
    """Both ranks say what one would."""
    predictions, references = texts(7)
    expected = pytest.approx(compute(Rouge(), predictions, references), rel=1e-12)
    assert on_two_ranks("Rouge", predictions, references) == [expected] * 2
