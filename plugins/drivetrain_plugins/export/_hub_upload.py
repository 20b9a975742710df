"""Uploads in a thread: files as they are when they are handed over, in commits that are tried again."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections import deque
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import ConfigError, Problem, require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

log = logging.getLogger("drivetrain")
# What a run writes about itself, paths of the machine among it: only a pattern that is exactly such a name takes it.
ABOUT_THE_RUN = {"recipe.json", "plan.json"}
MAX_PENDING, FIRST_WAIT_S, LONGEST_WAIT_S = 4, 1.0, 30.0
REFUSED = {400, 401, 403, 404, 413, 422}  # asking again gets the same answer


def is_allowed(file: Path, inside: str, patterns: Sequence[str]) -> bool:
    """Tell whether `file` matches one of `patterns` by name or by its path `inside` a folder; links never do."""
    name = file.name
    if name.startswith(".") or file.is_symlink() or not file.is_file():
        return False
    asked = any(p in (name, inside) for p in patterns)
    return asked or (
        name not in ABOUT_THE_RUN and any(fnmatchcase(name, p) or fnmatchcase(inside, p) for p in patterns)
    )


def allowed(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Return the files of a folder that match one of `patterns`; links are not followed, hidden folders left out."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not Path(where, n).is_symlink())
        for file in (Path(where, name) for name in sorted(files)):
            inside = file.relative_to(folder).as_posix()
            if is_allowed(file, inside, patterns):
                found.append(inside)
    return found


@attrs.define
class Job:
    """One commit: the files of `folder`, which is the job's own, to go under `prefix` in the repository."""

    name: str
    folder: Path
    prefix: str = ""
    newest: bool = False  # one of this name that still waits gives way to it
    only: bool = False  # what else is under `prefix` goes
    message: str = ""


def hold(files: Mapping[str, Path], folder: Path) -> Path:
    """Copy files as they are now; what removes or replaces them leaves these.

    Hard links would be cheaper, but a checkpoint whose files have other names too is not taken for valid.
    """
    for inside, file in files.items():
        place = folder / inside
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    return folder


def told(error: BaseException) -> str:
    """Return an error of the library, and the one it was raised from, as one line."""
    causes = [error] if error.__cause__ is None else [error, error.__cause__]
    return " from ".join(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}" for e in causes)


def status_of(error: BaseException) -> int | None:
    """Return the status of the answer that an error, or what it was raised from, is about."""
    for each in (error, error.__cause__):
        status = getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


@attrs.define(eq=False)
class Repository:
    """One repository of a hub, through `huggingface_hub`."""

    api: Any = attrs.field(repr=False)  # it holds the token
    name: str
    revision: str | None = None
    private: bool | None = None
    create: bool = True
    _ready: bool = False

    def prepare(self) -> None:
        """Make the repository and the branch unless they are there, or see that they are."""
        if self._ready:
            return
        if self.create:
            self.name = self.api.create_repo(self.name, private=self.private, exist_ok=True).repo_id
            if self.revision is not None:
                self.api.create_branch(self.name, branch=self.revision, exist_ok=True)
        else:
            self.api.model_info(self.name, revision=self.revision)
        self._ready = True

    def check(self, seconds: float) -> None:
        """Find out whether uploads can work.

        Raises:
            ConfigError: there is no network, the token is wrong, or the repository cannot be written to.
        """
        answer: list[BaseException | str | None] = []
        thread = threading.Thread(target=lambda: answer.append(self._asked()), daemon=True)
        thread.start()
        thread.join(seconds)
        wrong = answer[0] if answer else f"no answer within {seconds:g} s"
        if wrong is None:
            return
        do = {
            401: 'give a valid token: token = "env:HF_TOKEN" in a recipe, or `hf auth login`',
            403: "use a token that may write to this repository, or another repository",
            404: "create the repository, set create = true, or correct its name",
        }
        known = status_of(wrong) if isinstance(wrong, BaseException) else None
        otherwise = "see that the network, `endpoint` and the token are right; check = false trains without this test"
        mend = do.get(known or 0, otherwise)
        text = wrong if isinstance(wrong, str) else told(wrong)
        raise ConfigError([Problem(f"hub: {self.name} at {self.api.endpoint} cannot be uploaded to", text, mend)])

    def _asked(self) -> BaseException | str | None:
        try:
            token = self.api.whoami().get("auth", {}).get("accessToken") or {}
            if token.get("role") == "read":
                return "the token can only read"
            self.prepare()
        except Exception as error:  # noqa: BLE001 - the library's, and those of the network below it
            return error
        return None

    def upload(self, job: Job) -> None:
        """Send a job as one commit; the hub tells which contents it has, and these are not sent again."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete  # noqa: PLC0415 - a heavy library

        self.prepare()
        prefix = f"{job.prefix}/" if job.prefix else ""
        paths = {f"{prefix}{inside}": job.folder / inside for inside in allowed(job.folder, ["*"])}
        operations: list[Any] = [CommitOperationAdd(path, str(file)) for path, file in paths.items()]
        if job.only:
            there = self.api.list_repo_files(self.name, revision=self.revision)
            operations += [CommitOperationDelete(p) for p in there if p.startswith(prefix) and p not in paths]
        message = job.message or f"Upload {job.name}"
        with _without_bars():
            self.api.create_commit(self.name, operations, commit_message=message, revision=self.revision)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Draw no progress bars over what the run shows."""
    from huggingface_hub import constants  # noqa: PLC0415 - a heavy library

    bars: Any = require("huggingface_hub.utils", plugin="hub", extra="hf")
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or bars.are_progress_bars_disabled():
        yield
        return
    bars.disable_progress_bars()
    try:
        yield
    finally:
        bars.enable_progress_bars()


