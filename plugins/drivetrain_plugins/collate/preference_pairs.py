"""Preference pairs: a chosen and a rejected answer a row, as one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from drivetrain import DataError, hookimpl, option, plugin
from drivetrain_plugins.collate._padding import (
    IGNORED,
    Padding,
    column,
    fields,
    is_empty,
    processor_unless_given,
    tokenizer_of,
)
from drivetrain_plugins.shared.table import Ragged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from drivetrain import Run


@attrs.frozen
class PairCollator:
    """Make one batch of all chosen and all rejected sequences; picklable."""

    padding: Padding
    prompt: str
    chosen: str
    rejected: str

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return int64 tensors (2B, L): "input_ids", "attention_mask", "labels"; row i is chosen, row B + i rejected.

        Where rows have the prompt's field, each sequence is the prompt followed by the answer, and "labels" is -100 on
        the prompt. Otherwise the answers stand as they are, and every id is a label. Padding has label -100. Fields
        with a number a row (reference log-probabilities, margins) become (B,); others are left out.

        Raises:
            DataError: a row lacks one of the pair, or a value is no list of ids.
        """
        names = fields(rows, plugin="preference-pairs")
        if missing := [name for name in (self.chosen, self.rejected) if name not in names]:
            raise DataError(f"preference-pairs: rows lack {missing}. Received: rows with the fields {sorted(names)}")
        chosen, rejected = (self._ids(rows, name) for name in (self.chosen, self.rejected))
        answers = joined([chosen, rejected])
        if self.prompt in names:
            prompt = self._ids(rows, self.prompt)
            prompts = joined([prompt, prompt])
            ids = interleaved(prompts, answers)
            hidden = Ragged(np.full(len(prompts.values), IGNORED, np.int64), prompts.offsets)
            labels = interleaved(hidden, answers)
        else:
            ids = labels = answers
        others = {name: column(rows, name, plugin="preference-pairs") for name in names if name not in self._named}
        numbers = {name: values for name, values in others.items() if _is_number(values)}
        batch = self.padding({"input_ids": ids, "labels": labels}, plugin="preference-pairs")
        return {**self.padding(numbers, plugin="preference-pairs"), **batch}

    @property
    def _named(self) -> tuple[str, ...]:
        return self.prompt, self.chosen, self.rejected

    def _ids(self, rows: Sequence[Any], field: str) -> Ragged:
        values = column(rows, field, plugin="preference-pairs")
        if not isinstance(values, Ragged) or values.values.dtype.kind != "i":
            received = values.values if isinstance(values, Ragged) else values
            raise DataError(
                f"preference-pairs: field {field!r} must hold a list of token ids in every row. "
                f"Received: {repr(received)[:120]}"
            )
        return values


def joined(parts: Sequence[Ragged]) -> Ragged:
    """Return the lists of all `parts`, those of the first before those of the second."""
    values = [part.values[part.offsets[0] : part.offsets[-1]] for part in parts]
    lengths = np.concatenate([part.lengths for part in parts])
    return Ragged(np.concatenate(values), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def interleaved(heads: Ragged, tails: Ragged) -> Ragged:
    """Return list i of `heads` followed by list i of `tails`, for every i."""
    both = joined([heads, tails])
    places = np.arange(len(heads))
    made = both.take(np.stack([places, places + len(heads)], axis=1).ravel())
    return Ragged(made.values, made.offsets[::2])


def _is_number(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return values.ndim == 1 and values.dtype.kind in "iubf"
    return isinstance(values, list) and not is_empty(values)


@plugin(
    role="collate",
    provides=["padding"],
    rows="preferences",
    companions={
        "causal-lm-loss": {},
        "hf-model": {"path": "{kit}/model", "task": "causal-lm", "arguments": {"is_decoder": True}},
    },
)
class PreferencePairs:
    """Pad pairs of a chosen and a rejected answer as one batch, chosen first (as DPO trainers take them).

    Rafailov et al. 2023, "Direct Preference Optimization": one forward pass scores both answers.
    """

    tokenizer: Any = option(None, help="the tokenizer, unless a model plugin brings it")
    multiple: int = option(1, ge=1, help="round the padded length up to a multiple of this many tokens")
    length: int | None = option(None, ge=1, help="pad sequences to this many tokens; None pads to the batch's longest")
    prompt: str = option("prompt_input_ids", help="field with the prompt's ids, put before both answers; may be absent")
    chosen: str = option("chosen_input_ids", help="field with the ids of the preferred answer")
    rejected: str = option("rejected_input_ids", help="field with the ids of the other answer")

    requires = processor_unless_given

    @hookimpl
    def build_collator(self, run: Run) -> Callable[..., Any]:
        """Take padding id and side from the run's tokenizer."""
        tokenizer = tokenizer_of(self.tokenizer, run)
        padding = Padding.of(tokenizer, plugin="preference-pairs", multiple=self.multiple, length=self.length)
        return PairCollator(padding, self.prompt, self.chosen, self.rejected)
