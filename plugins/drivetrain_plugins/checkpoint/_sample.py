"""A digest of some rows of the training data: whether a resumed run reads what the one before read."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from drivetrain_plugins.checkpoint._format import raw_bytes

if TYPE_CHECKING:
    from drivetrain import Run

ROWS = 32  # evenly spread, the first and the last among them


def sample_of(run: Run) -> str | None:
    """Return a digest of `ROWS` training rows, or None for a stream and for rows that cannot be read alone.

    Another file in place of one that is gone, or other rows in a file, show unless they all lie between those that
    are looked at; all rows of a large set would have to be read to see each change.
    """
    fetch = getattr(run.batches["train"], "fetch", None)
    if fetch is None or hasattr(fetch.dataset, "open"):
        return None
    last = len(fetch.dataset) - 1
    numbers = torch.tensor(sorted({round(last * place / (ROWS - 1)) for place in range(ROWS)}))
    digest = hashlib.sha256()
    try:
        for row in fetch.rows(numbers, 0):
            _feed(digest, row)
    except Exception:  # noqa: BLE001 - a row that cannot be read is told when the run takes it
        return None
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    """Add a value by its content; of objects that say nothing of theirs, the type."""
    digest.update(type(value).__name__.encode() + b"\0")
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(raw_bytes(value).data)
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif hasattr(value, "keys"):
        for key in value:
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for part in value:
            _feed(digest, part)
    elif value is None or isinstance(value, (bool, int, float, str, bytes, np.generic)):
        digest.update(repr(value).encode())
    elif hasattr(value, "tobytes"):  # a picture
        digest.update(value.tobytes())
