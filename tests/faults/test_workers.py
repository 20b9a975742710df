"""Worker processes that are killed, stopped, hang, exit or raise; and what is left of them afterwards."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from drivetrain import (
    ConfigError,
    Counted,
    DataError,
    Sequential,
    Streamed,
    Trainer,
    TrainingError,
    hookimpl,
    plugin,
    stack,
)
from drivetrain.data import Fetch, count_labels
from drivetrain.state import Run
from drivetrain_plugins import SGD, Checkpoint, Evaluate, Loader
from drivetrain_plugins.data.bad_rows import BadRows
from drivetrain_plugins.shared.table import Table

ROWS, FATAL, SOON_S = 40, 13, 6.0
SPLITS = {"steps": 12, "device": "cpu", "log_every": "1 step"}


def row(number):
    draws = torch.Generator().manual_seed(number)
    return {"features": torch.randn(6, generator=draws), "labels": torch.tensor(number % 3)}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep():
    time.sleep(600)


def leave():
    os._exit(3)


def exit_python():
    sys.exit("enough")


def stop_iterating():
    raise StopIteration


class Rows(torch.utils.data.Dataset):
    """Rows of which one does something; nothing, if it is None."""

    def __init__(self, fault=None, fatal=FATAL):
        self.fault, self.fatal = fault, fatal

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        if index == self.fatal and self.fault is not None:
            self.fault()
        return row(index)


class AStream(Rows):
    """The same rows as a stream."""

    def open(self, epoch, position=None):
        return Counted((self[n] for n in range(ROWS)), position or 0)


class Pids(Rows):
    """Rows that tell which process made them."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "pid": torch.tensor(os.getpid())}


class TinyNet(torch.nn.Module):
    """A linear classifier that can do without the process numbers."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(6, 3)

    def forward(self, features, labels, pid=None):
        logits = self.layer(features)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def loader(dataset, *, rank=0, world_size=1, collate=stack, **options):
    """Return the plugin's loader of a train split in order, by its hook."""
    run = Run(device=torch.device("cpu"), rank=rank, world_size=world_size)
    sampler = None if hasattr(dataset, "open") else Sequential(ROWS)
    fetch = Fetch(dataset, collate, count_labels, 0, "train", tolerant=options.pop("tolerant", False))
    return Loader(**{"batch_size": 4, **options}).build_batches(run, "train", fetch, sampler)


