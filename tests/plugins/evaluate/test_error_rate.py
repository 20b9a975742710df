"""`error-rate`: edits over lengths, as torchmetrics counts them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_metrics import compute, on_two_ranks, texts

from drivetrain_plugins import ErrorRate
from drivetrain_plugins.evaluate.error_rate import distance


def by_definition(made, wanted):
    """Return Levenshtein's recursion, a cell at a time."""
    row = list(range(len(wanted) + 1))
    for i, one in enumerate(made, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(wanted, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (one != other))
    return row[-1]


@settings(deadline=None, max_examples=200)
@given(made=st.text("abcé", max_size=12), wanted=st.text("abcé", max_size=12))
def test_distance_is_levenshteins(made, wanted):
    """The rows of the table are those of the definition, for empty texts too."""
    assert distance(made, wanted) == distance(wanted, made) == by_definition(made, wanted)


@pytest.mark.parametrize(
    ("unit", "name"), [("character", "CharErrorRate"), ("word", "WordErrorRate"), ("token", "WordErrorRate")]
)
def test_rate_is_that_of_torchmetrics(unit, name):
    """All edits of the set over the length of all references, whatever the batches."""
    from torchmetrics import text

    predictions, references = texts(25)
    library = getattr(text, name)()
    library.update(predictions, references)
    for size in (1, 4, 25):
        made = compute(ErrorRate(unit=unit), predictions, references, size=size)
        assert made == {f"{unit}_error_rate": pytest.approx(library.compute().item(), rel=1e-6)}
    assert 0 < library.compute() < 1


def test_edges():
    """Too much text is an error above 1; references that are all empty have no rate."""
    assert compute(ErrorRate(unit="character"), ["abcd", ""], ["a", "b"]) == {"character_error_rate": 2.0}
    assert compute(ErrorRate(), ["a"], [""]) == {}
    assert compute(ErrorRate(), [], []) == {}
    with pytest.raises(ValueError, match="unit must be one of"):
        ErrorRate(unit="sentence")


def test_two_ranks_count_together():
    """Both ranks say what one would, bit for bit."""
    predictions, references = texts(7)
    assert on_two_ranks("ErrorRate", predictions, references) == [compute(ErrorRate(), predictions, references)] * 2
