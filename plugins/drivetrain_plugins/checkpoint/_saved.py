"""Reading checkpoints: every byte is verified against the manifest, and nothing in them is trusted."""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING, Any

import attrs
from safetensors import SafetensorError

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _manifest
from drivetrain_plugins.checkpoint._format import MODEL, STATE, decode, from_safetensors
from drivetrain_plugins.checkpoint._shelf import step_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from drivetrain_plugins.checkpoint._shard_plan import Index
    from drivetrain_plugins.checkpoint._shelf import Shelf

    Layout = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor | None]

MAX_STATE_BYTES, MAX_STATE_DEPTH, MAX_STATE_ENTRIES = 2**28, 256, 10_000_000


@attrs.frozen
class Saved:
    """A checkpoint whose every byte has been verified; of one that holds weights only, `tree` is the model alone."""

    shelf: Shelf
    name: str
    manifest: dict[str, Any]
    tree: Any

    @property
    def path(self) -> Path | str:
        """Where it stands."""
        return self.shelf.where(self.name)


@contextlib.contextmanager
def reading(place: object, name: str) -> Iterator[None]:
    """Turn whatever a damaged file causes into a CheckpointError with folder, file and reason."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{place}: {name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{place}: {name} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{place}: {name} is no valid safetensors file: {error}") from error
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"{place}: {name}: {error}") from error


def read_manifest(shelf: Shelf, name: str) -> dict[str, Any]:
    """Return the manifest of a checkpoint, every field of which has been checked.

    Raises:
        CheckpointError: it is missing, damaged, of a later version, or of another step than the name says.
    """
    with reading(shelf.where(name), _manifest.NAME):
        content = _manifest.parse(shelf.read(name, _manifest.NAME, limit=_manifest.MAX_BYTES))
        named = step_of(name)
        if named is not None and named != content["step"]:
            raise ValueError(f"expected step {named} as the folder is named, found step {content['step']}")
        return content


@attrs.frozen
class Reader:
    """The files of one checkpoint, each verified when it is read; an error names checkpoint and file."""

    shelf: Shelf
    name: str
    manifest: dict[str, Any]

    @classmethod
    def of(cls, shelf: Shelf, name: str) -> Reader:
        """Return the reader of a checkpoint, whose manifest is sound and lists every file there is.

        Raises:
            CheckpointError: it does not.
        """
        manifest = read_manifest(shelf, name)
        with reading(shelf.where(name), "the folder"):
            extra = set(shelf.files(name)) - {_manifest.NAME, *manifest["files"]}
            if extra:
                raise ValueError(f"holds files that the manifest does not list: {sorted(extra)[:8]}")
        return cls(shelf, name, manifest)

    def reading(self, file: str) -> contextlib.AbstractContextManager[None]:
        """Turn whatever damage causes into a CheckpointError that names the file."""
        return reading(self.shelf.where(self.name), file)

    def verified(self, file: str, limit: int = 2**63) -> bytearray:
        """Return a file's bytes, which have the size and the digest that the manifest says."""
        listed = self.manifest["files"][file]
        with self.reading(file):
            raw = self.shelf.read(self.name, file, limit=limit, size=listed["size"])
            found = hashlib.sha256(raw).hexdigest()
            if found != listed["sha256"]:
                raise ValueError(f"expected sha256 {listed['sha256']}, found {found}")
            return raw

    def json(self, file: str) -> Any:
        """Return the value of a JSON file."""
        raw = self.verified(file, MAX_STATE_BYTES)
        with self.reading(file):
            return _manifest.parse_json(raw, max_depth=MAX_STATE_DEPTH, max_entries=MAX_STATE_ENTRIES)

    def tensors(self, file: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a safetensors file, by key."""
        raw = self.verified(file)
        with self.reading(file):
            return from_safetensors(raw)

    def index(self) -> Index | None:
        """Return which part holds which chunk, or None of the full form."""
        files = self.manifest["files"]
        if _manifest.INDEX not in files:
            return None
        from drivetrain_plugins.checkpoint._shard_plan import check_index  # noqa: PLC0415 - loads torch's DCP

        content = self.json(_manifest.INDEX)
        with self.reading(_manifest.INDEX):
            return check_index(content, _manifest.parts(files))


def check(shelf: Shelf, name: str) -> dict[str, Any]:
    """Verify every byte of a checkpoint without keeping it, and return its manifest.

    Raises:
        CheckpointError: it is not complete and unchanged; folder, file and reason are named.
    """
    reader = Reader.of(shelf, name)
    for file in reader.manifest["files"]:
        reader.verified(file)
    return reader.manifest


def read(shelf: Shelf, name: str, layout: Layout | None = None, *, every: bool = True, resume: bool = False) -> Saved:
    """Return a checkpoint, after verifying its files against the manifest.

    Args:
        shelf: where it stands.
        name: its name there.
        layout: how a tensor (its reference, shape and dtype) is to lie over the ranks; whole ones if None.
        every: verify those parts of a sharded one, too, of which this rank needs nothing.
        resume: refuse one that holds weights only.

    Raises:
        CheckpointError: it is not complete and unchanged; folder, file and reason are named.
    """
    reader = Reader.of(shelf, name)
    manifest = reader.manifest
    if resume and manifest["kind"] == _manifest.WEIGHTS:
        do = "to begin a new run from these weights, add the plugin `warm-start` with this path"
        raise CheckpointError(
            f"{shelf.where(name)} holds weights only, no optimizer, position or streams: it cannot be resumed; {do}"
        )
    tensors = _tensors(reader, layout, every=every)
    content = reader.json("state.json")
    with reader.reading("state.json"):
        tree = decode(content, tensors)
        if tree["progress"] != manifest["position"]:
            raise ValueError(f"expected the manifest's position, found {tree['progress']}")
    return Saved(shelf, name, manifest, tree)


def _tensors(reader: Reader, layout: Layout | None, *, every: bool) -> dict[str, torch.Tensor]:
    index = reader.index()
    if index is not None:
        return _sharded(reader, index, layout, every=every)
    if layout is not None:
        from drivetrain_plugins.checkpoint._shards import lay_out  # noqa: PLC0415 - loads torch's DCP
    tensors: dict[str, torch.Tensor] = {}
    for part in (MODEL, STATE):
        file = f"{part}.safetensors"
        loaded = reader.tensors(file)
        with reader.reading(file):
            for key, tensor in loaded.items():
                reference = f"{part}/{key}"
                like = layout(reference, tuple(tensor.shape), tensor.dtype) if layout is not None else None
                tensors[reference] = tensor if like is None else lay_out(reference, tensor, like)
    return tensors


def _sharded(reader: Reader, index: Index, layout: Layout | None, *, every: bool) -> dict[str, torch.Tensor]:
    from drivetrain_plugins.checkpoint._shards import load_shards  # noqa: PLC0415 - loads torch's DCP

    unread = set(_manifest.parts(reader.manifest["files"]))

    def read_part(file: str) -> dict[str, torch.Tensor]:
        unread.discard(file)
        return reader.tensors(file)

    with reader.reading(_manifest.INDEX):
        tensors = load_shards(index, read_part, layout)
    for file in sorted(unread) if every else ():
        reader.verified(file)
    return tensors


def newest(
    shelf: Shelf, passed_over: Callable[[str], None], layout: Layout | None = None, *, resume: bool = True
) -> Saved | None:
    """Return the valid checkpoint of a run with the highest step, or None if there is none at all.

    Args:
        shelf: where a run's checkpoints stand.
        passed_over: told of each one that is passed over, and why.
        layout: see `read`.
        resume: pass over those that hold weights only.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    with reading(shelf.where(""), "the folder"):
        names = shelf.names()
    reasons = []
    for name in sorted(names, key=lambda n: step_of(n) or 0, reverse=True):
        try:
            return read(shelf, name, layout, resume=resume)
        except CheckpointError as error:
            reasons.append(str(error))
            passed_over(str(error))
    if reasons:
        raise CheckpointError(
            f"none of the {len(reasons)} checkpoints in {shelf.where('')} is valid:\n"
            + "\n".join(f"- {reason}" for reason in reasons)
            + "\nTo start from scratch, choose another output folder or remove these"
        )
    return None
