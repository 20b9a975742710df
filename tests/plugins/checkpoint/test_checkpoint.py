"""The plugin in runs: when it saves, what it keeps, what it restores, and which runs it refuses to go on with."""

from __future__ import annotations

import ast
import logging
import os
import random
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_runs import ROWS, Odd, Tied, named, steps, trainer

import drivetrain_plugins.checkpoint
from drivetrain import CheckpointError, Trainer, hookimpl, plugin
from drivetrain_plugins import SGD, AdamW, Checkpoint

# --- when, and what is kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every": "2 steps", "keep": 10}, [2, 4, 6, 7]),
        ({"every": "2 steps", "keep": 10, "at_end": False}, [2, 4, 6]),
        ({"every": "1 epoch", "keep": 10}, [4, 7]),
        ({"every": 3, "keep": 1}, [7]),
        ({"every": "2 steps", "keep": 2}, [6, 7]),
        ({"every": "100 steps"}, [7]),
        ({"every": "100 steps", "at_end": False}, []),
    ],
)
def test_when_and_how_many(tmp_path, options, expected):
    """Saves come at every multiple and, if asked, at the end, once; the newest `keep` remain."""
    trainer(tmp_path, checkpoint=Checkpoint(**options), steps=7).fit(ROWS)
    assert steps(tmp_path) == named(*expected)


def test_a_stop_is_saved_first(tmp_path):
    """A run that is stopped by any plugin, wherever it stands in the list, leaves a checkpoint of its last step."""

    class Stop:
        @hookimpl
        def step_end(self, step):
            if step.number == 2:
                step.run.request_stop("enough")

    result = trainer(tmp_path, Stop(), checkpoint=Checkpoint(every=100), steps=7).fit(ROWS)
    assert result.stopped == "enough"
    assert steps(tmp_path) == named(3)


def test_saved_is_told_after_the_commit(tmp_path):
    """`saved` hears of a checkpoint that can be loaded at that moment."""
    heard = []

    class Listener:
        @hookimpl
        def saved(self, run, path):
            assert run.hooks.load(run, path) == path
            heard.append(path.name)

    trainer(tmp_path, Listener(), steps=4).fit(ROWS)
    assert heard == named(2, 4)


def test_rotation_in_a_relative_folder(tmp_path, monkeypatch):
    """A folder given relative to where the run starts is rotated like any other."""
    monkeypatch.chdir(tmp_path)
    trainer("relative", checkpoint=Checkpoint(every="2 steps", keep=2), steps=7).fit(ROWS)
    assert steps(tmp_path / "relative") == named(6, 7)


def test_rotation_touches_only_its_own(tmp_path):
    """Files and folders that the plugin did not write, and the checkpoint gone on from, survive every rotation."""
    trainer(tmp_path, steps=2).fit(ROWS)
    foreign = tmp_path / "checkpoints"
    (foreign / "step-00000001").mkdir()
    (foreign / "step-00000001" / "mine.txt").write_text("mine")
    (foreign / "best").mkdir()
    (foreign / "notes.txt").write_text("mine")
    (foreign / ".tmp-mine").mkdir()
    trainer(tmp_path, steps=12).fit(ROWS, resume=foreign / "step-00000002")
    assert steps(tmp_path) == [".tmp-mine", "best", "notes.txt", *named(1, 2, 10, 12)]
    trainer(tmp_path, steps=16).fit(ROWS, resume=foreign / "step-00000012")
    assert steps(tmp_path) == [".tmp-mine", "best", "notes.txt", *named(1, 12, 14, 16)]


def test_left_overs_go_at_the_next_start_not_at_a_load(tmp_path):
    """What a killed process left unfinished is removed when a run starts; loading alone changes nothing."""
    trainer(tmp_path, steps=2).fit(ROWS)
    left = [f".tmp-00000004-{'0' * 16}", f".trash-00000000-{'f' * 16}"]
    for name in left:
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(b"half")
    run = (made := trainer(tmp_path, steps=4)).assemble(ROWS)
    run.hooks.load(run, None)
    assert set(left) < set(steps(tmp_path))
    made.fit(ROWS, resume=True)
    assert steps(tmp_path) == named(2, 4)


