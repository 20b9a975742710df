"""Memory that a worker process shares with the loop: a request goes in, a batch comes out.

A mailbox is one anonymous file, mapped by both sides and kept as long as the worker. So a batch opens no file, no
socket and no thread, touches no new pages of memory but its own copy's, and does not depend on the size of /dev/shm.
"""

from __future__ import annotations

import io
import mmap
import os
import tempfile
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch

SMALLEST = 1 << 16  # bytes
ALIGNED = 64  # bytes


class Mailbox:
    """One message at a time, of any size, from either side; whose turn it is they agree on elsewhere."""

    def __init__(self) -> None:
        """Open a file that has no name, in memory where the system has such files."""
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("drivetrain-batches")
        else:
            with tempfile.TemporaryFile() as file:
                self._file = os.dup(file.fileno())
        self._memory: mmap.mmap | None = None

    def __getstate__(self) -> Any:
        """Send the file along to a process that is being started."""
        return reduction.DupFd(self._file)

    def __setstate__(self, sent: Any) -> None:
        """Take the file over in the started process."""
        self._file, self._memory = sent.detach(), None

    def close(self) -> None:
        """Give the memory back."""
        self._memory = None
        os.close(self._file)

    def _reach(self, size: int, *, grow: bool = False) -> mmap.mmap:
        """Return the memory, mapped again if it ends before `size`: the other side has made it larger, or `grow`."""
        if self._memory is None or len(self._memory) < size:
            if grow and os.fstat(self._file).st_size < size:
                os.ftruncate(self._file, max(SMALLEST, 1 << (size - 1).bit_length()))
            self._memory = mmap.mmap(self._file, os.fstat(self._file).st_size)
        return self._memory

    def put(self, message: Any) -> tuple[int, int]:
        """Write `message`; return what `get` must be told: the bytes of its frame, and how many arrays lie behind it.

        Raises:
            Exception: the message holds something that cannot be sent to another process.
        """
        arrays: list[memoryview] = []
        stream = io.BytesIO()
        _Encoder(stream, 5, True, lambda each: arrays.append(each.raw())).dump(message)
        frame = stream.getbuffer()
        lengths = np.array([len(array) for array in arrays], np.int64)
        places = _places(lengths, len(frame))
        memory = memoryview(self._reach(int(places[-1]), grow=True))
        memory[: lengths.nbytes] = lengths.tobytes()
        memory[lengths.nbytes : lengths.nbytes + len(frame)] = frame
        for array, place in zip(arrays, places.tolist(), strict=False):
            memory[place : place + len(array)] = array
        return len(frame), len(arrays)

    def get(self, frame: int, arrays: int, *, pinned: bool = False) -> Any:
        """Return the message that was put, in memory of its own; `pinned` puts its arrays where a GPU fetches them."""
        head = 8 * arrays + frame
        lengths = np.frombuffer(self._reach(head), np.int64, arrays).copy()
        places = _places(lengths, frame)
        memory = self._reach(int(places[-1]))
        copies = []
        for length, place in zip(lengths.tolist(), places.tolist(), strict=False):
            copy = torch.empty(length, dtype=torch.uint8, pin_memory=pinned)
            if length:
                copy.copy_(torch.frombuffer(memory, dtype=torch.uint8, count=length, offset=place))
            copies.append(copy.numpy())
        with memoryview(memory) as view:
            return reduction.ForkingPickler.loads(view[head - frame : head], buffers=copies)


def _places(lengths: np.ndarray[Any, Any], frame: int) -> np.ndarray[Any, Any]:
    """Return where each array begins, aligned for every type, and the end of all: int64 (N + 1,)."""
    places = np.empty(len(lengths) + 1, np.int64)
    places[0] = -(-(lengths.nbytes + frame) // ALIGNED) * ALIGNED
    np.cumsum(-(-lengths // ALIGNED) * ALIGNED, out=places[1:])
    places[1:] += places[0]
    return places


class _Encoder(reduction.ForkingPickler):
    """What multiprocessing sends objects with, but a tensor is bytes beside the frame, not a shared file of its own."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        plain = type(value) is torch.Tensor and value.layout is torch.strided and value.device.type == "cpu"
        if not plain or value.requires_grad or value.is_quantized or value.is_conj() or value.is_neg():
            return value.__reduce_ex__(5)  # type: ignore[no-untyped-call]
        if not value.numel():
            return _empty, (tuple(value.shape), value.dtype)
        dense = value if _is_dense(value) else value.contiguous()
        flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy()
        return _tensor, (flat, value.dtype, tuple(value.shape), dense.stride())


def _is_dense(tensor: torch.Tensor) -> bool:
    """Tell whether the elements fill one stretch of memory, in whatever order of dimensions (channels-last is one)."""
    if tensor.is_contiguous():
        return True
    order = sorted(range(tensor.ndim), key=lambda d: (tensor.stride(d), tensor.shape[d]), reverse=True)
    return tensor.permute(order).is_contiguous()


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _tensor(
    flat: np.ndarray[Any, Any], dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    return torch.from_numpy(flat).view(dtype).as_strided(shape, stride)
