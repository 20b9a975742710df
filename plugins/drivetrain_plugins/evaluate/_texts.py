"""Metrics of texts: the hook that `generate` brings, and sums that are exact whatever the number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import attrs
import torch

from drivetrain import collect, hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pluggy

    from drivetrain import Run


# With what the kit lets a metric of texts act: a causal model that goes on with its rows' first tokens.
COMPANIONS: dict[str, dict[str, Any]] = {
    "generate": {"max_new_tokens": 2, "prompt_tokens": 2, "limit": 4},
    "hf-model": {"path": "{kit}/causal", "task": "causal-lm"},
    "causal-lm": {},
    "causal-lm-loss": {},
}


class TextMetric(Protocol):
    """A metric of generated texts; lives for one pass over one split."""

    def update(self, predictions: list[str], references: list[str]) -> None:
        """Add the texts of one batch, of the same number."""

    def compute(self) -> dict[str, float]:
        """Return the values over all ranks by name; every rank calls it."""


class TextHooks:
    """A hook of `generate` and of the metrics of what it makes: `add_hooks` of both adds it."""

    @collect
    def text_metrics(self, run: Run, split: str) -> Any:
        """Return a list of `TextMetric`, fresh for this evaluation."""


class OfTexts:
    """The hook that every plugin of metrics of texts brings."""

    @hookimpl
    def add_hooks(self, manager: pluggy.PluginManager) -> None:
        """Know the hook of texts."""
        manager.add_hookspecs(TextHooks)


@attrs.define(eq=False)
class Sums:
    """Numbers that are added up on this rank, and once over all."""

    world_size: int
    device: torch.device
    values: list[float]

    @classmethod
    def zeros(cls, run: Run, length: int) -> Sums:
        """Begin with `length` zeros."""
        return cls(run.world_size, run.device, [0.0] * length)

    def add(self, numbers: Sequence[float]) -> None:
        """Add a number to each of the values."""
        self.values = [value + number for value, number in zip(self.values, numbers, strict=True)]

    def total(self) -> list[float]:
        """Return the sums over all ranks; integers stay exact up to 2**53."""
        if self.world_size == 1:
            return self.values
        both = torch.tensor(self.values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(both)
        summed: list[float] = both.tolist()
        return summed