@attrs.define(eq=False)
class Uploader:
    """A thread that works through jobs in order."""

    repository: Repository
    scratch: Path  # a folder of its own in the run's
    tries: int = 3
    failed: dict[str, str] = attrs.field(factory=dict)  # by job, why
    sent: list[str] = attrs.field(factory=list)
    _jobs: deque[Job] = attrs.field(factory=deque)
    _busy: Job | None = None
    _wake: threading.Condition = attrs.field(factory=threading.Condition)
    _places: int = 0
    _closing: bool = False
    _given_up: threading.Event = attrs.field(factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Clear what a killed process left, and wait for jobs."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._thread = threading.Thread(target=self._work, name="drivetrain-hub", daemon=True)
        self._thread.start()

    def place(self, name: str) -> Path:
        """Return a folder that no other job has."""
        self._places += 1
        return self.scratch / f"{self._places}-{name}"

    def fail(self, name: str, error: BaseException) -> None:
        """Note what cannot be handed over."""
        log.warning("hub: %s cannot be uploaded: %s", name, told(error))
        self.failed[name] = told(error)

    def has_room(self) -> bool:
        """Tell whether few enough jobs wait: each holds a checkpoint's files on the disk."""
        return len(self._jobs) < MAX_PENDING

    def knows(self, name: str) -> bool:
        """Tell whether a job of this name was sent or is in line."""
        with self._wake:
            return name in self.sent or any(job.name == name for job in self._jobs)

    def put(self, job: Job) -> None:
        """Add a job."""
        with self._wake:
            passed_over = [j for j in self._jobs if job.newest and j.name == job.name and j is not self._busy]
            for old in passed_over:
                self._jobs.remove(old)
            self._jobs.append(job)
            self._wake.notify_all()
        for old in passed_over:
            shutil.rmtree(old.folder, ignore_errors=True)

    def finish(self, seconds: float) -> dict[str, str]:
        """Wait for what is left, for so long at most; return what was not uploaded, and why."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)
        self._given_up.set()
        with self._wake:
            left = [job.name for job in self._jobs]
        failed = {**dict.fromkeys(left, f"not finished within {seconds:g} s"), **self.failed}
        if self._thread is None or not self._thread.is_alive():  # else its files are cleared by the next run
            shutil.rmtree(self.scratch, ignore_errors=True)
        return failed

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and not self._closing:
                    self._wake.wait()
                if not self._jobs or self._given_up.is_set():
                    return
                job = self._busy = self._jobs[0]  # in line until it is through, so that `finish` can name it
            self._attempt(job)
            with self._wake:
                self._jobs.popleft()
                self._busy = None
            shutil.rmtree(job.folder, ignore_errors=True)

    def _attempt(self, job: Job) -> None:
        began = time.monotonic()
        for attempt in range(1, self.tries + 1):
            try:
                self.repository.upload(job)
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on and it is told at the end
                last = attempt == self.tries or status_of(error) in REFUSED or self._given_up.is_set()
                log.warning("hub: %s, try %d of %d: %s", job.name, attempt, self.tries, told(error))
                if last:
                    self.failed[job.name] = told(error)
                    return
                self._given_up.wait(min(FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S))
            else:
                self.failed.pop(job.name, None)
                self.sent.append(job.name)
                log.info("hub: uploaded %s in %.1f s", job.name, time.monotonic() - began)
                return


def on_first_rank(act: Callable[[], None], rank: int, world_size: int) -> None:
    """Do something on rank 0; where it is refused, every rank raises.

    Raises:
        ConfigError: what `act` raised.
    """
    error: ConfigError | None = None
    if rank == 0:
        try:
            act()
        except ConfigError as raised:
            error = raised
    if world_size > 1:
        import torch  # noqa: PLC0415 - the carriers' types need none

        problems: list[Any] = [error.problems if error else None]
        torch.distributed.broadcast_object_list(problems, 0)
        error = error or (ConfigError(problems[0]) if problems[0] else None)
    if error is not None:
        raise error
