"""A damaged checkpoint is never loaded: it is passed over, with the reason, for the one before it."""

from __future__ import annotations

import logging
import os
import random
import shutil

import faults_worker
import pytest

from drivetrain import CheckpointError

FILES = ["manifest.json", "model.safetensors", "state.json", "state.safetensors"]
OLDER, NEWEST = "step-00000008", "step-00000010"


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of a finished run's folder."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def newest(folder):
    """Return what the reader takes, and what it says about those it passed over."""
    reasons = []
    return faults_worker.newest(folder, reasons.append), reasons


def truncate(length):
    def act(path):
        size = path.stat().st_size
        os.truncate(path, {"half": size // 2, "last": size - 1}.get(length, length))

    return act


def replace_by(make):
    def act(path):
        path.unlink()
        make(path)

    return act


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def grown(path):
    path.write_bytes(path.read_bytes() + b"\0")


def linked(path):
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGE = {
    "empty": truncate(0),
    "one byte": truncate(1),
    "half": truncate("half"),
    "last byte missing": truncate("last"),
    "zeros": zeros,
    "grown": grown,
    "missing": lambda path: path.unlink(),
    "folder": replace_by(lambda path: path.mkdir()),
    "pipe": replace_by(os.mkfifo),
    "link": linked,
    "second name": lambda path: os.link(path, path.parent.parent / "elsewhere"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed(run, file, damage):
    """Whatever happens to a file, the checkpoint before is taken and the reason names folder and file."""
    DAMAGE[damage](run / "checkpoints" / NEWEST / file)
    found, reasons = newest(run)
    assert found.path.name == OLDER
    assert len(reasons) == 1
    assert f"{NEWEST}: {file}" in reasons[0]


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_is_noticed(run, file):
    """A single flipped bit anywhere in any file is noticed (each byte of the manifest, 200 places elsewhere)."""
    path = run / "checkpoints" / NEWEST / file
    content = path.read_bytes()
    draws = random.Random(4)
    places = range(len(content)) if file == "manifest.json" else draws.sample(range(len(content)), 200)
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draws.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"{NEWEST}: {file}"):
            faults_worker.read(path.parent)
    path.write_bytes(content)
    assert newest(run)[0].path.name == NEWEST


def test_swapped_and_extra_files_are_noticed(run):
    """Files of another checkpoint, files under each other's name and files nobody listed are refused."""
    parent = run / "checkpoints"
    shutil.copy(parent / OLDER / "model.safetensors", parent / NEWEST / "model.safetensors")
    assert "model.safetensors: expected sha256" in newest(run)[1][0]
    shutil.rmtree(parent / NEWEST)
    shutil.copytree(parent / OLDER, parent / NEWEST)  # the whole folder under another step's name
    assert "expected step 10 as the folder is named, found step 8" in newest(run)[1][0]
    shutil.rmtree(parent / NEWEST)
    (parent / OLDER / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"does not list: \['notes.txt'\]"):
        newest(run)


def test_nothing_valid_is_an_error_not_a_new_start(run):
    """With every checkpoint damaged, resume="auto" raises and lists each reason; it does not start from scratch."""
    for name in (OLDER, NEWEST):
        (run / "checkpoints" / name / "model.safetensors").unlink()
    trainer, rows = faults_worker.build(faults_worker.Job(folder=str(run)), faults_worker.LocalStore())
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as caught:
        trainer.fit(rows, resume="auto")
    assert all(f"{name}: model.safetensors is missing" in str(caught.value) for name in (OLDER, NEWEST))


def test_the_one_before_is_resumed_to_the_same_end(worker, finished, run, caplog):
    """A run whose newest checkpoint is damaged goes on from the one before, says so, and ends with the same bits."""
    path = run / "checkpoints" / NEWEST / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    trainer, rows = faults_worker.build(faults_worker.Job(folder=str(run)), faults_worker.LocalStore())
    assembled = trainer.assemble(rows)
    with caplog.at_level(logging.WARNING, "drivetrain"):
        assert assembled.hooks.load(assembled, None).name == OLDER
    (message,) = [r.getMessage() for r in caplog.records]
    assert "passed over" in message
    assert f"{NEWEST}: state.safetensors: expected sha256" in message
    ended = worker(run)
    assert ended["source"] == OLDER
    assert ended["digests"] == finished[1]["digests"]


def test_left_overs_and_times_are_ignored(run):
    """Unfinished folders are no checkpoints, and the order is that of steps, whatever the clock said."""
    parent = run / "checkpoints"
    (parent / ".tmp-00000012-0123456789abcdef").mkdir()
    os.utime(parent / NEWEST, (0, 0))
    found, reasons = newest(run)
    assert (found.path.name, reasons) == (NEWEST, [])
    for name in (OLDER, NEWEST):
        shutil.rmtree(parent / name)
    assert newest(run) == (None, [])
