"""`save-on-error`: what it saves is exact, and it saves nothing else."""

from __future__ import annotations

import contextlib
import logging
import random

import attrs
import numpy as np
import pytest
import torch
from checkpoint_runs import named, steps

from drivetrain import DataError, Hooks, PlanError, Trainer, TrainingError, hookimpl, plugin
from drivetrain.testing import digest, run_ranks
from drivetrain_plugins import EMA, Accumulate, AdamW, AsyncCheckpoint, Checkpoint, Evaluate, Loader, SaveOnError
from drivetrain_plugins.checkpoint._store import LocalStore

STEPS, BAD = 12, 17  # 40 rows in batches of 4, accumulation 2: 5 steps an epoch


class Net(torch.nn.Module):
    """A layer with dropout and one with statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)
        self.drop = torch.nn.Dropout(0.3)

    def forward(self, x, labels):
        return torch.nn.functional.cross_entropy(self.last(self.drop(self.norm(self.first(x)))), labels)


class Rows(torch.utils.data.Dataset):
    """Rows that draw from the global generators; one fails, until the file `mended` is there."""

    def __init__(self, mended=None, error=ValueError):
        self.mended, self.error = mended, error

    def __len__(self):
        return 40

    def __getitem__(self, index):
        noise = torch.randn(4) + random.gauss(0, 0.1) + np.random.standard_normal()  # noqa: NPY002 - as augmentations do
        if index == BAD and self.mended is not None and not self.mended.exists():
            self.mended.touch()
            raise self.error(f"row {index} is rotten")
        return {"x": noise.float(), "labels": torch.tensor(index % 2)}


@plugin(role="report", effect="observes")
class Draws:
    """Draws from Python's and numpy's generators in each step, and keeps what was logged of the training."""

    _lines: list[str] = attrs.field(init=False, factory=list)

    @hookimpl
    def assembled(self):
        self._lines = []

    @hookimpl
    def step_end(self):
        self._lines.append(f"{random.random().hex()} {np.random.random().hex()}")  # noqa: NPY002 - the global one

    @hookimpl
    def log(self, metrics):
        if "loss" in metrics:
            self._lines.append(" ".join(f"{name}={float(value).hex()}" for name, value in sorted(metrics.items())))

    def state_dict(self):
        return {"lines": self._lines}

    def load_state_dict(self, state):
        self._lines = list(state["lines"])


class Observer:
    """A plugin of a test, which may come and go when a run goes on."""

    effect = "observes"


class Stops(Observer):
    """Stops after a step."""

    def __init__(self, step):
        self.step = step

    @hookimpl
    def step_end(self, step):
        if step.run.progress.step == self.step:
            step.run.request_stop("as asked")


def trainer(folder, *extra, first=(), checkpoint=None, workers=0, **settings):
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.default_generator.manual_seed(0)
    own = [AdamW(lr=0.01), EMA(decay=0.9), Accumulate(2), Loader(batch_size=4, workers=workers, prefetch=4)]
    own += [Evaluate(every="4 steps"), checkpoint or Checkpoint(every="3 steps"), SaveOnError(), ("draws", Draws())]
    return Trainer(Net(), [*first, *own, *extra], output=folder, seed=3, steps=STEPS, log_every=2, **settings)


def fit(made, rows=None, **settings):
    return made.fit(rows or Rows(), evaluate=Rows(), **settings)


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """Return the digest of the run to which nothing happens."""
    made = trainer(tmp_path_factory.mktemp("reference"))
    fit(made)
    return digest(made.run)


def goes_on(folder, left_alone, **options):
    made = trainer(folder, **options)
    random.seed()
    assert fit(made, resume="auto").steps == STEPS
    assert digest(made.run) == left_alone


# --- it is exact -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 6])
def test_a_bad_row(tmp_path, left_alone, caplog, workers, start):
    """A row that cannot be read, met by workers far ahead too: the step before its batch is saved, and exact."""
    if start:  # in the second epoch, after a resume
        fit(trainer(tmp_path / "run", ("stop-at", Stops(start))))
        start_names = steps(tmp_path / "run")
    made = trainer(tmp_path / "run", workers=workers)
    with caplog.at_level(logging.WARNING, "drivetrain"), pytest.raises((DataError, TrainingError), match="is rotten"):
        fit(made, Rows(tmp_path / "mended"), resume="auto")
    step = made.run.progress.step
    assert step % 3  # not one that is saved anyway
    assert steps(tmp_path / "run")[-1:] == named(step)
    assert f"the state of step {step} is saved as {tmp_path / 'run' / 'checkpoints'}" in caplog.text
    assert not start or start_names == named(3, 6)
    goes_on(tmp_path / "run", left_alone, workers=workers)


@pytest.mark.parametrize("how", ["thread", "fork"])
def test_a_save_beside_the_training(tmp_path, left_alone, caplog, how):
    """What is handed over to a thread or a child is written before the run has ended, and exact."""
    checkpoint = AsyncCheckpoint(every="3 steps", how=how)
    made = trainer(tmp_path, ("raises", Raises("plan_step", after=True)), checkpoint=("checkpoint", checkpoint))
    with caplog.at_level(logging.WARNING, "drivetrain"), pytest.raises(ArithmeticError):
        fit(made)
    assert "the state of step 4 has been handed over to be saved" in caplog.text
    assert steps(tmp_path)[-1:] == named(4)
    goes_on(tmp_path, left_alone)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, GeneratorExit, RecursionError, MemoryError, StopIteration, BaseException]
)
def test_every_kind_of_end_at_a_boundary(tmp_path, left_alone, error):
    """Ctrl-C while the run waits for a batch, or anything else: the kind of the failure does not matter."""

    class Waits(Observer):
        @hookimpl(wrapper=True)
        def plan_step(self, run):
            if run.progress.step == 4:
                raise error("on purpose")
            return (yield)

    with pytest.raises((error, RuntimeError)):  # a generator makes one of a StopIteration
        fit(trainer(tmp_path, Waits()))
    assert steps(tmp_path)[-1:] == named(4)
    goes_on(tmp_path, left_alone)


class Raises(Observer):
    """Raises in one hook when it is fired for step 5 (or at all, where steps mean nothing): before or after others."""

    def __init__(self, hook, after, error=ArithmeticError):
        self.hook, self.error, self.armed = hook, error, True
        spec = getattr(Hooks, hook)

        def wrapper(this, carrier):
            if this._now(carrier) and not after:
                raise error(hook)
            result = yield
            if this._now(carrier) and after:
                raise error(hook)
            return result

        def listener(this, carrier):
            if this._now(carrier):
                raise error(hook)

        made = wrapper if spec.drivetrain_kind == "operation" else listener
        carrier = spec.__code__.co_varnames[1]
        made.__code__ = made.__code__.replace(
            co_varnames=tuple(carrier if name == "carrier" else name for name in made.__code__.co_varnames)
        )
        self.__class__ = type("Raises", (Raises,), {hook: hookimpl(made, wrapper=made is wrapper)})

    def _now(self, carrier):
        if getattr(carrier, "step", carrier) is None:  # a micro-batch of an evaluation
            return False
        return getattr(carrier, "run", carrier).progress.step >= 4


FIRED = [
    "epoch", "plan_step", "train_step", "count_items", "compute_gradients", "accumulate", "prepare", "forward",
    "compute_loss", "backward", "gradients_ready", "clip_gradients", "optimizer_step", "zero_grad", "step_end",
    "log", "agree", "evaluate", "metrics", "evaluated", "save", "saved",
]  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("hook", FIRED)
def test_no_checkpoint_of_a_step_half_done(tmp_path, left_alone, hook, after):
    """Whichever hook raises, before or after the others: what was saved, if anything, goes on to the same end."""
    saboteur = Raises(hook, after)
    made = trainer(tmp_path, *([("raises", saboteur)] if after else []), first=[] if after else [("raises", saboteur)])
    with contextlib.suppress(ArithmeticError):
        fit(made)
    assert made.run.progress.step >= 3
    goes_on(tmp_path, left_alone)


@pytest.mark.parametrize(
    ("hook", "saved"),
    [
        ("agree", 4), ("evaluate", 4), ("metrics", 4), ("evaluated", 4), ("plan_step", 4),
        ("forward", 3), ("backward", 3), ("optimizer_step", 3), ("step_end", 3), ("log", 3), ("zero_grad", 3),
    ],
)  # fmt: skip
def test_where_it_saves(tmp_path, caplog, hook, saved):
    """Between two steps, evaluations included; inside a step it says why not and which checkpoint there is."""
    with caplog.at_level(logging.WARNING, "drivetrain"), pytest.raises(ArithmeticError):
        fit(trainer(tmp_path, ("raises", Raises(hook, after=False))))
    assert steps(tmp_path)[-1:] == named(saved)
    if saved == 3:
        assert "the failure came inside a step, whose changes are half done" in caplog.text
        assert f"the newest checkpoint is {tmp_path / 'checkpoints' / 'step-00000003'}" in caplog.text


# --- where it does not save ------------------------------------------------------------------------------------------


def test_before_the_first_step(tmp_path, caplog):
    """A run that has done nothing leaves no checkpoint, which would stand in the way of its next start."""
    with caplog.at_level(logging.WARNING, "drivetrain"), pytest.raises(ValueError, match="nothing"):
        fit(trainer(tmp_path, ("raises", BeforeTheFirst())))
    assert steps(tmp_path) == []
    assert "there is no checkpoint of this run" in caplog.text
    assert fit(trainer(tmp_path)).steps == STEPS


class BeforeTheFirst(Observer):
    @hookimpl(wrapper=True)
    def plan_step(self):
        raise ValueError("nothing is done")
        yield


@pytest.mark.parametrize("resumed", [False, True])
def test_what_is_saved_already(tmp_path, caplog, resumed):
    """The state that a save has just got, or that the run went on from, is not written again."""

    class After(Observer):
        @hookimpl(wrapper=True)
        def plan_step(self, run):
            if run.progress.step == 3:
                raise ValueError("just saved")
            return (yield)

    if resumed:
        fit(trainer(tmp_path, ("stop-at", Stops(3))))
    made = trainer(tmp_path, After())
    with caplog.at_level(logging.WARNING, "drivetrain"), pytest.raises(ValueError, match="just saved"):
        fit(made, resume="auto")
    assert steps(tmp_path) == named(3)
    assert "its state has been saved, or is the one that the run started with" in caplog.text


class Full(LocalStore):
    """Fails to write from some save on."""

    def __init__(self, saves):
        self.saves, self.begun = saves, 0

    def make_folder(self, path):
        super().make_folder(path)
        self.begun += "tmp" in path.name

    def write(self, handle, chunk):
        if self.begun > self.saves:
            raise OSError(28, "injected")
        super().write(handle, chunk)


def full_after(saves):
    made = Checkpoint(every="3 steps")
    made._store = Full(saves + 1)  # the start writes a probe
    return made


def test_a_save_that_fails_is_not_tried_again(tmp_path, caplog):
    """When the save is what failed, its error is raised as it is."""
    checkpoint = full_after(1)
    with caplog.at_level(logging.WARNING, "drivetrain"), pytest.raises(Exception, match="injected") as caught:
        fit(trainer(tmp_path, checkpoint=checkpoint))
    assert "it was the save that failed" in caplog.text
    assert checkpoint._store.begun == 3  # the probe, step 3, step 6
    assert not any("save-on-error" in note for note in getattr(caught.value, "__notes__", []))


def test_a_listener_that_fails_after_a_save(tmp_path, caplog):
    """What fails while `saved` is told fails inside the save, which has made its checkpoint: no second one is made."""
    checkpoint = full_after(99)
    with caplog.at_level(logging.WARNING, "drivetrain"), pytest.raises(ArithmeticError):
        fit(trainer(tmp_path, ("raises", Raises("saved", after=True)), checkpoint=checkpoint))
    assert "it was the save that failed" in caplog.text
    assert (steps(tmp_path), checkpoint._store.begun) == (named(3, 6), 3)


@pytest.mark.parametrize("second", [OSError, KeyboardInterrupt, SystemExit])
def test_the_first_error_is_raised(tmp_path, caplog, second):
    """A failure of the emergency save, an impatient Ctrl-C too, is told in a note; the first error stays the error."""

    class Impatient(Observer):
        @hookimpl(wrapper=True)
        def save(self, run):
            if run.progress.step == 4:
                raise second("during the emergency save")
            return (yield)

    made = trainer(tmp_path, ("raises", Raises("plan_step", after=False)), Impatient())
    with caplog.at_level(logging.ERROR, "drivetrain"), pytest.raises(ArithmeticError) as caught:
        fit(made)
    note = f"the state of step 4 could not be saved: {second.__name__}: during the emergency save; the newest"
    assert any(note in each for each in caught.value.__notes__)
    assert note in caplog.text
    assert steps(tmp_path) == named(3)


def test_a_full_disk_at_the_emergency_save(tmp_path):
    """The real save's error is in the note, and the checkpoint before is whole."""
    made = trainer(tmp_path, ("raises", Raises("plan_step", after=False)), checkpoint=full_after(1))
    with pytest.raises(ArithmeticError) as caught:
        fit(made)
    assert any("could not be saved: CheckpointError" in note for note in caught.value.__notes__)
    assert steps(tmp_path) == named(3)


