"""`loader`: batches that depend on neither worker processes nor the place where one starts."""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest
import torch
from plugin_helpers import Record, as_rows, assert_same_weights, columns, cpu_run, fit, net

from drivetrain import DataError, Shuffled, Trainer, TrainingError, stack
from drivetrain.data import Fetch, Sequential, count_labels
from drivetrain_plugins import SGD, AdamW, Evaluate, Loader

ROWS = 23


class Noisy(torch.utils.data.Dataset):
    """Rows that draw from torch's, numpy's and Python's global generators each time they are read."""

    def __init__(self, rows=ROWS):
        self.data = columns(rows)

    def __len__(self):
        return len(self.data["labels"])

    def __getitem__(self, index):
        noise = torch.randn(6) + random.gauss(0, 1) + float(np.random.standard_normal())  # noqa: NPY002
        return {"features": self.data["features"][index] + 0.1 * noise, "labels": self.data["labels"][index]}


class Broken(Noisy):
    """One row cannot be read."""

    def __getitem__(self, index):
        if index == 7:
            raise OSError("no such picture")
        return super().__getitem__(index)


class Deadly(Noisy):
    """One row ends the process that reads it, as running out of memory does."""

    def __getitem__(self, index):
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Slow(Noisy):
    """One row never comes."""

    def __getitem__(self, index):
        if index == 7:
            signal.pause()
        return super().__getitem__(index)


def batches(plugin, dataset=None, split="train", sampler=None, **run):
    """Return the plugin's loader over `dataset`, made by calling its one hook."""
    dataset = Noisy() if dataset is None else dataset
    fetch = Fetch(dataset, stack, count_labels, 0, split)
    return plugin.build_batches(cpu_run(**run), split, fetch, sampler or Shuffled(len(dataset), 0))


def contents(micros):
    return [(m.num_rows, m.num_items, m.batch["features"], m.batch["labels"]) for m in micros]


def assert_same_batches(left, right):
    assert len(left) == len(right) > 0
    for ours, theirs in zip(left, right, strict=True):
        assert ours[:2] == theirs[:2]
        assert torch.equal(ours[2], theirs[2])
        assert torch.equal(ours[3], theirs[3])


@pytest.mark.parametrize(("epoch", "start"), [(0, 0), (1, 8)])
def test_workers_give_the_same_batches(epoch, start):
    """Two workers give the bits that the loop's own process gives, augmentation included, from any place on."""
    here = contents(batches(Loader(4)).iterate(epoch, start))
    there = contents(batches(Loader(4, workers=2)).iterate(epoch, start))
    assert_same_batches(here, there)


def test_starting_in_an_epoch_gives_its_rest():
    """Batches from row 8 on are the epoch's batches without the first two."""
    loader = batches(Loader(4))
    assert_same_batches(contents(loader.iterate(1, 8)), contents(loader.iterate(1))[2:])


def test_augmentation_differs_by_epoch_and_row():
    """The same row is augmented otherwise in the next epoch, and two equal rows differ in one epoch."""
    loader = batches(Loader(ROWS), sampler=Sequential(ROWS))
    (first,), (second,) = loader.iterate(0), loader.iterate(1)
    clean = Noisy().data["features"]
    noise = first.batch["features"] - clean
    assert not torch.equal(first.batch["features"], second.batch["features"])
    assert not torch.equal(noise[0], noise[1])


def test_order_does_not_depend_on_batch_size():
    """Batches of 3 and of 5, joined, are the same rows in the same order, with the same augmentation."""
    joined = [torch.cat([m.batch["features"] for m in batches(Loader(size)).iterate(2)]) for size in (3, 5)]
    assert torch.equal(*joined)
    assert len(joined[0]) == ROWS


def test_every_row_comes_once_an_epoch_and_orders_differ():
    """An epoch is a permutation; two epochs are two permutations."""
    dataset = [{"features": torch.zeros(1), "labels": torch.tensor(number)} for number in range(ROWS)]
    loader = batches(Loader(4), dataset)
    orders = [torch.cat([m.batch["labels"] for m in loader.iterate(epoch)]).tolist() for epoch in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(ROWS))] * 2
    assert orders[0] != orders[1]


