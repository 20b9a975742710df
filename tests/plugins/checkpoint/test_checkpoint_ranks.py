"""Two ranks: one writes, and what one fails at, both raise."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = '''
import json, os, sys
import torch
from drivetrain import CheckpointError, Trainer, hookimpl
from drivetrain_plugins import SGD, Checkpoint
from drivetrain_plugins.checkpoint._store import LocalStore

rank, folder, meeting, out = int(sys.argv[1]), *sys.argv[2:]
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x).square().mean()


class Broken(LocalStore):
    """Fails to read the newest checkpoint's tensors, or to write any."""

    def __init__(self, call):
        self.call = call

    def read(self, folder, name, **limits):
        if self.call == "read" and name == "model.safetensors":
            raise OSError(5, "injected")
        return super().read(folder, name, **limits)

    def write(self, handle, chunk):
        if self.call == "write" and bytes(chunk) != b"probe":
            raise OSError(28, "injected")
        super().write(handle, chunk)


def fit(steps, resume, broken_on=None, call=None):
    torch.manual_seed(rank)  # without data parallelism: the ranks' weights differ
    checkpoint = Checkpoint(every=2)
    if rank == broken_on:
        checkpoint._store = Broken(call)
    heard = []

    class Listener:
        provides = ("data-parallel",)  # said, not done: this test is about files

        @hookimpl
        def saved(self, run, path):
            heard.append(path.name)

        @hookimpl
        def loaded(self, run, path):
            heard.append(f"loaded {path.name} {run.model.layer.weight.sum().item().hex()}")

    trainer = Trainer(Model(), [SGD(lr=0.1), checkpoint, Listener()], output=folder, steps=steps, device="cpu")
    try:
        trainer.fit({"x": torch.arange(160.0).reshape(40, 4) / 100}, resume=resume)
    except CheckpointError as error:
        heard.append(f"{error}")
    return heard


seen = [fit(2, False)]
seen.append(fit(4, True, broken_on=0, call="write"))
seen.append(fit(4, True, broken_on=1, call="read"))
seen.append(fit(4, True))
with open(f"{out}.{rank}", "w") as file:
    file.write(json.dumps(seen))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # gloo's threads can abort a process that runs its exit handlers
'''


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Return what two ranks heard in four runs."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    arguments = [str(folder / name) for name in ("run", "meeting", "seen")]
    ranks = [subprocess.Popen([*command, str(rank), *arguments], env=environment) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"seen.{rank}").read_text()) for rank in range(2)]


def test_both_ranks_hear_of_one_checkpoint(seen):
    """Rank 0 writes, both hear `saved`; both go on from the same one with rank 0's weights."""
    assert seen[0][0] == seen[1][0] == ["step-00000002"]
    assert seen[0][3] == seen[1][3]
    assert seen[0][3][0].startswith("loaded step-00000002 ")
    assert seen[0][3][1] == "step-00000004"


def test_a_failure_of_the_writer_is_everyones(seen):
    """When rank 0 cannot write, both ranks raise the reason instead of one waiting for ever."""
    assert "could not be written: injected" in seen[0][1][1]
    assert seen[1][1][1] == f"rank 0: {seen[0][1][1]}"


def test_a_failure_of_another_rank_is_everyones(seen):
    """When rank 1 cannot read what rank 0 chose, both ranks raise the reason."""
    assert "model.safetensors cannot be read: injected" in seen[1][2][0]
    assert seen[0][2][0] == f"rank 1: {seen[1][2][0]}"
