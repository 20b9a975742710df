"""What the collators share: columns out of rows, and ragged columns made into rectangles."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import ConfigError, DataError
from drivetrain.data import IGNORE_INDEX
from drivetrain_plugins.shared.table import Ragged, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from drivetrain import Run

    Array = np.ndarray[Any, Any]

LABELS = ("labels", "label", "label_ids")  # the later name wins where a row has several
IGNORED = IGNORE_INDEX


def tokenizer_of(given: Any, run: Run) -> Any:
    """Return the tokenizer given to the plugin, else the run's."""
    return given if given is not None else run.processor


@property  # type: ignore[misc]  # a descriptor to be put into classes
def processor_unless_given(plugin: Any) -> tuple[str, ...]:
    """Require a processor where no tokenizer was given."""
    return () if plugin.tokenizer is not None else ("processor",)


# --- columns -----------------------------------------------------------------------------------------------------


def fields(rows: Sequence[Any], *, plugin: str) -> list[str]:
    """Return the names of the fields that all rows have.

    Raises:
        DataError: a row is no mapping, or lacks a field that others have.
    """
    if isinstance(rows, Table):
        return list(rows.columns)
    try:
        names = rows[0].keys()
        same = all(row.keys() == names for row in rows)
    except AttributeError:
        bad = next(row for row in rows if not hasattr(row, "keys"))
        raise DataError(
            f"{plugin}: a row must be a mapping of fields. Received: {type(bad).__name__} {repr(bad)[:80]}"
        ) from None
    if not same:
        known = {name for row in rows for name in row}
        place, lacks = next((i, sorted(known - row.keys())) for i, row in enumerate(rows) if known - row.keys())
        raise DataError(
            f"{plugin}: the rows of a batch must have the same fields, but row {place} of the batch lacks {lacks}. "
            f"Received: rows with {sorted({tuple(sorted(row)) for row in rows})}"
        )
    return list(names)


def raw(rows: Sequence[Any], field: str) -> Any:
    """Return `field` of all rows as it is."""
    return rows.columns[field] if isinstance(rows, Table) else [row[field] for row in rows]


def column(rows: Sequence[Any], field: str, *, plugin: str) -> Any:
    """Return `field` of all rows: `Ragged` where it holds lists of numbers, else a list or an array.

    Raises:
        DataError: a list holds something else than numbers.
    """
    values = raw(rows, field)
    if isinstance(values, (Ragged, np.ndarray)) or not _is_list(values[0]):
        return values
    return ragged(values, field, plugin=plugin)


def columns(rows: Sequence[Any], *, plugin: str) -> dict[str, Any]:
    """Return every field's `column`; text, and fields that are null in every row, are left out.

    Raises:
        DataError: as `fields` and `column` do.
    """
    made = {name: _column(rows, name, plugin) for name in fields(rows, plugin=plugin)}
    return {name: values for name, values in made.items() if name in LABELS or not is_empty(values)}


def _column(rows: Sequence[Any], field: str, plugin: str) -> Any:
    """Return a column; arrays of several dimensions are stacked."""
    if isinstance(rows, Table) or getattr(rows[0][field], "ndim", 1) < 2:  # noqa: PLR2004
        return column(rows, field, plugin=plugin)
    try:
        return np.stack([np.asarray(row[field]) for row in rows])
    except (TypeError, ValueError, RuntimeError) as error:
        shapes = sorted({str(tuple(getattr(row[field], "shape", ()))) for row in rows})
        raise DataError(f"{plugin}: field {field!r} makes no tensor ({error}). Received: shapes {shapes}") from error


