"""Dynamic padding: every batch is as long as its longest row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import ConfigError, DataError, hookimpl, option, plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain import Run

LABELS = ("label", "labels", "label_ids")


@attrs.frozen
class PadCollator:
    """Turn rows of integer lists into padded tensors; picklable, so workers can use it."""

    fill: dict[str, int]
    multiple: int
    side: str

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return int64 tensors (B, L) of the sequences and (B,) of the labels; strings are left out."""
        batch: dict[str, torch.Tensor] = {}
        if any(row.keys() != rows[0].keys() for row in rows):
            raise DataError(f"pad: the rows of a batch must have the same fields. Received: rows with {_fields(rows)}")
        for name, first in rows[0].items():
            values = [row[name] for row in rows]
            if isinstance(first, str) or all(value is None for value in values):
                continue
            ragged = hasattr(first, "__len__") and getattr(first, "ndim", 1) > 0
            try:
                made = self._pad(name, values) if ragged else torch.as_tensor(values)
            except (TypeError, ValueError, RuntimeError) as error:
                received = repr(values)[:200]
                raise DataError(f"pad: field {name!r} makes no tensor ({error}). Received: {received}") from error
            batch["labels" if name in LABELS else name] = made
        if "input_ids" in batch and "attention_mask" not in batch:
            ones = [[1] * len(row["input_ids"]) for row in rows]
            batch["attention_mask"] = self._pad("attention_mask", ones)
        return batch

    def _pad(self, name: str, values: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, values))
        length = -(-longest // self.multiple) * self.multiple
        fill = -100 if name in LABELS else self.fill.get(name, 0)
        if self.side == "left":
            return torch.tensor([[fill] * (length - len(v)) + list(v) for v in values])
        return torch.tensor([list(v) + [fill] * (length - len(v)) for v in values])


def _fields(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return sorted({tuple(sorted(row)) for row in rows})


@plugin(role="collate", provides=["padding"])
class Pad:
    """Pad each batch to its longest row with the tokenizer's padding id; labels with -100."""

    tokenizer: Any = option(None, help="the tokenizer, unless a model plugin brings it")
    multiple: int = option(1, ge=1, help="round the padded length up to a multiple of this many tokens")

    @property
    def requires(self) -> tuple[str, ...]:
        """Require a processor where no tokenizer was given."""
        return () if self.tokenizer is not None else ("processor",)

    @hookimpl
    def build_collator(self, run: Run) -> Callable[..., Any]:
        """Take padding id and side from the run's tokenizer."""
        tokenizer = self.tokenizer if self.tokenizer is not None else run.processor
        if tokenizer.pad_token_id is None:
            raise ConfigError("pad: the tokenizer has no padding token. Set one, e.g. tokenizer.pad_token = eos_token")
        types = tokenizer.pad_token_type_id
        fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": types, "special_tokens_mask": 1}
        return PadCollator(fill, self.multiple, tokenizer.padding_side)
