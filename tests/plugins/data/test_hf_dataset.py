"""`hf-dataset`: sets of the datasets library."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from data_helpers import assert_goes_on, drain
from plugin_helpers import CLASSES, FEATURES, fit, net

from drivetrain import ConfigError, DataError
from drivetrain_plugins import SGD, Evaluate, HFDataset

ROWS = [{"features": [float(n + k) for k in range(FEATURES)], "labels": n % CLASSES} for n in range(12)]


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path, monkeypatch):
    """Keep the library's cache in the test's folder, and its bars off."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def saved(tmp_path):
    """Return a folder with a set of two splits, as save_to_disk writes it."""
    splits = {"train": datasets.Dataset.from_list(ROWS), "validation": datasets.Dataset.from_list(ROWS[:5])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


def test_saved_folder_gives_its_splits(saved):
    """The rows of each split come back as they were saved."""
    plugin = HFDataset(saved)
    assert list(plugin.build_dataset("train")) == ROWS
    assert list(plugin.build_dataset("evaluate")) == ROWS[:5]
    assert plugin.build_dataset("evaluate/other") is None


def test_evaluation_can_be_left_out_or_named(saved):
    """None means no evaluation; any split can be evaluated on."""
    assert HFDataset(saved, evaluate=None).build_dataset("evaluate") is None
    assert len(HFDataset(saved, evaluate="train").build_dataset("evaluate")) == 12


def test_builder_reads_files(tmp_path):
    """The json builder reads files by split, and slices of a split."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    plugin = HFDataset(
        "json",
        data_files={"train": str(tmp_path / "rows.jsonl")},
        train="train[:75%]",
        evaluate="train[75%:]",
    )
    assert list(plugin.build_dataset("train")) == ROWS[:9]
    assert list(plugin.build_dataset("evaluate")) == ROWS[9:]


def test_run_trains_on_it_as_on_its_rows(saved):
    """The run fetches whole batches of it and sees every row's values."""

    class Stacked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, features, labels):
            return self.net(torch.stack(features, 1).float(), labels)

    weights, metrics = [], []
    for plugins, rows, held in ([[HFDataset(saved)], None, None], [[], ROWS, ROWS[:5]]):
        trainer, _ = fit(Stacked(), [*plugins, SGD(lr=0.01), Evaluate()], rows, held, epochs=2)
        weights.append(trainer.run.model.net.first.weight.detach())
        metrics.append(trainer.run.metrics["evaluate/loss"])
    assert torch.equal(*weights)
    assert metrics[0] == metrics[1]


def test_a_split_that_is_not_there_is_named(saved, tmp_path):
    """A missing split is refused with its name and what to do, for folders and for builders."""
    with pytest.raises(ConfigError, match=r"split 'test' of .*saved[\s\S]*evaluate=None"):
        HFDataset(saved, evaluate="test").build_dataset("evaluate")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    plugin = HFDataset("json", data_files={"train": str(tmp_path / "rows.jsonl")})
    with pytest.raises(ConfigError, match=r"split 'validation' of 'json'[\s\S]*evaluate=None"):
        plugin.build_dataset("evaluate")


def test_a_set_without_splits_is_explained(tmp_path):
    """A folder that holds one set and no splits is refused with what to save instead."""
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(ConfigError, match="a folder needs a saved DatasetDict"):
        HFDataset(str(tmp_path / "one")).build_dataset("train")


def test_an_empty_folder_is_refused(tmp_path):
    """A folder in which nothing was saved is refused by name."""
    with pytest.raises(ConfigError, match=f"split 'train' of '{tmp_path}' cannot be loaded"):
        HFDataset(str(tmp_path)).build_dataset("train")


