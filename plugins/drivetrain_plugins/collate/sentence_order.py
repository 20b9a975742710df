"""Sentence-order prediction: are these two segments in their order, or swapped?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import ConfigError, DataError, Problem, hookimpl, option, plugin
from drivetrain_plugins.collate._masking import (
    Batch,
    Masking,
    TokenPadding,
    joined,
    needed_token,
)
from drivetrain_plugins.collate._padding import fields, processor_unless_given, raw, tokenizer_of
from drivetrain_plugins.shared.table import Ragged, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain import Run

NAME = "sentence-order"


@attrs.frozen(eq=False)
class SentenceOrderCollator:
    """Make pairs of segments, swap half of them and mask tokens; picklable, so workers can use it."""

    padding: TokenPadding
    masking: Masking | None
    cls_id: int
    sep_id: int
    sentences: str
    first: str
    second: str
    label: str
    max_length: int
    stream = NAME

    def __call__(self, rows: Sequence[Any], generator: torch.Generator) -> Batch:
        """Return ids, attention mask, segment numbers (B, L), the order's label (B,): 1 if swapped; and labels."""
        swapped = torch.rand(len(rows), generator=generator) < 0.5  # noqa: PLR2004 - a coin
        cuts = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        first, second = self._shortened(*self._segments(rows, cuts.numpy()))
        flips = swapped.numpy()
        ahead, after = _swapped(first, second, flips)
        ends = [_constant(token, len(rows)) for token in (self.cls_id, self.sep_id, self.sep_id)]
        ids = joined([ends[0], ahead, ends[1], after, ends[2]])
        batch = self.padding(Table({"input_ids": ids, "token_type_ids": _types(ids, after)}), ids)
        batch.update(self.padding.numbers(rows, leave=(self.sentences, self.first, self.second, self.label, *batch)))
        if self.masking is not None:
            picked = self.masking.pick(self.masking.maskable(batch), generator)
            self.masking.corrupt(batch, picked, generator)
        batch[self.label] = swapped.long()
        return batch

    def _segments(self, rows: Sequence[Any], cuts: Any) -> tuple[Ragged, Ragged]:
        """Return the rows' two segments; a list of sentences is cut between two of them, at `cuts` (B,) in [0, 1)."""
        names = fields(rows, plugin=NAME)
        if self.sentences not in names:
            if self.first not in names or self.second not in names:
                raise DataError(
                    f"{NAME}: a row needs {self.sentences!r} (a list of sentences as lists of token ids), or "
                    f"{self.first!r} and {self.second!r} (lists of token ids). Received: rows with {sorted(names)}"
                )
            parts = self.padding.ids(rows, self.first), self.padding.ids(rows, self.second)
        else:
            lists = raw(rows, self.sentences)
            parts = _cut(lists, cuts, self.sentences)
        if not all(part.lengths.all() for part in parts):
            raise DataError(f"{NAME}: a segment has no tokens. Received: rows with {sorted(names)}")
        return parts

    def _shortened(self, first: Ragged, second: Ragged) -> tuple[Ragged, Ragged]:
        """Cut the first segment's beginning and the second's end, the longer first, so that they still touch."""
        room = self.max_length - 3
        a, b = first.lengths, second.lengths
        kept = np.minimum(a, np.maximum(room - b, room - room // 2))
        return _slice(first, a - kept, a), _slice(second, np.zeros_like(b), np.minimum(b, room - kept))


def _cut(lists: Sequence[Any], cuts: Any, field: str) -> tuple[Ragged, Ragged]:
    halves: tuple[list[Any], list[Any]] = ([], [])
    for sentences, cut in zip(lists, cuts, strict=True):
        if not hasattr(sentences, "__len__") or isinstance(sentences, str) or len(sentences) < 2:  # noqa: PLR2004
            raise DataError(
                f"{NAME}: field {field!r} must hold two sentences or more, as lists of token ids. "
                f"Received: {repr(sentences)[:100]}"
            )
        edge = 1 + int(cut * (len(sentences) - 1))
        try:
            halves[0].append(np.concatenate([np.asarray(s, np.int64) for s in sentences[:edge]]))
            halves[1].append(np.concatenate([np.asarray(s, np.int64) for s in sentences[edge:]]))
        except (TypeError, ValueError) as error:
            raise DataError(f"{NAME}: field {field!r} holds no token ids ({error}). Received: {sentences!r}") from error
    return Ragged.of(halves[0]), Ragged.of(halves[1])


def _slice(lists: Ragged, begins: Any, ends: Any) -> Ragged:
    """Return each list from its `begins` to its `ends`, int64 (B,)."""
    kept = ends - begins
    offsets = np.concatenate([[0], np.cumsum(kept)])
    places = np.arange(offsets[-1]) + np.repeat(lists.offsets[:-1] + begins - offsets[:-1], kept)
    return Ragged(lists.values[places], offsets)


def _swapped(first: Ragged, second: Ragged, flips: Any) -> tuple[Ragged, Ragged]:
    """Exchange the lists at `flips`, bool (B,)."""
    offsets = np.concatenate([first.offsets[:-1], len(first.values) + second.offsets])
    both = Ragged(np.concatenate([first.values, second.values]), offsets)
    numbers = np.arange(len(first))
    return both.take(numbers + flips * len(first)), both.take(numbers + ~flips * len(first))


def _constant(token: int, rows: int) -> Ragged:
    return Ragged(np.full(rows, token, np.int64), np.arange(rows + 1))


def _types(ids: Ragged, after: Ragged) -> Ragged:
    """Return 1 for the second segment and its end, else 0."""
    lengths = ids.lengths
    place = np.arange(len(ids.values)) - np.repeat(ids.offsets[:-1], lengths)
    return Ragged((place >= np.repeat(lengths - after.lengths - 1, lengths)).astype(np.int64), ids.offsets)


@plugin(
    role="collate",
    provides=["padding"],
    rows="sentences",
    example={"probability": 0.0, "label": "labels", "max_length": 32},
    companions={"hf-model": {"path": "{kit}/model"}},
)
class SentenceOrder:
    """Make pairs of consecutive segments, half of them swapped, with masked tokens on top: what ALBERT is trained on.

    A row has a document's `sentences` (cut into two segments at a random place between two of them), or its `first`
    and `second` segment, all as token ids without special tokens. A batch has [CLS] A [SEP] B [SEP], "token_type_ids",
    the order's label (0: in order, 1: swapped), and the "labels" of `masked-lm`. What is too long is cut at the outer
    ends, so that the segments stay consecutive. The draws depend on seed, epoch and position only.

    Source: Lan et al. 2020, "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations".
    """

    tokenizer: Any = option(None, help="the tokenizer, unless a model plugin brings it")
    sentences: str = option("sentences", help="field with a list of sentences, each a list of token ids")
    first: str = option("first", help="field with the first segment, where there are no sentences")
    second: str = option("second", help="field with the second segment, which follows the first")
    label: str = option("sentence_order_label", help='name of the order\'s label in the batch; "labels" to classify it')
    max_length: int = option(512, ge=5, help="longest pair in tokens, with special ones; longer ones are cut")
    probability: float = option(0.15, ge=0, le=1, help="chance of each token to be picked for masked-LM; 0: no labels")
    mask: float = option(0.8, ge=0, le=1, help="share of the picked tokens that become the mask token")
    random: float = option(0.1, ge=0, le=1, help="share of the picked tokens that become a random ordinary token")
    multiple: int = option(1, ge=1, help="round the padded length up to a multiple of this many tokens")

    requires = processor_unless_given

    @hookimpl
    def build_collator(self, run: Run) -> Callable[..., Any]:
        """Take special tokens and padding from the tokenizer."""
        tokenizer = tokenizer_of(self.tokenizer, run)
        shares = {"probability": self.probability, "mask": self.mask, "random": self.random}
        if self.probability and self.label == "labels":
            do = "set probability=0 to train on the order alone, or name the order's label otherwise"
            raise ConfigError([Problem(f"{NAME}: both the order and the masked tokens would be 'labels'", "", do)])
        return SentenceOrderCollator(
            TokenPadding.of(tokenizer, plugin=NAME, multiple=self.multiple),
            Masking.of(tokenizer, plugin=NAME, **shares) if self.probability else None,
            needed_token(tokenizer, "cls", plugin=NAME),
            needed_token(tokenizer, "sep", plugin=NAME),
            self.sentences,
            self.first,
            self.second,
            self.label,
            self.max_length,
        )
