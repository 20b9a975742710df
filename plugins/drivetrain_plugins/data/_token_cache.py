"""Tokenized rows kept in files: one for each content, tokenizer and set of options; written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from drivetrain import require
from drivetrain_plugins.shared.table import Ragged, Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from drivetrain_plugins.data._encoding import Encoder

log = logging.getLogger("drivetrain")
VERSION = "drivetrain/tokenized/2"


@attrs.frozen
class Kept:
    """What tokenizing a split gave."""

    table: Table | None
    bad: list[tuple[int, str]]  # (row number, why)
    dropped: int


def key(encoder: Encoder, parts: Iterable[Sequence[Any]]) -> str:
    """Return the digest of the rows' content, the tokenizer and the options."""
    digest = hashlib.blake2b(digest_size=16)
    options = attrs.asdict(encoder, recurse=False, filter=lambda field, _: field.name not in ("tokenizer", "parallel"))
    for part in (VERSION, options, tokenizer_state(encoder.tokenizer)):
        digest.update(json.dumps(part, sort_keys=True, default=repr).encode() + b"\n")
    for rows in parts:
        read = [[row.get(field) if hasattr(row, "keys") else repr(row) for field in encoder.fields] for row in rows]
        has = [[field in row if hasattr(row, "keys") else False for field in encoder.fields] for row in rows]
        digest.update(json.dumps([read, has], default=_plain).encode() + b"\n")
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else repr(value)


def tokenizer_state(tokenizer: Any) -> Any:
    """Return all that decides what a tokenizer gives, as JSON values."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: Any = None
    if backend is not None:  # truncation and padding are those of its last call
        state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    elif hasattr(tokenizer, "get_vocab"):
        state = tokenizer.get_vocab()
    about = getattr(tokenizer, "init_kwargs", {})
    versions = [getattr(require(m, extra="hf", plugin="tokenize"), "__version__", "") for m in ("tokenizers",)]
    names = ("model_input_names", "truncation_side", "padding_side", "model_max_length")
    return [type(tokenizer).__name__, state, about, versions, [getattr(tokenizer, name, None) for name in names]]


def save(path: Path, kept: Kept) -> None:
    """Write the file under a temporary name, and rename it when it is complete."""
    arrays: dict[str, Any] = {}
    for name, column in ({} if kept.table is None else kept.table.columns).items():
        if isinstance(column, Ragged):
            values, offsets = column.values, column.offsets
            arrays |= {f"{name}.values": values[offsets[0] : offsets[-1]], f"{name}.offsets": offsets - offsets[0]}
        elif isinstance(column, np.ndarray):
            arrays[f"{name}.array"] = column
        else:
            texts = [json.dumps(value, ensure_ascii=False).encode() for value in column]
            arrays[f"{name}.json"] = np.frombuffer(b"".join(texts), np.uint8)
            arrays[f"{name}.ends"] = np.cumsum([len(text) for text in texts], dtype=np.int64)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    names = [] if kept.table is None else list(kept.table.columns)  # in the file arrays stand in an order of its own
    about = {"version": VERSION, "bad": json.dumps(kept.bad), "dropped": str(kept.dropped), "names": json.dumps(names)}
    about["digest"] = _digest(arrays, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        require("safetensors.numpy", plugin="tokenize").save_file(arrays, str(written), about)
        written.replace(path)
    finally:
        with contextlib.suppress(OSError):
            written.unlink(missing_ok=True)


def _digest(arrays: dict[str, Any], about: dict[str, str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in ("version", "bad", "dropped", "names"):
        digest.update(f"{name} {about[name]}\n".encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(memoryview(arrays[name]).cast("B") if arrays[name].size else b"")
    return digest.hexdigest()


def load(path: Path) -> Kept | None:
    """Return what the file holds, or None where there is none or it is damaged; that is told."""
    if not path.is_file():
        return None
    safetensors = require("safetensors", plugin="tokenize")
    try:
        with safetensors.safe_open(str(path), "np") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if about["version"] != VERSION or about["digest"] != _digest(arrays, about):
            raise ValueError("its digest differs")  # noqa: TRY301 - one damage among others
        return Kept(
            _table(arrays, json.loads(about["names"])),
            [(number, why) for number, why in json.loads(about["bad"])],
            int(about["dropped"]),
        )
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("tokenize: the cache %s is damaged (%s) and is made again", path, error)
        return None


def _table(arrays: dict[str, Any], names: list[str]) -> Table | None:
    columns: dict[str, Any] = {}
    for full, array in arrays.items():
        name, _, kind = full.rpartition(".")
        if kind == "values":
            columns[name] = Ragged(array, arrays[f"{name}.offsets"])
        elif kind == "array":
            columns[name] = array
        elif kind == "json":
            ends = arrays[f"{name}.ends"].tolist()
            raw = array.tobytes()
            columns[name] = [json.loads(raw[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return Table({name: columns[name] for name in names}) if columns else None
