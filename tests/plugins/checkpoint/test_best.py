"""The best checkpoints: saved when they are measured, kept whatever comes, found again anywhere."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from checkpoint_runs import ROWS, named, steps, trainer

from drivetrain import ConfigError, hookimpl, plugin
from drivetrain_plugins import Checkpoint, Evaluate


@plugin(role="evaluate", effect="observes", provides=["evaluation"])
class Script:
    """An evaluator whose metrics are written down: by split and step, under the name "loss" unless said otherwise."""

    values: dict = attrs.field(factory=dict)  # {step: value}, or {split: {step: value}}
    name: str = "loss"

    @hookimpl
    def step_end(self, step):
        at = step.run.progress.step
        if any(at in (of if isinstance(of, dict) else self.values) for of in self.values.values()):
            step.run.request_evaluate("as written")

    @hookimpl
    def evaluate(self, run, split):
        values = self.values.get(split, self.values)
        at = run.progress.step
        return {self.name: values[at], "other": float(at)} if at in values else {"other": float(at)}


def run(folder, values, until, *, resume=False, evaluate=ROWS, name="loss", **options):
    """Make a run with metrics that are written down, and return its checkpoints."""
    options = {"every": "100 steps", "keep": 1, "best": 1, "at_end": False, **options}
    made = trainer(folder, ("script", Script(values, name)), checkpoint=Checkpoint(**options), steps=until)
    made.fit(ROWS, evaluate, resume=resume)
    return steps(folder) if (folder / "checkpoints").exists() else []


def metrics_of(folder, step):
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())["metrics"]


# --- which -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("best", "mode", "values", "expected"),
    [
        (1, "min", {2: 0.5, 3: 0.4, 5: 0.6}, [3]),
        (1, "max", {2: 0.5, 3: 0.4, 5: 0.6}, [5]),
        (2, "min", {1: 0.9, 2: 0.5, 3: 0.4, 5: 0.6}, [2, 3]),
        (2, "max", {1: 0.9, 2: 0.5, 3: 0.4, 5: 0.6}, [1, 5]),
        (3, "min", {2: 0.5, 3: 0.4}, [2, 3]),
        (1, "min", {2: 0.5, 3: 0.5, 4: 0.5}, [2]),  # a tie: the first stays
        (2, "max", {2: 0.5, 3: 0.5, 4: 0.5}, [2, 3]),
        (1, "min", {1: math.nan, 2: 0.5, 3: math.nan}, [2]),
        (1, "max", {1: math.inf, 2: 0.5, 3: math.inf, 4: 0.4}, [2]),
        (1, "min", {1: -math.inf, 2: 0.5, 3: -math.inf}, [2]),
        (2, "min", {1: math.nan, 2: math.inf}, []),
        (1, "max", {1: -3.0, 2: -2.0, 3: 0.0, 4: -0.0}, [3]),
    ],
)
def test_which_are_the_best(tmp_path, best, mode, values, expected):
    """The best by the metric are saved when they are measured, though nothing is due; a value that is none never is."""
    assert run(tmp_path, values, 6, best=best, mode=mode, metric="evaluate/loss") == named(*expected)


def test_the_best_stand_beside_the_newest(tmp_path):
    """`keep` counts the newest, `best` the best; one checkpoint can be both."""
    assert run(tmp_path, {2: 0.5, 3: 0.1, 6: 0.7}, 9, every="2 steps", keep=2, best=2) == named(2, 3, 6, 8)
    assert run(tmp_path, {10: 0.2}, 12, resume=True, every="2 steps", keep=2, best=2) == named(3, 8, 10, 12)


def test_a_real_evaluation(tmp_path):
    """With the plugin `evaluate`, the checkpoint that is kept is that of the least loss it logged, of that step."""
    seen = {}

    class Listener:
        @hookimpl
        def evaluated(self, run, split, metrics):
            seen[run.progress.step] = metrics["loss"]

    checkpoint = Checkpoint(every="100 steps", keep=1, best=1, mode="max", at_end=False)
    trainer(tmp_path, Listener(), Evaluate(every="1 step"), checkpoint=checkpoint, steps=5).fit(ROWS, ROWS)
    best = max(seen, key=seen.get)
    assert steps(tmp_path) == named(best)
    assert metrics_of(tmp_path, best) == {"evaluate/loss": seen[best]}


def test_a_metric_is_of_its_step(tmp_path):
    """The manifest holds what was measured at its own step, all splits of it, and nothing of an earlier step."""
    values = {"evaluate/a": {2: 0.5}, "evaluate/b": {2: math.nan, 3: 0.4}}
    sets = {"a": ROWS, "b": ROWS}
    run(tmp_path, values, 4, evaluate=sets, every="1 step", keep=9, metric="evaluate/b/loss")
    assert metrics_of(tmp_path, 1) == metrics_of(tmp_path, 4) == {}
    nan = {"$float": "nan"}
    both = {"evaluate/a/loss": 0.5, "evaluate/a/other": 2.0, "evaluate/b/loss": nan, "evaluate/b/other": 2.0}
    assert metrics_of(tmp_path, 2) == both
    assert metrics_of(tmp_path, 3) == {"evaluate/a/other": 3.0, "evaluate/b/loss": 0.4, "evaluate/b/other": 3.0}


def test_one_of_several_sets(tmp_path):
    """With several evaluation sets the one that the metric names decides, whatever the others say."""
    values = {"evaluate/a": {1: 0.1, 2: 0.2, 3: 0.3}, "evaluate/b": {1: 0.3, 2: 0.1, 3: 0.2}}
    sets = {"a": ROWS, "b": ROWS}
    assert run(tmp_path / "a", values, 3, evaluate=sets, metric="evaluate/a/loss") == named(1)
    assert run(tmp_path / "b", values, 3, evaluate=sets, metric="evaluate/b/loss") == named(2)


# --- for how long ----------------------------------------------------------------------------------------------------


def test_the_best_survives_rotations_and_resumes(tmp_path):
    """Rotation after rotation, in one run and in those that go on from it, the best is still there."""
    values = {2: 0.1, 4: 0.5, 7: 0.2, 12: 0.3}
    for until in (5, 9, 14):
        assert "step-00000002" in run(tmp_path, values, until, resume="auto", every="1 step")
    assert steps(tmp_path) == named(2, 9, 14)  # the best, what the run went on from, the newest


def test_a_better_one_takes_its_place_after_a_resume(tmp_path):
    """A resumed run knows how good the best before it was: a worse one is not saved, a better one replaces it."""
    assert run(tmp_path, {2: 0.5}, 3, at_end=True) == named(2, 3)
    assert run(tmp_path, {4: 0.6, 5: 0.4}, 6, resume=True) == named(3, 5)


def test_the_best_survives_another_process_and_a_move(tmp_path):
    """A run's folder that was moved and is gone on with by another process keeps the best that is in it."""
    run(tmp_path / "here", {2: 0.1}, 3, at_end=True)
    shutil.move(tmp_path / "here", tmp_path / "there")
    script = (
        "from test_best import run; from pathlib import Path; import sys\n"
        "run(Path(sys.argv[1]), {4: 0.2, 5: 0.3, 8: 0.4}, 9, resume=True, every='2 steps')"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "there")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})
    assert steps(tmp_path / "there") == named(2, 3, 8)
    assert metrics_of(tmp_path / "there", 2)["evaluate/loss"] == 0.1