def open_files():
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def same(left, right):
    left, right = ([(m.num_rows, m.num_items, m.position, m.ends, m.batch) for m in each] for each in (left, right))
    assert [each[:4] for each in left] == [each[:4] for each in right]
    for (*_, ours), (*_, theirs) in zip(left, right, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(autouse=True)
def nothing_left():
    """Look after each test whether a process, thread or file of it is still there."""
    gc.collect()
    threads = threading.active_count()
    yield
    assert multiprocessing.active_children() == []
    assert threading.active_count() == threads


# --- the same batches ----------------------------------------------------------------------------------------------

SOURCES = {
    "rows": Rows,
    "columns": lambda: {n: torch.stack([row(i)[n] for i in range(ROWS)]) for n in ("features", "labels")},
    "list": lambda: [row(i) for i in range(ROWS)],
    "stream": AStream,
}


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(("start", "world"), [(0, 1), (16, 2)])
@pytest.mark.parametrize("kind", [Rows, AStream])
def test_the_same_batches_with_any_number_of_workers(kind, workers, start, world):
    """Every field of every batch agrees with those of the loop's own process, for each rank, from any place on."""
    for rank in range(world):
        here, there = (loader(kind(), rank=rank, world_size=world, workers=n, batch_size=3) for n in (0, workers))
        same(here.iterate(0, start), there.iterate(0, start))


def test_a_table_is_the_same_in_workers():
    """Columns gathered in a worker are those gathered here."""
    table = Table({"features": torch.randn(ROWS, 6).numpy(), "labels": torch.arange(ROWS).numpy() % 3})
    same(*(loader(table, collate=FromColumns(), workers=n).iterate(0) for n in (0, 2)))


class FromColumns:
    def __call__(self, rows):
        return {name: torch.from_numpy(column) for name, column in rows.columns.items()}


@pytest.mark.parametrize("kind", SOURCES)
def test_weights_do_not_depend_on_workers(kind, tmp_path):
    """0 and 2 workers, and 2 then 1 over a resume within an epoch, end with the same bits in the weights."""
    ends = []
    for stretches in ([(0, 8)], [(2, 8)], [(2, 5), (1, 8)]):
        for workers, steps in stretches:
            model = TinyNet()
            plugins = [Loader(4, workers=workers), SGD(lr=0.1), Checkpoint(every="5 steps")]
            settings = {**SPLITS, "steps": steps, "output": tmp_path / str(len(ends))}
            Trainer(model, plugins, **settings).fit(SOURCES[kind](), resume=steps == 8 and len(stretches) > 1)
        ends.append(model.state_dict())
    for other in ends[1:]:
        assert all(torch.equal(other[name], ends[0][name]) for name in other)


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_may_be_started_otherwise(method):
    """Spawned workers, and those of a server, make the same batches."""
    same(loader(Rows(), workers=0).iterate(0), loader(Rows(), workers=1, start_method=method).iterate(0))


# --- a worker fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "doing"),
    [
        (Rows, r"worker 1 \(pid \d+\) of the train data{} making the batch of rows \[12, 13, 14, 15\]"),
        (AStream, r"worker 0 \(pid \d+\) of the train data{} reading rows 8 to 15"),
    ],
)
@pytest.mark.parametrize(
    ("fault", "error", "told"),
    [
        (kill, TrainingError, r" was killed by SIGKILL,"),
        (leave, TrainingError, r" ended with exit code 3,"),
        (stop, TrainingError, r" gave nothing for 0.5 seconds,"),
        (sleep, TrainingError, r" gave nothing for 0.5 seconds,"),
        (exit_python, TrainingError, ","),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_lost_worker_is_named_within_seconds(kind, doing, fault, error, told):
    """Whatever becomes of it, the error names the worker, its process, the split and the rows, and all have ended."""
    began, loaded = time.monotonic(), loader(kind(fault), workers=2, timeout_s=0.5)
    with pytest.raises(error, match=f"loader: {doing.format(told)}"):
        list(loaded.iterate(0))
    assert time.monotonic() - began < SOON_S


def test_what_was_made_before_is_given():
    """The batches before the one that is lost arrive."""
    made = loader(Rows(kill), workers=2).iterate(0)
    assert [next(made).num_rows for _ in range(3)] == [4, 4, 4]
    with pytest.raises(TrainingError):
        next(made)


@pytest.mark.parametrize("fault", [kill, stop])
def test_a_worker_lost_between_epochs_is_named(fault):
    """One that is killed or stopped while nobody waits for it is missed when it is asked again."""

    class Strikes:
        @hookimpl
        def log(self, run, metrics):
            if run.progress.step == 10:
                for worker in run.batches["train"].crews.kept._workers:
                    os.kill(worker.process.pid, signal.SIGKILL if fault is kill else signal.SIGSTOP)

    trainer = Trainer(TinyNet(), [Loader(4, workers=1, timeout_s=0.5), SGD(), Strikes()], **SPLITS)
    with pytest.raises(TrainingError, match=r"worker 0 \(pid \d+\) of the train data .* rows \["):
        trainer.fit(Rows())


@pytest.mark.parametrize("fault", [kill, sleep])
def test_a_run_says_it_and_leaves_nothing(fault):
    """The error of a run is drivetrain's, `failed` hears it, and no process is left."""
    heard = []

    class Hears:
        @hookimpl
        def failed(self, run, error):
            heard.append(error)

    trainer = Trainer(TinyNet(), [Loader(4, workers=2, timeout_s=0.5), SGD(), Hears()], **SPLITS)
    with pytest.raises(TrainingError, match=rf"of the train data .*\b{FATAL}\b") as caught:
        trainer.fit(Rows(fault))
    assert heard == [caught.value]


def fails():
    raise OSError("no such picture")


def fails_in_the_count(batch):
    raise LookupError(f"no labels among {sorted(batch)}")


@pytest.mark.parametrize("fault", [fails, stop_iterating])
def test_a_bad_row_is_a_data_error_from_a_worker_too(fault):
    """The same error with the same words as without workers, with the worker and its traceback as notes."""
    errors = []
    for workers in (0, 1):
        with pytest.raises(DataError) as caught:
            list(loader(Rows(fault), workers=workers).iterate(0))
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1]) != ""
    assert f"train row {FATAL}: " in str(errors[1])
    notes = "\n".join(errors[1].__notes__)
    assert re.search(r"in worker 0 \(pid \d+\) of the train data, making the batch of rows \[12, 13, 14, 15\]", notes)
    assert f"in {fault.__name__}\n" in notes