def test_drop_last_is_for_training_only():
    """Training leaves out rows that fill no batch; an evaluation sees every row."""
    plugin = Loader(4, drop_last=True, evaluate_batch_size=5)
    train, held = batches(plugin), batches(plugin, split="evaluate")
    assert [m.num_rows for m in train.iterate(0)] == [4] * 5
    assert (len(train), train.rows_per_epoch) == (5, 20)
    assert [m.num_rows for m in held.iterate(0)] == [5, 5, 5, 5, 3]
    assert (len(held), held.rows_per_epoch) == (5, 23)


def test_ranks_share_each_global_batch():
    """Two ranks' batches, side by side, are the batches of one rank that is twice as large."""
    whole = contents(batches(Loader(6)).iterate(0))
    parts = [contents(batches(Loader(3), rank=rank, world_size=2).iterate(0)) for rank in (0, 1)]
    for position, (rows, _, features, _) in enumerate(whole):
        both = torch.cat([part[position][2] for part in parts if part[position][0]])
        assert (len(both), torch.equal(both, features)) == (rows, True)


def test_loading_leaves_the_global_generators():
    """Iterating with workers draws nothing from the loop's generators."""
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
    list(batches(Loader(8, workers=1)).iterate(0))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert [random.getstate(), np.random.get_state()[1].tolist()] == states[1:]  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_is_named(workers):
    """An exception in the dataset names split and row, in a worker process too."""
    with pytest.raises(DataError, match="train row 7: OSError: no such picture"):
        list(batches(Loader(4, workers=workers), Broken()).iterate(0))


def test_a_worker_that_dies_is_told():
    """A worker that was killed, as for want of memory, ends the loading with its name, its rows and what to do."""
    rows = r"worker 0 \(pid \d+\) of the train data was killed by SIGKILL, making the batch of rows \[13, 21, 7\]"
    with pytest.raises(TrainingError, match=rows + ".*take fewer workers"):
        list(batches(Loader(4, workers=1), Deadly()).iterate(0))


def test_a_worker_that_hangs_is_told():
    """A worker that delivers nothing for `timeout_s` seconds ends the loading with drivetrain's error."""
    told = r"worker 0 .* gave nothing for 0.5 seconds, making the batch of rows \[13, 21, 7\].*larger timeout_s"
    with pytest.raises(TrainingError, match=told):
        list(batches(Loader(4, workers=1, timeout_s=0.5), Slow()).iterate(0))


def test_runs_with_and_without_workers_are_bit_identical():
    """Weights and every logged loss agree with 0 and 2 workers, with dropout and augmentation, over two epochs."""
    models, losses = [net(dropout=0.3), net(dropout=0.3)], []
    for model, workers in zip(models, (0, 2), strict=True):
        _, record = fit(model, [Loader(8, workers=workers), AdamW(lr=0.02)], Noisy(), epochs=2)
        losses.append(record.of("loss"))
    assert losses[0] == losses[1]
    assert_same_weights(*models)


def test_a_run_stopped_in_an_epoch_goes_on_from_there():
    """A run whose position is set to the middle of an epoch takes the steps that the whole run takes there."""
    whole, half = Record(), Record()
    Trainer(net(), [Loader(4), SGD(lr=1e-30), whole], epochs=1, log_every="1 step").fit(Noisy())
    trainer = Trainer(net(), [Loader(4), SGD(lr=1e-30), half], epochs=1, log_every="1 step")
    run = trainer.assemble(Noisy())
    run.progress.step, run.progress.rows_in_epoch = 3, 12
    run.hooks.fit(run)
    assert half.of("loss") == whole.of("loss")[3:]


def test_evaluation_batch_size_defaults_to_the_training_one():
    """Without a size of its own, an evaluation uses the micro-batch's."""
    trainer, _ = fit(net(), [Loader(7), SGD(), Evaluate()], as_rows(columns(8)), as_rows(columns(15)), steps=1)
    assert [m.num_rows for m in trainer.run.batches["evaluate"].iterate(0)] == [7, 7, 1]


def test_fewer_rows_than_a_batch_is_refused():
    """Dropping all rows is an error before the first step."""
    from drivetrain import ConfigError

    with pytest.raises(ConfigError, match="train data has 5 rows, fewer than one batch"):
        fit(net(), [Loader(8, drop_last=True), SGD()], columns(5), steps=1)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": -1}, {"workers": 257}, {"timeout_s": -1}])
def test_values_out_of_bounds_are_refused(options):
    """Sizes, workers and seconds have bounds."""
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be a number"):
        Loader(**options)
