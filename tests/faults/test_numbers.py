"""Numbers that are not finite, and spikes, in whole runs: what becomes of the step, the log, the files, and a resume.

What the guards do to one step is tested beside them (`tests/plugins/optim/test_nan_guard.py`, `test_spike_skip.py`,
`tests/plugins/precision/test_fp16.py`). Here a run is killed around the bad step and goes on from its files.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
from typing import ClassVar

import attrs
import faults_worker
import numpy as np
import pytest
import torch

from drivetrain import Trainer, TrainingError, hookimpl, option, plugin
from drivetrain.testing import digest
from drivetrain_plugins import FP16, AdamW, Checkpoint, Clip, Evaluate, JsonlLog, Linear, NanGuard, SpikeSkip

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "faults_worker"])
STEPS, BAD = 10, 5  # the bad step's number


@plugin(role="optim")
class Break:
    """Put what is not a number, or too large a one, into one step."""

    free_options: ClassVar = ("where",)  # a run without the fault may go on from one with it

    where: str = option("", help="loss, gradient, infinity, parameter or spike")
    step: int = option(BAD, help="the number of the step")

    @hookimpl(wrapper=True)
    def compute_loss(self, micro):
        loss = yield
        return loss * math.nan if self.where == "loss" and micro.step and micro.step.number == self.step else loss

    @hookimpl(wrapper=True)
    def backward(self, micro):
        yield
        if micro.step.number == self.step and self.where in ("gradient", "infinity", "spike"):
            grad = micro.run.model.project.weight.grad
            if self.where == "spike":
                grad *= 1e4
            else:
                grad[1, 2] = math.nan if self.where == "gradient" else -math.inf

    @hookimpl(tryfirst=True)
    def step_end(self, step):
        if step.number == self.step and self.where == "parameter":
            with torch.no_grad():
                step.run.model.project.weight[0, 0] = math.nan


@plugin(role="report", effect="observes")
class Seen:
    """What each step came to, and every log."""

    steps: list = attrs.field(init=False, factory=list)
    logs: list = attrs.field(init=False, factory=list)

    @hookimpl
    def step_end(self, step):
        self.steps.append((step.skipped, step.learning_rate))

    @hookimpl
    def log(self, run, metrics):
        self.logs.append((run.progress.step, metrics))


@plugin(role="control", effect="observes")
class Die:
    """Kill this process when so many steps are done, before they are saved."""

    at: int = 0

    @hookimpl(tryfirst=True)
    def step_end(self, step):
        if step.run.progress.step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


GUARDS = {
    "none": list,
    "raise": lambda: [NanGuard()],
    "later": lambda: [NanGuard(at_once=False)],
    "skip": lambda: [NanGuard(policy="skip", limit=4)],
    "roll-back": lambda: [NanGuard(policy="roll-back", limit=2, every=2)],
    "spike-skip": lambda: [SpikeSkip(factor=20.0, window=4, warmup=3)],
}


def build(folder, where, guard, half, *more, every="1 step", bad=BAD, **settings):
    """Return a trainer and its rows; every state that a guard has takes part."""
    torch.default_generator.manual_seed(1)
    precision = [FP16(init_scale=2.0**8, growth_interval=3, limit=4)] if half else []
    plugins = [*precision, AdamW(lr=3e-3), Linear(warmup=0.2), *GUARDS[guard](), Clip(norm=0.5), Break(where, bad)]
    plugins += [faults_worker.Recorder(), JsonlLog(), *more, Checkpoint(every=every, keep=20)]
    settings = {"steps": STEPS, "seed": 11, "log_every": 1, "device": "cpu", **settings}
    return Trainer(faults_worker.Tiny(), plugins, output=folder, **settings), faults_worker.Augmented()


def fit(folder, where, guard, half, *more, resume=False, seed=3, **settings):
    """Make the run, or go on with it; return it."""
    random.seed(seed)  # a resumed run takes these from the checkpoint
    np.random.seed(seed)  # noqa: NPY002 - the global one, which the recorder draws from
    trainer, rows = build(folder, where, guard, half, *more, **settings)
    trainer.fit(rows, resume=resume)
    return trainer.run


def until_killed(folder, what, at, resume):
    """Make the run in this process, which ends with it."""
    torch.set_num_threads(1)
    fit(folder, *what, Die(at), resume=resume, seed=at if resume else 3)


def kill(folder, *what, at, resume=False):
    """Make the run in another process that is killed when `at` steps are done."""
    process = SERVER.Process(target=until_killed, args=(folder, what, at, resume))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def checkpoints(folder):
    """Return the steps that stand on the disk; every byte of them is verified."""
    saved = [faults_worker.read(path) for path in sorted((folder / "checkpoints").iterdir())]
    return {one.manifest["step"]: one for one in saved}


def is_finite(tree):
    """Tell whether every tensor of a state is finite."""
    if isinstance(tree, torch.Tensor):
        return bool(tree.isfinite().all())
    return all(is_finite(value) for value in tree.values()) if isinstance(tree, dict) else True


# --- policies that end the run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", ["raise", "later"])
@pytest.mark.parametrize("where", ["loss", "gradient", "infinity"])
def test_raising_leaves_whole_checkpoints_of_good_weights(tmp_path, where, guard):
    """The error names the step, no file holds its weights, and without the fault the run goes on as if there was none."""
    with pytest.raises(TrainingError, match=rf"step {BAD}: (the loss is|gradients are) not finite"):
        fit(tmp_path / "run", where, guard, half=False)
    saved = checkpoints(tmp_path / "run")
    assert list(saved) == [1, 2, 3, 4, 5]
    assert all(is_finite(one.tree) for one in saved.values())
    resumed = fit(tmp_path / "run", "", guard, half=False, resume=True, seed=9)
    assert digest(resumed) == digest(fit(tmp_path / "straight", "", guard, half=False))


@pytest.mark.parametrize(
    ("guard", "half", "told"),
    [
        ("raise", False, rf"step {BAD + 1}: gradients are not finite"),
        ("skip", False, rf"step {BAD + 4}: gradients are not finite.*; 4 steps in a row were not"),
        ("none", True, rf"fp16: gradients of step {BAD + 4} and of 3 before it have overflowed"),
        ("skip", True, rf"fp16: gradients of step {BAD + 4} and of 3 before it have overflowed"),
    ],
)
def test_weights_that_are_not_finite_end_the_run(tmp_path, guard, half, told):
    """A weight that is NaN makes every step bad: the run ends, and goes on from before it as if it had never been."""
    with pytest.raises(TrainingError, match=f"(?s){told}"):
        fit(tmp_path / "run", "parameter", guard, half)
    saved = checkpoints(tmp_path / "run")
    good = [step for step, one in saved.items() if is_finite(one.tree["model"])]
    assert good == [1, 2, 3, 4, 5]
    path = tmp_path / "run" / "checkpoints" / f"step-{good[-1]:08d}"
    resumed = fit(tmp_path / "run", "", guard, half, resume=path, seed=9)
    assert digest(resumed) == digest(fit(tmp_path / "straight", "", guard, half))


# --- policies that skip ----------------------------------------------------------------------------------------------

SKIPPING = [
    ("loss", "skip", False, "non-finite gradients"),
    ("gradient", "skip", False, "non-finite gradients"),
    ("infinity", "roll-back", False, "non-finite gradients"),
    ("loss", "spike-skip", False, "a spike of the norm"),
    ("spike", "spike-skip", False, "a spike of the norm"),
    ("loss", "none", True, "overflow"),
    ("infinity", "raise", True, "overflow"),
    ("gradient", "skip", True, "overflow"),
    ("spike", "spike-skip", True, "a spike of the norm"),
]


@pytest.mark.parametrize(("where", "guard", "half", "reason"), SKIPPING)
def test_a_skipped_step_is_counted_and_seen(tmp_path, where, guard, half, reason):
    """One step is skipped, counted and in the state; the schedule waits for it; the log shows NaN, and only there."""
    seen = Seen()
    run = fit(tmp_path, where, guard, half, seen)
    assert [skipped for skipped, _ in seen.steps] == [reason if n == BAD else None for n in range(STEPS)]
    assert (run.progress.step, run.progress.applied, run.skipped_steps) == (STEPS, STEPS - 1, 1)
    applied = [n - (n > BAD) for n in range(STEPS)]
    assert [rate for _, rate in seen.steps] == pytest.approx([3e-3 * run.schedule(n) for n in applied], rel=1e-12)
    assert [metrics.get("skipped_steps") for _, metrics in seen.logs] == [None if n < BAD else 1 for n in range(STEPS)]
    not_finite = [n for n, (_, metrics) in enumerate(seen.logs) if not math.isfinite(metrics["loss"])]
    assert not_finite == ([BAD] if where == "loss" else [])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [n for n, line in enumerate(lines) if line["loss"] == "nan"] == not_finite
    norms = [metrics.get("grad_norm") for _, metrics in seen.logs]
    at_bad = norms.pop(BAD)  # nobody clips what is not applied; `spike-skip` has measured it before
    assert at_bad is None if guard != "spike-skip" else not at_bad < 100
    assert all(math.isfinite(norm) for norm in norms)
    saved = checkpoints(tmp_path)
    counted = [one.tree["counters"]["skipped_steps"] for one in saved.values()]
    assert counted == [int(step > BAD) for step in saved]
    assert all(is_finite(one.tree["model"]) and is_finite(one.tree["optimizer"]) for one in saved.values())
    before, after = (saved[step].tree for step in (BAD, BAD + 1))
    trained = {k for k, v in after["model"].items() if not torch.equal(v, before["model"][k])}
    assert trained <= {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "calls"}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(case[:3], id="-".join(map(str, case[:3])), marks=[pytest.mark.slow] * (i % 3 > 0))
        for i, case in enumerate(SKIPPING)
    ],
)
def test_killed_around_a_skipped_step(tmp_path, what):
    """Killed before, in and after the skipped step, a run ends with the bits and the log of one that was not."""
    straight = fit(tmp_path / "straight", *what)
    assert straight.skipped_steps == 1
    for at in (BAD, BAD + 1, BAD + 2):  # gone on with from the checkpoint before
        kill(tmp_path / "run", *what, at=at, resume=at > BAD)
        assert max(checkpoints(tmp_path / "run")) == at - 1
    resumed = fit(tmp_path / "run", *what, resume=True, seed=9)
    for part in ("model", "optimizer", "progress", "interval", "counters", "plugins"):
        assert digest(resumed, part) == digest(straight, part), part
    assert (tmp_path / "run" / "log.jsonl").read_text() == (tmp_path / "straight" / "log.jsonl").read_text()


def test_killed_around_a_roll_back(tmp_path):
    """Killed between a weight that became NaN and the roll-back that mends it, a run is mended in the same way."""
    what = ("parameter", "roll-back", False)
    straight = fit(tmp_path / "straight", *what)
    assert straight.skipped_steps == 2
    assert is_finite(straight.state_dict()["model"])
    for at in (BAD + 2, BAD + 3, BAD + 4):
        kill(tmp_path / "run", *what, at=at, resume=at > BAD + 2)
    saved = checkpoints(tmp_path / "run")
    assert [step for step, one in saved.items() if not is_finite(one.tree["model"])] == [BAD + 1, BAD + 2]
    resumed = fit(tmp_path / "run", *what, resume=True, seed=9)
    assert digest(resumed) == digest(straight)


def test_an_average_with_a_nan_is_nan_over_a_restart(tmp_path):
    """What an interval has added up is NaN from the bad step to the next log, also where the run is killed between."""
    what, settings = ("loss", "skip", False), {"log_every": 4, "bad": 4}
    seen = Seen()
    straight = fit(tmp_path / "straight", *what, seen, **settings)
    assert [(step, math.isnan(metrics["loss"])) for step, metrics in seen.logs] == [(4, False), (8, True), (10, False)]
    fit(tmp_path / "run", *what, faults_worker.StopAt(6), Seen(), **settings)
    assert math.isnan(faults_worker.newest(tmp_path / "run").tree["interval"]["loss"])
    resumed = fit(tmp_path / "run", *what, Seen(), resume=True, seed=9, **settings)
    assert digest(resumed, "model", "interval", "plugins") == digest(straight, "model", "interval", "plugins")


# --- the best --------------------------------------------------------------------------------------------------------


@plugin(role="evaluate", effect="observes")
class Measured:
    """Let evaluations give values that are chosen beforehand, by their step."""

    values: tuple = ()

    @hookimpl(wrapper=True)
    def evaluate(self, run, split):
        yield
        return {"loss": self.values[run.progress.step // 2 - 1]}


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("stop", [None, 5])
@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [
        ((NAN, 3.0, 2.0, NAN, 5.0), "min", [6]),
        ((NAN, 3.0, 4.0, -INF, 5.0), "min", [4]),
        ((1.0, NAN, INF, 4.0, 3.0), "max", [8]),
        ((NAN, NAN, -INF, INF, NAN), "max", []),
        ((2.0, NAN, NAN, NAN, NAN), "min", [2]),
    ],
)
def test_the_best_is_a_number(tmp_path, values, mode, best, stop):
    """NaN and infinities are worse than any number, at the first evaluation too, and over a restart."""

    def begin():
        torch.default_generator.manual_seed(1)
        checkpoint = Checkpoint(every="100 steps", keep=1, best=1, mode=mode)
        plugins = [AdamW(lr=3e-3), Measured(values), Evaluate(every="2 steps"), checkpoint]
        return Trainer(faults_worker.Tiny(), plugins, output=tmp_path, steps=STEPS, seed=11, device="cpu")

    rows = faults_worker.Augmented()
    if stop is not None:
        trainer = begin()
        trainer.plugins["stop-at"] = faults_worker.StopAt(stop)
        trainer.fit(rows, rows)
    begin().fit(rows, rows, resume="auto")
    kept = sorted({*best, STEPS, *([stop] if stop else [])})  # the newest, and what the run went on from
    assert list(checkpoints(tmp_path)) == kept
