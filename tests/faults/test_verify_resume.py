"""verify_resume: after loading, the run would save what the checkpoint holds, or resuming fails."""

from __future__ import annotations

import logging
import shutil

import attrs
import faults_worker
import pytest
import torch

from drivetrain import CheckpointError, hookimpl, plugin
from drivetrain_plugins import AsyncCheckpoint, Checkpoint


@plugin(role="report", effect="observes")
class Keeps:
    """A plugin with a tensor and a number, which can lose either when it loads."""

    loses: str = ""
    _sum: torch.Tensor = attrs.field(init=False, factory=lambda: torch.zeros(3))
    _steps: int = attrs.field(init=False, default=0)

    @hookimpl
    def step_end(self, step):
        self._sum += 0.5
        self._steps += 1

    def state_dict(self):
        return {"sum": self._sum, "steps": self._steps}

    def load_state_dict(self, state):
        if self.loses != "sum":
            self._sum = state["sum"]
        if self.loses != "steps":
            self._steps = state["steps"]


def trainer(folder, *plugins, kind=Checkpoint, **options):
    """Return a trainer of the reference run with another checkpoint plugin, and its rows."""
    made, rows = faults_worker.build(faults_worker.Job(folder=str(folder)), faults_worker.LocalStore())
    own = [p for n, p in made.plugins.items() if n != "checkpoint"]
    checkpoint = kind(every="2 steps", keep=2, verify_resume=True, **options)
    return faults_worker.Trainer(
        made.model, [*own, *plugins, checkpoint], output=folder, steps=10, seed=11, log_every=3
    ), rows


def load(folder, *plugins, **options):
    made, rows = trainer(folder, *plugins, **options)
    run = made.assemble(rows)
    return run, run.hooks.load(run, None)


@pytest.fixture
def saved(tmp_path):
    """Return the folder of a finished run with the plugin `keeps`."""
    made, rows = trainer(tmp_path / "run", Keeps())
    made.fit(rows)
    return tmp_path / "run"


@pytest.mark.parametrize("kind", [Checkpoint, AsyncCheckpoint])
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_good_one_is_accepted(tmp_path, form, kind, caplog):
    """What was saved is what the run would save after loading, in either form, and that is said."""
    made, rows = trainer(tmp_path / "run", Keeps(), form=form)
    made.fit(rows)
    with caplog.at_level(logging.INFO, "drivetrain"):
        run, path = load(tmp_path / "run", Keeps(), form=form, kind=kind)
    assert path.name == "step-00000010"
    assert run.progress.step == 10
    assert [r.getMessage() for r in caplog.records] == [f"checkpoint: the run's state has the digests of {path}"]


@pytest.mark.parametrize(("loses", "file"), [("sum", "state.safetensors"), ("steps", "state.json")])
def test_a_lost_part_is_noticed(saved, loses, file):
    """A plugin that loses a part of its state on load is an error with the file and both digests; without, silence."""
    pattern = rf"step-00000010: {file}: .* has the sha256 [0-9a-f]{{64}}; expected [0-9a-f]{{64}}"
    with pytest.raises(CheckpointError, match=pattern) as caught:
        load(saved, Keeps(loses=loses))
    import json

    manifest = json.loads((saved / "checkpoints" / "step-00000010" / "manifest.json").read_text())
    assert manifest["files"][file]["sha256"] in str(caught.value)
    made, rows = trainer(saved, Keeps(loses=loses))
    made.plugins["checkpoint"].verify_resume = False
    run = made.assemble(rows)
    assert run.hooks.load(run, None).name == "step-00000010"


def test_a_lost_part_of_a_sharded_one_is_noticed(tmp_path):
    """The same where each rank has written a part."""
    made, rows = trainer(tmp_path / "run", Keeps(), form="sharded")
    made.fit(rows)
    for loses, file in (("sum", "part-00000.safetensors"), ("steps", "state.json")):
        with pytest.raises(CheckpointError, match=f"step-00000010: {file}: .* has the sha256"):
            load(tmp_path / "run", Keeps(loses=loses), form="sharded")


def test_a_changed_weight_is_noticed(saved):
    """A model that another plugin changes while it loads is noticed by the model's file."""

    class Meddles(Keeps):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            with torch.no_grad():
                self.model.head.bias += 1

    meddles = Meddles()
    made, rows = trainer(saved, ("keeps", meddles))
    run = made.assemble(rows)
    meddles.model = run.model
    with pytest.raises(CheckpointError, match=r"model/head.bias is not what was saved|model.safetensors: after"):
        run.hooks.load(run, None)


def test_observers_may_come_and_go(saved):
    """Where other observers have a state of their own, the rest is compared, and nothing is wrong."""
    assert load(saved, Keeps(), ("more", Keeps()))[1].name == "step-00000010"
    assert load(saved)[1].name == "step-00000010"


def test_the_run_that_was_verified_goes_on_exactly(finished, tmp_path):
    """Verifying changes no bit: the run goes on to the end of the uninterrupted one."""
    folder, reference = finished
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000010")
    made, rows = trainer(tmp_path / "run")
    result = made.fit(rows, resume=True)
    assert result.steps == 10
    state = made.run.state_dict()
    for part in ("model", "optimizer", "progress", "interval"):
        assert faults_worker.digest(state[part]) == reference["digests"][part], part
