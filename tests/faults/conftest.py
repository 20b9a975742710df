"""The forking process, and checkpoints to damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


class Worker:
    """A `faults_worker` process."""

    def __init__(self, folder: Path):
        run = "import faults_worker; faults_worker.main()"
        command = [sys.executable, "-W", "ignore", "-c", run, str(folder / "reply.json")]
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

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


@pytest.fixture(autouse=True)
def one_thread():
    """Let runs of this process have the bits of the forked ones: sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def worker(tmp_path_factory):
    """Return a function that makes a run in a forked process, and may kill it."""
    made = Worker(tmp_path_factory.mktemp("worker"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def finished(worker, tmp_path_factory):
    """Return a finished run's folder (checkpoints of steps 8 and 10), what it ended as and which calls it made."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    answer = worker(folder)
    assert answer["steps"] == 10
    return folder, answer


@pytest.fixture
def uninterrupted(finished):
    """Return the reference: what the run ends as when nothing happens, and the calls it makes."""
    return finished[1]
