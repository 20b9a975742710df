"""What one save writes: collected from the run in one go, written by whoever has the time."""

from __future__ import annotations

import contextlib
import errno
import logging
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _manifest
from drivetrain_plugins.checkpoint._format import to_safetensors
from drivetrain_plugins.checkpoint._retention import Entry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from drivetrain_plugins.checkpoint._retention import Kept, Retention
    from drivetrain_plugins.checkpoint._shelf import Draft, Shelf

log = logging.getLogger("drivetrain")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@attrs.define
class Parcel:
    """One save of this rank: the manifest without its files, and the files by what they hold."""

    name: str
    about: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]  # file -> key -> tensor
    texts: dict[str, bytes]  # file -> JSON
    shared: bool = False  # every rank writes a part of the checkpoint

    @property
    def size(self) -> int:
        """Bytes of all tensors and texts; headers come on top."""
        tensors = sum(t.numel() * t.element_size() for group in self.tensors.values() for t in group.values())
        return tensors + sum(map(len, self.texts.values()))

    def contents(self) -> dict[str, Iterable[bytes | memoryview]]:
        """Return the files' bytes, in pieces."""
        return {**{f: to_safetensors(t) for f, t in self.tensors.items()}, **{f: [t] for f, t in self.texts.items()}}

    def entry(self) -> Entry:
        """Return what retention needs to know of it."""
        return Entry.of(self.name, self.about)


def write_files(draft: Draft, contents: Mapping[str, Iterable[bytes | memoryview]]) -> dict[str, Any]:
    """Write files into a draft; return what the manifest says of each."""
    return {file: draft.write(file, chunks) for file, chunks in contents.items()}


def write(kept: Kept, parcel: Parcel, retention: Retention, protected: Iterable[str], contents: Any = None) -> None:
    """Write the whole checkpoint, then remove those that are not to be kept any more.

    On a full disk, what the new checkpoint would push out goes first, but never the newest there is, and it is tried
    once more.

    Args:
        kept: the shelf, and what stands on it.
        parcel: what is written.
        retention: what is kept.
        protected: names that stay, whatever the rule says.
        contents: the files' bytes where they have been prepared; the parcel's own otherwise.

    Raises:
        CheckpointError: it could not be written; those before it are as they were.
    """
    entry, protected = parcel.entry(), set(protected)
    try:
        _attempt(kept.shelf, parcel, contents)
    except OSError as error:
        room = make_room(kept, entry, retention, protected) if error.errno in FULL_DISK else []
        if not room:
            raise cannot_write(kept.shelf, parcel, error) from error
        names = ", ".join(room)
        log.warning("checkpoint: %s: %s; making room first: %s", kept.shelf.where(parcel.name), error.strerror, names)
        kept.remove(room)
        try:
            _attempt(kept.shelf, parcel, contents)
        except OSError as again:
            raise cannot_write(kept.shelf, parcel, again) from again
    settle(kept, entry, retention, protected)


def make_room(kept: Kept, entry: Entry, retention: Retention, protected: Iterable[str]) -> list[str]:
    """Return what may go before `entry` is written: what it will push out, but never the newest there is."""
    try:
        before = kept.entries()
    except OSError:
        return []
    newest = max((e for e in before if e.step <= entry.step), key=lambda e: e.step, default=None)
    stay = {*protected, *([newest.name] if newest else [])}
    return retention.victims([*(e for e in before if e.name != entry.name), entry], entry.step, {*stay, entry.name})


def settle(kept: Kept, entry: Entry, retention: Retention, protected: Iterable[str]) -> None:
    """Remember a checkpoint that is complete, and remove those that it pushes out; a failure is told and no more."""
    kept.add(entry)
    try:
        kept.remove(retention.victims(kept.entries(), entry.step, {*protected, entry.name}))
    except OSError as error:
        kept.complain(error)


def _attempt(shelf: Shelf, parcel: Parcel, contents: Any) -> None:
    free = shelf.free_bytes()
    if free is not None and free < parcel.size:
        raise OSError(errno.ENOSPC, "No space left on device", str(shelf.where(parcel.name)))
    draft = shelf.begin(parcel.name)
    try:
        files = write_files(draft, parcel.contents() if contents is None else contents)
        draft.commit(_manifest.seal({**parcel.about, "files": files}))
    except BaseException:
        draft.discard()
        raise


def cannot_write(shelf: Shelf, parcel: Parcel, error: OSError) -> CheckpointError:
    """Return the error that says what happened to a save, and what it would have needed."""
    hint = "The checkpoints before it are as they were"
    if error.errno in FULL_DISK:
        with contextlib.suppress(OSError):
            hint = f"It needs about {parcel.size} bytes, {shelf.free_bytes()} are free. {hint}"
    reason = error.strerror or str(error)
    where = shelf.where(parcel.name)
    return CheckpointError(f"checkpoint {where} could not be written: {reason} ({error.filename or 'no file'}). {hint}")
