"""Batches: how many rows, in how many worker processes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs
import torch

from drivetrain import ConfigError, DataError, InProcess, Problem, Streamed, hookimpl, option, plugin
from drivetrain_plugins.data._workers import Crews, How, Request

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from drivetrain import Micro, Run

ROWS = 8  # of a micro-batch, where nobody says how many


@attrs.define(eq=False)
class InWorkers(InProcess):
    """The same batches, made in worker processes."""

    crews: Crews = attrs.field(kw_only=True)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Micro]:
        """Yield the micro-batches of `epoch` from row `start` on."""
        yield from self.crews.micros(Request((rows.numpy(), *key), rows) for rows, *key in self.positions(epoch, start))


@attrs.define(eq=False)
class StreamInWorkers(Streamed):
    """The batches of a stream, made in worker processes: each reads all of it and makes every n-th batch."""

    crews: Crews = attrs.field(kw_only=True)

    def iterate(self, epoch: int, start: int = 0, position: Any = None) -> Iterator[Micro]:
        """Yield this rank's micro-batches from row `start` on, which stands at `position` in the stream."""
        yield from self.crews.micros(self._requests((epoch, start, position)))

    def _requests(self, opening: tuple[int, int, Any]) -> Iterator[Request]:
        """Ask every worker to open the stream, then each for its next batch, until one says that it is over."""
        workers, whole = self.crews.how.workers, self.batch_size * self.world_size
        for number in itertools.count():
            # It has read the batch after its last one, to know whether there is any, and reads the one after this.
            rows = range(opening[1] + max(0, number - workers + 2) * whole, opening[1] + (number + 2) * whole)
            yield Request(opening if number < workers else None, rows)


@attrs.frozen
class OnTheHost:
    """Refuse batches that the loop would have to copy back, or that hang on somebody's graph."""

    def __call__(self, batch: Any) -> None:
        """Look at every tensor of `batch`.

        Raises:
            DataError: one lies on a device, or requires a gradient.
        """
        parts = batch if isinstance(batch, (list, tuple)) else [batch]
        for name, value in batch.items() if hasattr(batch, "items") else enumerate(parts):
            if isinstance(value, torch.Tensor) and (value.device.type != "cpu" or value.requires_grad):
                do = "Collate on the CPU, without gradients: the loop moves each batch when its turn comes"
                received = f"a tensor on {value.device}, requires_grad={value.requires_grad}"
                raise DataError(f"loader: field {name!r} of a batch cannot be used. {do}. Received: {received}")


@plugin(role="data", example={"batch_size": 4})
class Loader:
    """Set batch size and worker processes; the order of rows depends on neither."""

    free_options: ClassVar = ("workers", "prefetch", "timeout_s", "pin_memory", "persistent", "start_method")
    per_rank_options: ClassVar = {"batch_size": ROWS}  # with its default: other ranks may make up for another size

    batch_size: int | None = option(None, ge=1, help="rows of a micro-batch, for each rank; None takes 8")
    evaluate_batch_size: int | None = option(None, ge=1, help="rows of an evaluation batch; None takes batch_size")
    workers: int = option(0, ge=0, le=256, help="worker processes of each split; 0 makes batches in the loop")
    drop_last: bool = option(False, help="leave out the rows of an epoch that do not fill a batch")
    prefetch: int = option(2, ge=1, le=64, help="batches each worker makes ahead")
    timeout_s: float = option(300, ge=0, help="seconds to wait for a worker before it is called hung; 0 waits for ever")
    pin_memory: bool = option(False, help="put batches into pinned memory, for a GPU")
    persistent: bool = option(True, help="keep the workers between epochs and evaluations of a run")
    start_method: Literal["fork", "spawn", "forkserver"] | None = option(
        None, choices=[None, "fork", "spawn", "forkserver"], help="how workers start; None takes Python's default"
    )

    @hookimpl
    def batch_checks(self) -> list[OnTheHost]:
        """Refuse tensors that do not lie where batches are made."""
        return [OnTheHost()]

    @hookimpl
    def build_batches(self, run: Run, split: str, fetch: Any, sampler: Any) -> InProcess | Streamed:
        """Return the loader of `split`; evaluation never drops rows.

        Raises:
            ConfigError: a batch size is given, and the sampler cuts the batches.
        """
        train = split == "train"
        if train and self.batch_size is not None and hasattr(sampler, "bounds"):
            do = "leave batch_size out; evaluate_batch_size sets the size of evaluation batches"
            what = f"loader: {type(sampler).__name__} cuts the {split} batches itself, and a batch size is given too"
            raise ConfigError([Problem(what, f"batch_size={self.batch_size}", do)])
        size = (not train and self.evaluate_batch_size) or self.batch_size or ROWS
        common: dict[str, Any] = {
            "fetch": fetch,
            "batch_size": size,
            "drop_last": self.drop_last and train,
            "rank": run.rank,
            "world_size": run.world_size,
        }
        if self.workers == 0:
            return Streamed(**common) if sampler is None else InProcess(sampler=sampler, **common)
        pinned = self.pin_memory and run.device.type == "cuda"
        how = How(self.workers, self.prefetch, self.timeout_s, pinned, self.start_method)
        if sampler is None:
            parts = [Streamed(**common, part=part, parts=self.workers) for part in range(self.workers)]
            return StreamInWorkers(**common, crews=Crews(fetch, parts, how))
        return InWorkers(sampler=sampler, **common, crews=Crews(fetch, None, how))

    @hookimpl(wrapper=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Keep the workers while the run lasts."""
        all_crews = [b.crews for b in run.batches.values() if isinstance(b, (InWorkers, StreamInWorkers))]
        for crews in all_crews:
            crews.keep = self.persistent
        try:
            return (yield)
        finally:
            for crews in all_crews:
                crews.end()
