"""`mix`: several sources by weight, map-style and streams."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import pytest
from data_helpers import assert_goes_on, drain, lenient_run, strict_run, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_helpers import as_rows, columns, fit, net

from drivetrain import BadRow, ConfigError, DataError, Iterated, Recipe, hookimpl
from drivetrain_plugins import SGD, Evaluate, Jsonl
from drivetrain_plugins.data._mixing import Mixture, counts_of, interleaved
from drivetrain_plugins.data.mix import Mix
from drivetrain_plugins.shared.table import Table


class Given:
    """A source of rows by split."""

    def __init__(self, train, **more):
        self.splits = {"train": train, **{name.replace("_", "/"): rows for name, rows in more.items()}}
        self.facts = {"splits": [name for name in self.splits if "/" in name]}

    @hookimpl
    def build_dataset(self, split):
        return self.splits.get(split)


def rows(name, count):
    return [{"from": name, "n": n} for n in range(count)]


def mixed(sources, seed=0, **options):
    return Mix({name: Given(data) for name, data in sources.items()}, **options).build_dataset(
        lenient_run(seed)[0], "train"
    )


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 5)), min_size=1, max_size=4),
    st.sampled_from(["all", "first"]),
)
def test_counts_are_in_the_weights_proportions(sources, exhausted):
    """Rows of each source are to a row in the weights' proportions, end where they should, and none is missed or repeated."""
    sizes, weights = zip(*sources, strict=True)
    counts = counts_of(sizes, weights, exhausted=exhausted)
    if exhausted == "first":
        assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
        total = min(size / weight for size, weight in sources)
    else:
        assert all(count >= size for count, size in zip(counts, sizes, strict=True))
        total = max(size / weight for size, weight in sources)
    assert all(abs(count - max(1, total * weight)) <= 1 for count, weight in zip(counts, weights, strict=True))
    assert any(count == size for count, size in zip(counts, sizes, strict=True))
    source = interleaved(counts, 3)
    assert [int((source == i).sum()) for i in range(len(counts))] == counts
    for i, count in enumerate(counts):  # any stretch of the mix has its share of each source
        seen = (source == i).cumsum()
        share = [count * (n + 1) / len(source) for n in range(len(source))]
        assert max(abs(a - b) for a, b in zip(seen.tolist(), share, strict=True)) <= len(counts) + 1


def test_all_repeats_the_small_and_first_stops_with_it():
    """With "all" every row of every source is there and the small one is repeated evenly; "first" ends with one."""
    sources = {"small": rows("small", 5), "large": rows("large", 40)}
    made = list(mixed(sources, weights={"small": 1, "large": 2}))
    count = Counter((row["from"], row["n"]) for row in made)
    assert (len(made), {count["large", n] for n in range(40)}, {count["small", n] for n in range(5)}) == (60, {1}, {4})
    made = list(mixed(sources, weights={"small": 1, "large": 2}, exhausted="first"))
    count = Counter((row["from"], row["n"]) for row in made)
    assert (len(made), {count["small", n] for n in range(5)}) == (15, {1})
    assert [count["large", n] for n in range(40)].count(1) == 10
    assert Counter(row["from"] for row in mixed(sources)) == {"small": 5, "large": 40}


def test_the_mix_depends_on_the_seed_only():
    """The same seed gives the same mix, another seed another one."""
    sources = {"a": rows("a", 30), "b": rows("b", 50)}
    mixes = [list(mixed(sources, seed, weights={"a": 1, "b": 1}, exhausted="first")) for seed in (0, 0, 1)]
    assert mixes[0] == mixes[1] != mixes[2]


