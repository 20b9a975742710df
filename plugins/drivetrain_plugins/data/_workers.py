"""Worker processes that make batches: started once, asked ahead, answered in order, missed within seconds.

Each worker has a pipe of its own either way, on which only fixed small records travel, so that neither side can be
stuck inside a write or a read; what the records announce lies in mailboxes. While the loop waits for an answer it
watches the worker's process too. No signal handler is involved: an error is raised where the loop asks for a batch.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import itertools
import multiprocessing
import multiprocessing.util
import os
import select
import signal
import struct
import time
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import ConfigError, DrivetrainError, Micro, Problem, TrainingError
from drivetrain_plugins.data._mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from drivetrain import Streamed
    from drivetrain.data import Fetch

RECORD = struct.Struct("<qqq")  # number of the mailbox, bytes of the frame, arrays
LEAVE = RECORD.pack(-1, 0, 0)
LOOK_S = 0.2  # how often to look after a process that is waited for, in case its end was not signalled
GRACE_S = 2.0  # for workers to leave by themselves
SHOWN = 32  # row numbers in a message
# A terminal, a scheduler or torchrun sends these to every process of a group; what they mean is the loop's to decide.
OF_A_GROUP = [getattr(signal, f"SIG{name}") for name in ("TERM", "HUP", "QUIT", "USR1", "USR2")]


@attrs.frozen
class How:
    """The options of the plugin that its workers need."""

    workers: int
    prefetch: int
    timeout_s: float
    pinned: bool
    start_method: str | None


@attrs.frozen
class Request:
    """What a worker makes a batch of: arguments of its maker, and for messages the row numbers, or a range to read."""

    arguments: Any
    rows: Any


# --- in a worker ---------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Job:
    """What a worker process is started with."""

    fetch: Fetch
    stream: Streamed | None
    tasks: Connection
    results: Connection
    mailboxes: tuple[Mailbox, ...]


def work(job: Job) -> None:
    """Answer requests until told to leave, or until the process that asks is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in OF_A_GROUP:  # not SIG_IGN, which programs that a dataset starts would inherit
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, *OF_A_GROUP})
    gc.freeze()  # what a fork inherited is not this process's to finalise
    torch.set_num_threads(1)
    parent, ready = os.getppid(), select.poll()
    ready.register(job.tasks.fileno(), select.POLLIN)
    maker = _Maker(job)
    while True:
        while not ready.poll(1000):
            if os.getppid() != parent:
                return
        record = os.read(job.tasks.fileno(), RECORD.size)
        number, frame, arrays = RECORD.unpack(record) if record else (-1, 0, 0)
        if number < 0:
            return
        mailbox = job.mailboxes[number]
        try:
            written = mailbox.put(maker.answer(mailbox.get(frame, arrays)))
        except BaseException as error:  # noqa: BLE001 - SystemExit and the like too; the loop's process raises it
            written = mailbox.put(("error", type(error), str(error), traceback.format_exc()))
        with contextlib.suppress(BrokenPipeError):
            os.write(job.results.fileno(), RECORD.pack(number, *written))


class _Maker:
    """Batches by request: of row numbers, or the next one of this worker's part of a stream."""

    def __init__(self, job: Job) -> None:
        self._fetch, self._stream = job.fetch, job.stream
        self._opened: Iterator[Micro] = iter(())

    def answer(self, arguments: Any) -> Any:
        if self._stream is None:
            rows, epoch, position = arguments
            micro: Micro | None = self._fetch(torch.from_numpy(rows), epoch, position)
        else:
            if arguments is not None:
                self._opened = self._stream.iterate(*arguments)
            micro = next(self._opened, None)
        if micro is None:
            return ("end",)
        return "micro", micro.batch, micro.num_rows, micro.num_items, tuple(micro.bad), micro.position, micro.ends


# --- in the loop's process -----------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Worker:
    """One worker process as the loop sees it."""

    number: int
    process: BaseProcess
    tasks: Connection
    results: Connection
    mailboxes: tuple[Mailbox, ...]
    ready: select.poll
    asked: int = 0
    owed: collections.deque[Any] = attrs.field(factory=collections.deque)  # rows of each open request, oldest first