def test_going_on_from_an_older_one_replaces_the_later(tmp_path):
    """After going on from an older checkpoint, later ones of the same step are replaced by the new ones."""
    trainer(tmp_path, checkpoint=Checkpoint(every=2, keep=9), steps=6).fit(ROWS)
    old = (tmp_path / "checkpoints" / "step-00000004").stat().st_ino
    trainer(tmp_path, checkpoint=Checkpoint(every=2, keep=9), steps=6).fit(
        ROWS, resume=tmp_path / "checkpoints" / "step-00000002"
    )
    assert steps(tmp_path) == named(2, 4, 6)
    assert (tmp_path / "checkpoints" / "step-00000004").stat().st_ino != old


def test_a_strangers_folder_of_the_same_name_is_kept(tmp_path, caplog):
    """A folder in the way that is no valid checkpoint is moved aside under a name that is told, not deleted."""
    trainer(tmp_path, steps=2).fit(ROWS)
    (tmp_path / "checkpoints" / "step-00000004").mkdir()
    (tmp_path / "checkpoints" / "step-00000004" / "mine.txt").write_text("mine")
    with caplog.at_level(logging.WARNING, "drivetrain"):
        trainer(tmp_path, steps=4).fit(ROWS, resume="auto")
    (aside,) = (tmp_path / "checkpoints").glob("step-00000004.replaced-*")
    assert (aside / "mine.txt").read_text() == "mine"
    assert any(aside.name in r.getMessage() for r in caplog.records)


def test_modes_follow_the_umask(tmp_path):
    """Folders and files are as readable as the umask says, for a group that shares them."""
    before = os.umask(0o027)
    try:
        trainer(tmp_path, steps=2).fit(ROWS)
    finally:
        os.umask(before)
    folder = tmp_path / "checkpoints" / "step-00000002"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o640}


# --- what is restored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [AdamW(lr=0.01), SGD(lr=0.1, momentum=0.9)], ids=["adamw", "sgd"])
def test_everything_is_restored_bit_for_bit(tmp_path, optimizer):
    """Types, 0-dim tensors, the optimizer's steps, ties, counters and all three global generators are as they were."""
    saved = trainer(tmp_path, optimizer=optimizer, steps=3)
    saved.fit(ROWS)
    draws = torch.rand(3), np.random.random(3), [random.random(), random.gauss(0, 1)]  # noqa: NPY002
    made = trainer(tmp_path, optimizer=optimizer, steps=3)
    run = made.assemble(ROWS)
    with torch.no_grad():
        for tensor in (*run.model.parameters(), *run.model.buffers()):
            tensor.fill_(7)
    assert run.hooks.load(run, None) == tmp_path / "checkpoints" / "step-00000003"
    again = torch.rand(3), np.random.random(3), [random.random(), random.gauss(0, 1)]  # noqa: NPY002
    assert torch.equal(draws[0], again[0])
    assert draws[1].tolist() == again[1].tolist()
    assert draws[2] == again[2]
    then, now = saved.run.state_dict(), run.state_dict()
    assert now["progress"] == then["progress"]
    assert now["optimizer"]["param_groups"] == then["optimizer"]["param_groups"]
    assert now["model"].keys() == then["model"].keys()
    pairs = [(then["model"][k], now["model"][k]) for k in now["model"]]
    for index, entry in then["optimizer"]["state"].items():
        pairs += [(value, now["optimizer"]["state"][index][key]) for key, value in entry.items() if value is not None]
    for a, b in pairs:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)
    assert run.model.one.weight.data_ptr() == run.model.two.weight.data_ptr()


