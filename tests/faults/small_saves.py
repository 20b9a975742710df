"""Saves without a run: small complete checkpoints, written by the code that a run's save calls."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import traceback
from typing import TYPE_CHECKING

import pytest
import torch

from drivetrain_plugins.checkpoint import _manifest, _saved
from drivetrain_plugins.checkpoint._format import encode
from drivetrain_plugins.checkpoint._local import LocalShelf
from drivetrain_plugins.checkpoint._parcel import Parcel, write
from drivetrain_plugins.checkpoint._retention import Kept, Retention
from drivetrain_plugins.checkpoint._shelf import step_of
from drivetrain_plugins.checkpoint._store import LocalStore

if TYPE_CHECKING:
    from pathlib import Path


def parcel(step: int, size: int = 64) -> Parcel:
    """Return what a save at `step` writes; `size` is the model's number of bytes."""
    position = {"step": step, "applied": step}
    moment = torch.full((4,), float(step))
    state = {"model": {"weight": torch.full((size // 4,), float(step))}, "progress": position, "moment": moment}
    encoded = encode(state, ("model",))
    about = {
        "kind": _manifest.RUN, "metrics": {}, "milestone": False, "step": step, "position": position, "aliases": {},
        "plugins": {}, "states": {}, "settings": {}, "world_size": 1, "environment": {},
    }  # fmt: skip
    tensors = {f"{part}.safetensors": encoded.tensors[part] for part in ("model", "state")}
    return Parcel(f"step-{step:08d}", about, tensors, {"state.json": _manifest.dump_json(encoded.tree)})


def save(parent: Path, step: int, *, keep: int = 2, store: LocalStore | None = None, size: int = 64) -> None:
    """Write one checkpoint into the folder `parent`, and rotate."""
    write(Kept(LocalShelf(parent, store or LocalStore())), parcel(step, size), Retention(keep), ())


def newest(parent: Path) -> int | None:
    """Return the step of the newest valid checkpoint, by the real reader."""
    found = _saved.newest(LocalShelf(parent, LocalStore()), lambda reason: None)
    assert found is None or found.tree["model"]["weight"].eq(found.manifest["step"]).all()
    return found.manifest["step"] if found else None


def check(parent: Path, *, clean: bool = False) -> list[int]:
    """Return the steps a reader sees, every one verified; `clean`: nothing else is there."""
    names = sorted(p.name for p in parent.iterdir())
    hidden = [name for name in names if name.startswith(".")]
    assert not (clean and hidden), hidden
    seen = [name for name in names if name not in hidden]
    return [_saved.read(LocalShelf(parent, LocalStore()), name).manifest["step"] for name in seen]


def needed(size: int) -> int:
    """Return how many bytes of a tmpfs a checkpoint takes, in whole pages; the manifest's length varies by little."""
    made = parcel(8, size)
    files = [sum(map(len, chunks)) for chunks in ([bytes(c) for c in f] for f in made.contents().values())]
    return sum(-(-length // 4096) * 4096 for length in [*files, 1500])


def in_a_child(work):
    """Return what `work` returns, of plain values, in a forked process: for what cannot be undone."""
    end, report = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                answer = {"value": work()}
            except BaseException:
                answer = {"error": traceback.format_exc()}
            os.write(report, json.dumps(answer).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(report)
    with os.fdopen(end, "rb") as file:
        answer = json.loads(file.read() or b'{"error": "no answer"}')
    os.waitpid(child, 0)
    assert "error" not in answer, answer["error"]
    return answer["value"]


def as_nobody(work):
    """Return what `work` returns in a process that is not root; here, if this one is not."""

    def drop():
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        return work()

    return in_a_child(drop if os.geteuid() == 0 else work)


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """Mount a tmpfs at the new folder `folder`, or skip the test; give a function that changes its options."""

    def mount(*arguments):
        return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)

    folder.mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no `mount`")
    if (made := mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))).returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")

    def remount(changed):
        assert mount("-o", f"remount,{changed}", str(folder)).returncode == 0

    try:
        yield remount
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def steps_in(parent: Path) -> list[int]:
    """Return the steps for which folders are named."""
    return sorted(step for p in parent.iterdir() if (step := step_of(p.name)) is not None)
