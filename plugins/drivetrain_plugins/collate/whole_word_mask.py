"""Masked language modelling by words: all tokens of a word are hidden together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import ConfigError, DataError, Problem, hookimpl, option, plugin
from drivetrain_plugins.collate._masking import (
    Array,
    Batch,
    Masking,
    TokenPadding,
    look_up,
    special_table,
)
from drivetrain_plugins.collate._padding import LABELS, fields, padded, processor_unless_given, tokenizer_of
from drivetrain_plugins.shared.table import Ragged, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain import Run

NAME = "whole-word-mask"
CONTINUES, STARTS = "##", ("▁", "Ġ")  # WordPiece; SentencePiece and byte-level BPE


@attrs.frozen(eq=False)
class WholeWordMaskCollator:
    """Pad token rows and mask words; picklable, so workers can use it."""

    padding: TokenPadding
    masking: Masking
    continues: Array | None  # bool (V,): tokens that go on a word; None if the vocabulary does not tell
    stream = NAME

    def __call__(self, rows: Sequence[Any], generator: torch.Generator) -> Batch:
        """Return "input_ids", "attention_mask" and "labels", int64 (B, L): -100 where nothing is to be predicted."""
        ids = self.padding.ids(rows)
        batch = self.padding(rows, ids, leave=("offset_mapping", "word_ids", *LABELS))
        allowed = self.masking.maskable(batch)
        goes_on = self._goes_on(rows, batch["input_ids"], ids)
        goes_on[:, 1:] &= allowed[:, :-1]  # what follows a special token starts a word
        goes_on[:, 0] = False
        starts = allowed & ~goes_on
        picked = self.masking.pick(starts, generator)
        word = starts.flatten().cumsum(0).view_as(starts) - 1  # each token has the number of the last start before it
        chosen = torch.cat([picked[starts], torch.zeros(1, dtype=torch.bool)])  # for a batch that starts no word
        batch.pop("special_tokens_mask", None)
        self.masking.corrupt(batch, chosen[word.clamp_min(0)] & allowed, generator)
        return batch

    def _goes_on(self, rows: Sequence[Any], ids: torch.Tensor, lists: Ragged) -> torch.Tensor:
        """Return which tokens go on the word of the token before, bool (B, L), whatever that one is."""
        names = fields(rows, plugin=NAME)
        if "word_ids" in names:
            words = self._padded(_lists(rows, "word_ids", lists, 1))
            return _shifted(words[:, 1:] == words[:, :-1])
        if "offset_mapping" in names:
            spans = _lists(rows, "offset_mapping", lists, 2).reshape(-1, 2)
            begins, ends = (self._padded(Ragged(spans[:, edge], lists.offsets - lists.offsets[0])) for edge in (0, 1))
            return _shifted(begins[:, 1:] == ends[:, :-1])
        if self.continues is None:
            raise DataError(
                f"{NAME}: the vocabulary does not tell where words begin, and the rows have neither 'word_ids' nor "
                f"'offset_mapping'. Received: rows with {sorted(names)}. Tokenize with return_offsets_mapping=True"
            )
        return torch.from_numpy(look_up(self.continues, ids, plugin=NAME))

    def _padded(self, values: Ragged) -> torch.Tensor:
        return padded(values, -1, multiple=self.padding.multiple, side=self.padding.side)


def _shifted(same: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(len(same), 1, dtype=torch.bool), same], dim=1)


def _lists(rows: Sequence[Any], field: str, ids: Ragged, width: int) -> Any:
    """Return `field` of all rows back to back, `width` numbers for each token; None (no word) becomes -1."""
    values = rows.columns[field] if isinstance(rows, Table) else [row[field] for row in rows]
    try:
        parts = [np.asarray(part, dtype=np.float64).reshape(-1) for part in values]
    except (TypeError, ValueError) as error:
        raise DataError(f"{NAME}: field {field!r} must hold numbers. Received: {repr(values)[:200]}") from error
    if [len(part) for part in parts] != (ids.lengths * width).tolist():
        raise DataError(f"{NAME}: field {field!r} must have an entry for each token. Received: {repr(values)[:200]}")
    flat = np.nan_to_num(np.concatenate(parts), nan=-1).astype(np.int64)
    return flat if width > 1 else Ragged(flat, ids.offsets - ids.offsets[0])


def continuations(tokenizer: Any, prefix: str | None) -> Array | None:
    """Return which ids go on the word before, bool (V,), from the marks in the vocabulary; None if it has none.

    Raises:
        ConfigError: no token has the `prefix` that was asked for.
    """
    size = len(special_table(tokenizer))
    names = np.array([str(name) for name in tokenizer.convert_ids_to_tokens(range(size))])
    going_on: Array = np.char.startswith(names, prefix or CONTINUES)
    starting = np.logical_or.reduce([np.char.startswith(names, mark) for mark in STARTS])
    if prefix is not None:
        if not going_on.any():
            do = "leave it out, or give the mark of this vocabulary"
            raise ConfigError([Problem(f"{NAME}: no token of the vocabulary begins with the prefix", repr(prefix), do)])
        return going_on
    if going_on.sum() != starting.sum():  # "##" is also a word of those that mark beginnings
        return going_on if going_on.sum() > starting.sum() else ~starting
    model = type(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)).__name__
    return going_on if model == "WordLevel" else None


@plugin(
    role="collate",
    provides=["padding"],
    rows="sequences",
    companions={"hf-model": {"path": "{kit}/model", "task": "masked-lm"}},
)
class WholeWordMask:
    """Hide whole words for the model to predict: each word is picked with `probability`, and all its tokens with it.

    Words come from the rows' `word_ids` or `offset_mapping` (tokens that touch are one word), else from the marks of
    the vocabulary: "##" of WordPiece, or the beginnings "▁" and "Ġ" (where punctuation belongs to its word). A
    picked word's tokens are masked, replaced or kept one by one, as BERT did it; `mask=1, random=0` is what
    transformers does. All else is as in `masked-lm`.

    Source: Devlin et al., github.com/google-research/bert, "Whole Word Masking Models" (May 2019);
    Cui et al. 2021, "Pre-Training with Whole Word Masking for Chinese BERT".
    """

    tokenizer: Any = option(None, help="the tokenizer, unless a model plugin brings it")
    probability: float = option(0.15, ge=0, le=1, help="chance of each word to be picked")
    mask: float = option(0.8, ge=0, le=1, help="share of the picked words' tokens that become the mask token")
    random: float = option(0.1, ge=0, le=1, help="share of them that become a random ordinary token")
    prefix: str | None = option(None, help='what marks a token that goes on a word; None finds it ("##")')
    multiple: int = option(1, ge=1, help="round the padded length up to a multiple of this many tokens")

    requires = processor_unless_given

    @hookimpl
    def build_collator(self, run: Run) -> Callable[..., Any]:
        """Make tables of the tokenizer's vocabulary."""
        tokenizer = tokenizer_of(self.tokenizer, run)
        shares = {"probability": self.probability, "mask": self.mask, "random": self.random}
        return WholeWordMaskCollator(
            TokenPadding.of(tokenizer, plugin=NAME, multiple=self.multiple),
            Masking.of(tokenizer, plugin=NAME, **shares),
            continuations(tokenizer, self.prefix),
        )
