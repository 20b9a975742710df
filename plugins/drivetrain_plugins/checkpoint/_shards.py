"""The sharded form of a checkpoint: each rank writes its own chunks, and any number of ranks can read them.

Chunks and their overlaps are computed by the planners of `torch.distributed.checkpoint`. Its storage is not used: it
pickles its metadata and runs what a pickle says. Plans are exchanged as JSON and stored as JSON.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint._format import DTYPES
from drivetrain_plugins.checkpoint._shard_layout import cut, local_chunks
from drivetrain_plugins.checkpoint._shard_plan import (
    Chunk,
    Index,
    Stored,
    as_json,
    by_file,
    check_index,
    key_of,
    num_bytes,
    part_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from drivetrain_plugins.checkpoint._shard_plan import Box

    Layout = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor | None]
    Assigned = dict[str, list[tuple[int, str, Box]]]  # for each tensor: rank, key and box of each chunk

SMALL = 2**16  # bytes; what is replicated and smaller is the first rank's, so that who reads needs few other parts
PIECE = 2**20  # bytes; what is replicated and larger may be divided, so that the ranks write equally much


@attrs.frozen
class ShardPlan:
    """What this rank writes, and the content of `shards.json`, which is the same on all ranks."""

    file: str
    tensors: dict[str, torch.Tensor]  # by key; views of the tensors that were given
    index: dict[str, Any]


# --- writing ---------------------------------------------------------------------------------------------------------


def plan_shards(
    tensors: Mapping[str, torch.Tensor], rank: int, world_size: int, exchange: Callable[[str], list[str]]
) -> ShardPlan:
    """Return what each rank writes, so that all of it is written once and in equal amounts. All ranks must call it.

    Args:
        tensors: by reference ("model/NAME", "state/NAME"); a DTensor is this rank's shard, a plain one is replicated.
        rank: this process.
        world_size: how many there are.
        exchange: takes a text of this rank and returns those of all ranks, by rank.

    Raises:
        CheckpointError: on all ranks: a tensor cannot be saved, or the ranks' shards are not parts of one tensor.
    """
    views: dict[str, list[tuple[Box, torch.Tensor]]] = {}
    mine: dict[str, Any] = {}
    try:
        for reference, tensor in tensors.items():
            views[reference] = [(_box(chunk), view) for chunk, view in local_chunks(reference, tensor)]
            mine[reference] = [list(tensor.shape), DTYPES[tensor.dtype], [box for box, _ in views[reference]]]
        text = json.dumps({"tensors": mine})
    except ValueError as error:  # told to all: alone, this rank would leave the others waiting
        text = json.dumps({"error": str(error)})
    offers = _Offers()
    for number, offered in enumerate(exchange(text)):
        offers.add(number, json.loads(offered))
    assigned = offers.assign(world_size)
    index = {
        reference: Stored(shape, dtype, tuple(Chunk(part_name(r), key, *b) for r, key, b in assigned[reference]))
        for reference, (shape, dtype) in offers.tensors.items()
    }
    content = as_json(index)
    try:
        check_index(content, {part_name(number): 2**63 for number in range(world_size)})
    except ValueError as error:
        raise CheckpointError(f"the shards of the ranks do not make up one tensor: {error}") from None
    written = {
        key: _cut_out(views[reference], box)
        for reference, pieces in assigned.items()
        for owner, key, box in pieces
        if owner == rank
    }
    return ShardPlan(part_name(rank), written, content)


@attrs.define
class _Offers:
    """What the ranks hold: for each chunk, by whom it can be written."""

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = attrs.field(factory=dict)
    holders: dict[tuple[str, Box], list[int]] = attrs.field(factory=dict)

    def add(self, rank: int, offered: dict[str, Any]) -> None:
        """Add what one rank said.

        Raises:
            CheckpointError: it cannot save a tensor, or has another shape or dtype for one than the ranks before it.
        """
        if "error" in offered:
            raise CheckpointError(f"rank {rank}: {offered['error']}")
        dtypes = {name: dtype for dtype, name in DTYPES.items()}
        for reference, (shape, dtype, boxes) in offered["tensors"].items():
            about = tuple(shape), dtypes[dtype]
            if self.tensors.setdefault(reference, about) != about:
                raise CheckpointError(
                    f"{reference} differs between the ranks: rank {rank} has {about[1]} {list(about[0])}, "
                    f"one before it {self.tensors[reference][1]} {list(self.tensors[reference][0])}"
                )
            for offsets, sizes in boxes:
                self.holders.setdefault((reference, (tuple(offsets), tuple(sizes))), []).append(rank)

    def assign(self, world_size: int) -> Assigned:
        """Return who writes what.

        What several ranks hold goes to the one with the least so far, the largest first. DCP's deduplication goes
        tensor by tensor in their order, by the size of the whole even for a shard, and leaves the ranks unequal.
        """
        load = [0] * world_size
        made: Assigned = {reference: [] for reference in self.tensors}

        def give(reference: str, box: Box, rank: int) -> None:
            shape, dtype = self.tensors[reference]
            made[reference].append((rank, key_of(reference, *box, shape), box))
            load[rank] += num_bytes(box[1], dtype)

        sizes = {(name, box): num_bytes(box[1], self.tensors[name][1]) for name, box in self.holders}
        limit = max(PIECE, sum(sizes.values()) // (8 * world_size))
        shared: list[tuple[int, str, Box, list[int]]] = []
        for (reference, box), ranks in self.holders.items():
            size = sizes[reference, box]
            if len(ranks) == 1 or size < SMALL:
                give(reference, box, ranks[0])
            else:
                pieces = _divide(box, max(1, limit * box[1][0] // size))
                shared += [(size * piece[1][0] // box[1][0], reference, piece, ranks) for piece in pieces]
        for _, reference, box, ranks in sorted(shared, key=lambda s: (-s[0], *s[1:])):
            give(reference, box, min(ranks, key=lambda r: (load[r], r)))
        for pieces_of_one in made.values():
            pieces_of_one.sort(key=lambda p: p[2])
        return made


def _box(chunk: ChunkStorageMetadata) -> Box:
    return tuple(chunk.offsets), tuple(chunk.sizes)


def _divide(box: Box, rows: int) -> list[Box]:
    """Return the box in pieces of at most `rows` along dimension 0."""
    (start, *offsets), (length, *sizes) = box
    return [((start + at, *offsets), (min(rows, length - at), *sizes)) for at in range(0, length, rows)]


def _cut_out(views: list[tuple[Box, torch.Tensor]], box: Box) -> torch.Tensor:
    """Return that part of what this rank holds of a tensor which is `box`."""
    for (offsets, sizes), view in views:
        starts = [a - b for a, b in zip(box[0], offsets, strict=True)]
        if all(s >= 0 and s + n <= m for s, n, m in zip(starts, box[1], sizes, strict=True)):
            return cut(view, starts, box[1])
    raise AssertionError(f"{box} is no part of what this rank holds")


# --- reading ---------------------------------------------------------------------------------------------------------


def load_shards(
    index: Index,
    read_part: Callable[[str], Mapping[str, torch.Tensor]],
    layout: Layout | None = None,
    only: str = "",
) -> dict[str, torch.Tensor]:
    """Return the tensors of a sharded checkpoint, laid out over this run's ranks, whoever wrote them.

    One part is in memory at a time, and parts of which this rank needs nothing are not read.

    Args:
        index: what `check_index` returned.
        read_part: takes a file's name and returns its tensors.
        layout: takes a reference, a shape and a dtype; returns a DTensor with the mesh and the placements that the
            tensor is to have, or None for the whole tensor on the CPU.
        only: read those whose reference begins with this.

    Raises:
        ValueError: a part does not hold what the index says, or a layout is of another shape.
    """
    loaded: dict[str, torch.Tensor] = {}
    reads: dict[str, list[tuple[str, Sequence[int], torch.Tensor]]] = {}
    for reference, stored in index.items():
        if not reference.startswith(only):
            continue
        like = layout(reference, stored.shape, stored.dtype) if layout is not None else None
        loaded[reference] = _empty(reference, stored, like)
        chunks = local_chunks(reference, loaded[reference])
        for item in create_read_items_for_chunk_list(reference, _metadata(stored), [chunk for chunk, _ in chunks]):
            assert item.storage_index.index is not None
            assert item.dest_index.index is not None
            piece, view = stored.chunks[item.storage_index.index], chunks[item.dest_index.index][1]
            target = cut(view, item.dest_offsets, item.lengths)
            reads.setdefault(piece.file, []).append((piece.key, item.storage_offsets, target))
    held = by_file(index)
    for file in sorted(reads):
        part = read_part(file)
        _check_part(file, part, held[file])
        for key, offsets, target in reads.pop(file):
            target.copy_(cut(part[key], offsets, target.shape))
        del part
    return loaded


def lay_out(reference: str, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor with the mesh and the placements of the DTensor `like`: this rank takes its part of it.

    `distribute_tensor` does not do for what FSDP2 has cut, along one dimension, behind tensor parallelism: it takes
    other rows where the numbers do not divide.
    """
    made = _empty(reference, Stored(tuple(tensor.shape), tensor.dtype, ()), like)
    for chunk, view in local_chunks(reference, made):
        view.copy_(cut(tensor, chunk.offsets, chunk.sizes))
    return made


def _empty(reference: str, stored: Stored, like: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return torch.empty(stored.shape, dtype=stored.dtype)
    if tuple(like.shape) != stored.shape:
        raise ValueError(f"{reference} is {list(stored.shape)} in the checkpoint and {list(like.shape)} in this run")
    own = like.to_local()
    local = torch.empty(own.shape, dtype=stored.dtype, device=own.device)
    strides = torch.empty(stored.shape, device="meta").stride()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=torch.Size(stored.shape), stride=strides
    )


def _metadata(stored: Stored) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in stored.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=stored.dtype), torch.Size(stored.shape), chunks)


def _check_part(
    file: str, part: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    found = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in part.items()}
    if wrong := sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)):
        key = wrong[0]
        raise ValueError(f"{file}: expected {key!r} to be {expected.get(key)}, found {found.get(key)}")
