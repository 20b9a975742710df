"""Every file-system call a checkpoint makes, in one small class: the seam for other stores and for injected faults."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
CHUNK = 2**20  # bytes in one write or read


class LocalStore:
    """The local file system. Names and modes are the caller's; modes follow the umask."""

    def make_folders(self, path: Path) -> None:
        """Make `path` and its parents where they are missing."""
        path.mkdir(parents=True, exist_ok=True)

    def make_folder(self, path: Path) -> None:
        """Make the new folder `path`."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Create the new file `path` and return a handle to write to."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, handle: int, chunk: bytes | memoryview) -> None:
        """Write all of `chunk`, at most `CHUNK` bytes."""
        view = memoryview(chunk)
        while view:
            view = view[os.write(handle, view) :]

    def sync(self, handle: int) -> None:
        """Return when the file's bytes are on the disk."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        """Close a handle of `create`."""
        os.close(handle)

    def sync_folder(self, path: Path) -> None:
        """Return when the folder's names are on the disk."""
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Give `source` the free name `target` in one step."""
        source.rename(target)

    def exchange(self, one: Path, other: Path) -> bool:
        """Give each of two folders the other's name in one step; return False where the file system cannot."""
        if _LIBC is None or not hasattr(_LIBC, "renameat2"):
            return False
        if _LIBC.renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
            return True
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            return False
        raise OSError(number, os.strerror(number), str(one))

    def exists(self, path: Path) -> bool:
        """Tell whether anything, a broken link included, has this name."""
        return os.path.lexists(path)

    def listdir(self, path: Path) -> list[str]:
        """Return the names in a folder, sorted; none if it is missing. A link to a folder is refused."""
        try:
            if not stat.S_ISDIR(path.lstat().st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a folder of its own", str(path))
            return sorted(entry.name for entry in path.iterdir())
        except FileNotFoundError:
            return []

    def read(self, folder: Path, name: str, *, limit: int, size: int | None = None) -> bytearray:
        """Return the bytes of a regular file that is `size` bytes long, or of any size up to `limit`.

        Sizes are checked before anything is read. The open neither follows a link nor waits at a pipe.

        Raises:
            OSError: the file is missing or cannot be read.
            ValueError: it is a link, no regular file, reachable by a second name, or of another size.
        """
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ValueError("is a symbolic link; expected a regular file") from None
            raise
        finally:
            os.close(at)
        with os.fdopen(handle, "rb", buffering=0) as file:
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode):
                raise ValueError(f"is no regular file (mode {about.st_mode:o})")
            if about.st_nlink > 1:
                raise ValueError(f"has {about.st_nlink} hard links; expected 1")
            if size is not None and about.st_size != size:
                raise ValueError(f"expected {size} bytes, found {about.st_size}")
            if about.st_size > limit:
                raise ValueError(f"expected at most {limit} bytes, found {about.st_size}")
            content = bytearray(about.st_size)
            view, done = memoryview(content), 0
            while done < len(view):
                count = file.readinto(view[done : done + CHUNK])
                if not count:
                    raise ValueError(f"expected {len(view)} bytes, the file ended after {done}")
                done += count
            return content

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def free_bytes(self, path: Path) -> int:
        """Return how much can be written where `path` is."""
        about = os.statvfs(path)
        return about.f_bavail * about.f_frsize
