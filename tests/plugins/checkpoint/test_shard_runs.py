"""Runs with FSDP2: checkpoints of either form, and going on with other numbers of ranks."""

from __future__ import annotations

from pathlib import Path

import shard_runs
from test_shards import assert_same, ranks, whole

from drivetrain_plugins.checkpoint._convert import convert
from drivetrain_plugins.checkpoint._local import LocalShelf
from drivetrain_plugins.checkpoint._store import LocalStore

SCRIPT = Path(__file__).with_name("shard_runs.py")


def test_resume_is_exact_in_every_form(tmp_path):
    """Two ranks with FSDP2: stopped and resumed, sharded, full or one after the other, is as never stopped."""
    folder, seen = ranks(2, tmp_path, "exact", script=SCRIPT)["exact"]
    names = ["sharded-sharded", "full-full", "auto-sharded", "full-auto"]
    assert seen == [{**{name: [] for name in names}, "verified": True}] * 2

    def files(name, step):
        return {p.name for p in (folder / name / "checkpoints" / f"step-0000000{step}").iterdir()}

    parts = {"part-00000.safetensors", "part-00001.safetensors", "shards.json", "state.json", "manifest.json"}
    assert files("auto-sharded", 2) == files("sharded-sharded", 4) == files("full-auto", 4) == parts
    assert files("full-full", 4) == {"model.safetensors", "state.safetensors", "state.json", "manifest.json"}
    shelves = [LocalShelf(folder / name / "checkpoints", LocalStore()) for name in ("sharded-sharded", "full-full")]
    step = "step-00000004"
    convert((shelves[0], step), (shelves[0], "whole"), "full")  # which is, byte for byte, what one rank would write
    for file in ("model.safetensors", "state.safetensors"):
        assert shelves[0].read("whole", file, limit=2**30) == shelves[1].read(step, file, limit=2**30)


def test_ranks_come_and_go(tmp_path):
    """Two ranks, then one process without shards, then two: each begins with the bits the one before ended with."""
    folder, _ = ranks(2, tmp_path, "first", script=SCRIPT)["first"]
    loaded, end = shard_runs.fit(folder / "run", 4, resume=True)
    assert_same(loaded, whole(folder / "end"))
    assert len(loaded) > 20
    folder, _ = ranks(2, tmp_path, "last", script=SCRIPT)["last"]
    assert_same(whole(folder / "loaded"), end)