def test_an_error_that_is_nobodys_keeps_its_traceback():
    """An error that is not about a row becomes drivetrain's, with its kind, words and original traceback."""
    made = loader(Rows(), workers=1)
    made.crews.fetch.count = fails_in_the_count
    with pytest.raises(TrainingError, match=r"rows \[0, 1, 2, 3\], raised LookupError: no labels among") as caught:
        list(made.iterate(0))
    assert "in fails_in_the_count\n    raise LookupError" in "\n".join(caught.value.__notes__)


def test_what_cannot_be_sent_is_told():
    """A batch that does not travel between processes names its rows."""
    made = loader(Rows(), workers=1)
    made.crews.fetch.collate = Unsendable()
    with pytest.raises(TrainingError, match=r"rows \[0, 1, 2, 3\], raised .*lambda"):
        list(made.iterate(0))


class Unsendable:
    def __call__(self, rows):
        return {"labels": torch.zeros(len(rows)), "function": lambda: rows}


def test_what_cannot_be_started_is_told():
    """Data that cannot be sent to a spawned worker is an error with what to do, and leaves nothing."""
    dataset = Rows(lambda: None)
    before = open_files()
    with pytest.raises(ConfigError, match=r"worker 0 of 2 of the train data cannot be started[\s\S]*pickle"):
        list(loader(dataset, workers=2, start_method="spawn").iterate(0))
    assert open_files() <= before + 1  # the resource tracker's


# --- how long they live --------------------------------------------------------------------------------------------


class Seen:
    """A plugin that keeps which processes made the batches of each epoch and evaluation."""

    def __init__(self):
        self.train, self.held = [], []

    @hookimpl(wrapper=True)
    def compute_loss(self, micro):
        pids = self.held if micro.step is None else self.train
        pids.append((micro.run.progress.epoch, int(micro.batch["pid"][0])))
        return (yield)


@pytest.mark.parametrize("persistent", [True, False])
def test_workers_last_as_long_as_the_run(persistent):
    """Kept workers are the same processes in every epoch and evaluation; others are new each time."""
    seen = Seen()
    plugins = [Loader(8, workers=2, persistent=persistent), SGD(), Evaluate(every="3 steps"), seen]
    Trainer(TinyNet(), plugins, epochs=3, device="cpu").fit(Pids(), evaluate=Pids())
    by_epoch = [{pid for epoch, pid in seen.train if epoch == number} for number in range(3)]
    assert [len(pids) for pids in by_epoch] == [2, 2, 2]
    assert len(set.union(*by_epoch)) == (2 if persistent else 6)
    evaluations = len(seen.held) // 5
    assert evaluations == 5
    assert len({pid for _, pid in seen.held}) == (2 if persistent else 2 * evaluations)
    assert not {pid for _, pid in seen.held} & set.union(*by_epoch)


def test_evaluating_in_an_epoch_changes_nothing():
    """Two splits in turns, the one in the middle of the other, give the weights that training alone gives."""
    ends = []
    for every in ("100 steps", "2 steps"):
        model = TinyNet()
        plugins = [Loader(4, workers=2), SGD(lr=0.1), Evaluate(every=every, at_end=False)]
        Trainer(model, plugins, **SPLITS).fit(Rows(), evaluate=Rows())
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("kind", [Rows, AStream])
def test_stopped_in_the_middle_and_begun_again(kind):
    """An iteration that is given up leaves nothing in the next one's way, with kept workers too."""
    loaded, reference = loader(kind(), workers=2), list(loader(kind()).iterate(0))
    loaded.crews.keep = True
    for taken in (1, 0, 3, 9):
        stream = loaded.iterate(0)
        for _ in range(taken):
            next(stream)
        stream.close()
        same(reference, loaded.iterate(0))
    pids = {worker.process.pid for worker in loaded.crews.kept._workers}
    assert len(pids) == 2
    loaded.crews.end()


def test_an_iteration_within_another():
    """Two iterations of one loader at once do not take each other's batches."""
    loaded, reference = loader(Rows(), workers=1), list(loader(Rows()).iterate(0))
    loaded.crews.keep = True
    outer = []
    for micro in loaded.iterate(0):
        outer.append(micro)
        if len(outer) in (1, 4):
            same(reference, loaded.iterate(0))
    same(reference, outer)
    loaded.crews.end()


def test_without_a_run_the_workers_end_with_the_iteration():
    """Who only evaluates, or gives up in the middle, keeps no process."""
    loaded = loader(Rows(), workers=2)
    for _ in loaded.iterate(0):
        assert len(multiprocessing.active_children()) == 2
        break
    assert multiprocessing.active_children() == []
    list(loaded.iterate(0))
    assert multiprocessing.active_children() == []


