"""Multiple choice: rows that hold several candidates each."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import DataError, hookimpl, option, plugin
from drivetrain_plugins.collate._padding import (
    LABELS,
    Padding,
    fields,
    processor_unless_given,
    ragged,
    raw,
    tokenizer_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from drivetrain import Run
    from drivetrain_plugins.shared.table import Ragged


@attrs.frozen
class ChoiceCollator:
    """Pad the candidates of all rows to one length; picklable."""

    padding: Padding

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return int64 tensors (B, C, L) of the candidates and, where rows have them, "labels" (B,).

        Fields that hold a number a row become (B,); text is left out.

        Raises:
            DataError: the rows have not equally many candidates, or a value makes no tensor.
        """
        nested: dict[str, Ragged] = {}
        others: dict[str, Any] = {}
        choices = 0
        for name in fields(rows, plugin="multiple-choice"):
            values = raw(rows, name)
            if name not in LABELS and _nested(values[0]):
                choices = _same_count(values, name, choices)
                nested[name] = ragged(list(chain.from_iterable(values)), name, plugin="multiple-choice")
            elif name in LABELS or not _text(values[0]):
                others[name] = values
        if "input_ids" not in nested:
            raise DataError(
                "multiple-choice: a row needs 'input_ids' with a list of token ids for each candidate. "
                f"Received: {repr(rows[0])[:160]}"
            )
        flat = self.padding(nested, plugin="multiple-choice")
        batch = {name: made.view(len(rows), choices, -1) for name, made in flat.items()}
        return {**batch, **self.padding(others, plugin="multiple-choice")}


def _nested(value: Any) -> bool:
    """Tell whether a value holds lists."""
    if getattr(value, "ndim", 0) > 1:
        return True
    return isinstance(value, (list, tuple)) and len(value) > 0 and hasattr(value[0], "__len__") and not _text(value)


def _text(value: Any) -> bool:
    whole = value is None or isinstance(value, (str, bytes))
    return whole or (isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], (str, bytes)))


def _same_count(values: Sequence[Any], name: str, choices: int) -> int:
    """Return how many candidates each row has; `choices` of them, where other fields said so."""
    wanted = choices or len(values[0])
    for place, value in enumerate(values):
        count = len(value) if hasattr(value, "__len__") else 0
        if count != wanted:
            raise DataError(
                f"multiple-choice: every row of a batch must have the same number of candidates. Received: {wanted} "
                f"before, and {count} in field {name!r} of row {place} of the batch"
            )
    return wanted


@plugin(
    role="collate",
    provides=["padding"],
    rows="choices",
    companions={
        "hf-model": {"path": "{kit}/model", "task": "multiple-choice", "arguments": {"ignore_mismatched_sizes": True}}
    },
)
class MultipleChoice:
    """Pad rows of several candidates each to (rows, candidates, tokens)."""

    tokenizer: Any = option(None, help="the tokenizer, unless a model plugin brings it")
    multiple: int = option(1, ge=1, help="round the padded length up to a multiple of this many tokens")
    length: int | None = option(None, ge=1, help="pad candidates to this many tokens; None pads to the batch's longest")

    requires = processor_unless_given

    @hookimpl
    def build_collator(self, run: Run) -> Callable[..., Any]:
        """Take padding id and side from the run's tokenizer."""
        tokenizer = tokenizer_of(self.tokenizer, run)
        padding = Padding.of(tokenizer, plugin="multiple-choice", multiple=self.multiple, length=self.length)
        return ChoiceCollator(padding)
