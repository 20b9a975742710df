"""`shuffle-buffer`, and streams of blocks: keyed permutations, exact going on."""

from __future__ import annotations

import pytest
from data_helpers import assert_goes_on, drain, lenient_run, wrapped

from drivetrain import BadRow, ConfigError, Iterated
from drivetrain_plugins.data.shuffle_buffer import ShuffleBuffer
from drivetrain_plugins.shared.blocks import Blocks, Mapped


def shuffled(rows, size=8, seed=0):
    return wrapped(ShuffleBuffer(size=size), Iterated(rows), run=lenient_run(seed)[0])


def test_blocks_are_permuted_by_seed_epoch_and_block():
    """Every block keeps its rows; their order differs by epoch, seed and block, and is the same each time."""
    rows = list(range(43))
    found = {(seed, epoch): drain(shuffled(rows, seed=seed), epoch)[0] for seed in (0, 1) for epoch in (0, 1)}
    for order in found.values():
        for start in range(0, 43, 8):
            assert sorted(order[start : start + 8]) == rows[start : start + 8]
    assert len({tuple(order) for order in found.values()}) == 4
    first = found[0, 0]
    assert len({tuple(row - start for row in first[start : start + 8]) for start in range(0, 40, 8)}) == 5
    assert drain(shuffled(rows))[0] == first


@pytest.mark.parametrize("size", [2, 8, 43, 100])
def test_going_on_is_exact(size):
    """From any position, in the middle of a block, at its end and after all rows, the rest is what would have come."""
    assert_goes_on(shuffled(range(43), size), epoch=1)


def test_only_training_streams_are_shuffled():
    """Evaluation rows stay as they are; a split that is not there stays absent; map-style rows are refused."""
    held = Iterated([1, 2])
    assert wrapped(ShuffleBuffer(), held, "evaluate") is held
    assert wrapped(ShuffleBuffer(), [1, 2], "evaluate/x") == [1, 2]
    assert wrapped(ShuffleBuffer(), None) is None
    with pytest.raises(
        ConfigError, match=r"shuffle-buffer: the training data is no stream(?s:.*)list, 2 rows(?s:.*)`random`"
    ):
        wrapped(ShuffleBuffer(), [1, 2])


def test_blocks_may_change_the_number_of_rows():
    """Blocks that give more rows than they read, fewer or none, and blocks of blocks, go on exactly."""

    def grow(rows, epoch, block):
        return [(row, copy) for row in rows for copy in range(row % 4)] if block != 2 else []

    def pairs(rows, epoch, block):
        return list(zip(rows[::2], rows[1::2], strict=False))

    stream = Blocks(Blocks(Iterated(range(30)), 5, grow), 7, pairs)
    grown = [(row, copy) for row in range(30) if row // 5 != 2 for copy in range(row % 4)]
    expected = [pair for start in range(0, len(grown), 7) for pair in pairs(grown[start : start + 7], 0, 0)]
    assert assert_goes_on(stream) == expected


def test_mapped_rows_keep_positions_and_bad_rows():
    """A stream mapped row by row goes on where the inner one does, and a bad row passes as it is."""
    bad = BadRow("x:1: torn")
    stream = Mapped(Iterated([1, bad, 3]), lambda row: row * 10)
    assert assert_goes_on(stream) == [10, bad, 30]
    assert drain(stream, count=2)[1] == 2
