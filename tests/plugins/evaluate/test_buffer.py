"""The buffer of predictions: numpy's concatenation, padded, in memory and on disk, whose cost is linear."""

from __future__ import annotations

import gc
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain import TrainingError
from drivetrain_plugins.evaluate import _buffer
from drivetrain_plugins.evaluate._buffer import GrowingBuffer

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool]


def open_files():
    """Return how many files this process has open, where the system tells."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else None


def padded(batches, fill=-100):
    """Return the batches as one array, as one would write it without a thought for memory."""
    longest = [max(sizes) for sizes in zip(*(batch.shape[1:] for batch in batches), strict=True)]
    parts = []
    for batch in batches:
        part = np.full((len(batch), *longest), fill, np.int64 if batch.dtype == bool else batch.dtype)
        part[tuple(slice(size) for size in batch.shape)] = batch
        parts.append(part)
    return np.concatenate(parts)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    lengths=st.lists(st.integers(1, 5), min_size=6, max_size=6),
    dims=st.integers(1, 3),
    dtype=st.sampled_from(TYPES),
    limit=st.sampled_from([None, 0, 40, 1000]),
)
def test_all_rows_come_back_padded_whatever_the_limit(rows, lengths, dims, dtype, limit):
    """Batches of any type, length and number of dimensions are numpy's padded concatenation, on disk too."""
    draws = torch.Generator().manual_seed(1)
    shapes = [((b, length, 2)[:dims]) for b, length in zip(rows, lengths, strict=False)]
    batches = [(torch.randn(shape, generator=draws) * 3).to(dtype) for shape in shapes]
    buffer = GrowingBuffer(limit)
    for batch in batches:
        buffer.append(batch)
    assert buffer.num_rows == sum(rows)
    wanted = [(batch.float() if dtype == torch.bfloat16 else batch).numpy() for batch in batches]
    found = buffer.finish()
    ragged = len({shape[1:] for shape in shapes}) > 1
    np.testing.assert_array_equal(found, padded(wanted) if ragged else np.concatenate(wanted), strict=True)


def test_views_and_gradients_are_copied():
    """What is kept does not follow the tensor, hang on its graph, or care for its strides."""
    tensor = torch.arange(12.0, requires_grad=True)
    view = tensor.reshape(3, 4).T[::2]
    buffer = GrowingBuffer()
    buffer.append(view)
    wanted = view.detach().clone().numpy()
    with torch.no_grad():
        tensor.zero_()
    np.testing.assert_array_equal(buffer.finish(), wanted)


def test_numbers_are_moved_a_bounded_number_of_times(monkeypatch):
    """1,000 batches need as few allocations as doubling needs, and nothing is concatenated."""
    allocated = []
    empty = torch.empty
    monkeypatch.setattr(_buffer.torch, "empty", lambda *given, **how: allocated.append(given) or empty(*given, **how))
    monkeypatch.setattr(_buffer.np, "concatenate", None)
    monkeypatch.setattr(_buffer, "RESERVED", 1 << 16)
    buffer = GrowingBuffer()
    for number in range(1000):
        buffer.append(torch.full((8, 100), number, dtype=torch.int64))
    assert 3 < len(allocated) < 12
    found = buffer.finish()
    assert found.shape == (8000, 100)
    assert (found == np.repeat(np.arange(1000), 8)[:, None]).all()


def test_beyond_the_limit_rows_are_on_disk_and_nothing_stays(tmp_path, monkeypatch):
    """The file has no name, memory is let go, the array is a map that can be written to, and files are closed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    opened = open_files()
    buffer = GrowingBuffer(limit_bytes=100)
    buffer.append(torch.arange(20.0).reshape(2, 10))
    assert not buffer.spilled
    buffer.append(torch.arange(20.0, 50.0).reshape(3, 10))
    assert buffer.spilled
    assert list(tmp_path.iterdir()) == []
    found = buffer.finish()
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, np.arange(50.0).reshape(5, 10))
    found[0] = 7.0
    del found  # the map holds the file as long as there is one
    assert open_files() == opened


def test_an_evaluation_that_breaks_off_leaves_no_file():
    """A buffer that nobody finishes closes its file without a warning."""
    buffer = GrowingBuffer(limit_bytes=0)
    buffer.append(torch.ones(2, 3))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        del buffer
        gc.collect()
    assert told == []


def test_ragged_rows_on_disk_are_padded_on_disk():
    """Where the padded array is beyond the limit it is a memory map, too."""
    buffer = GrowingBuffer(limit_bytes=64, fill=-1)
    for length in (3, 9, 5):
        buffer.append(torch.ones(2, length))
    found = buffer.finish()
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found.sum(1), [3 - 6, 3 - 6, 9, 9, 5 - 4, 5 - 4])


def test_a_buffer_without_batches_is_an_empty_array():
    """Nothing in, nothing out; and a finished buffer starts anew."""
    buffer = GrowingBuffer(limit_bytes=0)
    assert buffer.finish().shape == (0,)
    buffer.append(torch.ones(2, 3))
    assert buffer.finish().shape == (2, 3)
    buffer.append(torch.ones(4, dtype=torch.int64))
    np.testing.assert_array_equal(buffer.finish(), np.ones(4, np.int64), strict=True)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([torch.tensor(1.0)], "by rows .* a scalar"),
        ([torch.ones(2), torch.ones(2, dtype=torch.float64)], "one type. Received: torch.float32, then torch.float64"),
        ([torch.ones(2), torch.ones(2, 2)], r"same number of dimensions. Received: \[1, 2\]"),
    ],
)
def test_batches_that_cannot_be_one_array_are_refused(batches, message):
    """The message says what was received."""
    buffer = GrowingBuffer()
    with pytest.raises(TrainingError, match=message):  # noqa: PT012 - some are found at the end
        for batch in batches:
            buffer.append(batch)
        buffer.finish()
