"""Rows kept for the end of an evaluation: in memory that grows by doubling, and beyond a limit on disk."""

from __future__ import annotations

import math
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from drivetrain import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

FILL = -100  # what stands where shorter rows end; the label that every loss passes over
# Bytes of the first allocation: memory that nothing has been written to takes none, so it costs addresses only, and
# evaluations that stay within are never moved.
RESERVED = 1 << 28


class GrowingBuffer:
    """Batches (B, ...) one after the other, flattened: each number is moved a bounded number of times, whatever N is.

    The memory they lie in doubles when it is full.

    Beyond `limit_bytes` they go to a file that has no name, so that nothing can be left behind; it is in the folder
    for temporary files (the variable TMPDIR sets it).
    """

    def __init__(self, limit_bytes: int | None = None, fill: float = FILL) -> None:
        """Start empty.

        Args:
            limit_bytes: what may lie in memory; None puts no limit.
            fill: what `finish` writes where batches are shorter than the longest.
        """
        self._file: Any = None
        self.limit_bytes, self.fill = limit_bytes, fill
        self.shapes: list[tuple[int, ...]] = []  # of each batch
        self.dtype: np.dtype[Any] | None = None  # the first batch's
        self._torch_dtype: torch.dtype | None = None
        self._flat: NDArray[Any] = np.empty(0)
        self._used = 0  # numbers

    @property
    def num_rows(self) -> int:
        """Rows of all batches."""
        return sum(shape[0] for shape in self.shapes)

    @property
    def spilled(self) -> bool:
        """Whether the rows are in a file."""
        return self._file is not None

    def append(self, tensor: torch.Tensor) -> None:
        """Add a batch (B, ...) from any device; bfloat16, which numpy does not have, becomes float32.

        Raises:
            TrainingError: it is a scalar, or of another type than the first.
        """
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        if tensor.dtype is not self._torch_dtype:
            self._start(tensor.dtype)
        array = (tensor if tensor.device.type == "cpu" and not tensor.requires_grad else tensor.detach().cpu()).numpy()
        if not array.ndim:
            raise TrainingError("predictions are kept by rows (B, ...). Received: a scalar")
        end = self._used + array.size
        if end > len(self._flat) and self._file is None:
            self._make_room(end)
        if self._file is None:
            self._flat[self._used : end] = array.reshape(-1)
        elif array.size:
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self.shapes.append(array.shape)
        self._used = end

    def flat(self) -> NDArray[Any]:
        """Return all numbers, one batch after the other: a view, or a memory map."""
        if self._file is None or not self._used:
            return self._flat[: self._used]
        assert self.dtype is not None
        self._file.flush()
        # Copy on write: a function that changes its predictions changes them in memory.
        array: NDArray[Any] = np.memmap(self._file, self.dtype, mode="c", shape=(self._used,))
        return array

    def batches(self) -> Iterator[NDArray[Any]]:
        """Yield the batches in the order they came, as views."""
        flat, start = self.flat(), 0
        for shape in self.shapes:
            end = start + math.prod(shape)
            yield flat[start:end].reshape(shape)
            start = end

    def finish(self) -> NDArray[Any]:
        """Return all rows (N, ...) and let go of them; a memory map where they are on disk.

        Batches whose other dimensions differ (texts padded to the longest of the batch) are padded with `fill`.
        """
        shape = joint_shape(self.shapes)
        if all(other[1:] == shape[1:] for other in self.shapes):
            array = self.flat().reshape(shape)
        else:
            assert self.dtype is not None
            array = blank(shape, self.dtype, self.limit_bytes, self.fill)
            row = 0
            for batch in self.batches():
                place(array, row, batch)
                row += len(batch)
        self.close()
        return array

    def close(self) -> None:
        """Let go of the memory and the file; arrays that were given out stay as they are."""
        if self._file is not None:
            self._file.close()
        self._file, self._flat, self._used, self.shapes = None, np.empty(0), 0, []
        self.dtype = self._torch_dtype = None

    def __del__(self) -> None:
        """Close the file of an evaluation that was broken off."""
        if self._file is not None:
            self._file.close()

    def _start(self, dtype: torch.dtype) -> None:
        """Take the type of the first batch; refuse another."""
        if self.dtype is not None:
            raise TrainingError(
                f"predictions of one evaluation have one type. Received: {self._torch_dtype}, then {dtype}"
            )
        self.dtype, self._torch_dtype = torch.empty(0, dtype=dtype).numpy().dtype, dtype
        self._flat = np.empty(0, self.dtype)

    def _make_room(self, needed: int) -> None:
        """Make room for `needed` numbers, or go to disk."""
        assert self.dtype is not None
        size = self.dtype.itemsize
        if self.limit_bytes is not None and needed * size > self.limit_bytes:
            self._file = tempfile.TemporaryFile(prefix="drivetrain-predictions-")  # noqa: SIM115
            if self._used:
                self._file.write(self._flat[: self._used].view(np.uint8).data)
            self._flat = np.empty(0, self.dtype)
            return
        doubled = max(needed, 2 * len(self._flat))
        reserved = RESERVED if self.limit_bytes is None else min(RESERVED, self.limit_bytes)
        try:
            larger = self._allocated(max(doubled, reserved // size))
        except RuntimeError:  # where addresses are limited
            larger = self._allocated(doubled)
        larger[: self._used] = self._flat[: self._used]
        self._flat = larger

    def _allocated(self, count: int) -> NDArray[Any]:
        """Return memory from torch: numpy asks for pages of megabytes, and the first write to those takes longer."""
        array: NDArray[Any] = torch.empty(count, dtype=self._torch_dtype).numpy()
        return array


def joint_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape (N, ...) that holds batches of all `shapes`.

    Raises:
        TrainingError: they do not have the same number of dimensions.
    """
    if not shapes:
        return (0,)
    if len({len(shape) for shape in shapes}) > 1:
        raise TrainingError(
            "predictions of one evaluation have the same number of dimensions. "
            f"Received: {sorted({len(shape) for shape in shapes})}"
        )
    return (sum(shape[0] for shape in shapes), *(max(sizes) for sizes in list(zip(*shapes, strict=True))[1:]))


def blank(shape: tuple[int, ...], dtype: np.dtype[Any], limit_bytes: int | None, fill: float | None) -> NDArray[Any]:
    """Return an array full of `fill` (None: of anything), in a file without a name where `limit_bytes` is too little.

    Types that cannot hold a negative number become int64.
    """
    if fill is not None and fill < 0 and dtype.kind in "bu":
        dtype = np.dtype(np.int64)
    count = math.prod(shape)
    array: NDArray[Any]
    if limit_bytes is None or count * dtype.itemsize <= limit_bytes or not count:
        array = np.empty(shape, dtype)
    else:
        with tempfile.TemporaryFile(prefix="drivetrain-predictions-", buffering=0) as file:
            file.truncate(count * dtype.itemsize)
            array = np.memmap(file, dtype, mode="r+", shape=shape)
    if fill is not None:
        array[...] = fill
    return array


def place(array: NDArray[Any], row: int, batch: NDArray[Any]) -> None:
    """Write a batch (B, ...) into `array` (N, ...) from `row` on; what it does not reach stays as it is."""
    array[(slice(row, row + len(batch)), *(slice(size) for size in batch.shape[1:]))] = batch
