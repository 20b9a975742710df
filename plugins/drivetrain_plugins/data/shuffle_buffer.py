"""Shuffling of what can only be read in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain.rng import generator
from drivetrain_plugins.shared.blocks import Blocks

if TYPE_CHECKING:
    from collections.abc import Generator

    from drivetrain import Run


@attrs.frozen
class Permuted:
    """Put the rows of a block into an order that depends on seed, epoch and block only."""

    seed: int

    def __call__(self, rows: list[Any], epoch: int, block: int) -> list[Any]:
        """Return the rows in their new order."""
        order = torch.randperm(len(rows), generator=generator(self.seed, "shuffle-buffer", epoch, block))
        return [rows[i] for i in order.tolist()]


@plugin(
    role="data",
    example={"size": 16},
    companions={
        "jsonl": {"train": "{kit}/{rows}-train.jsonl", "evaluate": "{kit}/{rows}-dev.jsonl", "stream": True},
        "hf-dataset?": {"streaming": True},
        "parquet?": {"stream": True},
        "text?": {"stream": True},
    },
)
class ShuffleBuffer:
    """Shuffle a training stream in blocks of `size` rows; going on reads one block again and is exact.

    A row moves within its block only. A buffer from which single rows are drawn would mix a little further, but its
    content is a state that no position tells. List it after plugins whose rows it is to shuffle whole (`tokenize`),
    as the plugins first in the list see the rows last.
    """

    size: int = option(1000, ge=2, help="rows that are held and shuffled together")

    @hookimpl(wrapper=True)
    def build_dataset(self, run: Run, split: str) -> Generator[None, Any, Any]:
        """Wrap the training stream."""
        rows = yield
        if rows is None or split != "train":
            return rows
        if not hasattr(rows, "open"):
            what, received = (
                "shuffle-buffer: the training data is no stream",
                f"{type(rows).__name__}, {len(rows)} rows",
            )
            raise ConfigError(
                [Problem(what, received, "take it out: the order `random` shuffles such data as a whole")]
            )
        return Blocks(rows, self.size, Permuted(run.settings.seed))
