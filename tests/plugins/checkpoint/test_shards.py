"""The sharded form: written once by many ranks, read by any number of them, bit for bit, and never trusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from drivetrain_plugins.checkpoint._format import from_safetensors, raw_bytes
from drivetrain_plugins.checkpoint._shard_plan import check_index
from drivetrain_plugins.checkpoint._shards import load_shards

SCRIPT = Path(__file__).with_name("shard_ranks.py")


def ranks(world, folder, *scenarios, script=SCRIPT):
    """Run scenarios; return for each its folder and what each rank saw."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", str(script), str(world), str(folder), *scenarios]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            assert process.wait(timeout=120) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    return {
        name: (folder / name, [json.loads((folder / name / f"result.{rank}").read_text()) for rank in range(world)])
        for name in scenarios
    }


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Return what four ranks saw."""
    return ranks(4, tmp_path_factory.mktemp("four"), "meshes", "odd", "replicated")


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    """Return what two ranks with FSDP2 saw."""
    return ranks(2, tmp_path_factory.mktemp("two"), "fsdp")["fsdp"]


@pytest.fixture(scope="module")
def strided(tmp_path_factory):
    """Return what eight ranks with FSDP2 over tensor parallelism saw."""
    return ranks(8, tmp_path_factory.mktemp("eight"), "strided")["strided"]


@pytest.fixture
def meshes(four):
    return four["meshes"]


@pytest.fixture
def odd(four):
    return four["odd"]


@pytest.fixture
def replicated(four):
    return four["replicated"]


def read(folder, **options):
    """Return the tensors of a folder of parts."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("part-*.safetensors")}
    index = check_index(json.loads((folder / "shards.json").read_text()), sizes)
    return load_shards(index, lambda file: from_safetensors(bytearray((folder / file).read_bytes())), **options)


def whole(file):
    return from_safetensors(bytearray(file.read_bytes()))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[key].dtype, right[key].shape), key
        assert np.array_equal(raw_bytes(tensor), raw_bytes(right[key])), key


def test_one_process_reads_what_fsdp_wrote(fsdp):
    """Model and optimizer of two ranks are, read by one process, what the whole tensors were."""
    folder, _ = fsdp
    assert_same(read(folder / "saved"), whole(folder / "whole.safetensors"))


def test_a_rank_reads_its_own_shards_again(fsdp):
    """With the layout of the run, each rank has the bits and the placements that it had; empty shards too."""
    _, seen = fsdp
    assert [s["again"] for s in seen] == [[], []]
    assert all(s["placements"] for s in seen)
    assert seen[0]["empty"] == []
    assert "model/one.weight" in seen[1]["empty"]  # one row, two ranks


def test_another_sharding_reads_the_same(fsdp):
    """Sharded along columns on another mesh, the whole is the same."""
    _, seen = fsdp
    assert [s["columns"] for s in seen] == [[], []]
    assert seen[0]["columns sharded"] == 12


def test_only_parts_that_are_needed_are_read(fsdp):
    """Rank 0 needs its own part only, rank 1 its own and what is replicated."""
    _, seen = fsdp
    assert [s["read"] for s in seen] == [
        ["part-00000.safetensors"],
        ["part-00000.safetensors", "part-00001.safetensors"],
    ]


def test_everything_is_written_once_and_not_copied(fsdp, meshes):
    """The ranks' bytes add up to the state's, a tied weight counted once; what is written is a view of the state."""
    for (folder, _), reports in ((fsdp, fsdp[1]), (meshes, [s["hsdp"] for s in meshes[1]])):
        state = whole(folder / "whole.safetensors")
        assert sum(r["bytes"] for r in reports) == sum(t.numel() * t.element_size() for t in state.values())
        assert not any(r["copied"] for r in reports)
        assert sum("embed" in k for r in reports for k in r["keys"] if k.startswith("model/")) == 2  # and no head


def test_nothing_is_unpickled(fsdp):
    """Planning, writing and loading unpickle nothing, on any rank."""
    assert [s["seen"] for s in fsdp[1]] == [[], []]


def test_a_mesh_of_replicas_and_shards_is_read_as_another(meshes):
    """HSDP writes each shard once; FSDP2 over tensor parallelism reads it, and the other way round."""
    folder, seen = meshes
    assert_same(read(folder / "saved"), whole(folder / "whole.safetensors"))
    for report in seen:
        assert (report["again"], report["as partitions"], report["from partitions"]) == ([], [], [])
    assert "_StridedShard" in seen[0]["partitioned"][0]


def test_shards_of_shards_are_where_they_belong(strided):
    """FSDP2 over tensor parallelism along one dimension: right for any number of rows, also where DCP's plan is not."""
    folder, seen = strided
    assert_same(read(folder / "saved"), whole(folder / "whole.safetensors"))
    assert all(s["again"] == [] and s["laid out"] == [] for s in seen)


def test_a_shard_that_is_in_pieces_is_stored_in_pieces(odd):
    """Rows that lie apart, both dimensions sharded, part of the ranks, 0-dim, empty, transposed: all read again."""
    folder, seen = odd
    assert all(s["again"] == [] and s["copied"] == [] for s in seen)
    rows = torch.arange(44.0).reshape(11, 4)
    expected = dict.fromkeys(("apart", "both", "some"), rows)
    expected |= {"scalar": torch.tensor(3.0), "nothing": torch.empty(0, 3), "columns": rows.t()}
    assert_same(read(folder / "saved", only="model/"), {f"model/{k}": t for k, t in expected.items()})
    assert read(folder / "saved", only="state/")["state/own"].tolist() == [2]  # which only rank 2 had
    index = json.loads((folder / "saved" / "shards.json").read_text())
    assert len(index["model/apart"]["chunks"]) > 4


def test_what_cannot_be_saved_is_refused_on_all_ranks(odd):
    """A wrong tensor of one rank, or shards that make no whole, are an error with the reason for everyone."""
    _, seen = odd
    errors = seen[0]["errors"]
    assert all(s["errors"] == errors for s in seen)
    expected = {
        "partial": "rank 0: model/partial is a sum that is still to be made over ranks",
        "dtype": "model/dtype differs between the ranks: rank 2 has torch.float64",
        "shape": "model/shape differs between the ranks: rank 1",
        "quantized": "rank 1: model/quantized cannot be saved. Received: Tensor torch.qint8",
        "lie": "rank 0: model/lie has a shard that is not what its placements say",
        "gap": "the shards of the ranks do not make up one tensor: model/gap: chunks overlap",
    }
    assert errors.keys() == expected.keys()
    for name, text in expected.items():
        assert text in errors[name]


def test_replicated_tensors_are_written_once_and_by_all(replicated):
    """Four ranks with the same tensors write within 10 % of a quarter each, though one tensor is most of the bytes."""
    _, seen = replicated
    share = seen[0]["total"] / 4
    assert sum(s["bytes"] for s in seen) == seen[0]["total"]
    assert all(abs(s["bytes"] - share) < share / 10 for s in seen), [s["bytes"] for s in seen]
    assert all(s["again"] == [] and s["copied"] == [] for s in seen)
    assert [s["small"] for s in seen] == [[0.0]] * 4  # which differ between ranks are rank 0's