def test_after_a_fall_back_the_best_of_this_course_counts(tmp_path):
    """Later checkpoints of a course that the run has left do not keep a good one from being saved."""
    run(tmp_path, {2: 0.5, 6: 0.1}, 6, every="2 steps", keep=9)
    older = tmp_path / "checkpoints" / "step-00000002"
    assert run(tmp_path, {3: 0.3, 5: 0.4}, 5, resume=older, keep=9) == named(2, 3, 4, 6)
    newer = older.with_name("step-00000003")
    assert run(tmp_path, {}, 8, resume=newer, every="2 steps", keep=1) == named(3, 8)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_a_metric_that_is_not_measured_is_named(tmp_path):
    """At the first evaluation without the metric the run ends, with the metrics that there are."""
    with pytest.raises(ConfigError, match=r"'evaluate/f1', which .* Received: \['evaluate/loss', 'evaluate/other'\]"):
        run(tmp_path, {2: 0.5}, 4, metric="evaluate/f1")


@pytest.mark.parametrize("metric", ["loss", "test/loss", "evaluate/a/loss", "evaluat/loss", ""])
def test_a_split_that_is_not_there_is_refused_before_step_0(tmp_path, metric):
    """A metric of a split that nobody evaluates is refused before anything is trained, with the splits there are."""
    checkpoint = Checkpoint(best=1, metric=metric)
    made = trainer(tmp_path, Evaluate(), checkpoint=checkpoint, steps=4)
    with pytest.raises(ConfigError, match=r"add `evaluate` and that split.*Received: splits .*\['evaluate'\]"):
        made.fit(ROWS, ROWS)
    assert made.run.progress.step == 0


def test_nobody_who_evaluates_is_refused_before_step_0(tmp_path):
    """With `best` and no evaluator, or no evaluation data, nothing is trained."""
    with pytest.raises(ConfigError, match="no plugin evaluates"):
        trainer(tmp_path, checkpoint=Checkpoint(best=1), steps=4).fit(ROWS, ROWS)
    with pytest.raises(ConfigError, match="nothing evaluates 'evaluate'"):
        trainer(tmp_path, checkpoint=Checkpoint(best=1), steps=4).fit(ROWS)
    made = trainer(tmp_path, ("script", Script()), checkpoint=Checkpoint(best=1), steps=4)
    with pytest.raises(ConfigError, match=r"Received: splits to evaluate \[\]"):
        made.fit(ROWS)


def test_without_best_nothing_is_asked_for(tmp_path):
    """With best=0 evaluations save nothing and need no metric; their values are noted all the same."""
    assert run(tmp_path, {2: 0.5}, 4, best=0, metric="nowhere/f1", every="2 steps", keep=9) == named(2, 4)
    assert metrics_of(tmp_path, 2)["evaluate/loss"] == 0.5
