"""Several ranks on one machine, over gloo: processes as they are in a real run."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import gc
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.context import ForkServerContext
    from multiprocessing.process import BaseProcess

GRACE_S = 3.0  # for the other ranks to end by themselves once one has failed


def run_ranks(
    function: Callable[..., Any], *arguments: Any, world_size: int = 2, timeout_s: float = 60, **options: Any
) -> list[Any]:
    """Call `function(*arguments, **options)` in each of `world_size` processes; return what they return, by rank.

    Args:
        function: of a module's top level; it finds `torch.distributed` initialised (gloo on the loopback).
        arguments: its arguments; they and what it returns must be picklable.
        world_size: number of processes.
        timeout_s: seconds for all of it, and for each collective.
        options: its keyword arguments.

    Raises:
        Exception: whatever the rank that failed first raised, with a note that has its rank and traceback.
        TimeoutError: not all ranks have ended in time; they are killed.
        RuntimeError: a rank died without an exception, or raised one that cannot be pickled.
    """
    context = _context()
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(prefix="drivetrain-ranks-") as folder:
        job = pickle.dumps(functools.partial(function, *arguments, **options))
        running: dict[connection.Connection, tuple[int, BaseProcess]] = {}
        for rank in range(world_size):
            here, there = context.Pipe(duplex=False)
            target_arguments = (job, rank, world_size, str(Path(folder) / "store"), timeout_s, there)
            process = context.Process(target=_rank, args=target_arguments, name=f"rank {rank}", daemon=False)
            process.start()
            there.close()
            running[here] = rank, process
        processes = [each for _, each in running.values()]
        try:
            reports = _gather(running, deadline)
        finally:
            for each in processes:
                if each.is_alive():
                    each.kill()
                each.join()
                each.close()
    failures = [report for report in reports.values() if "error" in report]
    if failures:
        _raise(min(failures, key=lambda report: report["when"]))
    if late := sorted(set(range(world_size)) - reports.keys()):
        raise TimeoutError(f"ranks {late} had not ended after {timeout_s} seconds and were killed")
    return [pickle.loads(reports[rank]["result"]) for rank in range(world_size)]  # noqa: S301 - our own child's


@functools.cache
def _context() -> ForkServerContext:
    """Return a server that has torch imported, so that a rank starts in milliseconds and inherits no threads.

    An optimizer imports torch._dynamo at its first step, which takes seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "drivetrain.testing.carriers"])
    return context


def _gather(running: Mapping[connection.Connection, tuple[int, BaseProcess]], deadline: float) -> dict[int, Any]:
    """Return the ranks' reports by rank; once one has failed the others get a moment to follow."""
    waiting, reports = dict(running), {}
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for end in ready:
            assert isinstance(end, connection.Connection)
            rank, process = waiting.pop(end)
            try:
                reports[rank] = pickle.loads(end.recv_bytes())  # noqa: S301 - our own child's
            except EOFError:
                process.join(GRACE_S)
                what = f"rank {rank} died without an exception (exit code {process.exitcode})"
                # No rank but a dead one could tell when it died; others' lost connections follow from it.
                reports[rank] = {"error": None, "what": what, "text": "", "rank": rank, "when": 0.0}
            end.close()
            if "error" in reports[rank]:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    for end in waiting:
        end.close()
    return reports


def _raise(report: dict[str, Any]) -> None:
    note = f"rank {report['rank']} failed first:\n{report['text']}"
    error: BaseException | None = None
    if report["error"] is not None:
        with contextlib.suppress(Exception):  # an exception may be picklable and yet not come back
            error = pickle.loads(report["error"])  # noqa: S301 - our own child's
    error = RuntimeError(report["what"]) if error is None else error
    error.add_note(note)
    raise error


def _loopback() -> str | None:
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def _rank(  # noqa: PLR0917 - a process takes them by position
    job: bytes, rank: int, world_size: int, store: str, timeout_s: float, reply: connection.Connection
) -> None:
    """Be one rank, and leave without running exit handlers: gloo's threads may abort the process there."""
    torch.set_num_threads(1)
    if name := _loopback():
        os.environ["GLOO_SOCKET_IFNAME"] = name
    status = 0
    report: dict[str, Any]
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=dt.timedelta(seconds=timeout_s),
        )
        report = {"result": pickle.dumps(pickle.loads(job)())}  # noqa: S301 - from the test
        gc.collect()  # drops models that hold on to the group, before it goes
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException as error:  # noqa: BLE001 - reported to the parent
        status, when = 1, time.monotonic()
        report = {"error": _pickled(error), "what": f"{type(error).__name__}: {error}", "when": when, "rank": rank}
        report["text"] = "".join(traceback.format_exception(error))
    reply.send_bytes(pickle.dumps(report))
    reply.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _pickled(error: BaseException) -> bytes | None:
    try:
        return pickle.dumps(error)
    except Exception:  # noqa: BLE001 - it may hold anything
        return None
