"""The default data path: rows of a map-style dataset, gathered whole, in an order that depends on the epoch only."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from typing import TYPE_CHECKING, Any, cast

import attrs
import numpy as np
import torch

from drivetrain.errors import DataError, DrivetrainError
from drivetrain.rng import derive_seed, seed_globals
from drivetrain.state import Micro
from drivetrain.streams import BadRow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from drivetrain.protocols import Order


log = logging.getLogger("drivetrain")
IGNORE_INDEX = -100  # the label that every loss passes over
SHORT = 64  # labels up to which a list is counted in less time than numpy takes to be called


class Columns(torch.utils.data.Dataset[Any]):
    """A dataset of equally long tensors by name; a batch is one `index_select` a column, with no collation."""

    def __init__(self, columns: Mapping[str, torch.Tensor]) -> None:
        """Take tensors (N, ...) that share N."""
        self.columns = dict(columns)
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"columns must be equally long. Received: {lengths}")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one row."""
        return {name: column[index] for name, column in self.columns.items()}

    def gather(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the batch of `indices` (B,)."""
        return {name: column.index_select(0, indices) for name, column in self.columns.items()}


def stack(rows: Sequence[Any]) -> Any:
    """Make a batch of equally shaped rows: dicts, tuples, tensors or numbers (torch's default collation).

    Raises:
        DataError: the rows have different fields, of which torch would take the first row's without a word.
    """
    if hasattr(rows[0], "keys") and any(row.keys() != rows[0].keys() for row in rows):
        raise DataError(
            "stack: the rows of a batch must have the same fields. "
            f"Received: rows with {sorted({tuple(sorted(row)) for row in rows})}"
        )
    return torch.utils.data.default_collate(list(rows))


def count_labels(batch: Any) -> int | None:
    """Count the target items of a batch on the CPU: labels that are not -100; None where there are no labels."""
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, torch.Tensor):
        return None
    array = labels.numpy()
    if array.ndim == 1 and array.size <= SHORT and array.dtype.kind in "iu":
        return len(array) - cast("list[int]", array.tolist()).count(IGNORE_INDEX)
    return int(np.count_nonzero(array != IGNORE_INDEX)) if array.dtype.kind in "iu" else len(array)


def count_shifted_labels(batch: Any) -> int | None:
    """Count the target items of a causal model, whose loss predicts `labels[..., 1:]`."""
    return None if batch.get("labels") is None else count_labels({"labels": batch["labels"][..., 1:]})


def shifts_labels(model: Any) -> bool:
    """Tell whether the loss that a transformers model brings predicts `labels[..., 1:]`.

    It names its loss; one that names none takes the causal one, where its attention looks back only.
    """
    if getattr(model, "loss_type", "") is not None:
        return getattr(model, "loss_type", "") == "ForCausalLM"
    causal = any(getattr(module, "is_causal", False) is True for module in model.modules())
    return causal and not getattr(model.config, "is_encoder_decoder", False)


@attrs.define(eq=False)
class Fetch:
    """Rows to batch, in the loop's process or in a worker; every draw is keyed by the position."""

    dataset: Any
    collate: Callable[..., Any]
    count: Callable[[Any], int | None]
    seed: int
    split: str
    stream: str | None = None  # set by a collator that draws: it is then called with `generator=`
    checks: tuple[Callable[[Any], None], ...] = ()  # each raises DataError for a batch that the run cannot use
    tolerant: bool = False  # bad rows are left out and told in `micro.bad`

    @contextlib.contextmanager
    def kept_generators(self) -> Iterator[None]:
        """Put Python's and numpy's global generators back: a model that draws from them sees the same with any workers.

        torch's is seeded at each step anyway.
        """
        held = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(held[0])
            np.random.set_state(held[1])  # noqa: NPY002

    def seed_globals(self, epoch: int, index: int) -> None:
        """Seed what augmentations draw from, by the row and the epoch."""
        seed_globals(derive_seed(self.seed, f"rows/{self.split}", epoch, index))

    def rows(self, indices: torch.Tensor, epoch: int) -> Sequence[Any]:
        """Return the rows of `indices`; global generators are seeded for each row, or once where rows come whole.

        A dataset whose rows are plain memory has `take_rows`, and is spared the seeding.
        """
        dataset, whole = self.dataset, getattr(self.dataset, "__getitems__", None)
        if hasattr(dataset, "take_rows"):
            taken: Sequence[Any] = dataset.take_rows(indices)
            return taken
        with self.kept_generators():
            if whole is not None:
                self.seed_globals(epoch, int(indices[0]))
                try:
                    rows: Sequence[Any] = whole(indices.tolist())
                except Exception:  # noqa: BLE001 - one of them; which one is found below
                    log.debug("%s rows %s cannot be fetched together", self.split, indices.tolist())
                else:
                    if len(rows) != len(indices):
                        raise DataError(
                            f"{self.split} rows {indices.tolist()[:16]}: {type(dataset).__name__}.__getitems__ "
                            f"returned {len(rows)} rows for {len(indices)}"
                        )
                    return rows
            picked: list[Any] = []
            for index in indices.tolist():
                self.seed_globals(epoch, index)
                try:
                    picked.append(dataset[index])
                except Exception as error:
                    reason = f"{self.split} row {index}: {type(error).__name__}: {error}"
                    if not self.tolerant or isinstance(error, MemoryError):  # that is no fault of the row
                        raise DataError(reason) from error
                    picked.append(BadRow(reason))
            return picked

    def __call__(self, indices: torch.Tensor, epoch: int, position: int) -> Micro:
        """Return the micro-batch of the rows `indices`, which stand at `position` in the epoch's order."""
        rows = indices.shape[0]
        if not rows:  # this rank has no rows in the epoch's last global batch
            return Micro(None, 0, 0)
        if self.collate is stack and hasattr(self.dataset, "gather"):
            batch = self.dataset.gather(indices)
            with contextlib.suppress(DataError):  # a check's: which row it is, is found below
                for check in self.checks:
                    check(batch)
                items = self.count(batch)
                return Micro(batch, rows, rows if items is None else items)
        return self.make(self.rows(indices, epoch), indices.tolist(), epoch, position)

    def make(self, rows: Sequence[Any], numbers: Sequence[int], epoch: int, position: int) -> Micro:
        """Return the micro-batch of `rows`, whose row numbers are `numbers`."""
        if not len(rows):
            return Micro(None, 0, 0)
        bad: list[str] = []
        try:
            batch = self.batch(rows, epoch, position)
        except Exception as error:
            if isinstance(error, DrivetrainError) and not isinstance(error, DataError):
                raise
            from drivetrain.explain import sift  # noqa: PLC0415 - loaded when something is wrong

            rows, bad = sift(self, rows, numbers, error)
            if not rows:
                return Micro(None, len(numbers), 0, bad=bad)
            batch = self.batch(rows, epoch, position)
        items = self.count(batch)
        return Micro(batch, len(numbers), len(rows) if items is None else items, bad=bad)

    def batch(self, rows: Sequence[Any], epoch: int, position: int) -> Any:
        """Collate `rows`, which stand at `position`, and check the batch."""
        if self.stream is None:
            batch = self.collate(rows)
        else:
            draws = torch.Generator().manual_seed(derive_seed(self.seed, self.stream, epoch, position))
            batch = self.collate(rows, generator=draws)
        for check in self.checks:
            check(batch)
        return batch


@attrs.define(eq=False)
class InProcess:
    """Batches made in the loop's own process; rank `rank` takes its slice of each global batch.

    A sampler with `bounds(epoch)` cuts the micro-batches itself: every `world_size` of them are a global batch.
    """

    fetch: Fetch
    sampler: Order
    batch_size: int
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1

    @property
    def rows_per_epoch(self) -> int:
        """Rows that an epoch consumes over all ranks."""
        rows, whole = getattr(self.sampler, "rows", None) or len(self.fetch.dataset), self.batch_size * self.world_size
        return rows - rows % whole if self.drop_last and not hasattr(self.sampler, "bounds") else rows

    def __len__(self) -> int:
        """Return the number of micro-batches in an epoch."""
        return math.ceil((len(self._cuts(0, 0)) - 1) / self.world_size)

    def _cuts(self, epoch: int, start: int) -> list[int]:
        """Return where micro-batches begin from row `start` on, and where the last one ends."""
        if hasattr(self.sampler, "bounds"):
            bounds = self.sampler.bounds(epoch)
            return [start, *bounds[bounds > start].tolist()]
        return [*range(start, self.rows_per_epoch, self.batch_size), self.rows_per_epoch]

    def positions(self, epoch: int, start: int) -> Iterator[tuple[torch.Tensor, int, int]]:
        """Yield (row numbers, epoch, position) of this rank's micro-batches; rows are empty where ranks have more."""
        order, cuts = self.sampler.order(epoch), self._cuts(epoch, start)
        last = len(cuts) - 1
        for first in range(0, last, self.world_size):
            begin, end = (cuts[min(first + self.rank + edge, last)] for edge in (0, 1))
            yield order[begin:end], epoch, begin

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Micro]:
        """Yield the micro-batches of `epoch` from row `start` on."""
        fetch = self.fetch
        for indices, of_epoch, position in self.positions(epoch, start):
            yield fetch(indices, of_epoch, position)


@attrs.frozen
class Shuffled:
    """A permutation of the rows from (seed, epoch)."""

    rows: int
    seed: int

    def order(self, epoch: int) -> torch.Tensor:
        """Return int64 (N,)."""
        draws = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        return torch.randperm(self.rows, generator=draws)


@attrs.frozen
class Sequential:
    """The rows as they come."""

    rows: int

    def order(self, epoch: int) -> torch.Tensor:  # noqa: ARG002 - the same in every epoch
        """Return int64 (N,)."""
        return torch.arange(self.rows)
