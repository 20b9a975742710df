"""A process that has the store's libraries imported and forks one child for each save it is told to make.

It reads one JSON object a line and answers with the child's pid; the child begins when a second line comes, and how it
ended is the second answer. So a test can arrange what happens to that pid before anything does.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import s3fs  # noqa: F401 - imported here, so that no child has to

from drivetrain_plugins.checkpoint import _reliable
from drivetrain_plugins.checkpoint._object import ObjectShelf

SMALL_PART = 5 * 2**20  # the least that S3 takes
FILES = {"model.safetensors": b"weights", "state.safetensors": bytes(SMALL_PART + 1), "state.json": b"{}"}


def save(shelf, name, tag="", files=FILES):
    """Make a checkpoint, every file of which ends with `tag`; what its manifest tells of them makes it checkable."""
    draft = shelf.begin(name)
    try:
        told = {file: draft.write(file, [content, tag.encode()]) for file, content in files.items()}
        draft.commit(json.dumps({"tag": tag, "files": told}).encode())
    except BaseException:
        draft.discard()
        raise


def whole(shelf, name):
    """Return the tag of a checkpoint of which every byte is what its manifest says."""
    manifest = json.loads(shelf.read(name, "manifest.json", limit=2**20))
    assert shelf.files(name) == sorted([*manifest["files"], "manifest.json"])
    for file, told in manifest["files"].items():
        content = shelf.read(name, file, limit=2**30, size=told["size"])
        assert hashlib.sha256(content).hexdigest() == told["sha256"]
        assert content.endswith(manifest["tag"].encode())
    return manifest["tag"]


def child(job):
    """Save as a run does that has just started."""
    _reliable.PART = SMALL_PART
    shelf = ObjectShelf.open(job["url"], 30.0)
    shelf.prepare()
    save(shelf, job["name"], job["tag"], {file: FILES[file] for file in job["files"]})


def main():
    for line in sys.stdin:
        ready, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.read(ready, 1)
                child(json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(pid, flush=True)
        sys.stdin.readline()
        os.write(go, b"x")
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        os.close(ready)
        os.close(go)


class Saver:
    """The process."""

    def __init__(self):
        command = [sys.executable, "-W", "ignore", "-c", "import s3_worker; s3_worker.main()"]
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def _tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def __call__(self, arrange, **job):
        """Save in a fork, whose pid `arrange` is called with first; return its exit status."""
        arrange(self._tell(json.dumps(job)))
        return self._tell("go")

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
