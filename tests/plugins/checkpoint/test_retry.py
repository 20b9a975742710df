"""Trying again, giving up in time, and telling of it without secrets."""

from __future__ import annotations

import errno
import itertools
import threading
import time

import pytest

from drivetrain_plugins.checkpoint import _retry
from drivetrain_plugins.checkpoint._retry import Deadline, persist, redacted, told


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """Begin with a pause of 10 ms."""
    monkeypatch.setattr(_retry, "FIRST_PAUSE_S", 0.01)


def test_pauses_grow_and_end_with_the_deadline(monkeypatch):
    """Tries come fast at first, then more slowly, and stop in time; the last failure is told."""
    moments = []

    def work(this):
        moments.append(time.monotonic())
        raise OSError(errno.EBUSY, "Slow down")

    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no success within 1 s \(\d tries\); the last: Slow down") as caught:
        persist(work, Deadline(1.0), "store://x")
    assert time.monotonic() - start < 1.1
    assert caught.value.filename == "store://x"
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    assert 5 <= len(moments) <= 9
    assert gaps[-1] > 3 * gaps[0]


def test_nothing_is_tried_after_the_deadline():
    """What comes when no time is left fails without a try."""
    with pytest.raises(TimeoutError, match="no time is left of 0 s"):
        persist(lambda this: pytest.fail("was tried"), Deadline(0.0), "store://x")


def test_a_try_that_was_given_up_can_tell():
    """A try that hung learns that nobody waits for it, before its next part."""
    release, learnt = threading.Event(), []

    def work(this):
        release.wait(10)
        try:
            this.check()
        except TimeoutError as error:
            learnt.append(error)

    with pytest.raises(TimeoutError):
        persist(work, Deadline(0.1), "store://x")
    threads = [t for t in threading.enumerate() if t.name == "drivetrain-store"]
    release.set()
    for thread in threads:
        thread.join(5)
    assert len(learnt) == 1


@pytest.mark.parametrize(
    ("status", "code", "again"),
    [(503, "SlowDown", True), (500, "?", True), (429, "?", True), (409, "ConditionalRequestConflict", True),
     (400, "BadDigest", True), (400, "?", False), (403, "RequestTimeTooSkewed", False), (404, "NoSuchBucket", False)],
)  # fmt: skip
def test_answers_of_services_are_understood(status, code, again):
    """Which refusals of an HTTP service may pass is read from its status and code, however the library wrapped them."""
    inner = RuntimeError()
    inner.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    outer = OSError(errno.EIO, "wrapped")
    outer.__cause__ = inner
    assert _retry.passing(inner) is again
    assert _retry.passing(outer) is again


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ftp://user:pw@host/x", "ftp://***@host/x"),
        ("az://c/x?sig=abc&se=1", "az://c/x?sig=***&se=1"),
        ("http://h/?X-Amz-Signature=abc&X-Amz-Security-Token=d e", "http://h/?X-Amz-Signature=***&X-Amz-Security-Token=*** e"),
        ("AccountKey=abc", "AccountKey=***"),
        ("s3://bucket/monkey=1/a@b", "s3://bucket/monkey=1/a@b"),
        ("it is in canary", "it is in ***"),
    ],
)  # fmt: skip
def test_secrets_are_hidden(monkeypatch, text, shown):
    """Passwords, signatures and this process's own keys are replaced in what is told, other text is not."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    assert redacted(text) == shown
    assert told(RuntimeError(text), "x").strerror == f"RuntimeError: {shown}"
