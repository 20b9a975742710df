"""Conversion of a checkpoint between its full and its sharded form; not a bit of a tensor changes.

The state's tree refers to tensors by name, wherever they are stored, and is copied as it is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _manifest, _saved
from drivetrain_plugins.checkpoint._format import MODEL, STATE, to_safetensors
from drivetrain_plugins.checkpoint._shard_plan import (
    Chunk,
    Index,
    Stored,
    as_json,
    by_file,
    check_index,
    key_of,
    part_name,
)
from drivetrain_plugins.checkpoint._shards import load_shards
from drivetrain_plugins.checkpoint._shelf import step_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from drivetrain_plugins.checkpoint._shelf import Draft, Shelf

FORMS = FULL, SHARDED = "full", "sharded"
TREE = "state.json"
MAX_PARTS = 100_000


def convert(source: tuple[Shelf, str], target: tuple[Shelf, str], form: str, parts: int = 1) -> None:
    """Write the checkpoint `source` again as `target`, in another form; `target` is complete or absent.

    Args:
        source: where it stands, and its name there.
        target: where it is to stand, and its name there; it may be the same.
        form: "full" or "sharded".
        parts: into how many files of about the same size the sharded form is cut, along dimension 0 of each tensor.

    Raises:
        CheckpointError: `source` is not complete and unchanged, or `target` could not be written.
        ValueError: no such form or number of parts.
    """
    if form not in FORMS or not 1 <= parts <= MAX_PARTS:
        raise ValueError(f"expected a form of {FORMS} and 1 to {MAX_PARTS} parts. Received: {form!r}, {parts!r}")
    reader = _saved.Reader.of(*source)
    index = reader.index()
    for file in _manifest.parts(reader.manifest["files"]).keys() - by_file(index or {}).keys():
        reader.verified(file)  # nothing reads it again
    shelf, name = target
    if step_of(name) not in (None, reader.manifest["step"]):
        raise CheckpointError(f"{shelf.where(name)} is no name for a checkpoint of step {reader.manifest['step']}")
    about = {k: v for k, v in reader.manifest.items() if k not in ("magic", "schema", "files", "sha256")}
    try:
        draft = shelf.begin(name)
        try:
            files = _write_full(draft, reader, index) if form == FULL else _write_sharded(draft, reader, index, parts)
            files[TREE] = draft.write(TREE, [memoryview(reader.verified(TREE))])
            draft.commit(_manifest.seal({**about, "files": files}))
        except BaseException:
            draft.discard()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"checkpoint {shelf.where(name)} could not be written: {reason}") from error


def _write_full(draft: Draft, source: _saved.Reader, held: Index | None) -> dict[str, Any]:
    """Write a part of the state at a time: no more than that is in memory."""
    files = {}
    for part in (MODEL, STATE):
        tensors = {reference[len(part) + 1 :]: tensor for reference, tensor in _tensors(source, held, part).items()}
        files[f"{part}.safetensors"] = draft.write(f"{part}.safetensors", to_safetensors(tensors))
    return files


def _write_sharded(draft: Draft, source: _saved.Reader, held: Index | None, parts: int) -> dict[str, Any]:
    tensors = _tensors(source, held, MODEL) | _tensors(source, held, STATE)
    index, contents = split(tensors, parts)
    files = {file: draft.write(file, to_safetensors(content)) for file, content in contents.items()}
    text = as_json(index)
    with source.reading(_manifest.INDEX):
        check_index(text, {file: about["size"] for file, about in files.items()})
    files[_manifest.INDEX] = draft.write(_manifest.INDEX, [_manifest.dump_json(text)])
    return files


def split(tensors: Mapping[str, torch.Tensor], parts: int) -> tuple[Index, dict[str, dict[str, torch.Tensor]]]:
    """Return the index and the content of each part, views; cut along dimension 0 as FSDP2 cuts, by `torch.chunk`."""
    index: Index = {}
    contents: dict[str, dict[str, torch.Tensor]] = {part_name(0): {}}
    for reference, tensor in tensors.items():
        shape, chunks = tuple(tensor.shape), []
        step = math.ceil(shape[0] / parts) if shape else 1
        for number, start in enumerate(range(0, shape[0], step) if tensor.numel() and shape else [0]):
            piece = tensor[start : start + step] if shape else tensor
            if piece.numel():
                offsets, sizes = (start, *(0 for _ in shape[1:])) if shape else (), tuple(piece.shape)
                chunk = Chunk(part_name(number), key_of(reference, offsets, sizes, shape), offsets, sizes)
                chunks.append(chunk)
                contents.setdefault(chunk.file, {})[chunk.key] = piece
        index[reference] = Stored(shape, tensor.dtype, tuple(chunks))
    return index, contents


def _tensors(reader: _saved.Reader, index: Index | None, part: str) -> dict[str, torch.Tensor]:
    """Return the whole tensors of the model or of the other state, by reference, whichever form holds them."""
    if index is None:
        return {f"{part}/{key}": tensor for key, tensor in reader.tensors(f"{part}.safetensors").items()}
    with reader.reading(_manifest.INDEX):
        return load_shards(index, reader.tensors, only=f"{part}/")
