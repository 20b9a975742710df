"""The forking process, and checkpoints to damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


class Worker:
    """A `faults_worker` process."""

    def __init__(self, folder: Path):
        script = Path(__file__).with_name("faults_worker.py")
        command = [sys.executable, "-W", "ignore", str(script), str(folder / "reply.json")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, folder, **job):
        """Perform a job in a fork; return its status, digests and calls."""
        self.process.stdin.write(json.dumps({"folder": str(folder), **job}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if answer["status"] not in (0, -9):
            pytest.fail(f"{job}: {answer}")
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def worker(tmp_path_factory):
    """Return a function that makes a run in a forked process, and may kill it."""
    made = Worker(tmp_path_factory.mktemp("worker"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def uninterrupted(worker, tmp_path_factory):
    """Return the reference: what the run ends as when nothing happens, and the calls it makes."""
    answer = worker(tmp_path_factory.mktemp("reference") / "run")
    assert answer["steps"] == 10
    return answer
