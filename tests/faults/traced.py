"""A save under strace: real system calls that fail or end the process, one process for each point."""

from __future__ import annotations

import collections
import ctypes
import json
import os
import re
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING

import attrs
import small_saves

from drivetrain import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

CALLS = (
    "mkdir", "mkdirat", "openat", "write", "pwrite64", "fsync", "fdatasync", "close", "rename", "renameat", "renameat2",
    "unlink", "unlinkat", "rmdir", "getdents64", "statfs",
)  # fmt: skip
_ANY = ctypes.c_ulong(-1)  # PR_SET_PTRACER_ANY


@attrs.frozen
class Ended:
    """How a traced save ended."""

    status: int  # 0, or the signal's number with a minus
    error: str | None = None  # the text of a CheckpointError
    errno: int | None = None  # that of its cause
    calls: tuple[str, ...] = ()  # the traced calls, in order, that began


def save(parent: Path, step: int, log: Path, *inject: str, **options) -> Ended:
    """Save in a child that strace is attached to; `inject` are expressions such as "write:error=ENOSPC:when=3"."""
    return perform(lambda: small_saves.save(parent, step, **options), log, *inject)


def perform(work, log: Path, *inject: str) -> Ended:
    """Do some work in a traced child."""
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        _child(there, work)
    there.close()
    with here:
        tracer = _attach(child, log, inject)
        try:
            here.send(b"!")
            answer = here.recv(65536)  # nothing, if it was killed
        except ConnectionError:  # before it had read that it may begin
            answer = b""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tracer.stderr.close()
    tracer.wait(timeout=30)
    calls = tuple(re.findall(rf"^(?:\d+ +)?({'|'.join(CALLS)})\(", log.read_text(), re.MULTILINE))
    return Ended(status, **(json.loads(answer) if answer else {}), calls=calls)


def _child(end: socket.socket, work) -> None:
    status = 1
    try:
        ctypes.CDLL(None).prctl(0x59616D61, _ANY, 0, 0, 0)  # PR_SET_PTRACER: strace is no ancestor
        end.recv(1)
        report = {}
        try:
            work()
        except CheckpointError as error:
            report = {"error": str(error), "errno": getattr(error.__cause__, "errno", None)}
        end.send(json.dumps(report).encode())  # sendto(2), which nothing is injected into
        status = 0
    finally:
        os._exit(status)


def _attach(process: int, log: Path, inject):
    expressions = [part for expression in inject for part in ("-e", f"inject={expression}")]
    command = ["strace", "-f", "-o", str(log), "-e", f"trace={','.join(CALLS)}", *expressions, "-p", str(process)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    told = tracer.stderr.readline()
    if "attached" not in told:
        os.kill(process, 9)
        os.waitpid(process, 0)
        tracer.stderr.close()
        tracer.wait()
        raise PermissionError(told.strip())
    return tracer


def why_not(folder: Path) -> str:
    """Return why system calls cannot be injected here, or nothing."""
    if not shutil.which("strace"):
        return "strace is not installed"
    try:
        ended = perform(lambda: os.mkdir(folder / "not made"), folder / "log", "mkdir:signal=SIGKILL:when=1")  # noqa: PTH102
    except PermissionError as error:
        return f"strace is not permitted: {error}"
    return "" if ended.status == -9 and not (folder / "not made").exists() else f"strace injects nothing: {ended}"


def points(calls, name: str) -> range:
    """Return the numbers of a call, counted from 1."""
    return range(1, collections.Counter(calls)[name] + 1)
