"""What a power loss can leave of a sequence of file-system calls: a recorder, and every state that a disk could have.

The model is stricter than any file system: the bytes of a file are there only after its fsync (before it: all, none,
half of them, or zeros), and the names in a folder only after the fsync of that folder (before it: any prefix of what
was done to them, in each folder independently of the others). A rename within a folder is one such change.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import attrs

from drivetrain_plugins.checkpoint._shelf import step_of
from drivetrain_plugins.checkpoint._store import LocalStore

Tree = tuple[tuple[str, Any], ...]  # names with bytes or trees, sorted


class Recorder(LocalStore):
    """The real store, which records every change with its contents; `deaf` calls claim to sync and do not."""

    def __init__(self, base: Path, deaf: tuple[str, ...] = ()):
        self.base, self.deaf, self.log, self.files, self.renamed = base, deaf, [], {}, None

    def _note(self, name, *paths, data=b""):
        inside = [p.relative_to(self.base).parts for p in map(Path, paths)]
        self.log.append((name, *inside, data) if name == "write" else (name, *inside))

    def make_folders(self, path):
        missing = [p for p in (*reversed(path.parents), path) if p.is_relative_to(self.base) and not p.exists()]
        super().make_folders(path)
        for folder in missing:
            self._note("make_folder", folder)

    def make_folder(self, path):
        super().make_folder(path)
        self._note("make_folder", path)

    def create(self, path):
        handle = super().create(path)
        self.files[handle] = path
        self._note("create", path)
        return handle

    def write(self, handle, chunk):
        super().write(handle, chunk)
        self._note("write", self.files[handle], data=bytes(chunk))

    def sync(self, handle):
        super().sync(handle)
        if "sync" not in self.deaf:
            self._note("sync", self.files[handle])

    def close(self, handle):
        super().close(handle)
        del self.files[handle]

    def sync_folder(self, path):
        super().sync_folder(path)
        if "sync_folder" not in self.deaf and Path(path).is_relative_to(self.base):  # names above are certain
            self._note("sync_folder", path)
        if self.renamed is not None and path == self.renamed.parent:  # who saves believes it done from here on
            self.log.append(("done", step_of(self.renamed.name)))
            self.renamed = None

    def rename(self, source, target):
        super().rename(source, target)
        assert Path(source).parent == Path(target).parent  # one change of one folder
        self._note("rename", source, target)
        if step_of(target.name) is not None:
            self.renamed = target

    def exchange(self, one, other):
        assert super().exchange(one, other)  # the file systems of these tests can
        assert Path(one).parent == Path(other).parent
        self._note("exchange", one, other)
        self.renamed = other
        return True

    def remove(self, path):
        super().remove(path)
        self._note("remove", path)

    def remove_folder(self, path):
        super().remove_folder(path)
        self._note("remove_folder", path)


@attrs.define(eq=False)
class File:
    """An inode with bytes."""

    data: bytes = b""
    synced: bool = False

    def outcomes(self) -> set[bytes]:
        """Return what the disk may hold."""
        if self.synced:
            return {self.data}
        half = self.data[: len(self.data) // 2]
        return {self.data, b"", half, bytes(len(self.data))}


@attrs.define(eq=False)
class Folder:
    """An inode with names: `versions` are those since the last sync, the first one is certain."""

    versions: list[dict[str, Any]] = attrs.field(factory=lambda: [{}])

    @property
    def now(self) -> dict[str, Any]:
        """What a running system sees."""
        return self.versions[-1]

    def outcomes(self) -> set[Tree]:
        """Return what the disk may hold."""
        found = set()
        for names in self.versions:
            ordered = sorted(names)
            for contents in itertools.product(*(names[name].outcomes() for name in ordered)):
                found.add(tuple(zip(ordered, contents, strict=True)))
        return found


class Disk:
    """The inodes under one folder, whose own name is certain."""

    def __init__(self):
        self.root = Folder()

    def at(self, parts):
        """Return the inode of a path."""
        found = self.root
        for name in parts:
            found = found.now[name]
        return found

    def do(self, name, parts, more=None):
        """Perform a recorded change."""
        parent = self.at(parts[:-1]) if parts else None
        if name == "write":
            file = self.at(parts)
            file.data, file.synced = file.data + more, False
        elif name == "sync":
            self.at(parts).synced = True
        elif name == "sync_folder":
            folder = self.at(parts)
            folder.versions = [folder.now]
        else:
            names = dict(parent.now)
            if name == "exchange":
                names[parts[-1]], names[more[-1]] = names[more[-1]], names[parts[-1]]
            elif name in ("make_folder", "create"):
                names[parts[-1]] = Folder() if name == "make_folder" else File()
            else:
                moved = names.pop(parts[-1])
                if name == "rename":
                    names[more[-1]] = moved
            parent.versions.append(names)


def crashes(log):
    """Give, after each call, the steps whose saves were done, what a kill leaves, and what a power loss can leave."""
    disk, done = Disk(), []
    yield done, (), {()}
    for name, *arguments in log:
        if name == "done":
            done = [*done, arguments[0]]
        else:
            disk.do(name, *arguments)
        yield done, _as_seen(disk.root), disk.root.outcomes()


def _as_seen(inode):
    if isinstance(inode, File):
        return inode.data
    return tuple((name, _as_seen(inode.now[name])) for name in sorted(inode.now))


def build(tree: Tree, folder: Path) -> None:
    """Make a state real."""
    folder.mkdir()
    for name, content in tree:
        if isinstance(content, bytes):
            handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(handle, content)
            os.close(handle)
        else:
            build(content, folder / name)
