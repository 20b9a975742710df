"""Trying again what a store fails at for a moment, and giving up in time: no call here outlasts its deadline.

Each try runs in a thread of its own. One that does not come back (a connection that hangs) is left behind, and the
caller goes on: with the next try, or with a TimeoutError. What was left behind may still come to its end later, so
that a try which does several things asks `Try.check` before the one that counts.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import re
import threading
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

PATIENCE_S = 60.0  # for one try, and more for what is large: at least SLOWEST bytes come through in a second
SLOWEST = 2**18
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
RECENT = 4  # tries to find what must be there: some stores show a new object a moment late

_CODES: list[tuple[type[BaseException], int]] = [
    (FileNotFoundError, errno.ENOENT),
    (FileExistsError, errno.EEXIST),
    (PermissionError, errno.EACCES),
    (TimeoutError, errno.ETIMEDOUT),
    (NotImplementedError, errno.ENOSYS),
]
_LASTING = frozenset(
    {
        errno.ENOENT, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENAMETOOLONG,
        errno.EMSGSIZE, errno.EFBIG, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EDQUOT, errno.ECANCELED,
        getattr(errno, "EREMCHG", errno.EINVAL),  # another region
    }
)  # fmt: skip
# Libraries of stores have exceptions of their own; these names say that the network failed.
_NETWORK = {"HTTPClientError", "ConnectionError", "ClientPayloadError", "IncompleteRead", "ResponseParserError"}
_PASSING_CODES = {"IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "RequestTimeout"}
_PASSING_STATUS = {408, 409, 425, 429}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}
_SECRETS = [
    (re.compile(r"(\w://)[^/\s@]*@"), r"\1***@"),
    (
        re.compile(
            r"(?i)\b((?:[\w-]*(?:signature|token|secret|password|credential|accesskey|accountkey)|sig|key)=)[^&\s\"']+"
        ),
        r"\1***",
    ),
]
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_jitter = random.SystemRandom()


@attrs.frozen
class Deadline:
    """A moment after which nothing is tried any more."""

    seconds: float
    _end: float = attrs.field(init=False)

    @_end.default
    def _from_now(self) -> float:
        return time.monotonic() + self.seconds

    def left(self) -> float:
        """Return the seconds that are left."""
        return max(0.0, self._end - time.monotonic())


@attrs.frozen
class Try:
    """One try: how long it may take, and whether somebody still waits for it."""

    limit_s: float
    given_up: threading.Event = attrs.field(factory=threading.Event)

    def check(self) -> None:
        """Stop a try that nobody waits for any more.

        Raises:
            TimeoutError: it has been given up.
        """
        if self.given_up.is_set():
            raise TimeoutError(errno.ETIMEDOUT, "given up before its last part")


def persist(
    work: Callable[[Try], T],
    deadline: Deadline,
    where: str,
    *,
    size: int = 0,
    tries: int | None = None,
    missing: int = 1,
) -> T:
    """Return the result of `work`, trying again what fails for a moment.

    Args:
        work: one try; it may be called again, and beside an earlier one that hangs.
        deadline: when to give up.
        where: the object's URL, for the error.
        size: how many bytes are moved.
        tries: how many tries there are at most.
        missing: how many tries there are where the object is missing.

    Raises:
        OSError: it cannot succeed; TimeoutError if it did not before the deadline.
    """
    failure: OSError | None = None
    for count in itertools.count(1):
        pause = 0.0
        try:
            return _bounded(work, deadline, PATIENCE_S + size / SLOWEST)
        except Exception as error:  # noqa: BLE001 - a store's library raises what it likes
            if failure is None or not isinstance(error, TimeoutError) or deadline.left():
                failure = told(error, where)  # a try that the deadline cut short tells less than the one before it
            again = count < missing if isinstance(error, FileNotFoundError) else passing(error)
            if not again or count == tries:
                raise failure from None
            pause = min(FIRST_PAUSE_S * 2 ** (count - 1), LONGEST_PAUSE_S) * _jitter.uniform(0.5, 1)
            if deadline.left() <= pause:
                tries_made = "1 try" if count == 1 else f"{count} tries"
                text = f"no success within {deadline.seconds:g} s ({tries_made}); the last: {failure.strerror}"
                raise TimeoutError(errno.ETIMEDOUT, text, where) from None
        time.sleep(pause)
    raise AssertionError  # for type checkers: the loop has no end of its own


def _bounded(work: Callable[[Try], T], deadline: Deadline, patience_s: float) -> T:
    """Run one try in a thread, and wait for it no longer than allowed."""
    limit = min(deadline.left(), patience_s)
    if limit <= 0:
        raise TimeoutError(errno.ETIMEDOUT, f"no time is left of {deadline.seconds:g} s")
    this, done = Try(limit), threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work(this))
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="drivetrain-store", daemon=True).start()
    try:
        if not done.wait(limit):
            raise TimeoutError(errno.ETIMEDOUT, f"no answer within {limit:.3g} s")
    finally:
        this.given_up.set()
    if errors:
        raise errors[0]
    return results[0]


def aside(work: Callable[[], Any], wait_s: float) -> None:
    """Do what is not waited for longer than `wait_s`, such as cleaning up; its failure is nobody's."""

    def run() -> None:
        with contextlib.suppress(Exception):  # the next `prepare` clears what stays
            work()

    thread = threading.Thread(target=run, name="drivetrain-store", daemon=True)
    thread.start()
    thread.join(wait_s)


def passing(error: BaseException) -> bool:
    """Tell whether the same call may succeed in a moment."""
    code, status = service_code(error), _status(error)
    if code in _PASSING_CODES:
        return True
    if 400 <= status < 500:  # noqa: PLR2004 - HTTP: the request is at fault
        return status in _PASSING_STATUS
    if status >= 500:  # noqa: PLR2004 - HTTP: the service is at fault
        return status != HTTPStatus.NOT_IMPLEMENTED
    if isinstance(error, OSError):
        known = next((number for kind, number in _CODES if isinstance(error, kind)), error.errno)
        return known not in _LASTING
    return any(kind.__name__ in _NETWORK for kind in type(error).__mro__)


def _response(error: BaseException) -> Any:
    for found in (error, error.__cause__):
        response = getattr(found, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def service_code(error: BaseException) -> str:
    """Return the code that an S3 service gave its refusal, such as "PreconditionFailed", or ""."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException) -> int:
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status if isinstance(status, int) else 0


def told(error: BaseException, where: str) -> OSError:
    """Return the OSError that says what happened at `where`, without the secrets that an address or a text may hold."""
    number = next((number for kind, number in _CODES if isinstance(error, kind)), getattr(error, "errno", None))
    nothing = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    text = getattr(error, "strerror", None) or str(error) or nothing
    if type(error).__name__ in _NO_CREDENTIALS:
        number = errno.EACCES
    elif not isinstance(error, OSError):
        text = f"{type(error).__name__}: {text}"
    if number in (errno.EACCES, errno.EPERM):
        text = f"access denied: {text}; check the credentials, and what they allow"
    return OSError(number if isinstance(number, int) else errno.EIO, redacted(text), where)


def redacted(text: str) -> str:
    """Return a text without passwords in addresses, signatures, and the secrets in this process's environment."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    for name in _SECRET_VARIABLES:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return text
