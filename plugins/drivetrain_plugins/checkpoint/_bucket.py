"""Every call that a checkpoint makes to an object store, in one small class over fsspec: single tries, no policy.

Paths are what fsspec calls them ("bucket/run/step-00000010/..."). `limit_s` is how long the caller will wait; a file
system that can cancel a request does so then. Whatever the store's library raises comes out as it is.
"""

from __future__ import annotations

import errno
import os
from datetime import UTC, datetime
from typing import Any

import attrs
import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from fsspec.spec import AbstractBufferedFile

from drivetrain import ConfigError, MissingDependency
from drivetrain.errors import Problem, nearest
from drivetrain_plugins.checkpoint._retry import redacted

PART = 2**26  # bytes of one part of a large object, and of one read
SMALL = 2**16  # bytes; more than `look` is meant for
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")
# File systems of a parent process. fsspec forgets them in a forked child, and closing them there would take the
# parent's connections out of the event loop's poll, which the two share.
_FORKED: list[Any] = []


@attrs.frozen
class Stat:
    """What a listing tells of an object; `time` is when it was written, in seconds by the store's clock."""

    size: int
    time: float | None


class Bucket:
    """A place in an object store, by its URL."""

    resumes = False  # whether a part of a large object may be sent again

    def __init__(self, url: str) -> None:
        """Open the store; nothing is sent yet."""
        self._given = url
        self.url = redacted(url.rstrip("/"))
        self._connect()

    def _connect(self) -> None:
        self._pid = os.getpid()
        self._fs, path = url_to_fs(self._given, use_listings_cache=False, **self.options())
        self.root = str(path).rstrip("/")

    def options(self) -> dict[str, Any]:
        """Return what the file system is opened with; the rest is the environment's and fsspec's configuration."""
        return {}

    @property
    def fs(self) -> Any:
        """The file system; one of its own in a forked process, where the parent's event loop does not run."""
        if self._pid != os.getpid():
            _FORKED.extend([self._fs, *getattr(type(self._fs), "_cache", {}).values()])
            self._connect()
        return self._fs

    def path(self, *parts: str) -> str:
        """Return an object's path."""
        return "/".join((self.root, *parts))

    def where(self, path: str) -> str:
        """Return the URL of a path."""
        return self.url + path.removeprefix(self.root)

    def limit(self, limit_s: float) -> dict[str, float]:
        """Return the arguments that bound a call."""
        return {"timeout": limit_s} if self.fs.async_impl else {}

    def put(self, path: str, data: bytes, limit_s: float) -> None:
        """Write an object, over an older one."""
        self.fs.pipe_file(path, data, **self.limit(limit_s))

    def create(self, path: str, data: bytes, limit_s: float) -> None:
        """Write an object if there is none.

        Raises:
            FileExistsError: there is one.
            NotImplementedError: the store has no such write.
        """
        try:
            self.fs.pipe_file(path, data, mode="create", **self.limit(limit_s))
        except (TypeError, ValueError) as error:
            raise NotImplementedError(str(error)) from error

    def replace(self, path: str, data: bytes, tag: Any, limit_s: float) -> None:  # noqa: ARG002 - what stores need
        """Write an object in place of the one that `look` showed.

        Raises:
            FileExistsError: it is another by now, where the store can tell.
        """
        self.put(path, data, limit_s)

    def look(self, path: str, limit_s: float) -> tuple[bytes, Any]:
        """Return a small object's bytes, and its tag where the store has one."""
        return bytes(self.fs.cat_file(path, start=0, end=SMALL, **self.limit(limit_s))), None

    def stat(self, path: str, limit_s: float) -> Stat:
        """Return an object's size and time."""
        found = self.fs.info(path, **self.limit(limit_s))
        if found["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "no such object")
        return stat_of(found)

    def read(self, path: str, start: int, end: int, limit_s: float) -> bytes:
        """Return the bytes of an object from `start` to before `end`."""
        return bytes(self.fs.cat_file(path, start=start, end=end, **self.limit(limit_s)))

    def find(self, path: str, limit_s: float) -> dict[str, Stat]:
        """Return the objects below a path, by their names from there."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(path, detail=True, **self.limit(limit_s))
        except FileNotFoundError:
            return {}
        below = f"{path}/"
        return {name.removeprefix(below): stat_of(info) for name, info in found.items() if info["type"] == "file"}

    def remove(self, path: str, limit_s: float) -> None:
        """Remove an object."""
        self.fs.rm_file(path, **self.limit(limit_s))

    # --- large objects -------------------------------------------------------------------------------------------

    def start(self, path: str, limit_s: float) -> Any:  # noqa: ARG002 - what stores need
        """Begin an object that is sent in parts, and return what the other methods call it."""
        return self.fs.open(path, "wb", block_size=PART)

    def send(self, upload: Any, number: int, part: bytes, limit_s: float) -> Any:  # noqa: ARG002 - what stores need
        """Send a part and return its tag; all but the last have `PART` bytes, numbers are counted from 1."""
        upload.write(part)

    def finish(self, upload: Any, tags: list[Any], size: int, limit_s: float) -> None:  # noqa: ARG002 - what stores need
        """Make the object, which has this size, of its parts."""
        upload.close()

    def abort(self, upload: Any, limit_s: float) -> None:  # noqa: ARG002 - what stores need
        """Drop what was sent of an object."""
        try:
            upload.discard()
        finally:
            if isinstance(upload, AbstractBufferedFile):
                upload.closed = True  # else the garbage collector would finish the object

    def abort_uploads(self, path: str, before: float, limit_s: float) -> None:
        """Drop what was sent of objects below a path that were begun before a time and never finished."""


def stat_of(info: dict[str, Any]) -> Stat:
    """Return size and time of what a listing tells."""
    value = next((info[key] for key in _TIMES if info.get(key)), None)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return Stat(int(info["size"]), float(value) if isinstance(value, (int, float)) else None)


def open_bucket(url: str, kinds: dict[str, type[Bucket]], extras: dict[str, str]) -> Bucket:
    """Return the place that a URL names.

    Args:
        url: such as "s3://bucket/run".
        kinds: what more than fsspec is known of a scheme.
        extras: drivetrain's extra for a scheme.

    Raises:
        MissingDependency: the scheme needs a package that is not installed.
        ConfigError: nobody knows the scheme, or the URL names no place in an object store.
    """
    scheme, _, place = url.partition("://")
    shown = redacted(url)
    if "::" in url or not place.strip("/"):
        do = 'name a bucket and a folder in it, such as "s3://bucket/run"'
        raise ConfigError([Problem("checkpoints cannot be kept at this URL", shown, do)])
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = str(known_implementations[scheme]["class"]).partition(".")[0]
        do = f"pip install 'drivetrain[{extras[scheme]}]'" if scheme in extras else str(error) or f"install {package}"
        what = f"{scheme}:// needs the package {package!r}, which is not installed"
        raise MissingDependency([Problem(what, shown, do)]) from error
    except ValueError:
        known = nearest(scheme, fsspec.available_protocols())
        raise ConfigError([Problem(f"no store is known for {scheme}://", shown, known)]) from None
    if issubclass(kind, LocalFileSystem):
        raise ConfigError([Problem(f"{scheme}:// is no object store", shown, "name a folder by its path")])
    try:
        return kinds.get(scheme, Bucket)(url)
    except Exception as error:  # noqa: BLE001 - a store's library raises what it likes
        what = f"the store cannot be opened: {type(error).__name__}: {redacted(str(error))}"
        raise ConfigError([Problem(what, shown, "check the URL and the store's settings")]) from None
