"""What the collators of language models share: token rows padded together, vocabularies as tables, and masking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import ConfigError, DataError, Problem
from drivetrain_plugins.collate._padding import IGNORED, LABELS, column, fields, is_empty, ones_like, padded, scalars
from drivetrain_plugins.shared.table import Ragged

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


AUXILIARY = ("special_tokens_mask", "offset_mapping", "word_ids")  # what collators read and models do not take
Batch = dict[str, torch.Tensor]
Array = np.ndarray[Any, Any]


def needed_token(tokenizer: Any, kind: str, *, plugin: str) -> int:
    """Return the id of the tokenizer's "mask", "cls" or "sep" token.

    Raises:
        ConfigError: the tokenizer has none.
    """
    found = getattr(tokenizer, f"{kind}_token_id", None)
    if found is None:
        do = f"take a tokenizer that has one, or set tokenizer.{kind}_token"
        raise ConfigError([Problem(f"{plugin}: the tokenizer has no {kind} token", type(tokenizer).__name__, do)])
    return int(found)


def joined(parts: Sequence[Ragged]) -> Ragged:
    """Return lists whose item i is the items i of all `parts`, one after the other."""
    parts = [Ragged(part.values[part.offsets[0] : part.offsets[-1]], part.offsets - part.offsets[0]) for part in parts]
    offsets = np.sum([part.offsets for part in parts], axis=0)
    out = np.empty(offsets[-1], np.result_type(*(part.values for part in parts)))
    starts = offsets[:-1]
    for part in parts:
        out[np.arange(len(part.values)) + np.repeat(starts - part.offsets[:-1], part.lengths)] = part.values
        starts = starts + part.lengths
    return Ragged(out, offsets)


@attrs.frozen(eq=False)
class TokenPadding:
    """Token rows made into tensors (B, L): every list of a row belongs to its tokens, and is as long as they are many.

    Class labels (a number a row) are left out, as are texts: the labels of a language model are its tokens.
    """

    plugin: str
    fill: dict[str, int]  # by field; no "input_ids" where the tokenizer has no padding token
    multiple: int = 1
    side: str = "right"

    @classmethod
    def of(cls, tokenizer: Any, *, plugin: str, multiple: int = 1, padding_id: int | None = None) -> TokenPadding:
        """Take padding ids and side from `tokenizer`."""
        fill = {"token_type_ids": tokenizer.pad_token_type_id, "special_tokens_mask": 1}
        found = tokenizer.pad_token_id if padding_id is None else padding_id
        if found is not None:
            fill["input_ids"] = found
        return cls(plugin, fill, multiple, tokenizer.padding_side)

    def ids(self, rows: Sequence[Any], field: str = "input_ids") -> Ragged:
        """Return the token ids of all rows.

        Raises:
            DataError: rows lack them, or they are no lists of integers.
        """
        names = fields(rows, plugin=self.plugin)
        if field not in names:
            raise DataError(f"{self.plugin}: a row needs token ids in {field!r}. Received: rows with {sorted(names)}")
        found = column(rows, field, plugin=self.plugin)
        if not isinstance(found, Ragged) or found.values.dtype.kind not in "iub":
            raise DataError(f"{self.plugin}: {field!r} must hold lists of token ids. Received: {_start(found)}")
        return found

    def __call__(self, rows: Sequence[Any], ids: Ragged, *, leave: Collection[str] = ()) -> Batch:
        """Return `ids` as "input_ids", an attention mask, and the rows' other fields but those to `leave`.

        Raises:
            DataError: a row has no tokens, a list is not as long as its ids, or rows differ in length and nothing pads.
        """
        if not ids.lengths.all():
            raise DataError(f"{self.plugin}: a row has no tokens (number {int(ids.lengths.argmin())} of the batch)")
        batch = {"input_ids": self._pad("input_ids", ids)}
        for name in fields(rows, plugin=self.plugin):
            if name == "input_ids" or name in leave:
                continue
            values = column(rows, name, plugin=self.plugin)
            if isinstance(values, Ragged):
                self._check(name, values, ids)
                batch["labels" if name in LABELS else name] = self._pad(name, values)
        if "attention_mask" not in batch:
            batch["attention_mask"] = self._pad("attention_mask", ones_like(ids))
        return {**batch, **self.numbers(rows, leave=("input_ids", *leave))}

    def numbers(self, rows: Sequence[Any], *, leave: Collection[str] = ()) -> Batch:
        """Return the fields of one number a row as tensors (B,), without class labels, texts and those to `leave`.

        Raises:
            DataError: some rows have a number, and others something else.
        """
        batch: Batch = {}
        for name in fields(rows, plugin=self.plugin):
            if name in leave or name in LABELS:
                continue
            values = column(rows, name, plugin=self.plugin)
            if not isinstance(values, Ragged) and not is_empty(values):
                batch[name] = scalars(values, name, plugin=self.plugin)
        return batch

    def _check(self, name: str, values: Ragged, ids: Ragged) -> None:
        if not np.array_equal(values.lengths, ids.lengths):
            row = int((values.lengths != ids.lengths).argmax())
            raise DataError(
                f"{self.plugin}: field {name!r} must have an entry for each token. "
                f"Received: {values.lengths[row]} entries for {ids.lengths[row]} tokens"
            )

    def _pad(self, name: str, lists: Ragged) -> torch.Tensor:
        longest = int(lists.lengths.max())
        pads = longest % self.multiple or not (lists.lengths == longest).all()
        if pads and name == "input_ids" and name not in self.fill:
            raise DataError(
                f"{self.plugin}: rows of {int(lists.lengths.min())} to {longest} tokens must be padded to a multiple "
                f"of {self.multiple}, and the tokenizer has no padding token. Set one, give padding_id where the "
                "plugin has it (padding is never a target, so any id will do), or take rows of one length"
            )
        fill = IGNORED if name in LABELS else self.fill.get(name, 0)
        made = padded(lists, fill, multiple=self.multiple, side=self.side)
        return made if made.is_floating_point() else made.long()


def _start(values: Any) -> str:
    return repr(values.values if isinstance(values, Ragged) else values)[:200]


@attrs.frozen(eq=False)
class Masking:
    """BERT's masking: what is picked becomes the mask token, a random ordinary token, or stays.

    Draws are made in the order of transformers' collator, so that equal generators mask equally; where it would put a
    special token in, another one is drawn here.

    Source: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", section 3.1.
    """

    plugin: str
    mask_id: int
    special: Array  # bool (V,): never masked, never put in
    ordinary: Array  # int64: the others
    probability: float
    mask: float
    random: float

    @classmethod
    def of(cls, tokenizer: Any, *, plugin: str, probability: float, mask: float, random: float) -> Masking:
        """Make tables of the tokenizer's vocabulary.

        Raises:
            ConfigError: there is no mask token, nothing but special tokens, or `mask` and `random` exceed 1.
        """
        if mask + random > 1:
            do = "they are shares of the masked tokens; what they leave stays as it is"
            raise ConfigError([Problem(f"{plugin}: mask and random add up to more than 1", f"{mask=}, {random=}", do)])
        special = special_table(tokenizer)
        ordinary = np.flatnonzero(~special)
        if not len(ordinary):
            raise ConfigError(f"{plugin}: the tokenizer has no tokens but special ones")
        mask_id = needed_token(tokenizer, "mask", plugin=plugin)
        return cls(plugin, mask_id, special, ordinary, probability, mask, random)

    def maskable(self, batch: Batch) -> torch.Tensor:
        """Return which tokens may be masked, bool (B, L): no padding, and nothing special by field or vocabulary.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        ids = batch["input_ids"]
        given = batch.get("special_tokens_mask")
        special = torch.from_numpy(look_up(self.special, ids, plugin=self.plugin)) if given is None else given != 0
        return ~special & (batch["attention_mask"] != 0)

    def pick(self, allowed: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return which of the `allowed` (B, L) are picked, each by itself."""
        chances = torch.full(allowed.shape, self.probability).masked_fill_(~allowed, 0.0)
        return torch.bernoulli(chances, generator=generator).bool()

    def corrupt(self, batch: Batch, picked: torch.Tensor, generator: torch.Generator) -> None:
        """Put masks and random tokens into the batch's ids where `picked`, and the ids themselves into its labels."""
        ids = batch["input_ids"]
        masked = torch.bernoulli(torch.full(ids.shape, self.mask), generator=generator).bool() & picked
        out = ids.masked_fill(masked, self.mask_id)
        if self.mask < 1 and self.random > 0:
            share = torch.full(ids.shape, min(1.0, self.random / (1 - self.mask)))
            swapped = torch.bernoulli(share, generator=generator).bool() & picked & ~masked
            drawn = torch.randint(len(self.special), ids.shape, generator=generator)[swapped]
            wrong = torch.from_numpy(self.special[drawn.numpy()])
            again = torch.randint(len(self.ordinary), (int(wrong.sum()),), generator=generator)
            drawn[wrong] = torch.from_numpy(self.ordinary)[again]
            out[swapped] = drawn
        batch["input_ids"], batch["labels"] = out, ids.masked_fill(~picked, IGNORED)


def special_table(tokenizer: Any) -> Array:
    """Return which ids are special, or none of the vocabulary's, bool (V,)."""
    known = np.fromiter(tokenizer.get_vocab().values(), np.int64)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    table = np.ones(int(known.max(initial=-1)) + 1, bool)
    table[np.setdiff1d(known, np.array(sorted(special), np.int64))] = False
    return table


def look_up(table: Array, ids: torch.Tensor, *, plugin: str) -> Array:
    """Return `table[ids]`.

    Raises:
        DataError: an id is not in the table.
    """
    array = ids.numpy()
    if array.size and (array.min() < 0 or array.max() >= len(table)):
        wrong = array[(array < 0) | (array >= len(table))][0]
        raise DataError(f"{plugin}: a token id must be below the vocabulary's {len(table)}. Received: {wrong}")
    found: Array = table[array]
    return found
