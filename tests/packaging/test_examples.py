"""The examples: each recipe can be composed, and no row that is measured on was learned from."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest

from drivetrain import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = ["addresses", "lora", "masked_lm", "pronunciation", "questions", "sentiment", "topics"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_composes(name: str):
    """A recipe is read, its options are sound, and its plugins have everything that they need."""
    plan = Recipe.load(EXAMPLES / name / "recipe.toml").plan()
    assert plan.problems == []
    assert {"hf-model", "evaluate", "checkpoint", "export-hf"} <= set(plan.as_dict()["plugins"])


def test_no_recipe_is_forgotten():
    """Every recipe is composed above, but those with other plugins, which CI runs: a module's, `survive`, a third party's."""
    assert sorted(path.parent.name for path in EXAMPLES.glob("*/recipe.toml")) == sorted(
        [*RECIPES, "digits", "survive", "third_party_plugin"]
    )


def check_splits(load: Callable[[str], Any], path: str, field: str) -> Any:
    """Assert that rows are the same in a fresh import and in one split only; return the module."""
    first, second = load(path), load(path)
    parts = {split: first.rows(split) for split in ("train", "evaluate")}
    assert parts == {split: second.rows(split) for split in ("train", "evaluate")}
    texts = {split: {row[field] for row in rows} for split, rows in parts.items()}
    assert not texts["train"] & texts["evaluate"]
    assert [len(texts[split]) for split in parts] == [len(rows) for rows in parts.values()]
    assert 400 <= len(parts["evaluate"]) < 0.2 * len(parts["train"])
    assert first.rows("evaluate/other") is None
    return first


def test_docstrings_are_kept_aside_by_package(load: Callable[[str], Any]):
    """Rows are the same each time; no package or module is in both splits; a limit takes the first rows."""
    data = check_splits(load, "masked_lm/docstrings_data.py", "text")
    packages = {split: {data.docstrings()[row["text"]] for row in data.rows(split)} for split in ("train", "evaluate")}
    assert not packages["train"] & packages["evaluate"]
    assert len(packages["evaluate"]) >= 10
    assert data.rows("train", limit=5) == data.rows("train")[:5]


def test_words_are_kept_aside_with_their_plurals(load: Callable[[str], Any]):
    """Rows are the same each time; a word, its plural and its possessive are on the same side."""
    data = check_splits(load, "pronunciation/words_data.py", "word")
    known = data.pronunciations()
    families = [(word, f"{word}s", f"{word}'s") for word in known if f"{word}s" in known and f"{word}'s" in known]
    assert len(families) > 1000
    assert all(len({data.is_aside(word) for word in family}) == 1 for family in families)
    assert known["tomato"] == ["T AH M EY T OW", "T AH M AA T OW"]


def test_tokenizer_knows_every_word_and_gives_it_back(load: Callable[[str], Any]):
    """The stored folder is what make_model.py makes; its ids of sounds decode to them, and no word has an unknown one."""
    from transformers import AutoConfig, AutoTokenizer

    made, folder = load("pronunciation/make_model.py"), EXAMPLES / "pronunciation" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert json.loads(made.tokenizer().backend_tokenizer.to_str()) == json.loads(tokenizer.backend_tokenizer.to_str())
    wanted = {k: v for k, v in made.configuration().to_diff_dict().items() if k != "transformers_version"}
    stored = AutoConfig.from_pretrained(folder).to_dict()
    assert {key: stored[key] for key in wanted} == wanted
    rows = load("pronunciation/words_data.py").rows("evaluate")
    ids = tokenizer([row["word"] for row in rows] + [row["phonemes"] for row in rows]).input_ids
    assert all(tokenizer.unk_token_id not in each and each[-1] == tokenizer.eos_token_id for each in ids)
    assert [len(each) for each in ids[: len(rows)]] == [len(row["word"]) + 1 for row in rows]
    assert tokenizer.batch_decode(ids[len(rows) :], skip_special_tokens=True) == [row["phonemes"] for row in rows]


def test_phoneme_errors(load: Callable[[str], Any]):
    """Distances are Levenshtein's; a word is right if it is said in any of the dictionary's ways."""
    pronounce = load("pronunciation/pronounce.py")
    for said, wanted, errors in [
        ("k i t t e n", "s i t t i n g", 3),
        ("", "a b", 2),
        ("a b", "a b", 0),
        ("b", "a b", 1),
    ]:
        assert pronounce.distance(said.split(), wanted.split()) == errors
        assert pronounce.distance(wanted.split(), said.split()) == errors
    said = {"tomato": "T AH M AA T OW", "abode": "AH B OW T"}
    assert pronounce.score(said) == "50.0% of the words right, 10.0% phoneme errors"


# --- addresses -------------------------------------------------------------------------------------------------------

ROWS = [
    {"words": ["12", "Oak", "St,", f"Apt {number}"], "tags": ["AddressNumber", "StreetName", "StreetNamePostType", "X"]}
    for number in range(200)
]


def test_addresses_are_split_by_their_text(load: Callable[[str], Any]):
    """Which addresses are kept aside depends neither on their order nor on commas and capitals."""
    fetch = load("addresses/fetch.py")
    parts = fetch.split(ROWS)
    shouted = [{**row, "words": [word.upper().replace(",", " ,") for word in row["words"]]} for row in ROWS]
    random.Random(0).shuffle(shouted)
    keys = [
        {split: {fetch.key(row["words"]) for row in rows} for split, rows in each.items()}
        for each in (parts, fetch.split(shouted))
    ]
    assert keys[0] == keys[1]
    assert not keys[0]["train"] & keys[0]["evaluate"]
    assert 20 <= len(parts["evaluate"]) <= 60
    assert len(parts["evaluate"]) + len(parts["train"]) == 200


def test_another_file_is_refused(load: Callable[[str], Any], tmp_path: Path):
    """A source distribution with other bytes is not opened; its checksum is told."""
    (tmp_path / "usaddress-0.5.16.tar.gz").write_bytes(b"something else")
    with pytest.raises(SystemExit, match="another file: its SHA-256 is"):
        load("addresses/fetch.py").read(tmp_path / "usaddress-0.5.16.tar.gz")
    with pytest.raises(SystemExit, match="cannot be read"):
        load("addresses/fetch.py").read(tmp_path / "missing.tar.gz")


def test_fetching_without_an_index_says_what_to_do(tmp_path: Path):
    """Where pip finds nothing, the script fails, says what is missing and what to do, and leaves no files."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, str(EXAMPLES / "addresses" / "fetch.py"), "--to", str(tmp_path / "data")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "The addresses are missing: pip could not download" in done.stderr
    assert "--sdist usaddress-0.5.16.tar.gz" in done.stderr
    assert not (tmp_path / "data").exists()


