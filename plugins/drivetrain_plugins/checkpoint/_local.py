"""Checkpoints as folders of a local file system.

The order of a save: new folder ".tmp-..." beside the target; each file, then its fsync; the manifest last; fsync of the
folder; rename; fsync of the parent. Old ones go after that, and by a rename to ".trash-..." first, so that no reader
ever sees one that is half deleted.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain_plugins.checkpoint import _manifest
from drivetrain_plugins.checkpoint._format import in_pieces
from drivetrain_plugins.checkpoint._shelf import step_of
from drivetrain_plugins.checkpoint._store import CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from drivetrain_plugins.checkpoint._store import LocalStore

log = logging.getLogger("drivetrain")
_LEFT_OVER = re.compile(r"\.(tmp|trash)-\d{8,15}-[0-9a-f]{16}")


def _scratch(kind: str, step: int) -> str:
    """Return a name nobody has, for a folder that readers do not see; drawn from the system, not from `random`."""
    return f".{kind}-{step:08d}-{secrets.token_hex(8)}"


@attrs.define
class LocalShelf:
    """Checkpoints in the folder `parent`; see `Shelf`."""

    parent: Path
    store: LocalStore

    def where(self, name: str) -> Path:
        """Return the checkpoint's folder."""
        return self.parent / name

    def prepare(self) -> None:
        """Make the folder, write a probe as a save writes, and remove what earlier processes left unfinished."""
        store = self.store
        store.make_folders(self.parent)
        probe = LocalDraft(self, "probe", _scratch("tmp", 0))
        moved = self.parent / _scratch("trash", 0)
        try:
            store.make_folder(probe.folder)
            probe.write("state.safetensors", [b"probe"])  # a name as long as any
            store.rename(probe.folder, moved)
        except OSError:
            probe.discard()
            raise
        self._remove(moved)
        for name in store.listdir(self.parent):
            if _LEFT_OVER.fullmatch(name):
                self._discard(self.parent / name)
        self._sync_above()

    def _sync_above(self) -> None:
        """Put the names of the run's folder and of those around it on the disk: they may be new, too."""
        for folder in self.parent.parents[:3]:
            try:
                self.store.sync_folder(folder)
            except PermissionError:  # not ours to read, so not new
                return

    def names(self) -> list[str]:
        """Return the names of folders that are named for steps."""
        return [name for name in self.store.listdir(self.parent) if step_of(name) is not None]

    def begin(self, name: str) -> LocalDraft:
        """Make the folder that is written to."""
        self.store.make_folders(self.parent)
        draft = LocalDraft(self, name, _scratch("tmp", step_of(name) or 0))
        self.store.make_folder(draft.folder)
        return draft

    def join(self, name: str, token: str) -> LocalDraft:
        """Return the draft in the folder that `token` names."""
        return LocalDraft(self, name, token)

    def files(self, name: str) -> list[str]:
        """Return what the folder holds."""
        return self.store.listdir(self.parent / name)

    def read(self, name: str, file: str, *, limit: int, size: int | None = None) -> bytearray:
        """Read a regular file, without following a link."""
        return self.store.read(self.parent / name, file, limit=limit, size=size)

    def remove(self, name: str) -> None:
        """Rename out of sight, then remove."""
        trash = self.parent / _scratch("trash", step_of(name) or 0)
        self.store.rename(self.parent / name, trash)
        self._discard(trash)

    def free_bytes(self) -> int | None:
        """Return what the file system has left; None for a folder that is not there yet."""
        try:
            return self.store.free_bytes(self.parent)
        except FileNotFoundError:
            return None

    def is_ours(self, name: str) -> bool:
        """Tell whether the folder holds a manifest that this plugin wrote."""
        try:
            _manifest.parse(self.read(name, _manifest.NAME, limit=_manifest.MAX_BYTES))
        except (OSError, ValueError):
            return False
        return True

    def _remove(self, folder: Path) -> None:
        store = self.store
        names = store.listdir(folder)
        for name in names:
            store.remove(folder / name)
        if names or store.exists(folder):
            store.remove_folder(folder)

    def _discard(self, folder: Path) -> None:
        """Remove a folder that readers do not see, as far as possible; what is left goes at the next start."""
        try:
            self._remove(folder)
        except OSError as error:
            log.warning("checkpoint: %s could not be removed: %s", folder, error)


@attrs.define
class LocalDraft:
    """A folder beside the target; see `Draft`."""

    shelf: LocalShelf
    name: str
    token: str

    @property
    def folder(self) -> Path:
        """Where the files are written."""
        return self.shelf.parent / self.token

    def write(self, file: str, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
        """Write in pieces of a mebibyte, then fsync."""
        store, size, digest = self.shelf.store, 0, hashlib.sha256()
        handle = store.create(self.folder / file)
        try:
            for piece in in_pieces(chunks, CHUNK):
                store.write(handle, piece)
                digest.update(piece)
                size += len(piece)
            store.sync(handle)
        finally:
            store.close(handle)
        return {"size": size, "sha256": digest.hexdigest()}

    def commit(self, manifest: bytes) -> None:
        """Rename, or exchange with what has the target's name: a save after going on from an older one."""
        self.write(_manifest.NAME, [manifest])
        shelf, store, target = self.shelf, self.shelf.store, self.shelf.parent / self.name
        store.sync_folder(self.folder)
        if store.exists(target) and not shelf.is_ours(self.name):  # damaged, or not ours: keep it, out of the way
            aside = target.with_name(f"{self.name}.replaced-{secrets.token_hex(4)}")
            log.warning("checkpoint: %s exists and is no valid checkpoint; it is now %s", target, aside.name)
            store.rename(target, aside)
        old = None
        if not store.exists(target):
            store.rename(self.folder, target)
        else:
            old = self.folder if store.exchange(self.folder, target) else self._replace(target)
        store.sync_folder(shelf.parent)
        if old is not None:
            shelf._discard(old)  # noqa: SLF001 - of the same file

    def _replace(self, target: Path) -> Path:
        """Move the old one away, then rename; return where it is. For a moment there is neither."""
        shelf, store = self.shelf, self.shelf.store
        old = shelf.parent / _scratch("trash", step_of(self.name) or 0)
        store.rename(target, old)
        try:
            store.rename(self.folder, target)
        except OSError:
            store.rename(old, target)
            raise
        return old

    def discard(self) -> None:
        """Remove what was written."""
        self.shelf._discard(self.folder)  # noqa: SLF001 - of the same file
