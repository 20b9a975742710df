"""`hf-dataset`: sets of the datasets library."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
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
