"""One outcome on all ranks: what one fails at, all raise; what one knows, all hear. Nothing is pickled."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from drivetrain import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run

T = TypeVar("T")


def together(run: Run, work: Callable[[], T]) -> T:
    """Do `work` on every rank; where it fails on one, raise that error on all.

    All ranks must call it. It returns when all are done.
    """
    failed: CheckpointError | ConfigError | None = None
    try:
        result = work()
    except (CheckpointError, ConfigError) as error:
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
        content = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(run.device) if raw else content
    torch.distributed.broadcast(content, source)
    return bytes(content.cpu().numpy()).decode()


def gather_texts(run: Run, text: str) -> list[str]:
    """Return every rank's `text` by rank; all ranks must call it."""
    if run.world_size == 1:
        return [text]
    raw = text.encode()
    lengths = [torch.zeros(1, dtype=torch.int64, device=run.device) for _ in range(run.world_size)]
    torch.distributed.all_gather(lengths, torch.tensor([len(raw)], device=run.device))
    sizes = [int(n) for n in torch.cat(lengths).tolist()]
    own = torch.frombuffer(bytearray(raw.ljust(max(*sizes, 1))), dtype=torch.uint8).to(run.device)
    parts = [torch.empty_like(own) for _ in sizes]
    torch.distributed.all_gather(parts, own)
    return [bytes(part[:size].cpu().numpy()).decode() for part, size in zip(parts, sizes, strict=True)]
