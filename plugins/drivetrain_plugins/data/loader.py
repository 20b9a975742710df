"""Batches: how many rows, in how many worker processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import InProcess, TrainingError, hookimpl, option, plugin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drivetrain import Micro, Run


class _Positions(torch.utils.data.Dataset[Any]):
    """A dataset whose keys are positions in the order, and whose values are finished micro-batches."""

    def __init__(self, fetch: Any) -> None:
        self.fetch = fetch

    def __getitem__(self, key: tuple[torch.Tensor, int, int]) -> Micro:
        made: Micro = self.fetch(*key)
        return made


def _whole(micro: Any) -> Any:
    return micro


@attrs.define(eq=False)
class InWorkers(InProcess):
    """The same batches, made in worker processes."""

    workers: int = 1
    prefetch: int = 2
    timeout_s: float = 0
    pin_memory: bool = False

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Micro]:
        """Yield the micro-batches of `epoch` from row `start` on."""
        loader = torch.utils.data.DataLoader(
            _Positions(self.fetch),
            sampler=list(self.positions(epoch, start)),
            batch_size=None,
            collate_fn=_whole,
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
            timeout=self.timeout_s,
            # The loader draws a base seed when iterated; never from the global generator.
            generator=torch.Generator().manual_seed(0),
        )
        for micro in self._told(loader):
            if self.pin_memory:
                micro.batch = torch.utils.data._utils.pin_memory.pin_memory(micro.batch)  # type: ignore[no-untyped-call]  # noqa: SLF001
            yield micro

    def _told(self, loader: Any) -> Iterator[Micro]:
        """Yield what the workers make; say what to do when one of them is lost."""
        try:
            yield from loader
        except (RuntimeError, ConnectionError, EOFError) as error:
            if str(error).startswith("Caught "):  # it comes from the rows, not from the processes
                raise
            raise TrainingError(
                f"loader: the {self.fetch.split} data's worker processes failed: {error}. A killed one has often run "
                "out of memory: take fewer workers or a smaller prefetch. A slow one needs a larger "
                f"timeout_s. Received: workers={self.workers}, prefetch={self.prefetch}, timeout_s={self.timeout_s}"
            ) from error


@plugin(role="data", example={"batch_size": 4})
class Loader:
    """Set batch size and worker processes; the order of rows depends on neither."""

    batch_size: int = option(8, ge=1, help="rows of a micro-batch, for each rank")
    evaluate_batch_size: int | None = option(None, ge=1, help="rows of an evaluation batch; None takes batch_size")
    workers: int = option(0, ge=0, le=256, help="worker processes; 0 makes batches in the loop")
    drop_last: bool = option(False, help="leave out the rows of an epoch that do not fill a batch")
    prefetch: int = option(2, ge=1, help="batches each worker makes ahead")
    timeout_s: float = option(300, ge=0, help="seconds to wait for a worker before it is called hung; 0 waits for ever")
    pin_memory: bool = option(False, help="put batches into pinned memory, for a GPU")

    @hookimpl
    def build_batches(self, run: Run, split: str, fetch: Any, sampler: Any) -> InProcess:
        """Return the loader of `split`; evaluation never drops rows."""
        train = split == "train"
        size = self.batch_size if train else self.evaluate_batch_size or self.batch_size
        common: dict[str, Any] = {
            "fetch": fetch,
            "sampler": sampler,
            "batch_size": size,
            "drop_last": self.drop_last and train,
            "rank": run.rank,
            "world_size": run.world_size,
        }
        if self.workers == 0:
            return InProcess(**common)
        pin = self.pin_memory and run.device.type == "cuda"
        return InWorkers(
            **common, workers=self.workers, prefetch=self.prefetch, timeout_s=self.timeout_s, pin_memory=pin
        )