@pytest.mark.parametrize("kind", [list, Table.of])
def test_whole_batches_are_fetched_source_by_source(kind):
    """A batch is the rows at its indices in their order, columns where all sources are columns."""
    made = mixed({name: kind([{"ids": [n] * (n % 3), "n": n, "s": name} for n in range(9)]) for name in "abc"})
    picks = [20, 3, 3, 11, 0, 26]
    batch = made.__getitems__(picks)
    assert isinstance(batch, list if kind is list else Table)
    assert list(batch) == [made[i] for i in picks]


def test_sources_that_differ_keep_what_they_share_and_are_told(caplog):
    """Rows have the fields that all sources have; what is left out is told, and nothing shared is refused."""
    differing = {"a": [{"text": "x", "label": 1, "id": 4}], "b": [{"label": 2, "text": "y"}]}
    assert sorted(mixed(differing), key=str) == [{"text": "x", "label": 1}, {"text": "y", "label": 2}]
    assert "rows differ (a: id, label, text; b: label, text); only text, label are kept" in caplog.text
    tables = {name: Table.of(data) for name, data in differing.items()}
    assert sorted(mixed(tables).__getitems__([0, 1]), key=str) == [{"text": "x", "label": 1}, {"text": "y", "label": 2}]
    with pytest.raises(ConfigError, match=r"no field in common \(a: text; b: label\)"):
        mixed({"a": [{"text": "x"}], "b": [{"label": 2}]})


def test_each_sources_evaluation_is_a_set_of_its_own():
    """Evaluation rows are not mixed: a source's are under its name, and its named sets under both names."""
    mix = Mix({"a": Given([1], evaluate=[2]), "b": Given([3], evaluate_x=[4])})
    assert mix.facts == {"splits": ["evaluate/a", "evaluate/b", "evaluate/b/x"]}
    run = strict_run()
    assert [mix.build_dataset(run, split) for split in mix.facts["splits"]] == [[2], None, [4]]
    assert mix.build_dataset(run, "evaluate") is None


@pytest.mark.parametrize("exhausted", ["all", "first"])
def test_streams_are_mixed_by_row_and_gone_on_in_exactly(exhausted):
    """Of streams, going on from any position gives the rest; "all" has every row, "first" ends with the first to end."""
    sources = {"a": Iterated(rows("a", 11)), "b": Iterated(rows("b", 40)), "c": rows("c", 7)}
    stream = mixed(sources, weights={"a": 1, "b": 2, "c": 1}, exhausted=exhausted)
    made = assert_goes_on(stream, epoch=1)
    count = Counter((row["from"], row["n"]) for row in made)
    whole = [name for name, size in (("a", 11), ("b", 40), ("c", 7)) if all(count[name, n] for n in range(size))]
    if exhausted == "all":
        assert whole == ["a", "b", "c"]
    else:
        assert len(whole) == 1
        assert max(count.values()) == 1
    assert drain(stream, 2)[0] != made


def test_the_shares_of_streams_are_the_weights():
    """Over many rows each stream's share is its weight, as a binomial draw has it."""
    stream = mixed(
        {name: Iterated([{"s": name}] * 3) for name in "ab"} | {"c": Iterated([{"s": "c"}] * 20_000)},
        weights={"a": 3, "c": 6},
    )
    found = Counter(row["s"] for row in drain(stream, count=20_000)[0])
    for name, share in (("a", 0.3), ("b", 0.1), ("c", 0.6)):
        assert abs(found[name] - 20_000 * share) < 5 * math.sqrt(20_000 * share * (1 - share))


def test_a_stream_that_starts_again_is_in_its_next_pass():
    """A small stream that is repeated hears another epoch each time, and a bad row of it passes as it is."""
    heard = []

    class Small:
        def set_epoch(self, epoch):
            heard.append(epoch)

        def __iter__(self):
            return iter([{"n": 1}, BadRow("small:2: torn")])

    stream = mixed({"small": Iterated(Small()), "large": Iterated([{"n": 0, "m": 1}] * 20), "map": [{"n": 2}] * 20})
    made, _ = drain(stream, 3)
    assert BadRow("small:2: torn") in made
    assert len(heard) == len(set(heard)) > 3
    assert heard[0] == 3