def test_entity_f1(load: Callable[[str], Any]):
    """Accuracy and F1 are those counted by hand; the look-up takes a word's most frequent tag."""
    score = load("addresses/score.py")
    wanted = [["N", "S", "S", "T"], ["P", "Z"]]  # five entities
    assert score.entities(wanted[0]) == {(0, 0, "N"), (1, 2, "S"), (3, 3, "T")}
    assert score.score(wanted, wanted) == (1.0, 1.0)
    guessed = [["N", "S", "T", "T"], ["P", "P"]]  # four, of which one is right
    accuracy, f1 = score.score(guessed, wanted)
    assert accuracy == pytest.approx(4 / 6)
    assert f1 == pytest.approx(2 * 1 / (4 + 5))
    rows = [{"words": ["Oak", "oak", "st"], "tags": ["S", "S", "T"]}, {"words": ["OAK"], "tags": ["P"]}]
    assert score.look_up(rows, [["oAk", "St", "never"]]) == [["S", "T", "S"]]


def test_fetched_addresses_have_the_labels_of_the_recipe():
    """Where the addresses were fetched, the recipe's labels are exactly their tags, and no address is in both files."""
    folder = EXAMPLES / "addresses" / "data"
    if not folder.is_dir():
        pytest.skip("python examples/addresses/fetch.py has not been run here")
    rows = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "evaluate")
    }
    tags = {tag for part in rows.values() for row in part for tag in row["tags"]}
    labels = Recipe.load(EXAMPLES / "addresses" / "recipe.toml").as_dict()["plugins"]["hf-model"]["labels"]
    assert sorted(tags) == labels
    texts = {name: {" ".join(row["words"]) for row in part} for name, part in rows.items()}
    assert not texts["train"] & texts["evaluate"]


# --- examples/optimizers ---------------------------------------------------------------------------------------------


def test_every_optimizer_is_compared(load: Callable[[str], Any]):
    """Each plugin that builds an optimizer has a rate in the comparison, and nothing else has."""
    compare = load("optimizers/compare.py")
    assert sorted(compare.OPTIMIZERS) == sorted(compare.optimizers())


def test_the_picture_has_a_panel_for_each(load: Callable[[str], Any]):
    """Two optimizers and one that does not run make two panels, inside the picture, best first."""
    compare = load("optimizers/compare.py")
    results = [compare.train(name, 12) for name in ("sgd", "adamw")]
    made = ET.fromstring(compare.draw([*results, {"name": "none", "reason": "not here"}]))
    titles = [e.text for e in made.iter() if e.get("font-weight") == "bold"]
    best = sorted(results, key=lambda r: r["held_out_loss"])
    assert [title.split()[0] for title in titles] == [r["name"] for r in best]
    lines = [e for e in made.iter() if e.tag.endswith("polyline")]
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert len(points) == 12
        assert all(0 <= x <= compare.WIDTH and 0 <= y <= compare.HEIGHT for x, y in points)
