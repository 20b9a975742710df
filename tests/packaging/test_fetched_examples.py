"""The examples whose rows are fetched: how these are split, and what is measured on them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_a_review_is_on_one_side(load: Callable[[str], Any]):
    """Sentences of one review stay together, whatever their order; what stands there twice or has no side is left out."""
    fetch = load("sentiment/fetch.py")
    rated = {
        "tweets": [(str(number), 1.0 - number % 2 * 2, f"said {number} &amp; done") for number in range(200)],
        "movies": [(str(number // 5), 0.5 + number % 3, f"a  scene {number}") for number in range(500)],
    }
    rated["tweets"] += [("900", 0.1, "neither one nor the other"), ("901", 2.0, "SAID 0 & done!")]
    parts = fetch.split(rated)
    assert sum(map(len, parts.values())) == 700
    where = {row["text"]: name for name, rows in parts.items() for row in rows}
    assert where["said 0 & done"] in ("train", "tweets")
    for review in range(100):
        assert len({where[f"a scene {number}"] for number in range(5 * review, 5 * review + 5)}) == 1
    assert {row["label"] for row in parts["tweets"]} == {"positive", "negative"}
    assert 15 <= len(parts["tweets"]) <= 50
    shuffled = {domain: random.Random(0).sample(rows, len(rows)) for domain, rows in rated.items()}
    again = fetch.split({**shuffled, "tweets": rated["tweets"]})
    assert {name: {row["text"] for row in rows} for name, rows in again.items()} == {
        name: {row["text"] for row in rows} for name, rows in parts.items()
    }


def country(number: int) -> dict[str, Any]:
    """Return made-up facts."""
    return {
        "Government": {
            "Capital": {"name": {"text": f"City {number} (also Town)"}},
            "Government type": {"text": "republic"},
        },
        "Geography": {
            "Coastline": {"text": f"{number} km; none in the east"},
            "Climate": {"text": " ".join(f"word{place}" for place in range(40))},
            "Terrain": {"text": "NA"},
        },
    }


def test_an_answer_stands_where_it_says(load: Callable[[str], Any]):
    """Each answer begins at its place in the text; no country is in both splits; texts are cut, and gaps asked nothing."""
    fetch = load("questions/fetch.py")
    parts = fetch.questions({f"Land {number}": country(number) for number in range(200)})
    assert sum(map(len, parts.values())) == 200 * 4
    for row in (row for rows in parts.values() for row in rows):
        assert row["context"][row["start"] :].startswith(row["answer"])
        assert len(row["answer"].split()) <= 12
    names = {
        split: {row["question"].partition("Land ")[2].split("?")[0].split()[0] for row in rows}
        for split, rows in parts.items()
    }
    assert not names["train"] & names["evaluate"]
    assert 10 <= len(names["evaluate"]) <= 60
    assert {row["answer"] for row in parts["train"] if "coastline" in row["question"]} == {
        f"{number} km" for number in names["train"]
    }


def test_spans_are_counted_by_hand(load: Callable[[str], Any]):
    """An end before its beginning is not taken, padding is not, and both ends must be right."""
    data = load("questions/questions_data.py")
    predictions = {
        "start_logits": np.array([[0.0, 3.0, 1.0], [5.0, 1.0, -100.0], [-3.0, -2.0, -100.0]]),
        "end_logits": np.array([[9.0, 1.0, 2.0], [0.0, 4.0, -100.0], [-1.0, -5.0, -100.0]]),
    }
    labels = {"start_positions": np.array([1, 0, 1]), "end_positions": np.array([2, 0, 1])}
    assert data.spans(predictions, labels) == {"exact": pytest.approx(2 / 3), "start": 1.0}


@pytest.mark.parametrize(("path", "name"), [("sentiment/fetch.py", "vader.tar.gz"), ("questions/fetch.py", "book.tgz")])
def test_another_file_is_refused(path: str, name: str, tmp_path: Path, load: Callable[[str], Any]):
    """A package with other bytes is not opened; its checksum is told."""
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(SystemExit, match="another file: its SHA-256 is"):
        load(path).read(tmp_path / name)


def test_digits_are_kept_apart(load: Callable[[str], Any]):
    """No picture is in both splits; a limit takes the first rows."""
    data = load("digits/digits_data.py")
    parts = {split: {row["image"].tobytes() for row in data.rows(split)} for split in ("train", "evaluate")}
    assert not parts["train"] & parts["evaluate"]
    assert 300 <= len(data.rows("evaluate")) <= 450
    assert [row["label"] for row in data.rows("train", limit=5)] == [row["label"] for row in data.rows("train")[:5]]
    assert data.rows("predict") is None
