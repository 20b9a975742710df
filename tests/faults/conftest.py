"""The forking process, and checkpoints to damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def environment():
    """Return what a program needs to find these modules, on one thread."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


class Worker:
    """A process of `module` (`faults_worker`, or one like it), which makes a run in a fork for each job."""

    def __init__(self, folder: Path, module: str = "faults_worker"):
        run = f"import {module}; {module}.main()"
        command = [sys.executable, "-W", "ignore", "-c", run, str(folder / "reply.json")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def ask(self, folder, **job):
        """Perform a job in a fork; return what it says of itself."""
        self.process.stdin.write(json.dumps({"folder": str(folder), **job}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __call__(self, folder, **job):
        """Perform a job that may be killed; return its status, digests and calls."""
        answer = self.ask(folder, **job)
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
