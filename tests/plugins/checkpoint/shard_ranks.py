"""Ranks for the tests of sharded checkpoints: `python shard_ranks.py WORLD_SIZE FOLDER SCENARIO...`.

The ranks are forked from this process, which has imported torch once. Each writes `SCENARIO/result.RANK` with what it saw.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list  # noqa: F401 - imported once
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from drivetrain import CheckpointError, Run
from drivetrain_plugins.checkpoint._format import from_safetensors, raw_bytes, to_safetensors
from drivetrain_plugins.checkpoint._ranks import gather_texts
from drivetrain_plugins.checkpoint._shard_plan import check_index
from drivetrain_plugins.checkpoint._shards import lay_out, load_shards, plan_shards

EVENTS = ("pickle.find_class", "marshal.loads")


class Watch:
    """Hears what is unpickled while it is on; what the import system reads is left out."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        if self.on and event in EVENTS:
            frame = sys._getframe(1)
            while frame is not None and "importlib" not in frame.f_code.co_filename:
                frame = frame.f_back
            if frame is None:
                self.seen.append(event)

    def __enter__(self):
        self.on = True

    def __exit__(self, *error):
        self.on = False


class Net(nn.Module):
    """Rows that do not divide: 5, 1 and 7; a tied weight, buffers, and a 0-dim parameter's like, a count."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.wide = nn.Linear(4, 5)
        self.one = nn.Linear(5, 1)
        self.back = nn.Linear(1, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("third", torch.tensor([1 / 3], dtype=torch.bfloat16))

    def forward(self, x):
        return self.head(self.back(self.one(self.wide(self.embed(x)))))


def train(model, rank, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        x = torch.arange(6) + rank - step % 2
        model(x.clamp(0, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def references(model, optimizer=None):
    """Return the flat state, a tied weight once."""
    flat, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            flat[f"model/{name}"] = tensor.detach()
    for number, entry in optimizer.state_dict()["state"].items() if optimizer else ():
        flat |= {f"state/optimizer.state.{number}.{key}": value for key, value in entry.items()}
    return flat


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run_of(rank, world):
    return Run(rank=rank, world_size=world)


def save(flat, rank, world, folder):
    """Write this rank's part, and the index; return what a test wants to know of it."""
    plan = plan_shards(flat, rank, world, lambda text: gather_texts(run_of(rank, world), text))
    folder.mkdir(exist_ok=True)
    if plan.tensors:
        (folder / plan.file).write_bytes(b"".join(map(bytes, to_safetensors(plan.tensors))))
    if rank == 0:
        (folder / "shards.json").write_text(json.dumps(plan.index))
    torch.distributed.barrier()
    locals_ = [t.to_local() if isinstance(t, DTensor) else t for t in flat.values()]
    storages = {t.untyped_storage().data_ptr() for t in locals_ if t.numel()}
    return {
        "bytes": sum(t.numel() * t.element_size() for t in plan.tensors.values()),
        "copied": [k for k, t in plan.tensors.items() if t.untyped_storage().data_ptr() not in storages],
        "keys": sorted(plan.tensors),
    }


