"""Rows of similar length next to each other, so that a batch holds little padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import Sequential as InTurn
from drivetrain import Shuffled, hookimpl, option, plugin
from drivetrain.rng import generator
from drivetrain_plugins.order._lengths import row_lengths

if TYPE_CHECKING:
    from drivetrain import Run


@attrs.frozen(eq=False)
class Grouped:
    """The epoch's permutation, sorted by length within windows; chunks of each window in random order."""

    lengths: np.ndarray[Any, Any]  # int64 (N,)
    window: int
    chunk: int
    seed: int

    @property
    def rows(self) -> int:
        """Return N."""
        return len(self.lengths)

    def order(self, epoch: int) -> torch.Tensor:
        """Return int64 (N,); the first row is the longest."""
        rows, chunk = self.rows, self.chunk
        order = Shuffled(rows, self.seed).order(epoch).numpy()
        longest = int(self.lengths[order].argmax())
        order[[0, longest]] = order[[longest, 0]]
        order = order[np.lexsort((-self.lengths[order], np.arange(rows) // self.window))]
        chunks = -(-rows // chunk)
        keys = torch.rand(chunks, generator=generator(self.seed, "group-by-length", epoch)).numpy()
        if rows % chunk:
            keys[-1] = 2  # an incomplete chunk stays last: elsewhere it would shift the batches behind it
        keys[0] = -1  # the longest row is in it
        shuffled = np.lexsort((keys, np.arange(chunks) * chunk // self.window))
        places = (shuffled[:, None] * chunk + np.arange(chunk)).ravel()
        return torch.from_numpy(order[places[places < rows]])


@attrs.frozen(eq=False)
class ByLength:
    """The longest rows first, in every epoch."""

    lengths: np.ndarray[Any, Any]  # int64 (N,)

    @property
    def rows(self) -> int:
        """Return N."""
        return len(self.lengths)

    def order(self, epoch: int) -> torch.Tensor:  # noqa: ARG002 - the same in every epoch
        """Return int64 (N,)."""
        return torch.from_numpy(np.argsort(-self.lengths, kind="stable"))


@plugin(role="order", example={"window": 16, "chunk": 4}, rows="tokens", companions={"pad": {}})
class GroupByLength:
    """Put rows of similar length into one batch: sort windows of the epoch's permutation by length.

    Batches of a size that divides `chunk` (over all ranks) never reach over a chunk's end. The first batch of an epoch
    holds its longest row, so that memory runs out at once or never.
    """

    field: str = option("input_ids", help="field whose length counts")
    window: int = option(4096, ge=1, help="rows sorted together; more leave less padding and less chance")
    chunk: int = option(64, ge=1, help="neighbours in length that stay together; window must be a multiple of it")
    sort_evaluation: bool = option(False, help="evaluate the longest rows first, instead of as they come")

    def __attrs_post_init__(self) -> None:
        """Refuse windows that chunks do not fill."""
        if self.window % self.chunk:
            raise ValueError(f"window must be a multiple of chunk. Received: {self.window=}, {self.chunk=}")

    @hookimpl
    def build_sampler(self, run: Run, split: str) -> Grouped | ByLength | InTurn:
        """Group what is trained on."""
        if split != "train" and not self.sort_evaluation:
            return InTurn(len(run.datasets[split]))
        lengths = row_lengths(run, split, self.field, plugin="group-by-length")
        return Grouped(lengths, self.window, self.chunk, run.settings.seed) if split == "train" else ByLength(lengths)
