"""Several samples in one row, up to a number of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import ConfigError, DataError, Problem, hookimpl, option, plugin
from drivetrain_plugins.collate._packing import (
    IGNORED,
    check_attention,
    extra_arguments,
    positions,
    token_columns,
)
from drivetrain_plugins.collate._padding import padded
from drivetrain_plugins.shared.causal import attends_back, shifts_labels
from drivetrain_plugins.shared.table import Ragged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain import Run


def first_fit(lengths: np.ndarray[Any, Any], room: int) -> list[list[int]]:
    """Return rows of sample numbers: from the longest on, each goes into the first row that has room for it."""
    rows: list[list[int]] = []
    left: list[int] = []
    sizes = lengths.tolist()
    for number in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[number]
        for row, free in enumerate(left):
            if size <= free:
                rows[row].append(number)
                left[row] -= size
                break
        else:
            rows.append([number])
            left.append(room - size)
    return rows


@attrs.frozen
class PackCollator:
    """Put samples into rows of at most `tokens` tokens; picklable, so workers can use it."""

    tokens: int
    fixed: bool = False
    start: int = 0
    shifted: bool = False
    mask: bool = True
    causal: bool = False
    additive: str | None = None  # the type of a mask that is added to the scores
    fill: dict[str, int] = attrs.field(factory=dict)
    extra: dict[str, Any] = attrs.field(factory=dict)

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Return int64 tensors (R, L) of the tokens, and the mask (R, 1, L, L)."""
        columns = token_columns(rows, plugin="pack")
        lengths = columns["input_ids"].lengths
        if (longest := int(lengths.max())) > self.tokens:
            raise DataError(
                f"pack: a sample of {longest} tokens is longer than a row of {self.tokens}. "
                "Cut the samples (e.g. max_length of `tokenize`), or raise `tokens`"
            )
        packs = first_fit(lengths, self.tokens)
        order = np.array([number for pack in packs for number in pack])
        lengths = lengths[order]
        ends = np.cumsum(lengths)
        edges = np.concatenate([[0], ends[np.cumsum([len(pack) for pack in packs]) - 1]])
        width = self.tokens if self.fixed else None
        made = {name: lists.take(order).values for name, lists in columns.items()}
        if self.shifted:
            made["labels"] = made.get("labels", made["input_ids"]).copy()
            made["labels"][ends - lengths] = IGNORED
        made["position_ids"] = positions(lengths, self.start)
        fill = {"labels": IGNORED, "position_ids": self.start, **self.fill}
        batch: dict[str, Any] = {
            name: padded(Ragged(values, edges), fill.get(name, 0), length=width) for name, values in made.items()
        }
        if self.mask:
            samples = np.repeat(np.arange(len(lengths)), lengths)
            batch["attention_mask"] = self._mask(padded(Ragged(samples, edges), -1, length=width))
        return {**batch, **self.extra}

    def _mask(self, samples: torch.Tensor) -> torch.Tensor:
        """Return who sees whom from the sample numbers (R, L); padding (-1) sees padding, as who sees none is NaN."""
        seen = samples[:, None, :, None] == samples[:, None, None, :]
        if self.causal:
            seen = seen.tril()
        if self.additive is None:
            return seen
        dtype: torch.dtype = getattr(torch, self.additive)
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


@plugin(
    role="collate",
    provides=["padding"],
    rows="sequences",
    example={"tokens": 32},
    companions={
        "hf-model": {"path": "{kit}/causal", "task": "causal-lm"},
        "causal-lm-loss": {},
        "module?": {"factory": "kit_module:language"},
    },
)
class Pack:
    """Put a batch's samples into as few rows of `tokens` tokens as first-fit finds; no token sees another sample.

    Positions restart with each sample. Labels must be per token; where the loss shifts them, the first of each sample
    is -100, so that no sample predicts the next one's start. A transformers model is tried when the run is assembled,
    and refused where packed samples do not come out as single ones.
    """

    tokens: int = option(512, ge=1, help="most tokens of a row; a longer sample is refused")
    fixed: bool = option(False, help="make every row `tokens` long (one shape), else as long as the longest")
    start: int = option(0, ge=0, help="position of a sample's first token; 2 for RoBERTa's kind")
    mask: bool | None = option(
        None, help="give a 4-d attention mask; None does so unless the model attends back and finds samples by position"
    )
    causal: bool | None = option(None, help="whether the mask hides later tokens; None asks the model")
    shifted: bool | None = option(None, help="whether the loss predicts label i + 1; None asks the loss and the model")
    _collate: Any = option(None, init=False)

    @hookimpl
    def build_collator(self, run: Run) -> PackCollator:
        """Fit mask and labels to the run's model and loss."""
        model = run.model
        config = getattr(model, "config", None)
        back = attends_back(model) if config is not None else shifts_labels(run)
        causal = back if self.causal is None else self.causal
        mask = (config is None or not back) if self.mask is None else self.mask
        collate = PackCollator(
            self.tokens,
            self.fixed,
            self.start,
            shifts_labels(run) if self.shifted is None else self.shifted,
            mask,
            causal,
            self._additive(model) if mask and config is not None else None,
            {"input_ids": getattr(run.processor, "pad_token_id", None) or 0, "special_tokens_mask": 1},
            extra_arguments(model, positions_only=not mask),
        )
        self._collate = collate
        return collate

    def _additive(self, model: Any) -> str | None:
        """Return the type of the mask that the model's attention adds to the scores; None where it takes booleans.

        Raises:
            ConfigError: its attention takes no mask, or more than the mask says.
        """
        config = model.config
        attention = getattr(config, "_attn_implementation", "sdpa")
        window = getattr(config, "sliding_window", None)
        wrong = attention not in ("sdpa", "eager")
        if wrong or (window is not None and window < self.tokens):
            received = f"attention {attention!r}" if wrong else f"sliding_window={window}, tokens={self.tokens}"
            do = "set mask=False, or load the model with attn_implementation='sdpa'" if wrong else "set mask=False"
            raise ConfigError([Problem("pack: the model's attention takes no 4-d mask", received, do)])
        return str(model.dtype).removeprefix("torch.") if attention == "eager" else None

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse a model whose tokens see other samples."""
        tried = attrs.evolve(self._collate, tokens=7, fixed=False)
        do = "set mask=True, or False if it was; or load the model with attn_implementation='sdpa'"
        check_attention(run, tried, plugin="pack", do=do)
