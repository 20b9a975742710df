"""Which rows of the data a micro-batch holds, while they are predicted."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem, Streamed, TrainingError
from drivetrain_plugins.evaluate import _made_texts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drivetrain import Micro, Run
    from drivetrain.protocols import Batches
    from drivetrain_plugins.evaluate.predict import Collector


class Followed:
    """The batches of a split; each is known by the numbers of its rows until it is collected.

    Those without target items, which an evaluation passes over, are predicted here, where it would take the next one.
    """

    def __init__(self, run: Run, split: str, batches: Batches) -> None:
        """Follow `batches`.

        Raises:
            ConfigError: nobody can tell which rows they hold.
        """
        self.split = split
        self.collector: Collector | None = None
        self._run, self._batches = run, batches
        self._rows: dict[int | None, torch.Tensor] = {}  # by the micro-batch's number
        if not isinstance(batches, Streamed) and not hasattr(batches, "positions"):
            what = f"predict: nobody can tell which rows are in a batch of the {split} data"
            do = "give the batches a method `positions`, as InProcess has it, or take `predict` out"
            raise ConfigError([Problem(what, type(batches).__name__, do)])

    @property
    def rows_per_epoch(self) -> int | None:
        """Those of the batches."""
        return self._batches.rows_per_epoch

    def __len__(self) -> int:
        """Return the number of micro-batches."""
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        """Look like the batches in everything else."""
        return getattr(self._batches, name)

    def iterate(self, epoch: int, start: int = 0, *position: Any) -> Iterator[Micro]:
        """Yield the micro-batches, having written down their rows."""
        numbered = self._numbers(epoch, start)
        for number, micro in enumerate(self._batches.iterate(epoch, start, *position)):
            rows = self._sound(next(numbered), micro)
            if micro.batch is not None and len(rows):
                micro.number = number  # as the evaluation counts, too
                self._rows[number] = rows
                if hasattr(micro.batch, "keys"):
                    _made_texts.complete(self._run, micro.batch)
                if micro.num_items == 0 and not self.split.startswith("predict"):
                    self._predict(micro)
            yield micro

    def pop(self, micro: Micro) -> torch.Tensor | None:
        """Return the numbers of a micro-batch's rows, int64 (B,); None if they were asked for before."""
        return self._rows.pop(micro.number, None)

    def _predict(self, micro: Micro) -> None:
        assert self.collector is not None
        micro.run, hooks = self._run, self._run.hooks
        hooks.prepare(micro)
        micro.outputs = hooks.forward(micro)
        self.collector.update(micro)
        micro.outputs = None

    def _numbers(self, epoch: int, start: int) -> Iterator[torch.Tensor]:
        batches: Any = self._batches
        if not isinstance(batches, Streamed):
            yield from (rows for rows, *_ in batches.positions(epoch, start))
            return
        size = batches.batch_size
        first = start + batches.rank * size
        while True:  # the last ones are cut by what the micro-batch holds
            yield torch.arange(first, first + size)
            first += size * batches.world_size

    def _sound(self, rows: torch.Tensor, micro: Micro) -> torch.Tensor:
        """Return the rows that are in the batch: without those that were found bad."""
        rows = rows[: micro.num_rows]
        if not micro.bad:
            return rows
        told = [re.match(rf"{re.escape(self.split)} row (\d+)\b", reason) for reason in micro.bad]
        if not all(told):
            raise TrainingError(
                f"predict: which of the rows {rows.tolist()[:16]} of the {self.split} data are bad cannot be told. "
                f"Received: {list(micro.bad)[:4]}"
            )
        bad = {int(match[1]) for match in told if match}
        return torch.tensor([row for row in rows.tolist() if row not in bad], dtype=torch.int64)
