"""One owner for a run's folder: the file `run.lock` says who, and a heartbeat says that it lives.

An owner that this machine can ask about is dead when its process is: a restart after a kill goes on at once. One on
another machine, or in another container, is dead when its heartbeat is old by the file system's own clock.

No lock is ever absent or half written while it changes hands. A lock file is written under another name and linked into
place. Who removes or replaces one with content C makes the file `.run.lock-HASH(C)` first, which one process can, looks
again, and then renames that file over the old one. Such a claim is a lock file itself: one whose owner died is taken
over in the same way.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import stat
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from drivetrain import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("drivetrain")
NAME = "run.lock"
MAX_BYTES = 4096
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_OURS = re.compile(rf"\.{re.escape(NAME)}-[0-9a-f]{{32}}")  # claims, and lock files that are not in place yet
_held: set[str] = set()  # the tokens of this process: other threads' locks are not left over from a program before


@attrs.frozen
class Owner:
    """Who holds a lock."""

    host: str
    machine: str  # where a process number means the same: the boot, and the namespace of such numbers
    pid: int
    started: int | None  # clock ticks after boot, which no second process of this number shares
    since: str
    token: str

    @classmethod
    def here(cls) -> Owner:
        """Return this process as an owner."""
        pid, now = os.getpid(), dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), _machine(), pid, _process(pid)[1], now, secrets.token_hex(16))

    @classmethod
    def parse(cls, raw: bytes) -> Owner | None:
        """Return the owner that a lock file names, or None if it is not one that we wrote."""
        try:
            owner = cls(**json.loads(raw if len(raw) <= MAX_BYTES else b""))
        except (ValueError, TypeError, RecursionError):
            return None
        texts = all(type(text) is str for text in (owner.host, owner.machine, owner.since, owner.token))
        numbers = type(owner.pid) is int and 0 < owner.pid < 2**31 and type(owner.started) in (int, type(None))
        return owner if texts and numbers else None

    def dump(self) -> bytes:
        """Return the content of the lock file."""
        return json.dumps(attrs.asdict(self), indent=1).encode() + b"\n"

    def lives(self) -> bool | None:
        """Tell whether the process runs, or None if this machine cannot know."""
        if (self.host, self.machine) != (socket.gethostname(), _machine()):
            return None
        if self.pid == os.getpid():  # ours, or left behind by what this process was before an exec
            return self.token in _held
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        state, started = _process(self.pid)
        if started is None or self.started is None:
            return None
        return started == self.started and state not in ("Z", "X")  # a zombie has only not been waited for

    def __str__(self) -> str:
        """Name the process."""
        return f"process {self.pid} on {self.host!r} since {self.since}"


@attrs.frozen
class _Found:
    """A lock file as it was read."""

    raw: bytes
    modified: float  # by the file system's clock

    def judge(self, now: float, stale_s: float) -> tuple[bool, str]:
        """Tell whether its owner is gone, and describe it."""
        owner, age = Owner.parse(self.raw), now - self.modified
        lives = owner.lives() if owner else None
        told = f"{owner or f'{len(self.raw)} bytes that name nobody'}, last sign of life {max(age, 0):.0f} s ago"
        if lives is None:  # from the future, too: the clock was set back, and nobody has written since
            return abs(age) > stale_s, f"{told}; from here it is taken for dead after {stale_s:.0f} s without one"
        return not lives, f"{told}; it {'runs' if lives else 'has ended'}"


@attrs.define(eq=False)
class RunLock:
    """Holds `folder` for this process, from `acquire` to `release`.

    Args:
        folder: an existing folder.
        beat_s: seconds between two signs of life.
        stale_s: seconds without one after which an owner elsewhere is taken for dead.
    """

    folder: Path = attrs.field(converter=Path)
    beat_s: float = attrs.field(default=10.0, kw_only=True)
    stale_s: float = attrs.field(default=60.0, kw_only=True)
    lost: bool = attrs.field(default=False, init=False)  # somebody else has taken the folder
    _owner: Owner | None = attrs.field(default=None, init=False)
    _ended: threading.Event = attrs.field(factory=threading.Event, init=False)
    _thread: threading.Thread | None = attrs.field(default=None, init=False)

    @property
    def path(self) -> Path:
        """The lock file."""
        return self.folder / NAME

    def acquire(self) -> None:
        """Take the folder, from a dead owner too, and begin to give signs of life.

        Raises:
            CheckpointError: it belongs to somebody who lives, or cannot be written to.
        """
        owner = Owner.here()
        _held.add(owner.token)  # before anyone can see it
        try:
            with _failing(self.path), self._written(owner) as written:
                self._place(written, self.path)
                self._sweep(written)
            ended = threading.Event()
            thread = threading.Thread(target=self._beats, args=(ended,), name="drivetrain-run-lock", daemon=True)
            self._owner, self._ended, self._thread, self.lost = owner, ended, thread, False
            thread.start()
        except BaseException:
            self._owner = self._thread = None
            self._remove(owner)
            raise

    def release(self) -> None:
        """Give the folder up, if it is ours; a process that was forked from the owner does nothing."""
        owner, thread = self._owner, self._thread
        if owner is None or thread is None or owner.pid != os.getpid():
            return
        self._ended.set()
        thread.join()
        self._owner = self._thread = None
        self._remove(owner)

    def beat(self) -> None:
        """Give a sign of life, or find that the folder is `lost`; for the thread, and for who is about to write."""
        owner = self._owner
        if owner is None or owner.pid != os.getpid() or self.lost:
            return
        found = _read(self.path)
        if found is None:  # removed by hand: nobody has it yet
            log.warning("checkpoint: %s was removed while its owner runs; it is written again", self.path)
            with self._written(owner) as written:
                _link(written, self.path)
            found = _read(self.path)
        if found is not None and found.raw != owner.dump():
            self.lost = True
            log.error("checkpoint: %s was taken from this run by %s", self.path, Owner.parse(found.raw) or "somebody")
        else:
            os.utime(self.path, follow_symlinks=False)

    def _beats(self, ended: threading.Event) -> None:
        complained = False
        while not self.lost and not ended.wait(self.beat_s):
            try:
                self.beat()
                complained = False
            except (OSError, CheckpointError) as error:
                if not complained:
                    log.warning("checkpoint: no sign of life could be given in %s: %s", self.path, error)
                complained = True

    # --- giving up -----------------------------------------------------------------------------------------------

    def _remove(self, owner: Owner) -> None:
        """Remove the lock file if it is the owner's."""
        raw = owner.dump()
        claim = self._claim(raw)
        try:
            if not _is(self.path, raw):
                return
            with self._written(attrs.evolve(owner, since="its end")) as written:
                if not _link(written, claim):  # it is just being taken
                    return
                try:
                    if _is(self.path, raw):
                        self.path.unlink()
                finally:
                    claim.unlink(missing_ok=True)
        except (OSError, CheckpointError) as error:
            log.warning("checkpoint: %s could not be removed: %s", self.path, error)
        finally:
            _held.discard(owner.token)

    # --- taking --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _written(self, owner: Owner) -> Iterator[Path]:
        """Give a complete lock file under a name of its own."""
        path = self.path.with_name(f".{NAME}-{secrets.token_hex(16)}")
        try:
            _create(path, owner.dump())
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _claim(self, raw: bytes) -> Path:
        return self.path.with_name(f".{NAME}-{hashlib.sha256(raw).hexdigest()[:32]}")

    def _place(self, written: Path, path: Path) -> None:
        """Make `path` the file `written`, where there is none or a stale one."""
        own = written.read_bytes()
        while not _link(written, path):
            found = _read(path)
            if found is None:  # gone meanwhile
                continue
            if found.raw == own:  # the link was made, and its answer lost; or the rename below
                return
            self._judge(written, found)
            claim = self._claim(found.raw)
            if claim == path:
                raise _no_file(path, f"a copy of {NAME}")
            self._place(written, claim)
            try:
                again = _read(path)
                if again is not None and again.raw == found.raw:
                    told = self._judge(written, again)
                    log.warning("checkpoint: %s is left over and was taken over: %s", path, told)
                    with contextlib.suppress(FileNotFoundError):  # somebody took our claim for stale
                        claim.rename(path)
            finally:
                claim.unlink(missing_ok=True)

    def _judge(self, written: Path, found: _Found) -> str:
        """Describe a stale lock; refuse one that is not."""
        os.utime(written)
        stale, told = found.judge(written.stat().st_mtime, self.stale_s)
        if stale:
            return told
        do = "Wait for its end, stop it, or choose another output folder"
        what = f"the run's folder {self.folder} belongs to another run"
        raise CheckpointError(f"{what}. {do}. Received: {self.path} of {told}")

    def _sweep(self, written: Path) -> None:
        """Remove claims and files that dead processes left: of locks that are gone, so nobody waits for them."""
        now = written.stat().st_mtime
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                if _OURS.fullmatch(path.name) and path != written:
                    with contextlib.suppress(OSError, CheckpointError):
                        found = _read(path)
                        if found is not None and found.judge(now, self.stale_s)[0]:
                            path.unlink()


