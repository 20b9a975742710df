"""Checkpoints that are written while the training goes on: the bytes are those of the call, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from async_runs import HOW, ROWS, Gate, Normed, Tracks, run_of
from checkpoint_runs import named, steps

from drivetrain import CheckpointError, ConfigError, hookimpl
from drivetrain_plugins import AsyncCheckpoint, Checkpoint
from drivetrain_plugins.checkpoint import _place, _saved
from drivetrain_plugins.checkpoint._flight import ForkFlight, ThreadFlight
from drivetrain_plugins.checkpoint._store import LocalStore

FILES = ("model.safetensors", "state.safetensors", "state.json")


@pytest.fixture
def gate():
    made = Gate()
    yield made
    made.close_gate()


class Spoiler:
    """Change everything that was saved, in place, as soon as save() returns; then let the writing begin."""

    effect = "observes"

    def __init__(self, gate=None):
        self.gate, self.there, self.flights = gate, [], []

    @hookimpl(wrapper=True)
    def save(self, run, path):
        result = yield
        self.there.append(path.exists())
        with torch.no_grad():
            for tensor in (*run.model.parameters(), *run.model.buffers()):
                tensor.add_(1)
            for entry in run.optimizer.state.values():
                for value in entry.values():
                    value.add_(1)
        run.optimizer.param_groups[0]["eps"] = 1e-3 * run.progress.step
        tracks = run.plugins["tracks"]
        tracks._sum += 7
        tracks._seen.append("changed")
        torch.rand(3)
        under = getattr(run.plugins.get("async-checkpoint"), "_under", None)
        self.flights.append(type(under.flight) if under else None)
        if self.gate is not None:
            self.gate.open()
        return result


def contents(folder):
    return {(p.parent.name, p.name): p.read_bytes() for p in folder.glob("checkpoints/*/*") if p.name in FILES}


# --- the bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_the_bytes_are_those_of_the_call(tmp_path, gate, how):
    """Everything may change right after save() returns: the files are, byte for byte, those of `checkpoint`."""
    gate.shut = True
    spoiler = Spoiler(gate)
    options = {"every": "2 steps", "keep": 9}
    asynchronous = AsyncCheckpoint(how=how, **options)
    run_of(tmp_path / "async", asynchronous, Tracks(), spoiler, until=7, store=gate).fit(ROWS)
    assert spoiler.there == [False] * 4  # writing had not begun
    assert spoiler.flights == [{"thread": ThreadFlight, "fork": ForkFlight}[how]] * 4
    at_once = Spoiler()
    run_of(tmp_path / "sync", Checkpoint(**options), Tracks(), at_once, until=7).fit(ROWS)
    assert at_once.there == [True] * 4
    found, expected = contents(tmp_path / "async"), contents(tmp_path / "sync")
    assert len(expected) == 12
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []


@pytest.mark.parametrize("how", HOW)
def test_going_on_from_one_is_exact(tmp_path, how):
    """A run that goes on from an asynchronous checkpoint ends with the bits of one that was never interrupted."""
    ends = []
    for folder, untils in (("whole", [7]), ("parts", [3, 7])):
        for until in untils:
            made = run_of(tmp_path / folder, AsyncCheckpoint(every=2, how=how), Tracks(), until=until)
            made.fit(ROWS, resume="auto")
        ends.append(made.run)
    for a, b in zip(ends[0].model.state_dict().values(), ends[1].model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert ends[0].plugins["tracks"]._seen == ends[1].plugins["tracks"]._seen == list(range(7))


@pytest.mark.parametrize("how", ["auto", "fork"])
def test_shared_memory_is_written_by_a_thread(tmp_path, gate, how):
    """A child would see changes of parameters in shared memory: they are copied, and a thread writes."""
    gate.shut = True
    spoiler = Spoiler(gate)
    torch.default_generator.manual_seed(0)
    shared = Normed().share_memory()
    run_of(
        tmp_path / "async", AsyncCheckpoint(every=2, how=how), Tracks(), spoiler, model=shared, until=4, store=gate
    ).fit(ROWS)
    assert spoiler.flights == [ThreadFlight] * 2
    run_of(tmp_path / "sync", Checkpoint(every=2), Tracks(), Spoiler(), until=4).fit(ROWS)
    assert contents(tmp_path / "async") == contents(tmp_path / "sync")


# --- one at a time, and nobody left behind ---------------------------------------------------------------------------


class Opens:
    """Open the gate a while after something has begun to wait, and tell whether it waited."""

    effect = "observes"

    def __init__(self, gate, at, act):
        self.gate, self.at, self.act, self.waited = gate, at, act, None

    @hookimpl(wrapper=True)
    def save(self, run, path):
        if run.progress.step != self.at:
            return (yield)
        timer = threading.Timer(0.2, self.gate.open)
        timer.start()
        started = time.monotonic()
        result = yield
        self.act(run)
        self.waited = time.monotonic() - started
        timer.join()
        self.gate.open()
        return result


@pytest.mark.parametrize("how", HOW)
def test_the_next_save_waits(tmp_path, gate, how):
    """One save is under way at a time: when the second one returns, the first is complete."""
    gate.shut, complete = True, []
    opens = Opens(gate, 2, lambda run: complete.extend(steps(tmp_path)))
    run_of(tmp_path, AsyncCheckpoint(every=1, keep=9, how=how), opens, until=2, store=gate).fit(ROWS)
    assert [name for name in complete if name[0] != "."] == named(1)
    assert opens.waited >= 0.19
    assert steps(tmp_path) == named(1, 2)


@pytest.mark.parametrize("how", HOW)
def test_load_waits_for_what_is_under_way(tmp_path, gate, how):
    """Loading right after a save finds that save."""
    gate.shut, loaded = True, []
    opens = Opens(gate, 2, lambda run: loaded.append(run.hooks.load(run, None).name))
    run_of(tmp_path, AsyncCheckpoint(every=2, how=how), opens, until=3, store=gate).fit(ROWS)
    assert loaded == named(2)
    assert opens.waited >= 0.19


class Heard:
    """What `saved` told, each with the step at which it was told; each can be read."""

    effect = "observes"

    def __init__(self):
        self.told = []

    @hookimpl
    def saved(self, run, path):
        _saved.read(*_place.checkpoint_at(path))
        self.told.append((path.name, run.progress.step))


@pytest.mark.parametrize("how", HOW)
def test_the_end_waits_and_every_save_is_told(tmp_path, gate, how):
    """When fit() returns, all saves are complete and have been told once, each when it was complete."""
    gate.shut, heard = True, Heard()
    threading.Timer(0.3, lambda: [gate.open() for _ in range(3)]).start()
    run_of(tmp_path, AsyncCheckpoint(every=2, keep=9, how=how), heard, until=5, store=gate).fit(ROWS)
    assert [name for name, _ in heard.told] == steps(tmp_path) == named(2, 4, 5)
    assert heard.told[-1] == ("step-00000005", 5)


class Raises:
    """Raise in the middle of a step."""

    effect = "observes"

    def __init__(self, error, gate):
        self.error, self.gate = error, gate

    @hookimpl
    def gradients_ready(self, step):
        if step.number == 3:
            threading.Timer(0.2, self.gate.open).start()
            raise self.error


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "error", [RuntimeError("bad"), SystemExit(3), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
def test_an_error_waits_for_what_is_under_way(tmp_path, gate, how, error):
    """When the loop ends with an exception, a save under way is finished first; the exception is the one that was."""
    gate.shut = True
    made = run_of(tmp_path, AsyncCheckpoint(every=3, how=how), Raises(error, gate), store=gate)
    with pytest.raises(type(error)) as caught:
        made.fit(ROWS)
    assert caught.value is error
    assert steps(tmp_path) == named(3)
    _saved.read(*_place.checkpoint_at(tmp_path / "checkpoints" / "step-00000003"))


def children():
    """Return the numbers of this process's children, those that nobody has waited for among them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(os.getpid()):
                found.append(stat.parent.name)
    return sorted(found)


