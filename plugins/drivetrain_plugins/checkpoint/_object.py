"""Checkpoints in an object store, where nothing can be renamed and one object at a time becomes visible.

    PREFIX/step-00000500/0123456789abcdef/model.safetensors    an attempt: the files of one save
                                          ...
                                          manifest.json
    PREFIX/step-00000500/COMMIT            {"attempt": "0123456789abcdef", "sha256": the manifest's}

A save writes its files below a name that nobody else has, then the manifest, and last COMMIT, with a condition: that
there is none, or that it is still the one that was there when the save began. Readers know a step by its COMMIT and
see only the attempt that it names, whose manifest has the digest that it pins.

Whether a COMMIT was written is not always known: an answer can be lost. Each try therefore looks first. A save that
ends without knowing leaves its files where they are, so that a COMMIT that arrives late is whole all the same.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain_plugins.checkpoint import _manifest
from drivetrain_plugins.checkpoint._bucket import Bucket, Stat, open_bucket
from drivetrain_plugins.checkpoint._format import in_pieces
from drivetrain_plugins.checkpoint._reliable import CLEAN_S, TIDY_S, Reliable, Sending
from drivetrain_plugins.checkpoint._retry import RECENT, Deadline, Try, aside, passing
from drivetrain_plugins.checkpoint._s3 import S3Bucket
from drivetrain_plugins.checkpoint._shelf import step_of
from drivetrain_plugins.checkpoint._store import CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger("drivetrain")
KINDS: dict[str, type[Bucket]] = {"s3": S3Bucket, "s3a": S3Bucket}
EXTRAS = {"s3": "s3", "s3a": "s3"}
COMMIT = "COMMIT"
STALE_S = 3600.0  # at least; what a save left behind is cleared when it is older than this and twice the deadline
_ATTEMPT = re.compile(r"[0-9a-f]{16}")
_PROBE = re.compile(r"\.probe-[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _pointer(attempt: str, manifest: bytes) -> bytes:
    return _manifest.dump_json({"attempt": attempt, "sha256": hashlib.sha256(manifest).hexdigest()})


def _parsed(raw: bytes) -> dict[str, str]:
    """Return what a COMMIT says.

    Raises:
        ValueError: it is none.
    """
    found = _manifest.parse_json(raw, max_depth=3, max_entries=8)
    sound = (
        isinstance(found, dict) and found.keys() == {"attempt", "sha256"} and {type(v) for v in found.values()} == {str}
    )
    if not sound or not _ATTEMPT.fullmatch(found["attempt"]) or not _SHA256.fullmatch(found["sha256"]):
        raise ValueError(f"expected a {COMMIT} with attempt and sha256, found {str(found)[:80]}")
    return {"attempt": found["attempt"], "sha256": found["sha256"]}


def _attempt_of(found: tuple[bytes, Any] | None) -> str | None:
    try:
        return None if found is None else _parsed(found[0])["attempt"]
    except ValueError:
        return None


def _plain(name: str) -> str:
    if not name or "/" in name or name in {".", ".."}:
        raise ValueError(f"expected a plain name, found {name[:80]!r}")
    return name


@attrs.define
class ObjectShelf:
    """Checkpoints below a URL; see `Shelf`.

    A save, a listing, and each 64 MiB of reading are given up after `deadline_s`.
    """

    store: Reliable
    deadline_s: float = 600.0
    conditional: bool = attrs.field(init=False, default=True)  # until the store is seen to have no such writes
    own: set[str] = attrs.field(init=False, factory=set)  # attempts of which this process has sent a COMMIT

    @classmethod
    def open(cls, url: str, deadline: float) -> ObjectShelf:
        """Return the shelf at a URL that fsspec knows; nothing is sent yet.

        Args:
            url: such as "s3://bucket/run".
            deadline: seconds after which an operation is given up.

        Raises:
            MissingDependency: the scheme needs a package that is not installed.
            ConfigError: the URL names no place in an object store.
        """
        return cls(Reliable(open_bucket(url, KINDS, EXTRAS)), deadline)

    @property
    def bucket(self) -> Bucket:
        """The calls that the store has."""
        return self.store.bucket

    def where(self, name: str) -> str:
        """Return the checkpoint's URL."""
        return f"{self.bucket.url}/{name}" if name else self.bucket.url

    def prepare(self) -> None:
        """Write, read and remove a probe, find out about conditional writes, and clear what saves left long ago."""
        bucket, deadline = self.bucket, Deadline(self.deadline_s)
        path = bucket.path(f".probe-{secrets.token_hex(8)}")
        try:
            self._probe(path, b"probe\n", deadline)
            now = self.store.do(lambda t: bucket.stat(path, t.limit_s), deadline, path, missing=RECENT).time
        except BaseException:
            aside(lambda: bucket.remove(path, CLEAN_S), min(deadline.left(), TIDY_S))
            raise
        self.store.remove(path, deadline)
        try:
            self._clear(time.time() if now is None else now, deadline)
        except OSError as error:
            log.warning("checkpoint: what earlier saves left in %s could not be cleared: %s", self.where(""), error)

    def _probe(self, path: str, body: bytes, deadline: Deadline) -> None:
        bucket, store = self.bucket, self.store
        self.conditional = False
        try:
            for _ in range(2):  # whether the first or the second is refused: the name is nobody else's
                store.do(lambda t: bucket.create(path, body, t.limit_s), deadline, path)
        except FileExistsError:
            self.conditional = True
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            store.do(lambda t: bucket.put(path, body, t.limit_s), deadline, path)
        if not self.conditional:
            text = "checkpoint: %s has no conditional writes: two runs that save there would not notice each other"
            log.warning(text, self.where(""))
        found, _ = store.do(lambda t: bucket.look(path, t.limit_s), deadline, path, missing=RECENT)
        if found != body:
            raise OSError(errno.EIO, f"what was written is read back as {found[:40]!r}", bucket.where(path))

    def names(self) -> list[str]:
        """Return the steps that have a COMMIT."""
        steps = (path.partition("/") for path in self.store.find(self.bucket.root, Deadline(self.deadline_s)))
        return sorted(name for name, _, rest in steps if rest == COMMIT and step_of(name) is not None)

    def begin(self, name: str) -> ObjectDraft:
        """Look which COMMIT the new one will replace, and choose a name for the attempt."""
        deadline = Deadline(self.deadline_s)
        older = self._look(name, deadline)
        return ObjectDraft(self, name, secrets.token_hex(8), deadline, older)

    def join(self, name: str, token: str) -> ObjectDraft:
        """Return the draft that writes into the attempt `token`."""
        if not _ATTEMPT.fullmatch(token):
            raise ValueError(f"expected the token of a draft, found {token[:80]!r}")
        return ObjectDraft(self, _plain(name), token, Deadline(self.deadline_s), None)

    def files(self, name: str) -> list[str]:
        """Return the names of the committed attempt's files."""
        deadline = Deadline(self.deadline_s)
        return sorted(self.store.find(self.bucket.path(name, self._committed(name, deadline)["attempt"]), deadline))

    def read(self, name: str, file: str, *, limit: int, size: int | None = None) -> bytearray:
        """Read a file of the committed attempt; the manifest must have the digest that COMMIT pins."""
        commit = self._committed(name, Deadline(self.deadline_s))
        path = self.bucket.path(name, commit["attempt"], _plain(file))
        content = self.store.read(path, limit, size, self.deadline_s)
        if file == _manifest.NAME and (found := hashlib.sha256(content).hexdigest()) != commit["sha256"]:
            raise ValueError(f"expected sha256 {commit['sha256']}, which {COMMIT} pins, found {found}")
        return content

    def remove(self, name: str) -> None:
        """Remove COMMIT, so that nobody sees the checkpoint any more; the files go while the caller goes on."""
        deadline = Deadline(self.deadline_s)
        found = self._look(name, deadline)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, f"no {COMMIT}", self.where(name))
        self.store.remove(self.bucket.path(name, COMMIT), deadline)
        self.forget(name, _attempt_of(found), deadline)

    def forget(self, name: str, attempt: str | None, deadline: Deadline) -> None:
        """Remove the files of an attempt that no COMMIT names, and wait for it a little."""
        if attempt is not None:
            path, time_left = self.bucket.path(name, attempt), Deadline(self.deadline_s)
            aside(lambda: self.store.remove_below(path, time_left), min(TIDY_S, deadline.left()))

    def free_bytes(self) -> None:
        """Return None: a store does not tell."""

    def _look(self, name: str, deadline: Deadline) -> tuple[bytes, Any] | None:
        return self.store.look(self.bucket.path(_plain(name), COMMIT), deadline)

    def _committed(self, name: str, deadline: Deadline) -> dict[str, str]:
        found = self._look(name, deadline)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, f"no {COMMIT}", self.where(name))
        return _parsed(found[0])

    def _clear(self, now: float, deadline: Deadline) -> None:
        """Remove attempts that no COMMIT names, probes and unfinished uploads, if nothing of them is recent.

        Another job may be saving here. Its attempt has no COMMIT yet, but its newest file is younger than its deadline;
        so a step of which anything is recent is left alone.
        """
        store, root, before = self.store, self.bucket.root, now - max(STALE_S, 2 * self.deadline_s)
        steps: dict[str, dict[str, Stat]] = {}
        for path, about in store.find(root, deadline).items():
            name, _, rest = path.partition("/")
            if step_of(name) is not None:
                steps.setdefault(name, {})[rest] = about
            elif _PROBE.fullmatch(path) and _is_old(about, before):
                store.remove(self.bucket.path(path), deadline)
        for name, found in steps.items():
            attempts = {rest.partition("/")[0] for rest in found} - {COMMIT}
            if attempts and all(_is_old(about, before) for about in found.values()):
                self._clear_step(name, {a for a in attempts if _ATTEMPT.fullmatch(a)}, deadline)
        store.abort_uploads(root, before, deadline)

    def _clear_step(self, name: str, attempts: set[str], deadline: Deadline) -> None:
        commit = self._look(name, deadline)
        named = _attempt_of(commit)
        if commit is not None and named is None:
            return  # damaged: whoever looks into it may want the files
        for attempt in attempts - {named}:
            self.store.remove_below(self.bucket.path(name, attempt), deadline)