def load(folder, layout=None):
    """Return the tensors, and the files that were read."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("part-*.safetensors")}
    index, read = check_index(json.loads((folder / "shards.json").read_text()), sizes), []

    def read_part(file):
        read.append(file)
        return from_safetensors(bytearray((folder / file).read_bytes()))

    return load_shards(index, read_part, layout), read


def same(left, right):
    """Return the names whose bits differ."""
    odd = sorted(left.keys() ^ right.keys())
    return odd + [
        k
        for k in left.keys() & right.keys()
        if left[k].shape != right[k].shape or bytes(raw_bytes(left[k])) != bytes(raw_bytes(right[k]))
    ]


def local(tensors):
    return {k: t.to_local() if isinstance(t, DTensor) else t for k, t in tensors.items()}


def keep_whole(flat, rank, folder, name):
    """Write what the whole tensors are, for the test; a collective."""
    full = {key: whole(tensor) for key, tensor in flat.items()}
    if rank == 0:
        (folder / name).write_bytes(b"".join(map(bytes, to_safetensors(full))))
    return full


# --- scenarios -------------------------------------------------------------------------------------------------------


def fsdp(rank, world, folder):
    """FSDP2 and AdamW: save; load as it was, sharded along another dimension, and on another mesh."""
    torch.manual_seed(0)
    model = Net()
    for module in (model.wide, model.one, model.back):
        fully_shard(module)
    fully_shard(model)
    optimizer = train(model, rank)
    flat = references(model, optimizer)
    full = keep_whole(flat, rank, folder, "whole.safetensors")
    watch = Watch()
    with watch:
        result = save(flat, rank, world, folder / "saved")
        again, read = load(folder / "saved", lambda reference, *_: flat[reference])
    result |= {"again": same(local(flat), local(again)), "read": read, "seen": watch.seen}
    result["placements"] = all(
        (t.device_mesh, t.placements) == (again[k].device_mesh, again[k].placements)
        for k, t in flat.items()
        if isinstance(t, DTensor)
    )
    mesh = init_device_mesh("cpu", (world,))

    def by_columns(reference, shape, dtype):
        if len(shape) != 2:
            return None
        return distribute_tensor(torch.empty(shape), mesh, [Shard(1)])

    columns, _ = load(folder / "saved", by_columns)
    result["columns"] = same(full, {k: whole(t) for k, t in columns.items()})
    result["columns sharded"] = sum(isinstance(t, DTensor) for t in columns.values())
    result["empty"] = sorted(k for k, t in local(flat).items() if not t.numel())
    return result


def sharded(module, mesh, partition=None):
    """Return a net with weights that only the seed decides, sharded."""
    torch.manual_seed(0)
    model = module()
    if partition is not None:
        plan = {"wide": ColwiseParallel(), "one": RowwiseParallel()}
        parallelize_module(model, partition, plan, src_data_rank=None)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model


def meshes(rank, world, folder):
    """HSDP, and FSDP2 over tensor parallelism: save each, load each as the other and whole."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("one", "two"))
    model = sharded(Net, mesh)
    hsdp = references(model, train(model, rank))
    two = references(sharded(Net, mesh["one"], mesh["two"]))
    two["model/plain"] = torch.arange(3.0)
    full = keep_whole(hsdp, rank, folder, "whole.safetensors")
    result = {"hsdp": save(hsdp, rank, world, folder / "saved")}
    again, result["read"] = load(folder / "saved", lambda reference, *_: hsdp[reference])
    result["again"] = same(local(hsdp), local(again))
    other, _ = load(folder / "saved", lambda reference, *_: two.get(reference))
    result["as partitions"] = same(full, {k: whole(t) for k, t in other.items()})
    result["partitioned"] = [str(two[f"model/{n}.weight"].placements) for n in ("wide", "one")]
    result["two"] = save(two, rank, world, folder / "two")
    torch.manual_seed(0)
    plain = references(Net()) | {"model/plain": torch.arange(3.0)}
    back, _ = load(folder / "two", lambda reference, *_: hsdp.get(reference))
    result["from partitions"] = same(plain, {k: whole(t) for k, t in back.items()})
    return result


