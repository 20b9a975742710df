"""Rows to token ids: what `tokenize` does with a block of rows, and what it says of rows that it cannot use."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from drivetrain import BadRow, ConfigError, DataError
from drivetrain.data import IGNORE_INDEX
from drivetrain_plugins.shared.table import Ragged, Table, column_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MASKS = ("attention_mask", "token_type_ids", "special_tokens_mask")


@contextlib.contextmanager
def threads(*, on: bool) -> Iterator[None]:
    """Let a fast tokenizer use threads of its own for a batch; never in a forked process, where they hang."""
    name, wanted = "TOKENIZERS_PARALLELISM", on and multiprocessing.parent_process() is None
    before = os.environ.get(name)
    os.environ[name] = "true" if wanted else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@attrs.frozen
class Encoded:
    """What became of a block of rows."""

    table: Table | None  # of the rows that are sound and short enough; None if there are none
    places: np.ndarray[Any, Any]  # which they were, int64
    bad: list[tuple[int, str]]  # (which it was, why) of those that cannot be used
    dropped: int  # too long


@attrs.frozen(kw_only=True)
class Encoder:
    """Turn rows into columns of token ids with a tokenizer; its fields are the options of `tokenize`."""

    tokenizer: Any
    names: dict[str, int]  # label names of the model
    text: str
    pair: str | None
    target: str | None
    words: str | None
    label: str | None
    max_length: int
    target_length: int | None
    truncation: bool
    special: bool
    drop_longer: bool
    keep: tuple[str, ...]
    parallel: bool

    @property
    def fields(self) -> list[str]:
        """Names of the fields that are read."""
        named = [self.words] if self.words else [self.text, self.pair, self.target]
        return [name for name in dict.fromkeys([*named, self.label, *self.keep]) if name]

    def labelled(self, rows: Sequence[Any]) -> bool:
        """Tell whether the rows have labels: all have, if one has."""
        if self.label is None or (self.target and not self.words):
            return False
        return any(self.label in row for row in rows if hasattr(row, "keys"))

    def __call__(self, rows: Sequence[Any], *, labelled: bool) -> Encoded:
        """Encode the rows that are sound."""
        bad: list[tuple[int, str]] = []
        places: list[int] = []
        labels: list[Any] = []
        for place, row in enumerate(rows):
            try:
                labels.append(self._checked(row, labelled=labelled))
            except DataError as error:
                bad.append((place, str(error)))
            else:
                places.append(place)
        if not places:
            return Encoded(None, np.zeros(0, np.int64), bad, 0)
        try:
            columns = self._columns([rows[p] for p in places], labels, labelled=labelled)
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a tokenizer raises for a row
            if len(rows) > 1:
                return self._one_by_one(rows, labelled=labelled)
            return Encoded(None, np.zeros(0, np.int64), [(0, f"the tokenizer refuses it: {error}")], 0)
        return self._sound(Table(columns), np.array(places, np.int64), bad)

    def _one_by_one(self, rows: Sequence[Any], *, labelled: bool) -> Encoded:
        """Encode each row by itself, to find those that the tokenizer refuses."""
        single = [self((row,), labelled=labelled) for row in rows]
        tables = [one.table for one in single if one.table is not None]
        places = np.array([place for place, one in enumerate(single) if one.table is not None], np.int64)
        bad = [(place, why) for place, one in enumerate(single) for _, why in one.bad]
        return Encoded(Table.concat(tables) if tables else None, places, bad, sum(one.dropped for one in single))

    def _sound(self, table: Table, places: np.ndarray[Any, Any], bad: list[tuple[int, str]]) -> Encoded:
        """Take out the rows without tokens, and those that are too long."""
        lengths = table.lengths("input_ids")
        bad += [(place, f"field {self.words or self.text!r} gives no token") for place in places[lengths == 0].tolist()]
        longest = lengths > self.max_length if self.drop_longer else np.zeros(len(table), bool)
        if self.drop_longer and self.target and "labels" in table.columns:
            longest |= table.lengths("labels") > (self.target_length or self.max_length)
        stay = np.flatnonzero((lengths > 0) & ~longest)
        dropped = int((longest & (lengths > 0)).sum())
        if len(stay) < len(table):
            table, places = table.take(stay), places[stay]
        return Encoded(table if len(stay) else None, places, sorted(bad), dropped)

    # --- one row -------------------------------------------------------------------------------------------------

    def _checked(self, row: Any, *, labelled: bool) -> Any:
        """Return the row's label, an id or a number (or a list of them), or None.

        Raises:
            DataError: the row cannot be used; says which field and why.
        """
        if isinstance(row, BadRow):
            raise DataError(row.reason)
        if not hasattr(row, "keys"):
            raise DataError(f"a row must be a mapping of fields. Received: {type(row).__name__}")
        self._check_texts(row)
        for field in self.keep:
            if field not in row:
                raise DataError(f"field {field!r} is to be kept. Received: {_shown(row, field)}")
        if self.label is None or (self.target and not self.words):
            return None
        if (self.label in row) != labelled:
            which = "has no" if labelled else "has a"
            raise DataError(
                f"it {which} label in field {self.label!r}, unlike the rows before. Received: {sorted(row)}"
            )
        if not labelled:
            return None
        return self._labels(row) if self.words else self._label(row[self.label])

    def _check_texts(self, row: Any) -> None:
        if self.words:
            words = row.get(self.words)
            if not _is_list(words) or not len(words) or not all(isinstance(word, str) for word in words):
                raise DataError(f"field {self.words!r} must be a list of words. Received: {_shown(row, self.words)}")
            _check_text("".join(words), self.words)
            return
        for field in (self.text, self.pair, self.target):
            if field is None:
                continue
            if not isinstance(row.get(field), str):
                raise DataError(f"field {field!r} must be text. Received: {_shown(row, field)}")
            _check_text(row[field], field)

    def _labels(self, row: Any) -> list[int]:
        labels, words = row[self.label], row[self.words]
        if not _is_list(labels) or len(labels) != len(words):
            got = f"{len(labels)} labels" if _is_list(labels) else repr(labels)[:60]
            raise DataError(f"field {self.label!r} must hold a label for each of {len(words)} words. Received: {got}")
        return [self._label(label) for label in labels]

    def _label(self, label: Any) -> Any:
        names = self.names
        if isinstance(label, str):
            if label not in names:
                raise DataError(f"the model has no label {label!r}. It has: {sorted(names)}")
            return names[label]
        if _is_list(label):  # several outputs at once
            if not all(_is_number(each) for each in label):
                raise DataError(f"a label's parts must be numbers. Received: {repr(label)[:60]}")
            return list(label)
        if isinstance(label, np.generic):
            label = label.item()
        if len(names) == 1 and isinstance(label, int) and not self.words:  # a single output regresses
            return float(label)
        classes = len(names) > 1 or self.words
        inside = isinstance(label, int) and (not names or 0 <= label < len(names) or label == IGNORE_INDEX)
        if not _is_number(label) or (classes and not inside):
            raise DataError(f"a label id must be below {len(names)}. Received: {label!r}")
        return label

    # --- all rows ------------------------------------------------------------------------------------------------

    def _columns(self, rows: Sequence[Any], labels: list[Any], *, labelled: bool) -> dict[str, Any]:
        """Return the columns of sound rows."""
        if self.words:
            ids = self._call([list(row[self.words]) for row in rows], None, is_split_into_words=True)
        else:
            texts = [row[self.text] for row in rows]
            ids = self._call(texts, [row[self.pair] for row in rows] if self.pair else None)
        made: dict[str, Any] = {name: _ragged(name, values) for name, values in ids.items()}
        if self.target and not self.words:
            targets = self._call(None, None, text_target=[row[self.target] for row in rows])
            made["labels"] = _ragged("labels", targets["input_ids"])
        if labelled:
            made["labels"] = self._of_tokens(ids, labels, made["input_ids"]) if self.words else column_of(labels)
        made.update({name: column_of([row[name] for row in rows]) for name in self.keep})
        return made

    def _call(self, texts: Any, pairs: Any, **more: Any) -> Any:
        cut = self.truncation and not self.drop_longer
        longest = (self.target_length if "text_target" in more else None) or self.max_length
        if not cut:
            more["verbose"] = False  # it would warn of what is wanted
        with threads(on=self.parallel):
            return self.tokenizer(
                texts,
                pairs,
                truncation=cut,
                max_length=longest if cut else None,
                add_special_tokens=self.special,
                **more,
            )

    def _of_tokens(self, ids: Any, labels: list[list[int]], tokens: Ragged) -> Ragged:
        """Label the first token of each word; the others, and special tokens, are -100."""
        if not getattr(ids, "is_fast", False):
            raise ConfigError(
                "tokenize: `words` needs a fast tokenizer, as others do not tell which token is of which word. "
                f"Received: {type(self.tokenizer).__name__}"
            )
        made = np.full(len(tokens.values), IGNORE_INDEX, np.int32)
        for number, of_words in enumerate(labels):
            of = np.array([-1 if word is None else word for word in ids.word_ids(number)])
            first = (of >= 0) & np.concatenate([[True], of[1:] != of[:-1]])
            made[tokens.offsets[number] : tokens.offsets[number + 1]][first] = np.array(of_words)[of[first]]
        return Ragged(made, tokens.offsets)


def _ragged(name: str, lists: Sequence[Sequence[int]]) -> Ragged:
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(each) for each in lists], out=offsets[1:])
    kind = np.int8 if name in MASKS else np.int32
    return Ragged(np.fromiter(itertools.chain.from_iterable(lists), kind, int(offsets[-1])), offsets)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)


def _shown(row: Any, field: str) -> str:
    return repr(row[field])[:60] if field in row else f"a row with the fields {sorted(row)}"


def _check_text(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"field {field!r} is no text: it holds half of a surrogate pair ({error})") from error


@attrs.frozen
class Tokenized:
    """What makes the blocks of a stream: rows that cannot be used stand as `BadRow` in their place."""

    encoder: Encoder
    split: str
    size: int

    def __call__(self, rows: list[Any], epoch: int, block: int) -> list[Any]:  # noqa: ARG002 - the same in every epoch
        """Return the tokenized rows; those that are too long are left out."""
        encoded = self.encoder(rows, labelled=self.encoder.labelled(rows))
        table, before = encoded.table, block * self.size
        made: dict[int, Any] = {}
        if table is not None:
            made = {place: table.row(i) for i, place in enumerate(encoded.places.tolist())}
        for place, why in encoded.bad:
            named = isinstance(rows[place], BadRow)
            made[place] = rows[place] if named else BadRow(f"tokenize: {self.split} row {before + place}: {why}")
        return [made[place] for place in sorted(made)]
