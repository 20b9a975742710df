"""Batches by tokens: as many rows as fit a budget once they are padded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import ConfigError, Problem, Shuffled, hookimpl, option, plugin
from drivetrain import Sequential as InTurn
from drivetrain.rng import generator
from drivetrain_plugins.order._lengths import row_lengths

if TYPE_CHECKING:
    from drivetrain import Run


@attrs.frozen(eq=False)
class Budgeted:
    """Rows by length, cut into batches; the cuts are those of every epoch, rows and batches change places."""

    lengths: np.ndarray[Any, Any]  # int64 (N,), rounded up
    cuts: np.ndarray[Any, Any]  # int64 (M + 1,), in the rows sorted by length, longest first
    seed: int
    shuffled: bool = True

    @property
    def rows(self) -> int:
        """Return N."""
        return len(self.lengths)

    def order(self, epoch: int) -> torch.Tensor:
        """Return int64 (N,): batch after batch."""
        rows = np.arange(self.rows)
        if self.shuffled:
            rows = Shuffled(self.rows, self.seed).order(epoch).numpy()
        rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
        batches, bounds = self._batches(epoch), self.bounds(epoch).numpy()
        shift = np.repeat(self.cuts[batches] - bounds[:-1], np.diff(bounds))
        return torch.from_numpy(rows[np.arange(self.rows) + shift])

    def bounds(self, epoch: int) -> torch.Tensor:
        """Return int64 (M + 1,): where batches end in `order(epoch)`."""
        sizes = np.diff(self.cuts)[self._batches(epoch)]
        return torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))

    def _batches(self, epoch: int) -> np.ndarray[Any, Any]:
        """Return the order of the batches, (M,); the one with the longest row is first."""
        count = len(self.cuts) - 1
        if not self.shuffled:
            return np.arange(count)
        others = torch.randperm(count - 1, generator=generator(self.seed, "token-budget", epoch)).numpy()
        return np.concatenate([[0], others + 1])


def cut(lengths: np.ndarray[Any, Any], tokens: int, max_rows: int | None) -> np.ndarray[Any, Any]:
    """Return where batches of at most `tokens` padded tokens end in rows of falling `lengths` (N,): int64 (M + 1,)."""
    cuts, rows = [0], len(lengths)
    while cuts[-1] < rows:
        fit = tokens // int(lengths[cuts[-1]])
        cuts.append(min(rows, cuts[-1] + (fit if max_rows is None else min(fit, max_rows))))
    return np.array(cuts, np.int64)


@plugin(
    role="order",
    provides=["batch-bounds"],
    example={"tokens": 64, "multiple": 2},
    rows="tokens",
    companions={"pad": {}},
)
class TokenBudget:
    """Cut micro-batches by padded tokens instead of rows: rows times the longest of them stays within `tokens`.

    Rows are sorted by their length rounded up to `multiple`; rows of one rounded length change places in every epoch,
    and so do the batches, but where the sorted rows are cut does not, so that every epoch has as many batches. The
    first batch of an epoch holds its longest row, so that memory runs out at once or never. A row that is longer than
    the budget is refused at assembly. `batch_size` of the loader is not used for a split that is cut here.
    """

    tokens: int = option(4096, ge=1, help="padded tokens of a micro-batch, for each rank: rows times the longest")
    field: str = option("input_ids", help="field whose length counts")
    multiple: int = option(8, ge=1, help="lengths are rounded up to a multiple; larger mixes rows more; as in `pad`")
    max_rows: int | None = option(None, ge=1, help="most rows of a micro-batch")
    evaluate_tokens: int | None = option(None, ge=1, help="cut evaluations by tokens, longest rows first")

    @hookimpl
    def build_sampler(self, run: Run, split: str) -> Budgeted | InTurn:
        """Cut what is trained on, and evaluations if they have a budget."""
        tokens = self.tokens if split == "train" else self.evaluate_tokens
        if tokens is None:
            return InTurn(len(run.datasets[split]))
        lengths = row_lengths(run, split, self.field, plugin="token-budget")
        rounded = np.maximum(-(-lengths // self.multiple), 1) * self.multiple
        longest = int(rounded.argmax())
        if rounded[longest] > tokens:
            name = "tokens" if split == "train" else "evaluate_tokens"
            what = f"token-budget: {split} row {longest} is longer than the budget of a batch"
            received = (
                f"{lengths[longest]} tokens, {rounded[longest]} as a multiple of {self.multiple}; {name}={tokens}; "
                f"{int((rounded > tokens).sum())} rows are too long"
            )
            raise ConfigError([Problem(what, received, f"raise {name}, or cut rows to a largest length")])
        cuts = cut(-np.sort(-rounded), tokens, self.max_rows)
        return Budgeted(rounded, cuts, run.settings.seed, shuffled=split == "train")
