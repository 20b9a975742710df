"""average-checkpoints: what is exported is the mean, and the run stays as it was."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from drivetrain import CheckpointError, ConfigError, DrivetrainError, PlanError, Trainer
from drivetrain.testing.carriers import tiny_module
from drivetrain.testing.kinds import kit_rows
from drivetrain_plugins import SGD, AverageCheckpoints, Checkpoint, Evaluate, ExportSafetensors, JsonlLog


def fitted(folder, *plugins, keep=3, steps=6, **options):
    checkpoint = Checkpoint(every="2 steps", keep=keep, **options)
    trainer = Trainer(
        tiny_module(), [SGD(lr=0.1), Evaluate(every="2 steps"), checkpoint, *plugins], output=folder, seed=3
    )
    trainer.fit(kit_rows("tensors", 40), evaluate=kit_rows("tensors", 12, start=1000), steps=steps)
    return trainer


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def mean_of(folder, steps):
    sets = [weights(folder, step) for step in steps]
    names = [name for name in sets[0] if sets[0][name].is_floating_point()]
    return {name: (sum(one[name].double() for one in sets) / len(sets)).float() for name in names}


def exported(folder):
    return load_file(folder / "model.safetensors")


def test_the_export_is_the_mean_of_the_newest(tmp_path):
    """Each weight of the export is the mean of the three newest checkpoints', and the model keeps its own."""
    trainer = fitted(tmp_path, AverageCheckpoints(count=3), ExportSafetensors())
    found, wanted = exported(tmp_path), mean_of(tmp_path, [2, 4, 6])
    assert wanted.keys() <= found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    last = weights(tmp_path, 6)
    assert all(torch.equal(tensor, last[name]) for name, tensor in trainer.run.model.state_dict().items())
    assert not torch.equal(found["head.weight"], last["head.weight"])


def test_the_order_of_the_list_does_not_matter(tmp_path):
    """An exporter before it writes the same."""
    fitted(tmp_path / "after", AverageCheckpoints(count=2), ExportSafetensors())
    fitted(tmp_path / "before", ExportSafetensors(), AverageCheckpoints(count=2))
    first, second = exported(tmp_path / "after"), exported(tmp_path / "before")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_best_by_a_metric(tmp_path):
    """With `best`, those with the best metric are taken, whatever their age."""
    log, options = JsonlLog(), {"best": 2, "metric": "evaluate/loss"}
    fitted(tmp_path, AverageCheckpoints(count=2, which="best"), ExportSafetensors(), log, keep=1, steps=12, **options)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = sorted((line["evaluate/loss"], line["step"]) for line in lines if "evaluate/loss" in line)
    assert len(losses) == 6
    found, wanted = exported(tmp_path), mean_of(tmp_path, [step for _, step in losses[:2]])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_asked_for_later(tmp_path):
    """`Trainer.export` writes the mean, too."""
    trainer = fitted(tmp_path, AverageCheckpoints(count=3), ExportSafetensors())
    trainer.export("safetensors", tmp_path / "again.safetensors")
    first, again = exported(tmp_path), load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_too_few_are_kept(tmp_path):
    """A checkpoint plugin that keeps fewer is refused before step 0, with the option to change."""
    with pytest.raises(ConfigError, match=r"newest 3, and checkpoint keeps 2(.|\n)*checkpoint\.keep = 3 or more"):
        fitted(tmp_path, AverageCheckpoints(count=3), keep=2)


def test_too_few_were_saved(tmp_path):
    """A run that was too short for so many says how many there are."""
    with pytest.raises(DrivetrainError, match="needs 3 checkpoints, and there are 1"):
        fitted(tmp_path, AverageCheckpoints(count=3), ExportSafetensors(), steps=2)


def test_without_checkpoints(tmp_path):
    """It is refused where nothing saves."""
    with pytest.raises(PlanError, match="requires 'checkpoint'"):
        Trainer(tiny_module(), [SGD(), AverageCheckpoints()], output=tmp_path).fit(kit_rows("tensors", 40), steps=2)


def test_a_damaged_one_is_not_averaged(tmp_path, caplog):
    """Bytes that are not as they were written are refused, and the file is named."""
    trainer = fitted(tmp_path, AverageCheckpoints(count=3), ExportSafetensors())
    file = tmp_path / "checkpoints" / "step-00000004" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError, match=r"step-00000004: model\.safetensors"):
        trainer.export("safetensors", tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()
