"""Beginning a new run with weights of an old one."""

from __future__ import annotations

import logging

import pytest
import torch
from checkpoint_runs import ROWS, trainer
from safetensors.torch import save_file

from drivetrain import CheckpointError
from drivetrain_plugins import Checkpoint, ExportSafetensors, WarmStart


@pytest.fixture
def old(tmp_path):
    """Return the folder of a finished run, and its weights."""
    made = trainer(tmp_path / "old", ExportSafetensors(), steps=4)
    made.fit(ROWS)
    return tmp_path / "old", {name: t.clone() for name, t in made.run.state_dict()["model"].items()}


def begun(folder, path, **options):
    """Return a run that has been assembled with the weights at `path`."""
    made = trainer(folder, WarmStart(str(path), **options), steps=2)
    with torch.no_grad():
        made.model.one.weight.zero_()
    return made.assemble(ROWS)


@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/step-00000004", "model.safetensors"])
def test_the_weights_are_those(tmp_path, old, path):
    """A run's folder, its checkpoints, one of them and an exported file give the same weights, and nothing else."""
    run = begun(tmp_path / "new", old[0] / path)
    now = run.state_dict()
    persistent = [name for name in old[1] if name in run.model.state_dict()]
    assert all(torch.equal(now["model"][name], old[1][name]) for name in persistent)
    assert now["model"]["one.weight"].data_ptr() == now["model"]["two.weight"].data_ptr()
    assert run.progress.step == 0
    assert not run.optimizer.state


def test_weights_only_checkpoints_are_for_this(tmp_path):
    """What a run of `what="weights"` saved cannot be resumed, and begins a new run; the error says which word does."""
    saving = {"every": 2, "what": "weights"}
    made = trainer(tmp_path / "old", checkpoint=Checkpoint(**saving), steps=4)
    made.fit(ROWS)
    with pytest.raises(CheckpointError, match=r"holds weights only.*add the plugin `warm-start`"):
        trainer(tmp_path / "old", checkpoint=Checkpoint(**saving), steps=6).fit(ROWS, resume=True)
    path = tmp_path / "old" / "checkpoints" / "step-00000004"
    with pytest.raises(CheckpointError, match="holds weights only"):
        trainer(tmp_path / "other", steps=6).fit(ROWS, resume=path)
    run = begun(tmp_path / "new", tmp_path / "old")
    assert torch.equal(run.model.one.weight, made.run.model.one.weight)


def test_other_weights_are_refused_or_taken_in_part(tmp_path, old, caplog):
    """Names, shapes and types that differ are named; without `strict` what fits is taken, and the rest told."""
    weights = {
        "one.weight": torch.ones(4, 4),
        "one.bias": torch.ones(3),
        "third": torch.ones(()),
        "more": torch.ones(1),
    }
    save_file(weights, str(tmp_path / "part.safetensors"))
    expected = r"missing: count, two.bias \(2\); left over: more \(1\); unlike: .*one.bias is float32\[3\] there"
    with pytest.raises(CheckpointError, match=expected):
        begun(tmp_path / "new", tmp_path / "part.safetensors")
    with caplog.at_level(logging.WARNING, "drivetrain"):
        run = begun(tmp_path / "new", tmp_path / "part.safetensors", strict=False)
    assert torch.equal(run.model.one.weight, torch.ones(4, 4))
    assert "warm-start: 1 of 6 tensors taken" in caplog.text


def test_damage_and_nothing_are_told(tmp_path, old):
    """A damaged checkpoint, a file that is none and a folder without one are refused by name."""
    with pytest.raises(CheckpointError, match=r"nowhere: manifest.json is missing"):
        begun(tmp_path / "new", tmp_path / "nowhere")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"bad.safetensors cannot be read as safetensors"):
        begun(tmp_path / "new", tmp_path / "bad.safetensors")
    path = old[0] / "checkpoints" / "step-00000004" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="expected sha256"):
        begun(tmp_path / "new", path.parent)
    assert begun(tmp_path / "new", old[0]).progress.step == 0  # the one before is taken