def ragged(values: Sequence[Any], field: str, *, plugin: str) -> Ragged:
    """Lay the lists of `field` back to back: lists, tuples, arrays or tensors of numbers, one a row.

    Raises:
        DataError: some value is no flat list of numbers; the first such row is named.
    """
    if set(map(type, values)) == {list}:
        flat = array("q")
        try:
            for each in values:
                flat.fromlist(each)  # half the time of numpy's conversion; refuses what is no integer
        except OverflowError as error:
            raise _blamed(values, field, plugin, _makes_list, error) from error
        except TypeError:
            pass
        else:
            return Ragged(np.asarray(flat), _offsets(values))
    try:
        return Ragged.of(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _blamed(values, field, plugin, _makes_list, error) from error


def scalars(values: Any, field: str, *, plugin: str) -> torch.Tensor:
    """Return one number a row as a fresh tensor (B,): int64, float32 or bool.

    Raises:
        DataError: some value is no number; the first such row is named.
    """
    try:
        if not isinstance(values, np.ndarray):
            values = [v.item() if isinstance(v, torch.Tensor) else v for v in values]
        return torch.from_numpy(_numbers(np.array(values)))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _blamed(values, field, plugin, _makes_number, error) from error


def _offsets(lists: Sequence[Any]) -> Array:
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(each) for each in lists], out=offsets[1:])
    return offsets


def _numbers(made: Array) -> Array:
    """Return numbers as the types that models take."""
    if made.dtype.kind not in "iubf":
        raise TypeError(f"no numbers but {made.dtype}")
    if made.dtype == np.uint64 and made.size and made.max() > np.iinfo(np.int64).max:
        raise OverflowError("a number does not fit into 64 bits")
    if made.dtype.kind == "b":
        return made
    return made.astype(np.float32 if made.dtype.kind == "f" else np.int64, copy=False)


def _makes_list(value: Any) -> None:
    if not _is_list(value):
        raise TypeError(f"it is no list but {type(value).__name__}")
    _numbers(np.asarray(value))
    Ragged.of([value])


def _makes_number(value: Any) -> None:
    if _numbers(np.asarray(value)).ndim:
        raise TypeError("a list where others have a number")


def _blamed(values: Sequence[Any], field: str, plugin: str, test: Any, error: Exception) -> DataError:
    """Return the error that names the first row whose value does not pass `test`."""
    for place, value in enumerate(values):
        reason = "it is null" if value is None else ""
        try:
            test(value)
        except Exception as alone:  # noqa: BLE001 - whatever it is, it is the reason
            said = f"row {place} of the batch: {reason or alone}"
            return DataError(f"{plugin}: field {field!r} makes no tensor ({said}). Received: {repr(value)[:120]}")
    return DataError(f"{plugin}: field {field!r} makes no tensor ({error}). Received: {repr(list(values))[:200]}")


def _is_list(value: Any) -> bool:
    plain = hasattr(value, "__len__") and not isinstance(value, (str, bytes, Mapping))
    return plain and getattr(value, "ndim", 1) > 0


def is_empty(values: Any) -> bool:
    """Tell whether a field holds nothing that makes a tensor: text, or null in every row."""
    if isinstance(values, Ragged):
        return False
    if isinstance(values, np.ndarray) and values.dtype.kind != "O":
        return values.dtype.kind in "US"
    return all(value is None or isinstance(value, (str, bytes)) for value in values)


# --- rectangles --------------------------------------------------------------------------------------------------


def padded(
    lists: Ragged, fill: float, *, multiple: int = 1, side: str = "right", length: int | None = None
) -> torch.Tensor:
    """Return the lists as a tensor (B, L) of their type; L is that of the longest, or `length`, up to `multiple`.

    Raises:
        DataError: a list is longer than `length`.
    """
    return torch.from_numpy(_filled(lists, fill, _taken(lists.lengths, multiple, side, length)))


def ones_like(lists: Ragged) -> Ragged:
    """Return lists of ones as long as `lists`: an attention mask before padding."""
    return Ragged(np.ones(int(lists.offsets[-1] - lists.offsets[0]), np.int64), lists.offsets - lists.offsets[0])