def test_an_empty_source_is_named():
    """A source without rows is refused by name: map-style before the run, a stream when it is read."""
    with pytest.raises(ConfigError, match="the source 'b' has no training rows"):
        mixed({"a": [1], "b": []})
    with pytest.raises(ConfigError, match="the source 'b' has no training rows"):
        mixed({"a": [1], "b": None})
    with pytest.raises(DataError, match="the source 'b' gave no rows"):
        drain(mixed({"a": Iterated([1] * 99), "b": Iterated([])}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": {}}, "there are no sources"),
        ({"sources": {"a": {"train": "x"}}}, r"'a' needs plugin = .*Received: \{'train': 'x'\}"),
        ({"sources": {"a": {"plugin": "jsnl", "train": "x"}}}, "did you mean 'jsonl'"),
        ({"sources": {"a": {"plugin": "jsonl", "trian": "x"}}}, "'jsonl' has no option 'trian'; did you mean 'train'"),
        ({"sources": {"a": {"plugin": "jsonl"}}}, "the source 'a': .*'train'"),
        ({"sources": {"a": {"plugin": "text", "train": "x", "by": "word"}}}, "the source 'a': by must be one of"),
        ({"sources": {"a": {"plugin": "sgd"}}}, "must be a plugin that brings data. Received: SGD"),
        ({"sources": {"a": {"plugin": "tokenize"}}}, "must be a plugin that brings data. Received: Tokenize"),
        ({"sources": {"a": Jsonl("x")}, "weights": {"b": 1}}, "no source 'b' to weigh"),
        ({"sources": {"a": Jsonl("x")}, "weights": {"a": 0}}, "weight of 'a' must be a number above 0. Received: 0"),
        ({"sources": {"a": Jsonl("x")}, "weights": {"a": float("inf")}}, "weight of 'a' must be a number above 0"),
    ],
)
def test_what_is_wrong_with_a_mix_is_said_before_a_run(options, message):
    """Sources and weights are checked when the plugin is made, with source and nearest name."""
    with pytest.raises(ConfigError, match=message):
        Mix(**options)


def test_a_recipe_mixes_files(tmp_path):
    """In a recipe each source is a table with the name of its plugin; the run sees both files' rows."""
    one = write_jsonl(tmp_path / "one.jsonl", rows("one", 6))
    two = write_jsonl(tmp_path / "two.jsonl", rows("two", 3))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        [plugins.mix]
        weights = {{one = 2.0}}
        [plugins.mix.sources.one]
        plugin = "jsonl"
        train = "{one}"
        [plugins.mix.sources.two]
        plugin = "jsonl"
        train = "{two}"
        evaluate = "{two}"
        """
    )
    mix = Recipe.load(recipe).trainer().plugins["mix"]
    made = mix.build_dataset(strict_run(), "train")
    assert isinstance(made, Mixture)
    assert sorted(made, key=str) == sorted([*rows("one", 6), *rows("two", 3)], key=str)
    assert mix.build_dataset(strict_run(), "evaluate/two") == rows("two", 3)


def test_a_run_trains_on_the_mix_and_evaluates_each_source():
    """A run on a mix of two sources evaluates both by name."""
    data = as_rows(columns(20))
    mix = Mix({"a": Given(data[:8], evaluate=data[:4]), "b": Given(data[8:], evaluate=data[4:])}, weights={"a": 2})
    trainer, _ = fit(net(), [mix, SGD(lr=0.1), Evaluate()], None, epochs=1)
    assert {name for name in trainer.run.metrics if name.startswith("evaluate")} == {
        "evaluate/a/loss",
        "evaluate/b/loss",
    }
    assert (
        trainer.run.progress.rows == len(mix.build_dataset(SimpleNamespace(settings=trainer.settings), "train")) == 36
    )