def _is_old(about: Stat, before: float) -> bool:
    return about.time is not None and about.time < before


@attrs.define
class ObjectDraft:
    """An attempt that no COMMIT names yet; see `Draft`. All it does ends by its deadline."""

    shelf: ObjectShelf
    name: str
    token: str
    deadline: Deadline
    older: tuple[bytes, Any] | None  # the COMMIT that there was when it was begun
    _discarded: bool = attrs.field(init=False, default=False)
    _unsure: set[object] = attrs.field(init=False, factory=set)  # tries whose COMMIT may have been written

    def write(self, file: str, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
        """Put a short file at once and send a long one in parts; what fails for a moment is sent again."""
        self._check()
        sending = Sending(self.shelf.store, self.shelf.bucket.path(self.name, self.token, _plain(file)), self.deadline)
        size, digest = 0, hashlib.sha256()
        try:
            for piece in in_pieces(chunks, CHUNK):
                digest.update(piece)
                size += len(piece)
                sending.add(piece)
            sending.finish()
        except BaseException:
            sending.abort()
            raise
        return {"size": size, "sha256": digest.hexdigest()}

    def commit(self, manifest: bytes) -> None:
        """Write the manifest, then COMMIT, on condition that nobody else has; then remove what it replaced."""
        self.write(_manifest.NAME, [manifest])
        shelf, path = self.shelf, self.shelf.bucket.path(self.name, COMMIT)
        body, replaced = _pointer(self.token, manifest), {_attempt_of(self.older)}
        shelf.own.add(self.token)
        shelf.store.do(lambda t: self._publish(t, path, body, replaced), self.deadline, path)
        self._unsure.clear()
        for attempt in replaced - {self.token}:
            shelf.forget(self.name, attempt, self.deadline)

    def _publish(self, this: Try, path: str, body: bytes, replaced: set[str | None]) -> None:
        """Try once: look which COMMIT there is, and put ours if it may be replaced."""
        try:
            found = self.shelf.bucket.look(path, this.limit_s)
        except FileNotFoundError:
            found = None
        attempt = _attempt_of(found)
        if found is not None and found[0] == body:
            return  # by a try whose answer was lost
        known = found is None or (self.older is not None and found[0] == self.older[0]) or attempt in self.shelf.own
        if not known:
            text = f"another run has committed this step meanwhile (attempt {attempt}); two runs save to one place"
            raise FileExistsError(errno.EEXIST, text)
        replaced.add(attempt)
        sent = object()
        self._unsure.add(sent)  # first this, then the checks: `discard` does it the other way round
        try:
            self._check()
            this.check()
        except OSError:
            self._unsure.discard(sent)
            raise
        try:
            self._put(path, body, found, this.limit_s)
        except Exception as error:
            if not passing(error):  # a refusal is an answer
                self._unsure.discard(sent)
            if isinstance(error, (FileExistsError, FileNotFoundError)):  # it is another by now: the next try looks
                raise OSError(errno.EAGAIN, f"{COMMIT} has just changed") from error
            raise

    def _put(self, path: str, body: bytes, found: tuple[bytes, Any] | None, limit_s: float) -> None:
        bucket, shelf = self.shelf.bucket, self.shelf
        if found is not None:
            bucket.replace(path, body, found[1], limit_s)
            return
        try:
            if shelf.conditional:
                bucket.create(path, body, limit_s)
                return
        except NotImplementedError:
            shelf.conditional = False
        bucket.put(path, body, limit_s)

    def discard(self) -> None:
        """Remove the attempt's files, unless a COMMIT that names them may have been written."""
        self._discarded = True
        if self._unsure:
            where = self.shelf.where(self.name)
            log.warning("checkpoint: %s: whether it was committed is not known; its files stay", where)
            return
        aside(self._remove, min(TIDY_S, self.deadline.left()))

    def _remove(self) -> None:
        store, deadline, path = self.shelf.store, Deadline(CLEAN_S), self.shelf.bucket.path(self.name, self.token)
        store.remove_below(path, deadline)
        store.abort_uploads(path, float("inf"), deadline)

    def _check(self) -> None:
        if self._discarded:
            raise OSError(errno.ECANCELED, "the save was given up", self.shelf.where(self.name))
