"""`group-by-length`: batches of similar lengths, the longest row first."""

from __future__ import annotations

import numpy as np
import pytest
from order_helpers import sampler_of, skewed, table

from drivetrain import ConfigError
from drivetrain_plugins.order.group_by_length import GroupByLength
from drivetrain_plugins.order.random import Random

ROWS, BATCH = 2000, 16


def padding(lengths, order, size=BATCH):
    """Return the share of padding in batches of `size` rows."""
    batches = [lengths[order[i : i + size]] for i in range(0, len(order), size)]
    return 1 - lengths.sum() / sum(len(batch) * batch.max() for batch in batches)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_batches_hold_similar_lengths(size):
    """Batches whose size divides a chunk have at most a seventh of the padding of random ones, and no more than sorting."""
    data, lengths = table(ROWS), skewed(ROWS)
    grouped = sampler_of(GroupByLength(window=1024, chunk=32), data).order(1).numpy()
    shuffled = sampler_of(Random(), data).order(1).numpy()
    by_window = np.concatenate([w[np.argsort(-lengths[w])] for w in np.split(shuffled, [1024])])
    assert padding(lengths, grouped, size) < padding(lengths, shuffled, size) / 7
    assert padding(lengths, grouped, size) == pytest.approx(padding(lengths, by_window, size), abs=0.01)


@pytest.mark.parametrize("rows", [1, 5, 64, 70, 200])
def test_the_longest_row_is_first(rows):
    """Every epoch begins with its longest row, and the first batch is the longest rows of the first window."""
    lengths = skewed(rows)
    sampler = sampler_of(GroupByLength(window=64, chunk=16), table(rows))
    for epoch in range(4):
        order = sampler.order(epoch).numpy()
        assert lengths[order[0]] == lengths.max()
        first = np.sort(lengths[order[: min(rows, 16)]])[::-1]
        assert (first == lengths[order[: min(rows, 16)]]).all()


def test_windows_are_those_of_the_permutation():
    """But for the longest row's place, a window of the order holds the rows of that window of the epoch's permutation."""
    order = sampler_of(GroupByLength(window=64, chunk=16), table(200)).order(2).numpy()
    permutation = sampler_of(Random(), table(200)).order(2).numpy()
    moved = [len(set(order[i : i + 64]) ^ set(permutation[i : i + 64])) for i in range(0, 200, 64)]
    assert sum(moved) in {0, 4}


def test_chunks_are_shuffled():
    """Chunks of a window come in a random order, and each is sorted within."""
    lengths, order = skewed(256), sampler_of(GroupByLength(window=256, chunk=16), table(256)).order(0).numpy()
    chunks = lengths[order].reshape(-1, 16)
    assert (np.diff(chunks, axis=1) <= 0).all()
    assert not (np.diff(chunks[:, 0]) <= 0).all()


def test_an_incomplete_chunk_is_last():
    """The rows that fill no chunk end the epoch, so that every batch before them lies in one chunk."""
    lengths = skewed(70)
    for epoch in range(5):
        order = sampler_of(GroupByLength(window=32, chunk=8), table(70)).order(epoch).numpy()
        chunks = lengths[order[:64]].reshape(-1, 8)
        assert (np.diff(chunks, axis=1) <= 0).all()


def test_evaluations_by_length_on_request():
    """An evaluation comes as it is, or, if asked for, with the longest rows first."""
    data, lengths = table(40), skewed(40)
    assert sampler_of(GroupByLength(), data, split="evaluate").order(0).tolist() == list(range(40))
    order = sampler_of(GroupByLength(sort_evaluation=True), data, split="evaluate").order(3).numpy()
    assert sorted(order.tolist()) == list(range(40))
    assert (np.diff(lengths[order]) <= 0).all()


def test_a_field_that_is_not_there_is_told():
    """A wrong field is an error before step 0 that lists the fields there are."""
    with pytest.raises(
        ConfigError, match=r"group-by-length: the train rows have no field 'tokens'[\s\S]*'input_ids', 'labels'"
    ):
        sampler_of(GroupByLength(field="tokens"), table(5))


@pytest.mark.parametrize(
    ("options", "told"), [({"window": 100, "chunk": 64}, "multiple of chunk"), ({"chunk": 0}, "chunk must be")]
)
def test_windows_that_chunks_do_not_fill_are_refused(options, told):
    """A window is a whole number of chunks."""
    with pytest.raises(ValueError, match=told):
        GroupByLength(**options)
