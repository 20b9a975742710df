"""Dynamic padding: every batch is as long as its longest row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.collate._padding import Padding, columns, processor_unless_given, tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from drivetrain import Run


@attrs.frozen
class PadCollator:
    """Turn rows of numbers and lists of numbers into padded tensors; picklable, so workers can use it."""

    padding: Padding

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return int64 tensors (B, L) of the sequences and (B,) of the labels; text is left out.

        Raises:
            DataError: a row lacks a field, or a value makes no tensor; field and row are named.
        """
        return self.padding(columns(rows, plugin="pad"), plugin="pad")


@plugin(role="collate", provides=["padding"])
class Pad:
    """Pad each batch to its longest row with the tokenizer's padding id; labels with -100."""

    tokenizer: Any = option(None, help="the tokenizer, unless a model plugin brings it")
    multiple: int = option(1, ge=1, help="round the padded length up to a multiple of this many tokens")
    length: int | None = option(None, ge=1, help="pad every row to this many tokens; None pads to the batch's longest")

    requires = processor_unless_given

    @hookimpl
    def build_collator(self, run: Run) -> Callable[..., Any]:
        """Take padding id and side from the run's tokenizer."""
        tokenizer = tokenizer_of(self.tokenizer, run)
        return PadCollator(Padding.of(tokenizer, plugin="pad", multiple=self.multiple, length=self.length))
