"""What the kernel asks of objects that plugins make; nobody needs to inherit from these, and no run loads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from drivetrain.state import Micro


class Metric(Protocol):
    """A streaming metric of an evaluation; lives for one pass over one split."""

    def update(self, micro: Micro) -> None:
        """Add one batch; `micro.outputs` and `micro.batch` are on the device, so avoid `.item()`."""

    def compute(self) -> dict[str, float]:
        """Return the values by name."""


class Order(Protocol):
    """A sampler: the order of a split, a function of the epoch (and the run's seed and data) only."""

    rows: int

    def order(self, epoch: int) -> torch.Tensor:
        """Return row numbers, int64 (rows,).

        A method `bounds(epoch)` besides cuts the micro-batches: int64 (M + 1,), from 0 to `rows`; M never changes.
        """


class Batches(Protocol):
    """A loader: micro-batches of a split from any position of any epoch, in O(1)."""

    rows_per_epoch: int

    def __len__(self) -> int:
        """Return the number of micro-batches in one epoch."""

    def iterate(self, epoch: int, start: int = 0, position: Any = None) -> Iterator[Micro]:
        """Yield the micro-batches of `epoch` from row number `start` of its order on; of a stream, from `position`."""


class Reader(Protocol):
    """Rows from some position on."""

    def __iter__(self) -> Iterator[Any]:
        """Return itself."""

    def __next__(self) -> Any:
        """Return the next row, or a `BadRow` in its place."""

    def position(self) -> Any:
        """Return where to go on after the rows given so far, in JSON values."""


class Stream(Protocol):
    """Rows in an order that depends on the epoch (and the run's seed) only."""

    def open(self, epoch: int, position: Any = None) -> Reader:
        """Return a reader that stands at `position`, or at the epoch's start."""