@pytest.mark.parametrize("how", HOW)
def test_nothing_is_left(tmp_path, how):
    """After many saves there are as many open files and threads as before, and no child."""

    def left():
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), children()

    run_of(tmp_path / "warm", AsyncCheckpoint(every=1, how=how), until=2).fit(ROWS)
    before = left()
    run_of(tmp_path / "run", AsyncCheckpoint(every=1, how=how), until=12).fit(ROWS)
    store = Gate(fails=lambda step: step % 2 == 1)
    failing = AsyncCheckpoint(every=1, how=how, on_failure="continue")
    run_of(tmp_path / "failing", failing, until=12, store=store).fit(ROWS)
    store.close_gate()
    assert left() == before


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_a_failure_is_told_at_a_later_step(tmp_path, how):
    """By default a save that failed ends the run as soon as it is known, with the error of the store."""
    store = Gate(fails=lambda step: step == 2)
    made = run_of(tmp_path, AsyncCheckpoint(every=2, how=how), until=40, store=store)
    with pytest.raises(CheckpointError, match=r"step-00000002 could not be written: Input/output error"):
        made.fit(ROWS)
    assert 2 < made.run.progress.step <= 4  # the next save at the latest
    assert steps(tmp_path) == []
    store.close_gate()


@pytest.mark.parametrize("how", HOW)
def test_failures_are_counted_and_gone_without(tmp_path, how, caplog):
    """With "continue" failures in a row are counted and a success resets the count."""
    store = Gate(fails=lambda step: step in (1, 2, 4, 5))
    checkpoint = AsyncCheckpoint(every=1, keep=9, how=how, on_failure="continue", failures=3)
    with caplog.at_level(logging.WARNING, "drivetrain"):
        run_of(tmp_path, checkpoint, until=7, store=store).fit(ROWS)
    assert steps(tmp_path) == named(3, 6, 7)
    told = [r.getMessage() for r in caplog.records]
    assert [text[12:26] for text in told] == ["failure 1 of 3", "failure 2 of 3"] * 2
    store.close_gate()


