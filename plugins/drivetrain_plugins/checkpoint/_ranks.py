"""One outcome on all ranks: what one fails at, all raise; what rank 0 found, all use."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from drivetrain import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run

T = TypeVar("T")


def together(run: Run, work: Callable[[], T]) -> T:
    """Do `work` on every rank; where it fails on one, raise that CheckpointError on all.

    All ranks must call it. It returns when all are done.
    """
    failed: CheckpointError | None = None
    try:
        result = work()
    except CheckpointError as error:
        failed = error
    if run.world_size > 1:
        first = torch.tensor([run.world_size if failed is None else run.rank], device=run.device)
        torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
        if (source := int(first)) < run.world_size:
            text = share_text(run, str(failed or ""), source)
            raise failed or CheckpointError(f"rank {source}: {text}")
    if failed is not None:
        raise failed
    return result


def share_text(run: Run, text: str, source: int = 0) -> str:
    """Return rank `source`'s `text` on all ranks; as bytes, since objects would be pickled."""
    if run.world_size == 1:
        return text
    raw = text.encode()
    length = torch.tensor([len(raw)], device=run.device)
    torch.distributed.broadcast(length, source)
    content = torch.zeros(int(length), dtype=torch.uint8, device=run.device)
    if run.rank == source:
        content = torch.tensor(list(raw), dtype=torch.uint8, device=run.device)
    torch.distributed.broadcast(content, source)
    return bytes(content.tolist()).decode()