def test_optimizer_state_of_another_type_than_its_parameter(tmp_path):
    """A float32 state of a bfloat16 parameter, which torch would cast at load, comes back as float32."""

    class Float32State(torch.optim.Optimizer):
        def __init__(self, groups):
            super().__init__(groups, {"lr": 0.1})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["mean"] = state.get("mean", torch.zeros_like(p, dtype=torch.float32)) + p.grad.float() / 3
                    state["names"] = {"inner": torch.tensor([1, 2])}

    @plugin(role="optim")
    class Own:
        @hookimpl
        def build_optimizer(self, run, groups):
            return Float32State(groups)

    made = []
    for _ in range(2):
        run = trainer(tmp_path, optimizer=Own(), steps=2)
        run.model.to(torch.bfloat16)
        made.append(run)
    rows = {"x": ROWS["x"].to(torch.bfloat16)}
    made[0].fit(rows)
    run = made[1].assemble(rows)
    run.hooks.load(run, None)
    states = [list(t.run.optimizer.state.values()) for t in made]
    for a, b in zip(*states, strict=True):
        assert a["mean"].dtype == b["mean"].dtype == torch.float32
        assert torch.equal(a["mean"], b["mean"])


def test_plugin_state_of_odd_values(tmp_path):
    """NaN, infinity, tuples, integer keys and big integers in a plugin's state are restored as they were."""
    odd, made = Odd(), Odd()
    odd._value = {3: (1.5, float("inf")), "n": float("nan"), "big": 2**70, "$tensor": [torch.tensor(True)]}
    trainer(tmp_path, odd, steps=2).fit(ROWS)
    run = trainer(tmp_path, made, steps=2).assemble(ROWS)
    run.hooks.load(run, None)
    assert str(made._value) == str(odd._value)


def test_state_that_cannot_be_saved_is_named(tmp_path):
    """A plugin's state that cannot be restored is refused at the first save, by the plugin's name."""
    odd = Odd()
    odd._value = {1, 2}
    with pytest.raises(CheckpointError, match=r"plugins/odd/value cannot be saved. Received: builtins.set"):
        trainer(tmp_path, odd, steps=2).fit(ROWS)
    assert steps(tmp_path) == []


# --- law -------------------------------------------------------------------------------------------------------------


def test_saving_changes_no_bit_of_training(tmp_path):
    """The weights are the same with a checkpoint at every step and with none."""
    with_it = trainer(tmp_path, checkpoint=Checkpoint(every=1), steps=6)
    with_it.fit(ROWS)
    torch.default_generator.manual_seed(0)
    without = Trainer(Tied(), [AdamW(lr=0.01)], seed=3, steps=6)
    without.fit(ROWS)
    for a, b in zip(with_it.run.model.parameters(), without.run.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_pickled_or_executed(tmp_path):
    """No audit event of unpickling, executing or starting anything is raised by saving and loading."""
    seen, recording = [], True
    forbidden = (
        "pickle.find_class",
        "marshal.load",
        "exec",
        "compile",
        "os.system",
        "subprocess.Popen",
        "socket.connect",
    )

    def hook(event, args):
        if recording and event.startswith(forbidden):
            seen.append((event, args))

    trainer(tmp_path / "warm", steps=2).fit(ROWS)  # modules are imported
    made = trainer(tmp_path / "run", steps=2)
    made.fit(ROWS)
    sys.addaudithook(hook)
    try:
        run = made.run
        run.hooks.save(run, tmp_path / "run" / "checkpoints" / "step-00000002")
        run.hooks.load(run, None)
    finally:
        recording = False
    assert seen == []


def test_the_sources_name_no_pickle():
    """No module of the plugin names a loader that can execute what it reads."""
    banned = {"pickle", "marshal", "dill", "shelve", "joblib", "cloudpickle", "eval", "exec"}
    for path in Path(drivetrain_plugins.checkpoint.__path__[0]).glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {a.name for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not names & banned, path
        assert not calls & {"torch.load", "torch.save", "np.load", "numpy.load"}, path