@pytest.mark.parametrize("how", HOW)
def test_too_many_in_a_row_end_the_run(tmp_path, how):
    """With "continue" the run ends at the number of failures in a row that is not tolerated."""
    store = Gate(fails=lambda step: step > 1)
    checkpoint = AsyncCheckpoint(every=1, keep=9, how=how, on_failure="continue", failures=2)
    made = run_of(tmp_path, checkpoint, until=40, store=store)
    with pytest.raises(CheckpointError, match="step-00000003"):
        made.fit(ROWS)
    assert steps(tmp_path) == named(1)
    store.close_gate()


@pytest.mark.parametrize("how", HOW)
def test_only_the_last_save_itself_must_succeed(tmp_path, how):
    """A tolerated failure that is noticed at the last step is tolerated; that of the last save ends the run."""
    for failing, expected in ((4, [1, 2, 3, 5]), (5, [1, 2, 3, 4])):
        store, folder = Gate(fails=lambda step, failing=failing: step == failing), tmp_path / str(failing)
        made = run_of(folder, AsyncCheckpoint(every=1, keep=9, how=how, on_failure="continue"), until=5, store=store)
        if failing == 5:
            with pytest.raises(CheckpointError, match="step-00000005"):
                made.fit(ROWS)
        else:
            made.fit(ROWS)
        assert steps(folder) == named(*expected)
        store.close_gate()


def test_a_child_that_is_killed(tmp_path):
    """A child that ends by a signal or with a status is a clear error, and leaves nothing that a reader sees."""
    endings = {
        "was ended by SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "ended with status 7": lambda: os._exit(7),
    }
    for number, (text, end) in enumerate(endings.items()):
        store, folder = Gate(), tmp_path / str(number)

        def act(name, step, end=end, run=store.run):
            if name == "sync" and os.getpid() != run:
                end()

        store.act = act
        made = run_of(folder, AsyncCheckpoint(every=2, how="fork"), store=store)
        with pytest.raises(CheckpointError, match=f"the process that wrote the checkpoint {text}"):
            made.fit(ROWS)
        left = steps(folder)
        assert [name[:13] for name in left] == [".tmp-00000002"]
        store.close_gate()
        run_of(folder, AsyncCheckpoint(every=2, how="fork")).fit(ROWS, resume="auto")
        assert steps(folder) == named(2, 4, 5)


def test_no_process_to_be_had(tmp_path, monkeypatch):
    """Where the system gives no process, that is a save that failed, and no file stays open."""

    def refuse():
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CheckpointError, match=r"no process could be forked .*: Resource temporarily unavailable"):
        run_of(tmp_path, AsyncCheckpoint(every=2, how="fork")).fit(ROWS)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_the_child_logs_is_told(tmp_path, caplog):
    """A warning of the rotation in the child is a warning of the run."""

    class Keeps(LocalStore):
        def rename(self, source, target):
            if ".trash-" in target.name and "probe" not in str(source) and ".tmp-" not in source.name:
                raise OSError(errno.EACCES, "Permission denied", str(source))
            super().rename(source, target)

    with caplog.at_level(logging.WARNING, "drivetrain"):
        run_of(tmp_path, AsyncCheckpoint(every=1, keep=1, how="fork"), until=2, store=Keeps()).fit(ROWS)
    assert ["could not be removed" in r.getMessage() for r in caplog.records] == [True]


def test_fork_is_refused_where_it_cannot_be(tmp_path):
    """how="fork" with a store is refused before step 0; "auto" takes a thread there."""
    url = f"memory://{tmp_path.name}"
    made = run_of(tmp_path / "fork", AsyncCheckpoint(every=2, how="fork", store=url + "/fork"))
    with pytest.raises(ConfigError, match="cannot fork: connections to a store do not survive a fork"):
        made.fit(ROWS)
    assert made.run.progress.step == 0
    spoiler = Spoiler()
    run_of(tmp_path / "auto", AsyncCheckpoint(every=2, store=url + "/auto"), Tracks(), spoiler, until=2).fit(ROWS)
    assert spoiler.flights == [ThreadFlight]
    assert _place.shelf_of(url + "/auto").names() == named(2)
    with pytest.raises(ValueError, match="how"):
        AsyncCheckpoint(how="process")
