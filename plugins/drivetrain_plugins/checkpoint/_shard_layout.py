"""Where a rank's shard of a tensor lies in the whole.

`torch.distributed.checkpoint` plans it for shards that lie in one piece. FSDP2 over tensor parallelism, along one
dimension, makes others; these are worked out here.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard

from drivetrain_plugins.checkpoint._format import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Runs = list[tuple[int, int]]  # start and length of the indices that a shard takes, in order
    Placed = tuple[ChunkStorageMetadata, torch.Tensor]


def local_chunks(reference: str, tensor: torch.Tensor) -> list[Placed]:
    """Return what this rank holds of a tensor: where each chunk lies in the whole, and a view of its elements.

    Raises:
        ValueError: the tensor is of a kind that no chunks can stand for.
    """
    if not isinstance(tensor, DTensor):
        return _planned(reference, tensor, _plain(reference, tensor.detach()))
    if tensor.device_mesh.get_coordinate() is None:
        return []
    local, placements = _plain(reference, tensor.to_local().detach()), tensor.placements
    if any(p.is_partial() for p in placements):
        raise ValueError(f"{reference} is a sum that is still to be made over ranks. Received: placements {placements}")
    if all(type(p) in (Replicate, Shard) for p in placements):
        return _planned(reference, tensor, local)
    return _strided(reference, tensor, local)


def _plain(reference: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or refuse one that is no block of elements."""
    block = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_meta
    if not block or tensor.dtype not in DTYPES:
        received = f"{type(tensor).__name__} {tensor.dtype} {tensor.layout} on {tensor.device}"
        raise ValueError(f"{reference} cannot be saved. Received: {received}")
    return tensor


def _planned(reference: str, tensor: torch.Tensor, local: torch.Tensor) -> list[Placed]:
    """Return DCP's plan for one tensor, which must be of the shape that this rank holds."""
    (item,) = create_default_local_save_plan({reference: tensor}, is_coordinator=False).items
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    if tuple(chunk.sizes) != tuple(local.shape):
        raise ValueError(_unlike(reference, tensor, local))
    return [(chunk, local)] if local.numel() else []


def _strided(reference: str, tensor: DTensor, local: torch.Tensor) -> list[Placed]:
    """Return the chunks of a tensor with placements that have a split factor.

    FSDP2 makes them where it cuts, along the same dimension, what tensor parallelism has cut: the placement of FSDP2
    stands first and its factor is the number of shards to its right. Read from left to right, the placements describe
    other rows than FSDP2 cuts where the numbers do not divide, and DCP reads them so; and a shard need not be in one
    piece, of which DCP knows the beginning only. Which reading is meant shows in the shapes: over all ranks, they are
    the same for no two readings that differ.
    """
    for fsdp in (True, False):
        if fsdp and not _is_fsdp(tensor):
            continue
        runs = [_runs(tensor, dim, fsdp=fsdp) for dim in range(tensor.ndim)]
        if [sum(length for _, length in along) for along in runs] == list(local.shape):
            return list(_chunks_of(runs, local)) if local.numel() else []
    raise ValueError(_unlike(reference, tensor, local))


def _is_fsdp(tensor: DTensor) -> bool:
    """Tell whether each split factor is the number of shards along its dimension that stand to the right of it."""
    placements, mesh = tensor.placements, tensor.device_mesh
    for i, placement in enumerate(placements):
        if not hasattr(placement, "split_factor"):
            continue
        along = getattr(placement, "dim", None)
        behind = [mesh.size(j) for j in range(i + 1, mesh.ndim) if getattr(placements[j], "dim", None) == along]
        if placement.split_factor != math.prod(behind):
            return False
    return True


def _unlike(reference: str, tensor: torch.Tensor, local: torch.Tensor) -> str:
    placements = tensor.placements if isinstance(tensor, DTensor) else ()
    return (
        f"{reference} has a shard that is not what its placements say. "
        f"Received: {list(local.shape)} of {list(tensor.shape)}, {placements}"
    )


def _runs(tensor: DTensor, dim: int, *, fsdp: bool) -> Runs:
    """Return which indices along `dim` this rank holds."""
    runs = [(0, tensor.shape[dim])]
    along = [(i, p) for i, p in enumerate(tensor.placements) if getattr(p, "dim", None) == dim]
    if fsdp:
        along.sort(key=lambda ip: hasattr(ip[1], "split_factor"))
    for i, placement in along:
        number, count = tensor.device_mesh.get_local_rank(i), tensor.device_mesh.size(i)
        factor = 1 if fsdp else getattr(placement, "split_factor", 1)
        runs = [run for n in range(factor) for run in _part(_part(runs, n, factor), number, count)]
    return runs


def _part(runs: Runs, number: int, count: int) -> Runs:
    """Return part `number` of `count`, cut as `torch.chunk` cuts."""
    step = math.ceil(sum(length for _, length in runs) / count)
    low, high, at = number * step, (number + 1) * step, 0
    made = []
    for start, length in runs:
        first, last = max(low, at), min(high, at + length)
        if first < last:
            made.append((start + first - at, last - first))
        at += length
    return made


def _chunks_of(runs: list[Runs], local: torch.Tensor) -> Iterator[Placed]:
    """Yield a chunk for each combination of runs: in the whole tensor they are apart, in the shard they follow."""
    placed = []
    for along in runs:
        starts = itertools.accumulate((length for _, length in along), initial=0)
        placed.append([(*run, start) for run, start in zip(along, starts, strict=False)])
    for combination in itertools.product(*placed):
        offsets, sizes, inside = zip(*combination, strict=True)
        yield ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)), cut(local, inside, sizes)


def cut(tensor: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """Return the view of `tensor` that begins at `offsets` and has the shape `sizes`."""
    for dim, (start, length) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
