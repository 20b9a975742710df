"""A checkpoint's folder: written so that it is complete or absent at every instant, read so that nothing is trusted.

The order of a save: new folder ".tmp-..." beside the target; each file, then its fsync; the manifest last; fsync of the
folder; rename; fsync of the parent. Old ones go after that, and by a rename to ".trash-..." first, so that no reader
ever sees one that is half deleted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import re
import secrets
from typing import TYPE_CHECKING, Any

import attrs
from safetensors import SafetensorError

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _manifest
from drivetrain_plugins.checkpoint._format import (
    MODEL,
    STATE,
    Encoded,
    decode,
    from_safetensors,
    in_pieces,
    to_safetensors,
)
from drivetrain_plugins.checkpoint._store import CHUNK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from drivetrain_plugins.checkpoint._store import LocalStore

log = logging.getLogger("drivetrain")
STEP_NAME = re.compile(r"step-(\d{8,15})")
_LEFT_OVER = re.compile(r"\.(tmp|trash)-\d{8,15}-[0-9a-f]{16}")
MAX_STATE_BYTES, MAX_STATE_DEPTH, MAX_STATE_ENTRIES = 2**28, 256, 10_000_000


@attrs.frozen
class Saved:
    """A checkpoint whose every byte has been verified."""

    path: Path
    manifest: dict[str, Any]
    tree: Any


def step_of(name: str) -> int | None:
    """Return the step that a checkpoint's folder is named for."""
    match = STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def scratch(parent: Path, kind: str, step: int) -> Path:
    """Return a name nobody has, for a folder that readers do not see; drawn from the system, not from `random`."""
    return parent / f".{kind}-{step:08d}-{secrets.token_hex(8)}"


# --- writing ---------------------------------------------------------------------------------------------------------


def write(store: LocalStore, target: Path, encoded: Encoded, about: dict[str, Any]) -> None:
    """Make the checkpoint `target`, or leave everything as it was.

    Raises:
        CheckpointError: a call of the file system failed, or `target` exists and is none of ours.
    """
    temporary = scratch(target.parent, "tmp", about["step"])
    size = sum(t.numel() * t.element_size() for group in encoded.tensors.values() for t in group.values())
    contents: dict[str, Iterable[bytes | memoryview]] = {
        "model.safetensors": to_safetensors(encoded.tensors[MODEL]),
        "state.safetensors": to_safetensors(encoded.tensors[STATE]),
        "state.json": [_manifest.dump_json(encoded.tree)],
    }
    try:
        store.make_folders(target.parent)
        store.make_folder(temporary)
        files = {name: _write_file(store, temporary / name, chunks) for name, chunks in contents.items()}
        _write_file(store, temporary / _manifest.NAME, [_manifest.seal({**about, "files": files})])
        store.sync_folder(temporary)
        _publish(store, temporary, target, about["step"])
    except OSError as error:
        _discard(store, temporary)
        raise CheckpointError(_cannot_write(store, target, error, size)) from error
    except BaseException:
        _discard(store, temporary)
        raise


