"""Equal work for every rank and micro-batch of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.order._lengths import row_lengths

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from drivetrain import Run
    from drivetrain.protocols import Order

    Array = np.ndarray[Any, Any]

HALVINGS = 24  # of the interval in which the least possible cost of the dearest part is looked for


def split_padded(costs: Array, parts: int) -> Array:
    """Cut rows of falling length into consecutive parts whose dearest is as cheap as can be.

    Args:
        costs: (S, G) what one row costs in a batch in which it is the longest, falling along each of S lists.
        parts: into how many; a part is left empty only where there are fewer rows.

    Returns:
        Sizes of the parts, int64 (S, parts).
    """
    rows, lists = costs.shape[1], np.arange(len(costs))

    def fill(limit: Array) -> Array:
        """Return where parts end that are as large as `limit` (S,) lets them be: (S, parts + 1)."""
        ends = np.zeros((len(costs), parts + 1), np.int64)
        for part in range(parts):
            start = ends[:, part]
            fit = (limit / costs[lists, np.minimum(start, rows - 1)] + 1e-9).astype(np.int64)
            left = np.maximum(rows - start - (parts - 1 - part), 1)  # one for each part to come
            ends[:, part + 1] = np.minimum(start + np.clip(fit, 1, left), rows)
        return ends

    low, high = costs[:, 0].copy(), costs[:, 0] * rows
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = fill(middle)[:, -1] == rows
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    sizes: Array = np.diff(fill(high))
    return sizes


def split_packed(costs: Array, parts: int) -> tuple[Array, Array]:
    """Give each row, dearest first, to the part that has least so far (Graham 1969; at most 4/3 of the best).

    Args:
        costs: (S, G), falling along each of S lists.
        parts: into how many.

    Returns:
        Places of the rows, part by part, int64 (S, G), and sizes of the parts, int64 (S, parts).
    """
    lists, loads = np.arange(len(costs)), np.zeros((len(costs), parts))
    part_of = np.empty(costs.shape, np.int64)
    for row in range(costs.shape[1]):
        part_of[:, row] = least = loads.argmin(1)
        loads[lists, least] += costs[:, row]
    sizes = (part_of[:, :, None] == np.arange(parts)).sum(1)
    return np.argsort(part_of, axis=1, kind="stable"), sizes


@attrs.define(eq=False)
class Balanced:
    """The inner order, in which each step's rows are dealt out anew."""

    inner: Order
    rows: int  # of an epoch, dropped ones left out
    lengths: Array  # int64 (rows of the data,)
    batch_size: int
    world_size: int
    accumulation: int
    attention: float
    padded: bool
    resumed: tuple[int, int] = (0, 0)  # epoch and row at which a run went on, maybe with other ranks
    _made: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def order(self, epoch: int) -> torch.Tensor:
        """Return int64 (rows,): rows of each step as in the inner order, in its micro-batches."""
        return self._deal(epoch)[1]

    def bounds(self, epoch: int) -> torch.Tensor:
        """Return int64 (M + 1,): where micro-batches end."""
        return self._deal(epoch)[2]

    def _deal(self, epoch: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Make order and bounds together; the last epoch's are kept, as each is asked for by itself."""
        of_step = self.batch_size * self.world_size * self.accumulation
        head = self.resumed[1] % of_step if epoch == self.resumed[0] else 0  # steps are counted from where it went on
        if self._made is None or self._made[0] != (epoch, head):
            rows = self.inner.order(epoch)[: self.rows].numpy()
            last = head + (len(rows) - head) // of_step * of_step
            pieces = (rows[None, :head], rows[head:last].reshape(-1, of_step), rows[None, last:])
            dealt = [self._deal_steps(piece) for piece in pieces if piece.size]
            sizes = np.concatenate([[0], *(size for _, size in dealt)])
            order = np.concatenate([row for row, _ in dealt])
            self._made = (epoch, head), torch.from_numpy(order), torch.from_numpy(np.cumsum(sizes))
        return self._made

    def _deal_steps(self, rows: Array) -> tuple[Array, Array]:
        """Deal out the rows (S, G) of S steps; return them and the sizes of the micro-batches, both flat."""
        whole = self.batch_size * self.world_size
        parts = -(-rows.shape[1] // whole) * self.world_size
        rows = np.take_along_axis(rows, np.argsort(-self.lengths[rows], axis=1, kind="stable"), 1)
        tokens = np.maximum(self.lengths[rows], 1).astype(np.float64)
        costs = tokens + self.attention * tokens**2
        if self.padded:
            return rows.ravel(), split_padded(costs, parts).ravel()
        places, sizes = split_packed(costs, parts)
        return np.take_along_axis(rows, places, 1).ravel(), sizes.ravel()


@plugin(role="order", conflicts=["batch-bounds"], example={"attention": 0.01}, rows="tokens", companions={"pad": {}})
class Rebalance:
    """Deal out the rows of every step, so that its micro-batches cost the same on all ranks.

    Each step has the rows that it would have without this plugin (batch size times ranks times accumulation, in the
    order of whichever plugin sets it), so the gradient is the same; which rank has them, and how many of them, follows
    their lengths. Going on with other ranks keeps every row once in the epoch. A row of n tokens costs
    n + attention * n**2; a padded micro-batch costs its rows times the longest.
    """

    field: str = option("input_ids", help="field whose length counts")
    attention: float | None = option(
        None, ge=0, help="cost of attention; None takes 1 / (6 * hidden size) of the model's config, 0 without one"
    )
    padded: bool = option(True, help="rows are padded to the longest of their batch; False where they are packed")

    _sampler: Balanced | None = attrs.field(init=False, default=None)

    @hookimpl(wrapper=True)
    def build_batches(self, run: Run, split: str, sampler: Any) -> Generator[None, Any, Any]:
        """Put the dealt order in place of the loader's; the loader knows the batch size."""
        batches = yield
        if split != "train" or batches.rows_per_epoch == 0:
            return batches
        if sampler is None or hasattr(sampler, "bounds") or not hasattr(batches, "batch_size"):
            received = "a stream" if sampler is None else f"{type(sampler).__name__}, {type(batches).__name__}"
            do = "give it an order that leaves the batches to the loader, or take rebalance out"
            raise ConfigError([Problem("rebalance: it deals out the rows of map-style batches", received, do)])
        self._sampler = batches.sampler = Balanced(
            sampler,
            batches.rows_per_epoch,
            row_lengths(run, split, self.field, plugin="rebalance"),
            batches.batch_size,
            run.world_size,
            run.facts.get("accumulation", 1),
            self._attention(run),
            self.padded,
        )
        return batches

    def _attention(self, run: Run) -> float:
        """Return attention's share: 2 of its 12 * hidden + 2 * length products a token, in a usual block."""
        if self.attention is not None:
            return self.attention
        hidden = getattr(getattr(run.model, "config", None), "hidden_size", None)
        return 1 / (6 * hidden) if hidden else 0.0

    @hookimpl
    def loaded(self, run: Run, path: Path) -> None:  # noqa: ARG002
        """Count steps from where the run goes on: the rows before it are done, with however many ranks."""
        if self._sampler is not None:
            self._sampler.resumed = run.progress.epoch, run.progress.rows_in_epoch
