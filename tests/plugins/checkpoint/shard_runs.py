"""Runs whose state lies over ranks: `python shard_runs.py WORLD_SIZE FOLDER SCENARIO...`, see shard_ranks.py."""

from __future__ import annotations

import sys
from pathlib import Path

import shard_ranks
import torch
from torch.distributed.fsdp import fully_shard

from drivetrain import Stage, Trainer, Transform, hookimpl
from drivetrain_plugins import AdamW, Checkpoint

ROWS = {"x": torch.arange(80) % 7}


class Net(shard_ranks.Net):
    def forward(self, x):
        return super().forward(x).square().mean()


class Shards:
    """FSDP2 over all ranks."""

    provides = ("data-parallel",)

    @hookimpl
    def transforms(self, run):
        return [Transform(Stage.SHARD, fully_shard)]


class Heard:
    """Keeps the state as it is after loading and at the end, whole."""

    def __init__(self):
        self.loaded_state, self.end = None, None

    @hookimpl
    def loaded(self, run, path):
        self.loaded_state = state(run)

    @hookimpl
    def saved(self, run, path):
        self.end = state(run)


def state(run):
    now = run.state_dict()
    moments = {f"{n}.{k}": t for n, entry in now["optimizer"]["state"].items() for k, t in entry.items()}
    return {k: shard_ranks.whole(t) for k, t in (now["model"] | moments).items()}


def fit(folder, steps, *plugins, resume=False, **options):
    """Train to `steps`; return the state after loading and the last that was saved."""
    torch.manual_seed(0)
    heard = Heard()
    own = [AdamW(lr=0.1), Checkpoint(every=2, on_change="accept", **options), heard, *plugins]
    Trainer(Net(), own, output=folder, steps=steps, device="cpu").fit(ROWS, resume=resume)
    return heard.loaded_state, heard.end


# --- scenarios -------------------------------------------------------------------------------------------------------


def exact(rank, world, folder):
    """In each form: four steps at once, and two and two; and going on from one form in the other."""
    seen = {}
    for form, then in (("sharded", "sharded"), ("full", "full"), ("auto", "sharded"), ("full", "auto")):
        _, once = fit(folder / f"{form}-{then}-once", 4, Shards(), form=form)
        _, half = fit(folder / f"{form}-{then}", 2, Shards(), form=form)
        loaded, twice = fit(folder / f"{form}-{then}", 4, Shards(), form=then, resume=True)
        seen[f"{form}-{then}"] = shard_ranks.same(half, loaded) + shard_ranks.same(once, twice)
    loaded, _ = fit(folder / "sharded-sharded", 6, Shards(), resume=True, verify_resume=True)
    seen["verified"] = loaded is not None
    return seen


def first(rank, world, folder):
    """Two steps, sharded."""
    _, end = fit(folder / "run", 2, Shards())
    if rank == 0:
        (folder / "end").write_bytes(b"".join(map(bytes, shard_ranks.to_safetensors(end))))
    return {}


def last(rank, world, folder):
    """Go on from what one process saved."""
    loaded, _ = fit(folder.parent / "first" / "run", 6, Shards(), resume=True)
    if rank == 0:
        (folder / "loaded").write_bytes(b"".join(map(bytes, shard_ranks.to_safetensors(loaded))))
    return {}


if __name__ == "__main__":
    shard_ranks.SCENARIOS = {f.__name__: f for f in (exact, first, last)}
    sys.exit(shard_ranks.main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