@contextlib.contextmanager
def _failing(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one that says what to do."""
    try:
        yield
    except OSError as error:
        what = f"the run's folder cannot be taken: {error.strerror or error} ({error.filename or path})"
        raise CheckpointError(f"{what}. Make {path.parent} writable, or choose another output folder") from error


def _machine() -> str:
    """Return the boot and the namespace in which a process number means the same; elsewhere the network's address."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except (OSError, ValueError):
        return f"{uuid.getnode():012x}"


def _process(pid: int) -> tuple[str, int | None]:
    """Return the state of a process (a letter) and when it was started, or None where the system does not tell."""
    try:
        if Path("/proc/self").readlink().name != str(os.getpid()):  # it shows the processes of another namespace
            return "", None
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, ValueError, IndexError):
        return "", None


def _create(path: Path, raw: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        if os.write(handle, raw) < len(raw):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(handle)


def _link(source: Path, target: Path) -> bool:
    """Give `source` a second name, and tell whether it was free."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:  # a file system without links: the content comes a moment after the name
            _create(target, source.read_bytes())
        except FileExistsError:
            return False
    return True


def _read(path: Path) -> _Found | None:
    """Return a lock file's content and its last sign of life, or None if there is none.

    Raises:
        CheckpointError: it is no file.
        OSError: it cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _no_file(path, "a symbolic link") from None
        raise
    try:  # about what was opened: a network file system looks anew when it opens
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise _no_file(path, f"no regular file (mode {about.st_mode:o})")
        return _Found(os.read(handle, MAX_BYTES + 1), about.st_mtime)
    finally:
        os.close(handle)


def _is(path: Path, raw: bytes) -> bool:
    found = _read(path)
    return found is not None and found.raw == raw


def _no_file(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} must be a file that a run wrote. Remove it. Received: {what}")
