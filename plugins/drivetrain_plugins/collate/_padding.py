"""What the collators share: columns out of rows, and ragged columns made into rectangles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from drivetrain import DataError
from drivetrain_plugins.shared.table import Ragged, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

LABELS = ("label", "labels", "label_ids")


def fields(rows: Sequence[Any], *, plugin: str) -> list[str]:
    """Return the names of the fields that all rows have.

    Raises:
        DataError: a row is no mapping, or has other fields than the first.
    """
    if isinstance(rows, Table):
        return list(rows.columns)
    for row in rows:
        if not hasattr(row, "keys"):
            raise DataError(f"{plugin}: a row must be a mapping of fields. Received: {type(row).__name__}")
        if row.keys() != rows[0].keys():
            received = sorted({tuple(sorted(row)) for row in rows})
            raise DataError(f"{plugin}: the rows of a batch must have the same fields. Received: rows with {received}")
    return list(rows[0])


def column(rows: Sequence[Any], field: str, *, plugin: str) -> Any:
    """Return `field` of all rows: `Ragged` where it holds lists of numbers, else a list or an array.

    Raises:
        DataError: a list holds something else than numbers.
    """
    values = rows.columns[field] if isinstance(rows, Table) else [row[field] for row in rows]
    if isinstance(values, (Ragged, np.ndarray)) or not _is_list(values[0]):
        return values
    try:
        return Ragged.of(values)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{plugin}: field {field!r} makes no tensor ({error}). Received: {repr(values)[:200]}"
        ) from error


def _is_list(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) > 0


def padded(
    lists: Ragged, fill: float, *, multiple: int = 1, side: str = "right", length: int | None = None
) -> torch.Tensor:
    """Return the lists as a tensor (B, L) of their type; L is that of the longest, or `length`, up to `multiple`."""
    lengths = lists.lengths
    longest = int(lengths.max(initial=0)) if length is None else length
    width = -(-longest // multiple) * multiple
    out = np.full((len(lists), width), fill, dtype=lists.values.dtype)
    places = np.arange(width)
    taken = places < lengths[:, None] if side == "right" else places >= width - lengths[:, None]
    out[taken] = lists.values[lists.offsets[0] : lists.offsets[-1]]
    return torch.from_numpy(out)


def ones_like(lists: Ragged) -> Ragged:
    """Return lists of ones as long as `lists`: an attention mask before padding."""
    return Ragged(np.ones(int(lists.offsets[-1] - lists.offsets[0]), np.int64), lists.offsets - lists.offsets[0])