class Crew:
    """The workers of one split, for one iteration at a time."""

    def __init__(self, fetch: Fetch, streams: list[Streamed] | None, how: How) -> None:
        """Start the processes.

        Args:
            fetch: makes a batch of row numbers.
            streams: each worker's part, where the data is a stream.
            how: how many, and how long to wait for them.

        Raises:
            ConfigError: a process cannot be started.
        """
        self._split, self._how, self._owner = fetch.split, how, os.getpid()
        self._workers: list[_Worker] = []
        self.busy = False
        # Before multiprocessing sends its daemons SIGTERM at exit, which these do not obey, and waits for them.
        multiprocessing.util.Finalize(self, _close_open, (weakref.ref(self),), exitpriority=10)
        try:
            for number in range(how.workers):
                self._start(number, fetch, streams[number] if streams else None)
        except Exception as error:
            self.close()
            what = f"loader: worker {number} of {how.workers} of the {self._split} data cannot be started"
            do = "take fewer workers; with start_method 'spawn' or 'forkserver', give data and collator that pickle"
            received = f"{type(error).__name__}: {error}; start_method={how.start_method!r}"
            raise ConfigError([Problem(what, received, do)]) from error
        except BaseException:
            self.close()
            raise

    def _start(self, number: int, fetch: Fetch, stream: Streamed | None) -> None:
        context: Any = multiprocessing.get_context(self._how.start_method)
        mailboxes = tuple(Mailbox() for _ in range(self._how.prefetch))
        their_tasks, tasks = context.Pipe(duplex=False)
        results, their_results = context.Pipe(duplex=False)
        job = Job(fetch, stream, their_tasks, their_results, mailboxes)
        name = f"drivetrain loader, {self._split} {number}"
        process = context.Process(target=work, args=(job,), name=name, daemon=True)
        try:
            with _held(context.get_start_method()):
                process.start()
        except BaseException:
            _close(tasks, results, *mailboxes)
            raise
        finally:
            their_tasks.close()
            their_results.close()
        ready = select.poll()
        ready.register(results.fileno(), select.POLLIN)
        ready.register(process.sentinel, select.POLLIN)
        self._workers.append(_Worker(number, process, tasks, results, mailboxes, ready))

    def close(self) -> None:
        """Let the workers leave, kill those that do not, and give everything back."""
        workers, self._workers = self._workers, []
        if os.getpid() != self._owner:  # a fork of the process that started them
            return
        for worker in workers:
            with contextlib.suppress(OSError):
                os.write(worker.tasks.fileno(), LEAVE)
        until = time.monotonic() + GRACE_S
        for worker in workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.process.close()
            _close(worker.tasks, worker.results, *worker.mailboxes)

    @property
    def closed(self) -> bool:
        """Tell whether there are no workers any more."""
        return not self._workers

    def micros(self, requests: Iterable[Request]) -> Iterator[Micro]:
        """Yield the batches of `requests`, in order; the workers are asked `prefetch` requests ahead."""
        workers, asked = self._workers, iter(requests)
        for worker in workers:
            while worker.owed:  # answers that an iteration ended early did not take
                self._answer(worker)
        waiting: collections.deque[_Worker] = collections.deque()
        turns = itertools.cycle(workers)
        for request in itertools.islice(asked, len(workers) * self._how.prefetch):
            self._ask(worker := next(turns), request)
            waiting.append(worker)
        while waiting:
            worker = waiting.popleft()
            kind, *answer = self._answer(worker)
            if kind == "error":
                self._told(worker, *answer)
            if kind == "end":
                return
            following = next(asked, None)
            if following is not None:
                self._ask(worker, following)
                waiting.append(worker)
            batch, rows, items, bad, position, ends = answer[:6]
            yield Micro(batch, rows, items, bad=bad, position=position, ends=ends)

    def _ask(self, worker: _Worker, request: Request) -> None:
        number = worker.asked % len(worker.mailboxes)
        worker.asked += 1
        worker.owed.append(request.rows)
        written = worker.mailboxes[number].put(request.arguments)
        try:
            os.write(worker.tasks.fileno(), RECORD.pack(number, *written))
        except BrokenPipeError:
            self._lost(worker)

    def _answer(self, worker: _Worker) -> Any:
        """Return the answer to the worker's oldest open request; `answer[-1]` of an error are its rows."""
        source, waited = worker.results.fileno(), time.monotonic()
        while True:
            events = dict(worker.ready.poll(int(LOOK_S * 1000)))
            dead = not events.get(source, 0) and (bool(events) or worker.process.exitcode is not None)
            if dead:  # it may have answered between the two looks
                events = dict(worker.ready.poll(0))
            if events.get(source, 0):
                break
            if dead:
                self._lost(worker)
            if self._how.timeout_s and time.monotonic() - waited > self._how.timeout_s:
                self._lost(worker, hung=True)
        record = os.read(source, RECORD.size)
        if not record:
            self._lost(worker)
        number, frame, arrays = RECORD.unpack(record)
        answer = worker.mailboxes[number].get(frame, arrays, pinned=self._how.pinned)
        return (*answer, worker.owed.popleft())

    def _told(self, worker: _Worker, kind: type[BaseException], text: str, trace: str, rows: Any) -> None:
        """Raise what a worker raised."""
        where = f"{self._who(worker)}, {_doing(rows)}"
        if issubclass(kind, DrivetrainError):
            error: DrivetrainError = kind(text)
            error.add_note(f"in {where}")
        else:
            error = TrainingError(f"loader: {where}, raised {kind.__name__}: {text}")
        error.add_note(f"there:\n{trace}")
        raise error

    def _lost(self, worker: _Worker, *, hung: bool = False) -> None:
        """Raise what became of a worker that does not answer; the others end, too."""
        how, process = self._how, worker.process
        who, doing = self._who(worker), _doing(worker.owed[0])
        if hung:
            what, do = f"gave nothing for {how.timeout_s:g} seconds", "A slow one needs a larger timeout_s"
            process.kill()
        else:
            process.join(GRACE_S)
            code = process.exitcode
            do = "A killed one has often run out of memory: take fewer workers or a smaller prefetch"
            if code is not None and code < 0:
                what = f"was killed by {signal.Signals(-code).name}"
            else:
                what = f"ended with exit code {code}"
                do = "Its own output says why; a script needs `if __name__ == '__main__':` where processes are spawned"
        self.close()
        raise TrainingError(
            f"loader: {who} {what}, {doing}. {do}. "
            f"Received: workers={how.workers}, prefetch={how.prefetch}, timeout_s={how.timeout_s:g}"
        )

    def _who(self, worker: _Worker) -> str:
        return f"worker {worker.number} (pid {worker.process.pid}) of the {self._split} data"