def test_an_instance_forgets_the_run_before(tmp_path):
    """A save that failed in one run does not keep the next run of the same instances from saving."""
    made = trainer(tmp_path / "one", checkpoint=full_after(0))
    with pytest.raises(Exception, match="injected"):
        fit(made)
    made.plugins["checkpoint"] = Checkpoint(every="100 steps")
    made.plugins["raises"] = Raises("plan_step", after=False)
    with pytest.raises(ArithmeticError):
        fit(made)
    assert steps(tmp_path / "one")[-1:] == named(4)


def test_nothing_to_save_with():
    """A run without a plugin that saves is refused."""
    with pytest.raises(PlanError, match="'save-on-error' requires 'checkpoint', which no plugin"):
        Trainer(Net(), [AdamW(lr=0.1), SaveOnError()], steps=1).fit(Rows())


def fail(folder):
    """Fail between two steps; return at which, and what was said."""

    class Reduces:
        provides = ("data-parallel",)

        @hookimpl
        def gradients_ready(self, step):
            for parameter in step.run.parameters:
                torch.distributed.all_reduce(parameter.grad)

    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("drivetrain").addHandler(handler)
    plugins = [AdamW(lr=0.01), Loader(batch_size=4), Checkpoint(every="3 steps"), SaveOnError(), ("all", Reduces())]
    made = Trainer(Net(), [*plugins, ("raises", Raises("plan_step", after=False))], output=folder, steps=8, seed=3)
    with contextlib.suppress(ArithmeticError):
        made.fit(Rows())
    return made.run.progress.step, [message for message in heard if "save-on-error" in message]


def test_no_rank_saves_alone(tmp_path):
    """With two ranks nothing is saved, nobody waits for the other, and each says why."""
    for step, heard in run_ranks(fail, str(tmp_path)):
        assert step == 4
        assert ["one of 2 ranks cannot save by itself" in message for message in heard] == [True]
