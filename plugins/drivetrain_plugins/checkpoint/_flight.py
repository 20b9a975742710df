"""Work that goes on beside the training: in a thread, or in a forked child that sees memory as it was at the fork."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import signal
import sys
import threading
import warnings
from typing import TYPE_CHECKING, NoReturn, Protocol

import attrs

from drivetrain import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("drivetrain")
# They are meant for the run, which waits for its child.
_IGNORED = [getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2")]
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_LONGEST = 30_000  # bytes of a report: less than a pipe holds, so that the child never waits for its reader


@attrs.frozen
class Outcome:
    """How work ended: with an error's text, or without."""

    error: str | None = None


class Flight(Protocol):
    """Work under way."""

    def poll(self, *, wait: bool) -> Outcome | None:
        """Return how it ended, or None if it has not and `wait` is false."""


class ThreadFlight:
    """Work in a thread of this process; what it reads must not change meanwhile."""

    def __init__(self, work: Callable[[], None]) -> None:
        """Start it."""
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="drivetrain-checkpoint")
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the run must hear of it
            self._error = _told(error)

    def poll(self, *, wait: bool) -> Outcome | None:
        """Join the thread, or look whether it lives."""
        if wait:
            self._thread.join()
        return None if self._thread.is_alive() else Outcome(self._error)


class ForkFlight:
    """Work in a forked child, whose memory is a copy-on-write image of this process.

    The child runs Python, hashing and system calls only: no torch operation, whose thread pool did not survive the
    fork, and no destructor. What it logs is logged by this process when it has ended.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        """Start it.

        Raises:
            CheckpointError: the system gives no process.
        """
        self._report, end = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)  # none may reach the child before it ignores them
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: see above
                self._child = os.fork()
        except OSError as error:
            os.close(self._report)
            os.close(end)
            raise CheckpointError(f"no process could be forked to write the checkpoint: {error.strerror}") from error
        finally:
            if os.getpid() == parent:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self._child == 0:
            _child(work, end, parent)
        os.close(end)

    def poll(self, *, wait: bool) -> Outcome | None:
        """Reap the child."""
        child, status = os.waitpid(self._child, 0 if wait else os.WNOHANG)
        if child == 0:
            return None
        with os.fdopen(self._report, "rb") as file:
            raw = file.read()
        code = os.waitstatus_to_exitcode(status)
        if code or not raw:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            return Outcome(f"the process that wrote the checkpoint {how}")
        report = json.loads(raw)
        for level, message in report["logged"]:
            log.log(level, "%s", message)
        return Outcome(report["error"])


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append((record.levelno, record.getMessage()[:2000]))


def _die_with(parent: int) -> None:
    """Let this process end when its parent does: the run's next start must find nobody who still writes or removes."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _child(work: Callable[[], None], report: int, parent: int) -> NoReturn:
    code = 1
    try:
        _die_with(parent)
        gc.disable()  # nothing of the parent's is to be finalized here, and no page copied for a count
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
        collector = _Collector()
        log.handlers, log.propagate = [collector], False
        error = None
        try:
            work()
        except Exception as problem:  # noqa: BLE001 - whatever it is, the run must hear of it
            error = _told(problem)
        messages, told = collector.messages, {"error": error and error[: _LONGEST // 4]}
        text = json.dumps({**told, "logged": messages})
        while len(text) > _LONGEST and messages:
            messages.pop()
            text = json.dumps({**told, "logged": messages})
        os.write(report, text.encode())
        code = 0
    finally:
        os._exit(code)  # whatever happens, this process must not go on with the training


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
