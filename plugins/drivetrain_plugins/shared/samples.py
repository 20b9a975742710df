"""Samples of what a model makes, in words: brought by who makes them, heard by trackers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import event

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain import Run


class SampleHooks:
    """A hook of plugins that make samples and of those that show them: `add_hooks` of both adds it."""

    @event()
    def samples(self, run: Run, split: str, rows: Sequence[dict[str, Any]]) -> None:
        """Hear samples of an evaluation of `split`, on rank 0: dicts of texts and numbers, all with the same keys.

        `generate` gives {"input", "prediction", "reference"}.
        """