def test_workers_end_when_the_loop_is_killed(tmp_path):
    """Workers of a process that was killed notice it and leave."""
    told = tmp_path / "pids"
    process = multiprocessing.get_context("fork").Process(target=_iterate_for_ever, args=(told,))
    process.start()
    until = time.monotonic() + 20
    while not told.exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.join()
    process.close()
    pids = [int(pid) for pid in told.read_text().split()]
    assert len(pids) == 2
    while any(_runs(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in pids)


def _iterate_for_ever(told):
    loaded = loader(Rows(), workers=2)
    loaded.crews.keep = True
    list(loaded.iterate(0))
    part = told.with_suffix(".part")
    part.write_text(" ".join(str(worker.process.pid) for worker in loaded.crews.kept._workers))
    part.rename(told)
    time.sleep(600)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_many_batches_leak_nothing():
    """Files and memory stay as they were after the first hundreds; more than a thousand were made."""
    loaded = loader(Wide(), workers=2, batch_size=1)
    loaded.crews.keep = True
    used = []
    for _ in range(3):
        for number in range(12):
            for _micro in loaded.iterate(number):
                pass
        used.append((open_files(), int(Path("/proc/self/statm").read_text().split()[1]) * 4096))
    loaded.crews.end()
    assert used[0][0] == used[1][0] == used[2][0]
    assert used[2][1] - used[0][1] < 8 << 20
    assert open_files() < used[0][0]


class Wide(Rows):
    """Rows of 64 kB."""

    def __getitem__(self, index):
        return {"features": torch.zeros(16_000) + index, "labels": torch.tensor(0)}


def test_workers_do_not_hear_the_terminal():
    """An interrupt is sent to every process of a terminal; the workers leave it to the loop's."""
    loaded, made = loader(Rows(), workers=1), 0
    stream = loaded.iterate(0)
    for _ in stream:
        made += 1
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)
    assert made == ROWS // 4


def test_bad_rows_are_told_by_workers_of_a_stream():
    """What a stream's worker leaves out arrives with the batch that lacks it."""
    made = [m.bad for m in loader(Broken(), workers=2, tolerant=True).iterate(0)]
    assert [len(bad) for bad in made] == [0, 0, 0, 1, *[0] * 6]
    trainer = Trainer(TinyNet(), [Loader(4, workers=2), ("bad-rows", BadRows(1)), SGD()], **SPLITS)
    trainer.fit(Broken())
    assert trainer.run.extras["bad_rows"] == 1


class Broken(AStream):
    """A stream with one row of another shape."""

    def open(self, epoch, position=None):
        rows = [row(n) for n in range(ROWS)]
        rows[FATAL] = {"features": "text", "labels": None}
        return Counted(iter(rows), position or 0)


# --- options -------------------------------------------------------------------------------------------------------


class Cut(Sequential):
    """An order that cuts its batches."""

    def bounds(self, epoch):
        return torch.tensor([0, 5, 20, ROWS])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_size_beside_a_sampler_that_cuts(workers):
    """It is refused at assembly with the option to take instead; without one the sampler's cuts are the batches."""

    @plugin(role="order")
    class Cuts:
        @hookimpl(wrapper=True)
        def build_sampler(self, run, split):
            order = yield
            return Cut(ROWS) if split == "train" else order

    def assemble(**options):
        trainer = Trainer(TinyNet(), [Loader(**options, workers=workers), Cuts(), Evaluate(), SGD()], **SPLITS)
        return trainer.assemble(Rows(), evaluate=Rows())

    with pytest.raises(ConfigError, match=r"Cut cuts the train batches[\s\S]*batch_size=4[\s\S]*evaluate_batch_size"):
        assemble(batch_size=4)
    run = assemble(evaluate_batch_size=10)
    assert [m.num_rows for m in run.batches["train"].iterate(0)] == [5, 15, 20]
    assert [m.num_rows for m in run.batches["evaluate"].iterate(0)] == [10] * 4


def test_eight_rows_where_nobody_says():
    """Without a size, batches hold 8 rows, of a stream too."""
    assert [m.num_rows for m in loader(Rows(), batch_size=None).iterate(0)] == [8] * 5
    streamed = loader(AStream(), batch_size=None)
    assert type(streamed) is Streamed
    assert [m.num_rows for m in streamed.iterate(0)] == [8] * 5
