"""The default data path: rows of a map-style dataset, gathered whole, in an order that depends on the epoch only."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain.errors import DataError
from drivetrain.rng import derive_seed
from drivetrain.state import Micro

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from drivetrain.state import Order


IGNORE_INDEX = -100  # the label that every loss passes over


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
    """Make a batch of equally shaped rows: dicts, tuples, tensors or numbers (torch's default collation)."""
    return torch.utils.data.default_collate(list(rows))


def count_labels(batch: Any) -> int | None:
    """Count the target items of a batch on the CPU: labels that are not -100; None where there are no labels."""
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, torch.Tensor):
        return None
    array = labels.numpy()
    return int(np.count_nonzero(array != IGNORE_INDEX)) if array.dtype.kind in "iu" else len(array)


def count_shifted_labels(batch: Any) -> int | None:
    """Count the target items of a causal model, whose loss predicts `labels[..., 1:]`."""
    return None if batch.get("labels") is None else count_labels({"labels": batch["labels"][..., 1:]})


@attrs.define(eq=False)
class Fetch:
    """Rows to batch, in the loop's process or in a worker; every draw is keyed by the position."""

    dataset: Any
    collate: Callable[..., Any]
    count: Callable[[Any], int | None]
    seed: int
    split: str
    stream: str | None = None  # set by a collator that draws: it is then called with `generator=`

    def rows(self, indices: torch.Tensor, epoch: int) -> Sequence[Any]:
        """Return the rows of `indices`; global generators are seeded for each row, or once where rows come whole.

        Python's and numpy's are put back, so that a model which draws from them sees the same with any worker count;
        torch's is seeded at each step anyway.
        """
        held = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            return self._pick(indices, epoch)
        finally:
            random.setstate(held[0])
            np.random.set_state(held[1])  # noqa: NPY002

    def _pick(self, indices: torch.Tensor, epoch: int) -> Sequence[Any]:
        whole = getattr(self.dataset, "__getitems__", None)
        if whole is not None:
            self.seed_globals(epoch, int(indices[0]))
            rows: Sequence[Any] = whole(indices.tolist())
            return rows
        picked = []
        for index in indices.tolist():
            self.seed_globals(epoch, index)
            try:
                picked.append(self.dataset[index])
            except Exception as error:
                raise DataError(f"{self.split} row {index}: {type(error).__name__}: {error}") from error
        return picked

    def seed_globals(self, epoch: int, index: int) -> None:
        """Seed what augmentations draw from, by the row and the epoch."""
        seed = derive_seed(self.seed, f"rows/{self.split}", epoch, index)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - for datasets that draw from the legacy generator

    def __call__(self, indices: torch.Tensor, epoch: int, position: int) -> Micro:
        """Return the micro-batch of the rows `indices`, which stand at `position` in the epoch's order."""
        if not len(indices):  # this rank has no rows in the epoch's last global batch
            return Micro(None, 0, 0)
        if self.collate is stack and hasattr(self.dataset, "gather"):
            batch = self.dataset.gather(indices)
        elif self.stream is None:
            batch = self.collate(self.rows(indices, epoch))
        else:
            draws = torch.Generator().manual_seed(derive_seed(self.seed, self.stream, epoch, position))
            batch = self.collate(self.rows(indices, epoch), generator=draws)
        items = self.count(batch)
        return Micro(batch, len(indices), len(indices) if items is None else items)


@attrs.define(eq=False)
class InProcess:
    """Batches made in the loop's own process; rank `rank` takes its slice of each global batch."""

    fetch: Fetch
    sampler: Order
    batch_size: int
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1

    @property
    def rows_per_epoch(self) -> int:
        """Rows that an epoch consumes over all ranks."""
        rows, whole = len(self.fetch.dataset), self.batch_size * self.world_size
        return rows - rows % whole if self.drop_last else rows

    def __len__(self) -> int:
        """Return the number of micro-batches in an epoch."""
        return math.ceil(self.rows_per_epoch / (self.batch_size * self.world_size))

    def positions(self, epoch: int, start: int) -> Iterator[tuple[torch.Tensor, int, int]]:
        """Yield (row numbers, epoch, position) of this rank's micro-batches."""
        order, size = self.sampler.order(epoch), self.batch_size
        for position in range(start, self.rows_per_epoch, size * self.world_size):
            mine = position + self.rank * size
            yield order[mine : min(mine + size, self.rows_per_epoch)], epoch, mine

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
