"""Checkpoints that earlier versions wrote: every later version reads them, and goes on from them.

The files in `golden` are committed and never made again. Those of schema 1 were written before there was a schema 2;
`make_golden.py` writes those of a new schema, beside the old ones. Where one of these tests fails, the reader has to
learn the old form again: nobody's checkpoints can be written anew. What the run ends as depends on the processor; what
is read does not, so that is compared with what `golden/index.json` recorded.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil

import faults_worker
import make_golden
import numpy as np
import pytest
from make_golden import GOLDEN, INDEX, NAME
from safetensors.numpy import load

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _manifest, _saved
from drivetrain_plugins.checkpoint._place import checkpoint_at

INDEXED = json.loads(INDEX.read_text())
RUNS = [name for name, about in INDEXED.items() if about["draws"]]
WEIGHTS = sorted(INDEXED.keys() - set(RUNS))


@pytest.fixture
def changed(tmp_path):
    """Return a function that changes fields of a golden manifest, seals it, and returns the checkpoint."""

    def change(name, drop=(), **fields):
        path = tmp_path / NAME
        shutil.copytree(GOLDEN / name, path, dirs_exist_ok=True)
        content = json.loads((path / "manifest.json").read_text())
        content = {k: v for k, v in content.items() if k not in ("sha256", *drop)}
        (path / "manifest.json").write_bytes(_manifest.seal({**content, **fields}))
        return path

    return change


def resumed(name, folder, steps=6):
    """Return a run of the same plugins that has gone on from a copy of a golden checkpoint."""
    shutil.copytree(GOLDEN / name, folder / "checkpoints" / NAME)
    trainer, rows = make_golden.trainer(folder, steps=steps, on_change="accept")
    result = trainer.fit(rows, evaluate=faults_worker.Augmented(10), resume=True)
    return trainer.run, result


def test_every_schema_is_there():
    """Each schema there has been has its checkpoints, and the newest has them in every form and kind."""
    schemas = {json.loads((GOLDEN / name / "manifest.json").read_text())["schema"] for name in INDEXED}
    assert schemas == set(range(1, _manifest.SCHEMA + 1)), "a new schema: run tests/faults/make_golden.py"
    forms = {name.split("/")[1] for name in INDEXED if name.startswith(f"schema-{_manifest.SCHEMA}/")}
    assert forms == {"full", "sharded", "weights"}


@pytest.mark.parametrize("name", INDEXED)
def test_files_are_as_committed(name):
    """Every byte is as it was when it was written, and nothing was added."""
    files = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (GOLDEN / name).iterdir()}
    assert files == INDEXED[name]["files"]


@pytest.mark.parametrize("name", INDEXED)
def test_it_is_read_as_it_was_written(name):
    """It is verified, and each part of the state is what it was, bit for bit; a new part of the tree has no digest."""
    place = checkpoint_at(GOLDEN / name)
    assert _saved.check(*place)["step"] == 4
    saved = _saved.read(*place)
    expected = INDEXED[name]
    assert {part: faults_worker.digest(saved.tree[part]) for part in expected["digests"]} == expected["digests"]
    assert saved.tree["model"]["project.bias"].tolist() == expected["weight"]
    assert saved.tree["model"]["head.weight"] is saved.tree["model"]["embed.weight"]


@pytest.mark.parametrize("name", [n for n in INDEXED if (GOLDEN / n / "model.safetensors").exists()])
def test_tensors_are_those_of_the_library(name):
    """Safetensors' own reader, without this project's code, finds the same weights."""
    weights = load((GOLDEN / name / "model.safetensors").read_bytes())
    model = _saved.read(*checkpoint_at(GOLDEN / name)).tree["model"]
    assert model.keys() - weights.keys() == {"head.weight"}  # tied: stored once
    assert all(np.array_equal(weights[key], model[key].numpy()) for key in weights)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_it(name, tmp_path):
    """The same plugins go on to the end: the position, the recorder's lines and the optimizer's steps say so."""
    run, result = resumed(name, tmp_path)
    assert (result.steps, run.progress.step, run.progress.rows) == (6, 6, 90)
    lines = [line for line in run.plugins["recorder"]._lines if re.match(r"\d+ [0-9a-f]{64} ", line)]
    assert [int(line.split()[0]) for line in lines] == list(range(6))
    saved = _saved.read(*checkpoint_at(GOLDEN / name)).tree["plugins"]["recorder"]["lines"]
    assert run.plugins["recorder"]._lines[: len(saved)] == saved
    assert {float(state["step"]) for state in run.optimizer.state_dict()["state"].values()} == {6.0}
    written = _saved.check(*checkpoint_at(tmp_path / "checkpoints" / "step-00000006"))
    assert written["schema"] == _manifest.SCHEMA


@pytest.mark.parametrize("name", RUNS)
def test_draws_go_on_from_it(name, tmp_path):
    """Python's and NumPy's generators give what they would have given next, whatever was drawn before the load."""
    trainer, rows = make_golden.trainer(tmp_path, steps=6, on_change="accept")
    run = trainer.assemble(rows, evaluate=faults_worker.Augmented(10))
    run.hooks.load(run, GOLDEN / name)
    drawn = [random.random().hex(), float(np.random.random_sample()).hex()]  # noqa: NPY002 - the global one
    assert drawn == INDEXED[name]["draws"]


def test_forms_are_one_state(tmp_path):
    """From the full and the sharded form of one checkpoint, a run ends with the same bits."""
    ends = [
        faults_worker.digest(resumed(f"schema-2/{form}/{NAME}", tmp_path / form)[0].state_dict()["model"])
        for form in ("full", "sharded")
    ]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", RUNS)
def test_only_versions_and_new_options_may_differ(name, tmp_path, caplog):
    """Of the plugins that the run had, none is missing, none is out of order, and no option has changed its value."""
    trainer, rows = make_golden.trainer(tmp_path, steps=6, on_change="warn")
    run = trainer.assemble(rows, evaluate=faults_worker.Augmented(10))
    run.hooks.load(run, GOLDEN / name)
    lines = [line for record in caplog.records for line in record.getMessage().splitlines()[1:]]
    allowed = re.compile(r" *~ ([\w-]+: (version was .*|[\w-]+ was 'absent', is .*)|data: the training rows .*)")
    assert [line for line in lines if not allowed.fullmatch(line)] == []


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_no_run(name, tmp_path):
    """Weights are read, and going on from them is refused with what to do."""
    assert _saved.read(*checkpoint_at(GOLDEN / name)).tree.keys() == {"model", "progress"}
    with pytest.raises(CheckpointError, match=r"holds weights only.*warm-start"):
        resumed(name, tmp_path)


@pytest.mark.parametrize("name", INDEXED)
def test_a_later_schema_is_refused(name, changed):
    """What a later version wrote is not guessed at: the message says who can read it, though the rest is known."""
    path, later = changed(name, schema=_manifest.SCHEMA + 1), _manifest.SCHEMA + 1
    for read in (_saved.check, _saved.read):
        text = rf"{NAME}: manifest.json: expected a schema up to {_manifest.SCHEMA}, found {later}; a later version"
        with pytest.raises(CheckpointError, match=text):
            read(*checkpoint_at(path))


@pytest.mark.parametrize("name", INDEXED)
def test_unknown_and_missing_fields_are_refused(name, changed):
    """A field that its schema does not have, one of a later schema included, is refused; so is one that is missing."""
    schema = json.loads((GOLDEN / name / "manifest.json").read_text())["schema"]
    wrong = [{"later": 1}, {"drop": ["aliases"]}, *([{"kind": "run"}] if schema == 1 else [])]
    for fields in wrong:
        path = changed(name, **fields)
        with pytest.raises(CheckpointError, match=r"manifest.json: expected the fields"):
            _saved.check(*checkpoint_at(path))