@contextlib.contextmanager
def _held(start_method: str) -> Iterator[None]:
    """Hold signals back from a process while it is started; one of a fork server inherits nothing from this one."""
    numbers = () if start_method == "forkserver" else (signal.SIGINT, *OF_A_GROUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _close_open(crew: weakref.ref[Crew]) -> None:
    if (still := crew()) is not None:
        still.close()


def _close(*ends: Connection | Mailbox) -> None:
    for end in ends:
        end.close()


def _doing(rows: Any) -> str:
    if isinstance(rows, range):
        return f"reading rows {rows.start} to {rows.stop - 1}"
    numbers = [int(row) for row in rows[:SHOWN]]
    return f"making the batch of rows [{', '.join(map(str, numbers))}{', ...' if len(rows) > SHOWN else ''}]"


@attrs.define(eq=False)
class Crews:
    """The workers of a loader: kept between iterations while a run is being fitted, else ended with each."""

    fetch: Fetch
    streams: list[Streamed] | None
    how: How
    keep: bool = False
    kept: Crew | None = None

    def micros(self, requests: Iterable[Request]) -> Iterator[Micro]:
        """Yield the batches of `requests`; an iteration within another has workers of its own."""
        crew = self.kept
        if crew is None or crew.busy or crew.closed:
            crew = Crew(self.fetch, self.streams, self.how)
            if self.keep and (self.kept is None or self.kept.closed):
                self.kept = crew
        crew.busy = True
        try:
            yield from crew.micros(requests)
        finally:
            crew.busy = False
            if crew is not self.kept:
                crew.close()

    def end(self) -> None:
        """End the kept workers."""
        self.keep, crew = False, self.kept
        self.kept = None
        if crew is not None:
            crew.close()