def _taken(lengths: Array, multiple: int, side: str, length: int | None) -> Array:
    """Return which places of the rectangle hold an item, bool (B, L)."""
    longest = int(lengths.max(initial=0))
    if length is not None and longest > length:
        place = int(lengths.argmax())
        raise DataError(
            f"row {place} of the batch has {longest} items, more than the length of {length} that rows are padded to. "
            "Cut rows before, or leave `length` unset"
        )
    width = -(-(longest if length is None else length) // multiple) * multiple
    places = np.arange(width)
    taken: Array = places < lengths[:, None] if side == "right" else places >= width - lengths[:, None]
    return taken


def _filled(lists: Ragged, fill: float, taken: Array) -> Array:
    out = np.full(taken.shape, fill, dtype=lists.values.dtype)
    out[taken] = lists.values[lists.offsets[0] : lists.offsets[-1]]
    return out


@attrs.frozen
class Padding:
    """How token rows become rectangles: what a tokenizer's `pad` does, in a form that pickles small.

    A field whose lists are as long as `input_ids` in every row is padded to the batch's width, others to their own
    longest list. Float labels of equal length (one number a class) are stacked as they are.
    """

    fill: dict[str, int]
    multiple: int = 1
    side: str = "right"
    length: int | None = None
    ignored: int = IGNORED

    @classmethod
    def of(cls, tokenizer: Any, *, plugin: str, multiple: int = 1, length: int | None = None) -> Padding:
        """Take padding ids and side from `tokenizer`.

        Raises:
            ConfigError: it has no padding token.
        """
        if getattr(tokenizer, "pad_token_id", None) is None:
            do = "Set one, e.g. tokenizer.pad_token = eos_token"
            raise ConfigError(f"{plugin}: the tokenizer has no padding token. {do}. Received: {type(tokenizer)}")
        ids = {"input_ids": tokenizer.pad_token_id, "decoder_input_ids": tokenizer.pad_token_id}
        fill = {**ids, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0), "special_tokens_mask": 1}
        return cls(fill, multiple, tokenizer.padding_side, length)

    def __call__(self, given: Mapping[str, Any], *, plugin: str) -> dict[str, torch.Tensor]:
        """Return tensors (B, L) of ragged columns and (B,) of numbers, labels as "labels", with an attention mask.

        Raises:
            DataError: a column makes no tensor.
        """
        batch: dict[str, torch.Tensor] = {}
        masks: dict[bytes, Array] = {}
        ids = given.get("input_ids")
        like = _outline(ids) if isinstance(ids, Ragged) else None
        for name in (*(n for n in given if n not in LABELS), *(n for n in LABELS if n in given)):
            values = given[name]
            target = "labels" if name in LABELS else name
            if isinstance(values, Ragged):
                batch[target] = self._rectangle(name, values, like, masks, plugin)
            else:
                made = scalars(values, name, plugin=plugin) if _flat(values) else _stacked(values, name, plugin)
                batch[target] = made.long() if target == "labels" and made.dtype == torch.bool else made
        if like is not None and "attention_mask" not in batch:
            batch["attention_mask"] = torch.from_numpy(masks[like].astype(np.int64))
        return batch

    def _rectangle(
        self, name: str, lists: Ragged, like: bytes | None, masks: dict[bytes, Array], plugin: str
    ) -> torch.Tensor:
        key, fill = _outline(lists), self.ignored if name in LABELS else self.fill.get(name, 0)
        tokens = like in (None, key)
        classes = name in LABELS and lists.values.dtype.kind == "f"
        if classes or not tokens:
            lengths = lists.lengths
            if len(lists) and (lengths == lengths[0]).all():
                items = lists.values[lists.offsets[0] : lists.offsets[-1]]
                return torch.from_numpy(items.reshape(len(lists), -1).copy())
        if not tokens:
            return padded(lists, fill, multiple=self.multiple, side=self.side)
        if key not in masks:
            try:
                masks[key] = _taken(lists.lengths, self.multiple, self.side, self.length)
            except DataError as error:
                raise DataError(f"{plugin}: field {name!r}: {error}") from None
        return torch.from_numpy(_filled(lists, fill, masks[key]))


def _outline(lists: Ragged) -> bytes:
    """Return a key that two columns share if their lists are equally long in every row."""
    offsets = lists.offsets
    return (offsets - offsets[0] if offsets[0] else offsets).tobytes()


def _flat(values: Any) -> bool:
    return getattr(values, "ndim", 1) == 1


def _stacked(values: Array, field: str, plugin: str) -> torch.Tensor:
    try:
        return torch.from_numpy(_numbers(np.array(values)))
    except (TypeError, OverflowError) as error:
        raise DataError(f"{plugin}: field {field!r} makes no tensor ({error})") from error


def take_labels(given: dict[str, Any]) -> tuple[str, Any]:
    """Take the labels out of `given`; return their name there and their values, None if there are none."""
    found = [(name, given.pop(name)) for name in LABELS if name in given]
    return found[-1] if found else ("labels", None)
