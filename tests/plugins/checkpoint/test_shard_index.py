"""The index of a sharded checkpoint and its parts, read in one process as if a stranger had written them."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint._format import from_safetensors, raw_bytes, to_safetensors
from drivetrain_plugins.checkpoint._shard_plan import check_index
from drivetrain_plugins.checkpoint._shards import load_shards, plan_shards


def saved(tensors, world=1):
    """Return the index and the parts of plain tensors that `world` ranks hold alike."""
    plans = [plan_shards(tensors, rank, world, lambda text: [text] * world) for rank in range(world)]
    assert all(p.index == plans[0].index for p in plans)
    return plans[0].index, {p.file: p.tensors for p in plans if p.tensors}


SHAPES = {"model/a": (5, 4), "model/b": (3,), "model/c": (), "state/d": (0, 2)}


@pytest.fixture
def stored():
    """Return an index of which one tensor is cut in three, and the parts."""
    torch.manual_seed(0)
    index, parts = saved({name: torch.randn(shape) for name, shape in SHAPES.items()})
    a = index["model/a"]["chunks"]
    file, tensor = a[0]["file"], parts["part-00000.safetensors"].pop("model/a")
    a[:] = [
        {"file": file, "key": "model/a:0,0", "offsets": [0, 0], "sizes": [2, 4]},
        {"file": file, "key": "model/a:2,0", "offsets": [2, 0], "sizes": [3, 1]},
        {"file": "part-00007.safetensors", "key": "model/a:2,1", "offsets": [2, 1], "sizes": [3, 3]},
    ]
    parts[file] |= {"model/a:0,0": tensor[:2], "model/a:2,0": tensor[2:, :1]}
    parts["part-00007.safetensors"] = {"model/a:2,1": tensor[2:, 1:]}
    return index, parts


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[key].dtype, right[key].shape), key
        assert np.array_equal(raw_bytes(tensor), raw_bytes(right[key])), key


def sizes_of(parts):
    return {f: sum(len(c) for c in to_safetensors(t)) for f, t in parts.items()}


def test_a_part_is_read_once_and_alone(stored):
    """Each part is asked for once, and the one before it is gone by then."""
    index, parts = stored
    asked, alive = [], []

    class Part(dict):
        def __del__(self):
            alive.pop()

    def read_part(file):
        assert not alive
        asked.append(file)
        alive.append(file)
        return Part(parts[file])

    loaded = load_shards(check_index(index, sizes_of(parts)), read_part)
    assert asked == sorted(parts)
    assert {k: tuple(t.shape) for k, t in loaded.items()} == SHAPES
    asked.clear()
    assert list(load_shards(check_index(index, sizes_of(parts)), read_part, only="model/b")) == ["model/b"]
    assert asked == ["part-00000.safetensors"]


WRONG = {
    "no object": (lambda i: [], "expected an object"),
    "a name": (lambda i: i.update({"../x": i.pop("model/b")}), "expected names like"),
    "a field more": (lambda i: i["model/b"].update(x=1), "model/b: expected shape, dtype and chunks"),
    "a field less": (lambda i: i["model/b"].pop("dtype"), "model/b: expected shape, dtype and chunks"),
    "a dtype": (lambda i: i["model/b"].update(dtype="F128"), "expected a dtype among"),
    "a dtype's type": (lambda i: i["model/b"].update(dtype=[]), "expected a dtype among"),
    "a negative shape": (lambda i: i["model/b"].update(shape=[-3]), "not negative"),
    "a truth": (lambda i: i["model/b"].update(shape=[True]), "not negative"),
    "a fraction": (lambda i: i["model/b"].update(shape=[3.0]), "not negative"),
    "dimensions": (lambda i: i["model/b"].update(shape=[1] * 65), "up to 64"),
    "beyond memory": (lambda i: i["state/d"].update(shape=[0, 2**62, 2**62]), "memory can hold"),
    "no chunks": (lambda i: i["model/b"].update(chunks={}), "expected a list of chunks"),
    "missing": (lambda i: i["model/a"]["chunks"].pop(1), "model/a: chunks are missing: they hold 17 of 20"),
    "all missing": (lambda i: i["model/c"]["chunks"].clear(), "model/c: chunks are missing"),
    "twice": (lambda i: i["model/b"]["chunks"].append({**i["model/b"]["chunks"][0], "key": "model/x"}), "chunks overlap"),
    "overlap and gap": (lambda i: i["model/a"]["chunks"][2].update(offsets=[1, 1]), "chunks overlap"),
    "beyond the shape": (lambda i: i["model/a"]["chunks"][2].update(offsets=[3, 1]), "beyond the shape"),
    "negative offsets": (lambda i: i["model/a"]["chunks"][2].update(offsets=[-1, 1]), "not negative"),
    "empty": (lambda i: i["state/d"]["chunks"].append({**i["model/b"]["chunks"][0], "offsets": [0, 0], "sizes": [0, 1]}), "is empty"),
    "other dimensions": (lambda i: i["model/b"]["chunks"][0].update(offsets=[0, 0], sizes=[3, 1]), "of 1 dimensions"),
    "a path": (lambda i: i["model/b"]["chunks"][0].update(file="../part-00000.safetensors"), "expected a file like"),
    "another file": (lambda i: i["model/b"]["chunks"][0].update(file=".metadata"), "expected a file like"),
    "a file there is not": (lambda i: i["model/b"]["chunks"][0].update(file="part-00003.safetensors"), "not among the parts"),
    "a key's type": (lambda i: i["model/b"]["chunks"][0].update(key=7), "expected a key like"),
    "a key": (lambda i: i["model/b"]["chunks"][0].update(key="__metadata__"), "expected a key like"),
    "a key twice": (lambda i: i["model/b"]["chunks"][0].update(key="model/c"), "for another chunk already"),
    "larger than its file": (lambda i: i["model/b"].update(shape=[2**40], chunks=[{**i["model/b"]["chunks"][0], "sizes": [2**40]}]), "bytes long"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_index_is_refused(stored, name):
    """Whatever is not a cover of each tensor by chunks that the files can hold is named; nothing else is raised."""
    index, parts = stored
    damage, reason = WRONG[name]
    changed = damage(index) if name == "no object" else (damage(index), index)[1]
    with pytest.raises(ValueError, match=reason):
        check_index(json.loads(json.dumps(changed)), sizes_of(parts))


def test_any_other_change_of_a_number_is_refused(stored):
    """No number of an index can be changed without being noticed, at the latest when the part is read."""
    index, parts = stored
    for reference, about in index.items():
        for chunk, field in itertools.product(range(len(about["chunks"])), ("offsets", "sizes")):
            for place, by in itertools.product(range(len(about["shape"])), (-1, 1, 2)):
                changed = copy.deepcopy(index)
                changed[reference]["chunks"][chunk][field][place] += by
                with pytest.raises(ValueError, match=reference):
                    check_index(changed, sizes_of(parts))


def tiling(box, dims, levels):
    """Return a random tiling as nested shards make them."""
    low, sizes = box
    if not levels:
        return [box]
    dim = random.choice(dims)
    cuts = sorted({0, sizes[dim], *(random.randrange(sizes[dim] + 1) for _ in range(random.randrange(3)))})
    made = []
    for start, end in itertools.pairwise(cuts):
        part = [*low], [*sizes]
        part[0][dim], part[1][dim] = low[dim] + start, end - start
        made += tiling(part, dims, levels - 1)
    return made


def test_a_cover_is_accepted_and_nothing_else_is():
    """Against counting how often each element is covered: nested cuts pass, and no damage to them does."""
    random.seed(7)
    refused = 0
    for _ in range(1500):
        shape = [random.randrange(1, 5) for _ in range(random.randrange(1, 4))]
        boxes = tiling(([0] * len(shape), shape), range(len(shape)), random.randrange(4))
        damaged = random.random() < 0.7
        if damaged:
            offsets, sizes = random.choice(boxes)
            dim = random.randrange(len(shape))
            offsets[dim] += random.choice([-1, 0, 1])
            sizes[dim] += random.choice([-1, 0, 1])
        count, inside = np.zeros(shape, int), True
        for offsets, sizes in boxes:
            inside &= all(o >= 0 and s > 0 and o + s <= n for o, s, n in zip(offsets, sizes, shape, strict=True))
            count[tuple(slice(max(o, 0), max(o, 0) + s) for o, s in zip(offsets, sizes, strict=True))] += 1
        chunks = [
            {"file": "part-00000.safetensors", "key": f"model/x:{n}", "offsets": o, "sizes": s}
            for n, (o, s) in enumerate(boxes)
        ]
        index = {"model/x": {"shape": shape, "dtype": "U8", "chunks": chunks}}
        if inside and (count == 1).all():
            check_index(index, {"part-00000.safetensors": 1000})
        else:
            refused += 1
            with pytest.raises(ValueError, match="model/x"):
                check_index(index, {"part-00000.safetensors": 1000})
    assert 300 < refused < 1300


def test_an_overlap_behind_another_chunk_is_refused():
    """A long chunk is compared with all that begin before it ends, not only with the next."""
    boxes = [([0, 0], [4, 1]), ([0, 1], [1, 1]), ([1, 1], [1, 1]), ([2, 0], [2, 1])]
    chunks = [
        {"file": "part-00000.safetensors", "key": f"model/x:{n}", "offsets": o, "sizes": s}
        for n, (o, s) in enumerate(boxes)
    ]
    with pytest.raises(ValueError, match="chunks overlap"):
        check_index({"model/x": {"shape": [4, 2], "dtype": "U8", "chunks": chunks}}, {"part-00000.safetensors": 1000})


def test_a_costly_index_is_refused_soon():
    """Chunks that are made to be slow to check do not take long."""
    size = 2000
    peeled = []  # a row, a column, a row, ... of what is left
    for n in range(size):
        peeled.append(([n, n], [1, size - n]))
        if n < size - 1:
            peeled.append(([n + 1, n], [size - n - 1, 1]))
    chunks = [
        {"file": "part-00000.safetensors", "key": f"model/x:{n}", "offsets": o, "sizes": s}
        for n, (o, s) in enumerate(peeled)
    ]
    index = {"model/x": {"shape": [size, size], "dtype": "U8", "chunks": chunks}}
    began = time.process_time()
    with pytest.raises(ValueError, match="as shards of shards never do"):
        check_index(index, {"part-00000.safetensors": 2**40})
    assert time.process_time() - began < 2


DAMAGED_PARTS = {
    "a key less": lambda part: part.pop("model/b"),
    "a key more": lambda part: part.update(x=torch.ones(1)),
    "a shape": lambda part: part.update({"model/b": torch.ones(4)}),
    "a dtype": lambda part: part.update({"model/b": torch.ones(3, dtype=torch.int32)}),
}


@pytest.mark.parametrize("name", DAMAGED_PARTS)
def test_a_part_that_is_not_what_the_index_says_is_refused(stored, name):
    """Keys, shapes and dtypes of a part are those of the index."""
    index, parts = stored
    checked = check_index(index, sizes_of(parts))
    DAMAGED_PARTS[name](parts["part-00000.safetensors"])
    with pytest.raises(ValueError, match=r"part-00000\.safetensors: expected"):
        load_shards(checked, parts.__getitem__)


def test_one_rank_writes_one_part():
    """Without ranks, the sharded form is one part that holds every tensor whole, whatever its dtype."""
    tensors = {
        "model/w": torch.randn(3, 2).to(torch.float8_e4m3fn),
        "model/c": torch.tensor(1 + 2j),
        "state/n": torch.tensor(7),
    }
    tensors["model/conjugate"] = torch.randn(3, dtype=torch.complex64).conj()
    index, parts = saved(tensors)
    assert {file: set(part) for file, part in parts.items()} == {"part-00000.safetensors": set(tensors)}
    content = bytearray(b"".join(map(bytes, to_safetensors(parts["part-00000.safetensors"]))))
    loaded = load_shards(
        check_index(index, {"part-00000.safetensors": len(content)}), lambda _: from_safetensors(content)
    )
    assert_same(loaded, tensors)


def test_the_largest_are_given_out_first():
    """Ranks write equally much also where no tensor is large enough to be divided and the small ones come first."""
    tensors = {f"model/{n}": torch.ones(size * 1000) for n, size in enumerate((60, 60, 60, 180, 60, 60))}
    _, parts = saved(tensors, 2)
    assert [sum(t.numel() for t in part.values()) for part in parts.values()] == [240_000, 240_000]


def test_a_tensor_that_no_chunks_can_stand_for_is_refused():
    """Subclasses and dtypes that cannot be stored are named."""
    for tensor in (torch.ones(2, dtype=torch.complex128), torch.ones(2).to_sparse(), torch.ones(2, device="meta")):
        with pytest.raises(CheckpointError, match="rank 0: model/odd cannot be saved"):
            saved({"model/odd": tensor})


def read(folder, **options):
    """Return the tensors of a folder of parts."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("part-*.safetensors")}
    index = check_index(json.loads((folder / "shards.json").read_text()), sizes)
    return load_shards(index, lambda file: from_safetensors(bytearray((folder / file).read_bytes())), **options)


# --- why DCP's own files are not used --------------------------------------------------------------------------------


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.filterwarnings("ignore:.*intent is to load in a single process")
def test_a_crafted_metadata_file_runs_code_in_dcp_and_is_never_opened_here(tmp_path, stored):
    """The reason for shards.json: reading DCP's `.metadata` is running it. Reading ours opens no such file."""
    index, parts = stored
    mark = tmp_path / "mark"
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "shards.json").write_text(json.dumps(index))
    for file, part in parts.items():
        (folder / file).write_bytes(b"".join(map(bytes, to_safetensors(part))))
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    opened, on = [], [True]
    sys.addaudithook(
        lambda event, arguments: on and event in ("open", "pickle.find_class") and opened.append(arguments)
    )
    loaded = read(folder)
    on.clear()
    assert {k: tuple(t.shape) for k, t in loaded.items()} == SHAPES
    assert {Path(a[0]).name for a in opened if isinstance(a[0], (str, Path))} == {"shards.json", *parts}
    assert not mark.exists()
    with pytest.raises(dcp.CheckpointException):
        dcp.load({"a": torch.empty(5, 4)}, checkpoint_id=folder, no_dist=True)
    assert mark.exists()
