"""The rows that ranks have kept, on rank 0 and in the order of the data; and a result of rank 0 for all."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import numpy as np
import torch

from drivetrain import TrainingError
from drivetrain_plugins.evaluate._buffer import FILL, GrowingBuffer, blank, joint_shape, place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from drivetrain import Run

    Shapes = Sequence[tuple[int, ...]]

K = TypeVar("K")
T = TypeVar("T")
MESSAGE_BYTES = 1 << 24  # batches travel together up to this size


def gathered(
    buffers: Mapping[K, GrowingBuffer],
    numbers: Sequence[int],
    run: Run,
    limit_bytes: int | None = None,
    fill: float = FILL,
) -> dict[K, NDArray[Any]]:
    """Return all ranks' rows (N, ...) by key on rank 0, and nothing elsewhere; the buffers are let go.

    Ranks take the micro-batches of the data in turn: number n of rank r comes before number n of rank r + 1, and all
    numbers n before any n + 1.

    Args:
        buffers: each has had the same batches; the same keys on all ranks that have had any.
        numbers: which of the rank's micro-batches each batch was, since some may have been left out.
        run: its rank and world size; every rank calls this.
        limit_bytes: larger arrays lie on disk.
        fill: what stands where batches are shorter than the longest of all ranks.

    Raises:
        TrainingError: ranks keep numbers of different types, or of different numbers of dimensions.
    """
    if run.world_size == 1:
        return {key: buffer.finish() for key, buffer in buffers.items()}
    kept = {key: (buffer.shapes, buffer.dtype) for key, buffer in buffers.items() if buffer.shapes}
    everyone: list[Any] = [None] * run.world_size
    torch.distributed.all_gather_object(everyone, (list(numbers), kept))
    arrays = {}
    for key in dict.fromkeys(key for _, of_rank in everyone for key in of_rank):
        layout = Layout.of([(of_rank.get(key, ([], None)), order) for order, of_rank in everyone])
        if run.rank == 0:
            array = arrays[key] = layout.blank(limit_bytes, fill)
            _receive(array, buffers.get(key), layout, run)
        elif layout.shapes[run.rank]:
            _send(buffers[key], layout, run)
        if key in buffers:
            buffers[key].close()
    return arrays


@attrs.frozen(eq=False)
class Layout:
    """What ranks have kept under one key, and where it goes."""

    shapes: Sequence[Shapes]  # by rank, of each batch
    order: Sequence[Sequence[int]]  # by rank, the number of each batch
    dtype: np.dtype[Any]
    whole: tuple[int, ...]

    @classmethod
    def of(cls, ranks: Sequence[tuple[tuple[Shapes, np.dtype[Any] | None], Sequence[int]]]) -> Layout:
        """Return the layout of ((shapes, type), numbers) of each rank.

        Raises:
            TrainingError: types or numbers of dimensions differ; all ranks find this, so that none waits for another.
        """
        types = {dtype for (_, dtype), _ in ranks if dtype is not None}
        if len(types) > 1:
            raise TrainingError(f"ranks keep predictions of different types. Received: {sorted(map(str, types))}")
        shapes = [of_rank for (of_rank, _), _ in ranks]
        whole = joint_shape([*itertools.chain.from_iterable(shapes)])
        return cls(shapes, [order for _, order in ranks], types.pop(), whole)

    def blank(self, limit_bytes: int | None, fill: float) -> NDArray[Any]:
        """Return the array for all rows, where batches are shorter than the longest full of `fill`."""
        ragged = any(shape[1:] != self.whole[1:] for shape in itertools.chain.from_iterable(self.shapes))
        return blank(self.whole, self.dtype, limit_bytes, fill if ragged else None)

    def first_rows(self) -> dict[tuple[int, int], int]:
        """Return the first row of batch `index` of `rank` in the order of the data, by (rank, index)."""
        ranks = enumerate(zip(self.order, self.shapes, strict=True))
        numbered = ((n, rank, i) for rank, (order, shapes) in ranks if shapes for i, n in enumerate(order))
        rows, row = {}, 0
        for _, rank, index in sorted(numbered):
            rows[rank, index] = row
            row += self.shapes[rank][index][0]
        return rows

    def messages(self, rank: int) -> Iterator[tuple[range, int]]:
        """Yield the batches of each message of `rank`, and their numbers together."""
        first, count, shapes = 0, 0, self.shapes[rank]
        for index, shape in enumerate(shapes):
            size = math.prod(shape)
            if count and (count + size) * self.dtype.itemsize > MESSAGE_BYTES:
                yield range(first, index), count
                first, count = index, 0
            count += size
        if count:
            yield range(first, len(shapes)), count


def from_rank_0(run: Run, plugin: str, call: Callable[[], T]) -> T:
    """Return what `call` returns on rank 0, on all ranks; if it raises there, all ranks raise.

    Raises:
        Exception: what `call` raised, on rank 0.
        TrainingError: the same in words, on the others.
    """
    if run.world_size == 1:
        return call()
    told: list[Any] = [None, None]
    try:
        if run.rank == 0:
            told[0] = call()
    except Exception as error:
        told[1] = f"{type(error).__name__}: {error}"
        raise
    finally:
        torch.distributed.broadcast_object_list(told, src=0, device=_device(run))
    if told[1] is not None:
        raise TrainingError(f"{plugin} failed on rank 0: {told[1]}")
    result: T = told[0]
    return result


def _receive(array: NDArray[Any], own: GrowingBuffer | None, layout: Layout, run: Run) -> None:
    """Fill `array` with this rank's batches and then those of the others."""
    rows, size = layout.first_rows(), layout.dtype.itemsize
    for index, batch in enumerate(own.batches() if own is not None else ()):
        place(array, rows[0, index], batch)
    for rank in range(1, run.world_size):
        for batches, count in layout.messages(rank):
            message = torch.empty(count * size, dtype=torch.uint8, device=_device(run))
            torch.distributed.recv(message, src=rank)
            flat, start = message.cpu().numpy().view(layout.dtype), 0
            for index in batches:
                shape = layout.shapes[rank][index]
                end = start + math.prod(shape)
                place(array, rows[rank, index], flat[start:end].reshape(shape))
                start = end


def _send(buffer: GrowingBuffer, layout: Layout, run: Run) -> None:
    """Give this rank's batches to rank 0."""
    flat, start = buffer.flat(), 0
    for _, count in layout.messages(run.rank):
        part = torch.from_numpy(flat[start : start + count].view(np.uint8)).to(_device(run))
        torch.distributed.send(part, dst=0)
        start += count


def _device(run: Run) -> torch.device:
    """Return where messages lie: nccl sends what is on a device, others what is on the host."""
    return run.device if "nccl" in torch.distributed.get_backend() else torch.device("cpu")
