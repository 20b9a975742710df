"""Whole runs with their checkpoints in S3: killed at random, gone on from, and ended as a run that was left alone."""

from __future__ import annotations

import random
import time

import faults_worker
import pytest
from conftest import Worker
from s3_server import BUCKET
from test_s3 import server  # noqa: F401 - a fixture

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _saved
from drivetrain_plugins.checkpoint._place import shelf_of


@pytest.fixture(scope="module")
def runner(server, tmp_path_factory):  # noqa: F811 - the fixture
    """Return a function that makes a run in a forked process which finds the server."""
    made = Worker(tmp_path_factory.mktemp("worker"))
    yield made
    made.close()


def kill_until_done(runner, tmp_path, reference, kills, name):
    """Kill a run at random times, going on each time; return what it ended as."""
    draws, place = random.Random(name), f"s3://{BUCKET}/{name}"
    began = time.monotonic()
    whole = runner(tmp_path / f"{name}-alone", store=f"{place}-alone")
    duration = time.monotonic() - began
    assert whole["digests"] == reference["digests"]
    for _ in range(kills):
        ended = runner(tmp_path / name, store=place, kill_after=draws.uniform(0.1, 0.9) * duration)
        shelf = shelf_of(place)
        for found in shelf.names():
            _saved.check(shelf, found)
        if ended["status"] == 0:
            break
    return runner(tmp_path / name, store=place), shelf_of(place).names()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_as_they_would(runner, uninterrupted, tmp_path, kills):
    """Whenever it is killed, every checkpoint in the store is whole and the run ends with the same bits."""
    ended, names = kill_until_done(runner, tmp_path, uninterrupted, kills, f"run-{kills}")
    assert ended["digests"] == uninterrupted["digests"]
    assert names[-1] == "step-00000010"
    assert len(names) <= 3  # keep = 2, and the one it went on from
    assert not (tmp_path / f"run-{kills}" / "checkpoints").exists()


def test_a_second_job_does_not_mix_with_the_first(runner, tmp_path):
    """A job that starts from the beginning where another one's checkpoints are is refused."""
    place = f"s3://{BUCKET}/shared"
    runner(tmp_path / "one", store=place)
    trainer, rows = faults_worker.build(
        faults_worker.Job(folder=str(tmp_path / "two"), store=place), faults_worker.LocalStore()
    )
    with pytest.raises(CheckpointError, match=r"holds checkpoints of another.*step-00000010"):
        trainer.fit(rows)
