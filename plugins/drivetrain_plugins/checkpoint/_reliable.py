"""A place in an object store of which every call is tried again until a deadline, and none outlasts it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from drivetrain_plugins.checkpoint._bucket import PART
from drivetrain_plugins.checkpoint._retry import RECENT, Deadline, Try, aside, persist

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain_plugins.checkpoint._bucket import Bucket, Stat

TIDY_S = 10.0  # how long a caller waits for cleaning up; it goes on without the caller for as long as CLEAN_S
CLEAN_S = 60.0


@attrs.frozen
class Reliable:
    """The calls of a bucket, tried again; see `persist` for what is raised."""

    bucket: Bucket

    def do(self, work: Callable[[Try], Any], deadline: Deadline, path: str, **how: Any) -> Any:
        """Return the result of `work`, which is about the object at `path`."""
        return persist(work, deadline, self.bucket.where(path), **how)

    def look(self, path: str, deadline: Deadline) -> tuple[bytes, Any] | None:
        """Return a small object's bytes and tag, or None if there is none."""
        try:
            found: tuple[bytes, Any] = self.do(lambda t: self.bucket.look(path, t.limit_s), deadline, path)
        except FileNotFoundError:
            return None
        return found

    def find(self, path: str, deadline: Deadline) -> dict[str, Stat]:
        """Return the objects below a path, by their names from there."""
        found: dict[str, Stat] = self.do(lambda t: self.bucket.find(path, t.limit_s), deadline, path)
        return found

    def read(self, path: str, limit: int, size: int | None, seconds: float) -> bytearray:
        """Return the bytes of an object that is there, part by part; each part may take `seconds`.

        Raises:
            ValueError: it is of another size than `size`, or larger than `limit`.
        """
        bucket = self.bucket
        there = self.do(lambda t: bucket.stat(path, t.limit_s), Deadline(seconds), path, missing=RECENT).size
        if size is not None and there != size:
            raise ValueError(f"expected {size} bytes, found {there}")
        if there > limit:
            raise ValueError(f"expected at most {limit} bytes, found {there}")
        content = bytearray(there)
        for start in range(0, there, PART):
            end = min(start + PART, there)
            work = _ranged(bucket, path, start, end)
            piece = self.do(work, Deadline(seconds), path, size=end - start, missing=RECENT)
            if len(piece) != end - start:
                raise ValueError(f"expected {there} bytes, the file ended after {start + len(piece)}")
            content[start:end] = piece
        return content

    def remove(self, path: str, deadline: Deadline) -> None:
        """Remove an object, if it is still there."""
        try:
            self.do(lambda t: self.bucket.remove(path, t.limit_s), deadline, path)
        except FileNotFoundError:  # a try whose answer was lost, or somebody else
            return

    def remove_below(self, path: str, deadline: Deadline) -> None:
        """Remove the objects below a path."""
        for file in self.find(path, deadline):
            self.remove(f"{path}/{file}", deadline)

    def abort_uploads(self, path: str, before: float, deadline: Deadline) -> None:
        """Drop what was sent of objects below a path that were begun before a time and never finished."""
        self.do(lambda t: self.bucket.abort_uploads(path, before, t.limit_s), deadline, path)


def _ranged(bucket: Bucket, path: str, start: int, end: int) -> Callable[[Try], bytes]:
    return lambda this: bucket.read(path, start, end, this.limit_s)


@attrs.define
class Sending:
    """The bytes of one object on their way: a short one is put at once, a long one goes in parts."""

    store: Reliable
    path: str
    deadline: Deadline
    _held: bytearray = attrs.field(init=False, factory=bytearray)
    _upload: Any = attrs.field(init=False, default=None)
    _tags: list[Any] = attrs.field(init=False, factory=list)
    _size: int = attrs.field(init=False, default=0)

    def add(self, piece: bytes | memoryview) -> None:
        """Keep a piece, and send a part when one is full."""
        self._held += piece
        if len(self._held) >= PART:
            self._send()

    def finish(self) -> None:
        """Send the rest; the object is there when this returns."""
        bucket = self.store.bucket
        if self._upload is None:
            data = bytes(self._held)
            self._do(lambda t: bucket.put(self.path, data, t.limit_s), size=len(data))
            return
        if self._held:
            self._send()
        self._do(lambda t: bucket.finish(self._upload, self._tags, self._size, t.limit_s), size=PART)

    def abort(self) -> None:
        """Drop what was sent, as far as possible."""
        if self._upload is not None:
            aside(lambda: self.store.bucket.abort(self._upload, CLEAN_S), min(TIDY_S, self.deadline.left()))

    def _send(self) -> None:
        bucket = self.store.bucket
        if self._upload is None:
            self._upload = self._do(lambda t: bucket.start(self.path, t.limit_s))
        part, number = bytes(self._held), len(self._tags) + 1
        self._held.clear()
        tries = None if bucket.resumes else 1
        tag = self._do(lambda t: bucket.send(self._upload, number, part, t.limit_s), size=len(part), tries=tries)
        self._tags.append(tag)
        self._size += len(part)

    def _do(self, work: Callable[[Try], Any], **how: Any) -> Any:
        return self.store.do(work, self.deadline, self.path, **how)