def _write_file(store: LocalStore, path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    size, digest = 0, hashlib.sha256()
    handle = store.create(path)
    try:
        for piece in in_pieces(chunks, CHUNK):
            store.write(handle, piece)
            digest.update(piece)
            size += len(piece)
        store.sync(handle)
    finally:
        store.close(handle)
    return {"size": size, "sha256": digest.hexdigest()}


def _publish(store: LocalStore, temporary: Path, target: Path, step: int) -> None:
    """Rename, where a folder with the target's name is moved away first: a save after going on from an older one."""
    old = None
    if store.exists(target):
        old = scratch(target.parent, "trash", step)
        if not is_ours(store, target):  # damaged, or not ours: keep it, out of the way
            old = target.with_name(f"{target.name}.replaced-{secrets.token_hex(4)}")
            log.warning("checkpoint: %s exists and is no valid checkpoint; it is now %s", target, old.name)
        store.rename(target, old)
    try:
        store.rename(temporary, target)
    except OSError:
        if old is not None:
            store.rename(old, target)
        raise
    store.sync_folder(target.parent)
    if old is not None and _LEFT_OVER.fullmatch(old.name):
        _discard(store, old)


def _cannot_write(store: LocalStore, target: Path, error: OSError, size: int) -> str:
    hint = "The checkpoints before it are as they were"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            hint = f"It needs about {size} bytes, {store.free_bytes(target.parent)} are free. {hint}"
    return (
        f"checkpoint {target} could not be written: {error.strerror or error} ({error.filename or 'no file'}). {hint}"
    )


def _discard(store: LocalStore, folder: Path) -> bool:
    """Remove a folder that readers do not see, as far as possible; what is left goes at the next start."""
    try:
        names = store.listdir(folder)
        for name in names:
            store.remove(folder / name)
        if names or store.exists(folder):
            store.remove_folder(folder)
    except OSError as error:
        log.warning("checkpoint: %s could not be removed: %s", folder, error)
        return False
    return True


def sweep(store: LocalStore, parent: Path) -> None:
    """Remove what saves of earlier processes left unfinished."""
    for name in store.listdir(parent):
        if _LEFT_OVER.fullmatch(name):
            _discard(store, parent / name)


def rotate(store: LocalStore, newest: Path, keep: int, protected: Path | None) -> None:
    """Keep the `keep` newest checkpoints up to the one just written, and `protected`; remove the other ones we wrote.

    A failure is told and no more: the new checkpoint is complete.
    """
    parent, last = newest.parent, step_of(newest.name)
    if last is None:
        return
    try:
        names = [n for n in store.listdir(parent) if (step_of(n) or 0) <= last and step_of(n) is not None]
        mine = [n for n in sorted(names, key=step_of, reverse=True) if is_ours(store, parent / n)]  # type: ignore[arg-type]
        for name in mine[keep:]:
            victim = parent / name
            if victim not in (newest, protected):
                trash = scratch(parent, "trash", step_of(name) or 0)
                store.rename(victim, trash)
                _discard(store, trash)
    except OSError as error:
        log.warning("checkpoint: old checkpoints in %s could not be removed: %s", parent, error)


def is_ours(store: LocalStore, folder: Path) -> bool:
    """Tell whether the folder holds a manifest that this plugin wrote for a folder of this name."""
    try:
        _read_manifest(store, folder)
    except CheckpointError:
        return False
    return True


# --- reading ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    """Turn whatever a damaged file causes into a CheckpointError with folder, file and reason."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{folder}: {name} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: {name} is no valid safetensors file: {error}") from error
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {name}: {error}") from error


def _read_manifest(store: LocalStore, folder: Path) -> dict[str, Any]:
    with _reading(folder, _manifest.NAME):
        content = _manifest.parse(store.read(folder, _manifest.NAME, limit=_manifest.MAX_BYTES))
        named = step_of(folder.name)
        if named is not None and named != content["step"]:
            raise ValueError(f"expected step {named} as the folder is named, found step {content['step']}")
        return content


def read(store: LocalStore, folder: Path) -> Saved:
    """Return the checkpoint in `folder`, after verifying every file against the manifest.

    Raises:
        CheckpointError: it is not complete and unchanged; folder, file and reason are named.
    """
    content = _read_manifest(store, folder)
    with _reading(folder, "the folder"):
        extra = set(store.listdir(folder)) - {_manifest.NAME, *content["files"]}
        if extra:
            raise ValueError(f"holds files that the manifest does not list: {sorted(extra)[:8]}")

    def verified(name: str, limit: int = 2**63) -> bytearray:
        listed = content["files"][name]
        raw = store.read(folder, name, limit=limit, size=listed["size"])
        found = hashlib.sha256(raw).hexdigest()
        if found != listed["sha256"]:
            raise ValueError(f"expected sha256 {listed['sha256']}, found {found}")
        return raw

    tensors = {}
    for file in (MODEL, STATE):
        with _reading(folder, f"{file}.safetensors"):
            loaded = from_safetensors(verified(f"{file}.safetensors"))
            tensors.update({f"{file}/{key}": tensor for key, tensor in loaded.items()})
    with _reading(folder, "state.json"):
        raw = verified("state.json", MAX_STATE_BYTES)
        tree = _manifest.parse_json(raw, max_depth=MAX_STATE_DEPTH, max_entries=MAX_STATE_ENTRIES)
        tree = decode(tree, tensors)
        if tree["progress"] != content["position"]:
            raise ValueError(f"expected the manifest's position, found {tree['progress']}")
    return Saved(folder, content, tree)


def newest(store: LocalStore, parent: Path, accept: Callable[[str], None]) -> Saved | None:
    """Return the valid checkpoint with the highest step in `parent`, or None if there is none at all.

    Args:
        store: where to read.
        parent: the folder of a run's checkpoints.
        accept: told of each one that is passed over, and why.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    with _reading(parent, "the folder"):
        names = [n for n in store.listdir(parent) if step_of(n) is not None]
    reasons = []
    for name in sorted(names, key=step_of, reverse=True):  # type: ignore[arg-type]
        try:
            return read(store, parent / name)
        except CheckpointError as error:
            reasons.append(str(error))
            accept(str(error))
    if reasons:
        raise CheckpointError(
            f"none of the {len(reasons)} checkpoints in {parent} is valid:\n"
            + "\n".join(f"- {reason}" for reason in reasons)
            + "\nTo start from scratch, choose another output folder or remove these"
        )
    return None
