"""`exact-match`: the share of texts that are right, as torchmetrics counts it for SQuAD."""

from __future__ import annotations

import pytest
from text_metrics import compute, on_two_ranks, texts

from drivetrain_plugins import ExactMatch


@pytest.mark.parametrize(
    ("normalize", "made", "wanted", "right"),
    [
        ("nothing", "a b", "a b", 1),
        ("nothing", "a b ", "a b", 0),
        ("strip", " a b\n", "a b", 1),
        ("strip", "A b", "a b", 0),
        ("lower", " A b", "a B", 1),
        ("squad", "The cat.", "cat", 1),
        ("squad", "cats", "cat", 0),
    ],
)
def test_what_is_done_to_both_texts(normalize, made, wanted, right):
    """Each way to normalise makes equal what it should, and no more."""
    assert compute(ExactMatch(normalize=normalize), [made, "x"], [wanted, "y"]) == {"exact_match": right / 2}


def test_squad_is_that_of_torchmetrics():
    """Answers are compared as torchmetrics' SQuAD does."""
    from torchmetrics.text import SQuAD

    predictions, references = texts(20)
    predictions[1:6] = [f"The {text.upper()}!" for text in references[1:6]]
    library = SQuAD()
    library.update(
        [{"prediction_text": text, "id": str(number)} for number, text in enumerate(predictions)],
        [
            {"answers": {"answer_start": [0], "text": [text]}, "id": str(number)}
            for number, text in enumerate(references)
        ],
    )
    expected = library.compute()["exact_match"].item() / 100
    assert compute(ExactMatch(normalize="squad"), predictions, references)["exact_match"] == pytest.approx(expected)
    assert 6 / 20 <= expected < 1


def test_no_texts_no_number():
    """Where nothing was made nothing is said."""
    assert compute(ExactMatch(), [], []) == {}


def test_two_ranks_count_together():
    """Both ranks say what one would, though they have different numbers of texts."""
    predictions, references = texts(7)
    assert on_two_ranks("ExactMatch", predictions, references) == [compute(ExactMatch(), predictions, references)] * 2