@pytest.mark.parametrize("content", [None, '{"a": 1}\n{"a": \n'], ids=["missing", "cut"])
def test_files_that_cannot_be_read_are_refused(content, tmp_path):
    """A missing file, and one that is no JSON, are drivetrain's error with the library's reason."""
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    plugin = HFDataset("json", data_files={"train": str(tmp_path / "rows.jsonl")})
    with pytest.raises((ConfigError, DataError), match="split 'train' of 'json' cannot be loaded"):
        plugin.build_dataset("train")


def test_plain_columns_are_read_where_arrow_has_them(saved):
    """A set without formats or picked rows becomes columns over its memory, some of them if so asked."""
    from drivetrain_plugins.shared.table import Ragged, Table

    table = HFDataset(saved).build_dataset("train")
    assert isinstance(table, Table)
    assert isinstance(table.columns["features"], Ragged)
    assert list(HFDataset(saved, columns=["labels"]).build_dataset("train")) == [{"labels": r["labels"]} for r in ROWS]
    with pytest.raises(ConfigError, match=r"there is no column \['text'\]. 'train' has: \['features', 'labels'\]"):
        HFDataset(saved, columns=["text"]).build_dataset("train")


def test_sets_that_decode_or_pick_rows_stay_what_they_are(tmp_path):
    """Images are decoded and picked rows are picked by the library itself."""
    import numpy as np
    from PIL import Image

    pictures = [{"image": Image.fromarray(np.full((2, 2), n, np.uint8)), "labels": n} for n in range(3)]
    made = datasets.Dataset.from_list(pictures)
    picked = datasets.Dataset.from_list(ROWS).select([5, 3, 9])
    datasets.DatasetDict({"train": made, "validation": picked}).save_to_disk(str(tmp_path / "saved"))
    images = HFDataset(str(tmp_path / "saved")).build_dataset("train")
    assert [np.asarray(row["image"]).tolist() for row in images] == [[[n, n], [n, n]] for n in range(3)]
    assert list(HFDataset(str(tmp_path / "saved")).build_dataset("evaluate")) == [ROWS[n] for n in (5, 3, 9)]


def test_named_evaluation_sets(saved):
    """Several splits can be evaluated on, each under its name."""
    plugin = HFDataset(saved, evaluate={"held": "validation", "seen": "train"})
    assert plugin.facts == {"splits": ["evaluate/held", "evaluate/seen"]}
    assert [len(plugin.build_dataset(f"evaluate/{name}")) for name in ("held", "seen")] == [5, 12]
    assert plugin.build_dataset("evaluate") is None


@pytest.mark.parametrize("source", ["saved", "json"])
def test_a_streaming_set_goes_on_exactly(source, saved, tmp_path):
    """The rows of a streaming set are those of the whole, from every position on, and each epoch starts at its first."""
    if source == "saved":
        plugin = HFDataset(saved, streaming=True)
    else:
        for part in (0, 1):
            lines = "".join(json.dumps(row) + "\n" for row in ROWS[part * 6 : part * 6 + 6])
            (tmp_path / f"rows{part}.jsonl").write_text(lines)
        plugin = HFDataset("json", data_files={"train": str(tmp_path / "rows*.jsonl")}, streaming=True)
    stream = plugin.build_dataset("train")
    assert assert_goes_on(stream) == ROWS
    _, position = drain(stream, count=5)
    assert drain(stream, 0, position, count=2)[0] == ROWS[5:7]
    assert drain(stream, 1)[0] == ROWS
    some = HFDataset(saved, streaming=True, columns=["labels"]).build_dataset("train")
    assert drain(some)[0] == [{"labels": row["labels"]} for row in ROWS]


def test_two_readers_of_a_streaming_set_do_not_disturb_each_other(saved):
    """Readers of one set, in turn, each keep their own place."""
    stream = HFDataset(saved, streaming=True).build_dataset("train")
    first, second = stream.open(0), stream.open(0)
    taken = [next(reader) for reader in (first, first, second, first, second)]
    assert taken == [ROWS[n] for n in (0, 1, 0, 2, 1)]
    _, position = drain(stream, count=3)
    assert first.position() == position