def odd(rank, world, folder):
    """Layouts that DCP describes wrongly, of part of the ranks, and those that nobody can save."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("one", "two"))
    rows = torch.arange(44.0).reshape(11, 4)
    pair = DeviceMesh("cpu", [1, 3])
    strided = _StridedShard(0, split_factor=2)
    flat = {
        "model/apart": distribute_tensor(rows, mesh, [Shard(0), strided], src_data_rank=None),
        "model/both": distribute_tensor(rows, mesh, [Shard(1), Shard(0)], src_data_rank=None),
        "model/some": distribute_tensor(rows, pair, [Shard(0)], src_data_rank=None),
        "model/scalar": DTensor.from_local(torch.tensor(3.0), mesh, [Replicate(), Replicate()], run_check=False),
        "model/nothing": torch.empty(0, 3),
        "model/columns": rows.t(),
    }
    if rank == 2:
        flat["state/own"] = torch.tensor([2])
    result = save(flat, rank, world, folder / "saved")
    again, _ = load(folder / "saved", lambda reference, *_: flat.get(reference))
    again = {k: t for k, t in again.items() if k in flat}
    result["again"] = same(local(flat), local(again))
    errors = {}
    for name, tensor in {
        "partial": DTensor.from_local(rows, mesh, [Replicate(), Partial()], run_check=False),
        "dtype": rows.to(torch.float64) if rank == 2 else rows,
        "shape": rows[:rank],
        "quantized": torch.quantize_per_tensor(rows, 1, 0, torch.qint8) if rank == 1 else rows,
        "lie": DTensor.from_local(
            rows[: 9 + rank], mesh, [Shard(0), Replicate()], run_check=False, shape=(40, 4), stride=(4, 1)
        ),
        "gap": rows
        if rank
        else DTensor.from_local(rows[:6], mesh, [Shard(0), Replicate()], run_check=False, shape=(11, 4), stride=(4, 1)),
    }.items():
        try:
            save({f"model/{name}": tensor}, rank, world, folder / "refused")
        except CheckpointError as error:
            errors[name] = str(error)
    return result | {"errors": errors}


def replicated(rank, world, folder):
    """Plain tensors, one of them most of the bytes: written once, in equal amounts, the small ones by rank 0."""
    flat = {f"model/{n}": torch.full((1000, 100 + n), float(n)) for n in range(7)}
    flat |= {"model/large": torch.arange(5e6).reshape(5000, 1000), "model/small": torch.tensor([float(rank)])}
    flat["model/wide"] = torch.ones(1, 300_000)
    result = save(flat, rank, world, folder / "saved")
    again, _ = load(folder / "saved")
    result["total"] = sum(t.numel() * 4 for t in flat.values())
    result["small"] = again.pop("model/small").tolist()
    del flat["model/small"]
    return result | {"again": same(flat, again)}


def strided(rank, world, folder):
    """FSDP2 over tensor parallelism along one dimension, for every number of rows up to 18."""
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("one", "two"))
    flat, full = {}, {}
    for rows in range(1, 19):
        torch.manual_seed(rows)
        model = nn.Sequential(nn.Linear(2, rows, bias=False))
        full[f"model/{rows}"] = model[0].weight.detach().clone()
        parallelize_module(model, mesh["two"], {"0": ColwiseParallel()}, src_data_rank=None)
        fully_shard(model, mesh=mesh["one"])
        flat[f"model/{rows}"] = model[0].weight.detach()
    full["model/left"] = torch.arange(18.0).reshape(9, 2)  # as DTensor cuts it: other rows
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    flat["model/left"] = distribute_tensor(full["model/left"], mesh, placements, src_data_rank=None)
    result = save(flat, rank, world, folder / "saved")
    if rank == 0:
        (folder / "whole.safetensors").write_bytes(b"".join(map(bytes, to_safetensors(full))))
    again, _ = load(folder / "saved", lambda reference, *_: flat[reference])
    result["again"] = same(local(flat), local(again))
    laid = {key: lay_out(key, tensor, flat[key]) for key, tensor in full.items()}
    result["laid out"] = same(local(flat), local(laid))
    return result


SCENARIOS = {f.__name__: f for f in (fsdp, meshes, odd, replicated, strided)}


def one_rank(rank, world, folder, scenarios):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting-{scenarios[0]}", rank=rank, world_size=world
    )
    for scenario in scenarios:
        (folder / scenario).mkdir(exist_ok=True)
        result = SCENARIOS[scenario](rank, world, folder / scenario)
        (folder / scenario / f"result.{rank}").write_text(json.dumps(result))
        torch.distributed.barrier()


def main(world, folder, scenarios):
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            try:
                one_rank(rank, world, folder, scenarios)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)  # gloo's threads can abort a process that runs its exit handlers
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
