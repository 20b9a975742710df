"""A batch as one long row, without padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.collate._packing import (
    IGNORED,
    check_attention,
    extra_arguments,
    flat,
    positions,
    token_columns,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain import Run


@attrs.frozen
class FlattenCollator:
    """Lay rows of tokens behind each other; picklable, so workers can use it."""

    position_ids: bool = True
    start: int = 0
    separator: int | None = IGNORED
    seq_idx: bool = False
    flash_attention: bool = False
    extra: dict[str, Any] = attrs.field(factory=dict)

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return int64 tensors (1, T) of the T tokens of all rows, and where each begins."""
        columns = token_columns(rows, plugin="flatten")
        lengths = columns["input_ids"].lengths
        ends = np.cumsum(lengths)
        made = {name: flat(lists) for name, lists in columns.items()}
        made["labels"] = made.get("labels", made["input_ids"]).copy()
        if self.separator is not None:
            made["labels"][ends - lengths] = self.separator
        if self.position_ids:
            made["position_ids"] = positions(lengths, self.start)
        batch: dict[str, Any] = {name: torch.from_numpy(values.copy())[None] for name, values in made.items()}
        if self.seq_idx:
            numbers = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
            batch["seq_idx"] = torch.from_numpy(numbers)[None]
        if self.flash_attention:
            edges = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = edges
            batch["max_length_q"] = batch["max_length_k"] = int(lengths.max())
        return {**batch, **self.extra}


@plugin(
    role="collate",
    provides=["padding"],
    rows="sequences",
    companions={
        "hf-model": {"path": "{kit}/causal", "task": "causal-lm"},
        "causal-lm-loss": {},
        "module?": {"factory": "kit_module:language"},
    },
)
class Flatten:
    """Lay a batch's rows behind each other in one row; positions restart, and a label separates the rows.

    The model must find the rows by their positions or by flash attention's lengths; it is tried when the run is
    assembled, and refused where a token sees another row's.
    """

    position_ids: bool = option(True, help="give positions that restart with every row")
    start: int = option(0, ge=0, help="position of a row's first token; 2 for RoBERTa's kind")
    separator: int | None = option(IGNORED, help="label of each row's first token; None keeps its own")
    seq_idx: bool = option(False, help="give the number of each token's row, int32")
    flash_attention: bool = option(False, help="give the row boundaries that flash attention's kernels take, int32")
    _collate: Any = option(None, init=False)

    @hookimpl
    def build_collator(self, run: Run) -> FlattenCollator:
        """Return the collator."""
        collate = FlattenCollator(
            self.position_ids,
            self.start,
            self.separator,
            self.seq_idx,
            self.flash_attention,
            extra_arguments(run.model, positions_only=True),
        )
        self._collate = collate
        return collate

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse a model whose tokens see other rows."""
        do = "take `pack` with mask=True, or load the model with flash attention and set flash_attention=True"
        check_attention(run, self._collate, plugin="flatten", do=do)
