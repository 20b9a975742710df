"""From the full form to the sharded one and back: not a byte of a tensor file changes."""

from __future__ import annotations

import json
import math
import re

import attrs
import pytest
import torch
from checkpoint_runs import ROWS, Odd, trainer

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _manifest, _saved
from drivetrain_plugins.checkpoint._convert import convert, split
from drivetrain_plugins.checkpoint._format import encode, from_safetensors
from drivetrain_plugins.checkpoint._local import LocalShelf
from drivetrain_plugins.checkpoint._store import LocalStore

NAME = "step-00000004"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Return a shelf with the checkpoints of a run."""
    folder = tmp_path_factory.mktemp("run")
    odd = Odd()
    odd._value = {3: (torch.arange(7), math.nan), "empty": torch.empty(0, 5), "scalar": torch.tensor(1.5), "n": 2**70}
    trainer(folder, odd, steps=4).fit(ROWS)
    return LocalShelf(folder / "checkpoints", LocalStore())


@pytest.fixture
def other(tmp_path):
    return LocalShelf(tmp_path / "other", LocalStore())


def bytes_of(shelf, name):
    return {file: bytes(shelf.read(name, file, limit=2**30)) for file in shelf.files(name)}


def tensors_of(tree):
    encoded = encode(tree, ("model",))
    return {f"{part}/{key}": t for part, group in encoded.tensors.items() for key, t in group.items()}


@pytest.mark.parametrize("parts", [1, 2, 3, 40])
def test_there_and_back_changes_no_byte(shelf, other, parts):
    """Full, sharded, sharded otherwise, full: tensors and tree are the same files, and the digests say so."""
    convert((shelf, NAME), (other, NAME), "sharded", parts)
    convert((other, NAME), (other, "again"), "sharded", 2)
    convert((other, "again"), (other, "back"), "full")
    before, after = bytes_of(shelf, NAME), bytes_of(other, "back")
    assert after == before  # the manifest, too
    sharded = set(other.files(NAME))
    assert sharded - {"manifest.json", "state.json", "shards.json"} == {
        f"part-{n:05d}.safetensors" for n in range(min(parts, 7))
    }


def test_the_sharded_form_is_read_as_the_full_one(shelf, other):
    """The reader makes the same state of both, and of the manifest only the files differ."""
    convert((shelf, NAME), (other, NAME), "sharded", 3)
    full, sharded = _saved.read(shelf, NAME), _saved.read(other, NAME)
    assert str(full.tree) == str(sharded.tree)
    for key, tensor in tensors_of(full.tree).items():
        assert torch.equal(tensor, tensors_of(sharded.tree)[key]), key
    assert sharded.tree["model"]["one.weight"] is sharded.tree["model"]["two.weight"]
    apart = {"files", "sha256"}
    assert {k: v for k, v in full.manifest.items() if k not in apart} == {
        k: v for k, v in sharded.manifest.items() if k not in apart
    }


def test_a_converted_checkpoint_is_resumed(shelf, other, tmp_path):
    """A run goes on from the sharded form as from the full one."""
    results = []
    for form in ("full", "sharded"):
        target = LocalShelf(tmp_path / form / "checkpoints", LocalStore())
        convert((shelf, NAME), (target, NAME), form, 2)
        run = trainer(tmp_path / form, Odd(), steps=6)
        run.fit(ROWS, resume=True)
        saved = _saved.read(target, "step-00000006")
        results.append({k: t.tolist() for k, t in tensors_of(saved.tree).items()})
    assert str(results[0]) == str(results[1])


def test_cuts_are_those_of_fsdp():
    """Along dimension 0, as `torch.chunk` cuts: 5 rows in 3 parts are 2, 2 and 1; a row or a number is not cut."""
    tensors = {"model/a": torch.randn(5, 2), "model/b": torch.randn(1, 9), "model/c": torch.tensor(3.0)}
    index, contents = split(tensors, 3)
    assert [c.sizes for c in index["model/a"].chunks] == [tuple(t.shape) for t in tensors["model/a"].chunk(3)]
    assert [len(index[k].chunks) for k in tensors] == [3, 1, 1]
    pieces = [contents[c.file][c.key] for c in index["model/a"].chunks]
    assert torch.equal(torch.cat(pieces), tensors["model/a"])
    assert all(p.untyped_storage().data_ptr() == tensors["model/a"].untyped_storage().data_ptr() for p in pieces)
    nothing = {"model/a": torch.empty(0, 3)}
    assert split(nothing, 3)[1] == {"part-00000.safetensors": {}}  # a sharded checkpoint has a part


def test_in_place_of_itself(shelf, other):
    """A checkpoint can be converted where it stands."""
    convert((shelf, NAME), (other, NAME), "full")
    convert((other, NAME), (other, NAME), "sharded", 2)
    assert "shards.json" in other.files(NAME)
    convert((other, NAME), (other, NAME), "full")
    assert bytes_of(other, NAME) == bytes_of(shelf, NAME)
    assert [p.name for p in other.parent.iterdir()] == [NAME]


FILES = ["state.json", "shards.json", "part-00000.safetensors", "part-00001.safetensors"]


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_source_is_refused(shelf, other, file):
    """One bit of any file, and nothing is written."""
    convert((shelf, NAME), (other, NAME), "sharded", 2)
    path = other.where(NAME) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{re.escape(file)}: expected sha256"):
        convert((other, NAME), (other, "back"), "full")
    assert [p.name for p in other.parent.iterdir()] == [NAME]


def reseal(shelf, name, change, drop=()):
    """Change files of a checkpoint, and have the manifest say so: what somebody who means harm can do."""
    manifest = _saved.read_manifest(shelf, name)
    about = {k: v for k, v in manifest.items() if k not in ("magic", "schema", "files", "sha256")}
    contents = change({f: bytes(shelf.read(name, f, limit=2**30)) for f in manifest["files"]})
    draft = shelf.begin(name)
    files = {file: draft.write(file, [content]) for file, content in contents.items() if file not in drop}
    draft.commit(_manifest.seal({**about, "files": files}))


def index_of(change):
    def changed(contents):
        index = json.loads(contents["shards.json"])
        change(index)
        return {**contents, "shards.json": _manifest.dump_json(index)}

    return changed


LIES = {
    "a chunk less": (
        index_of(lambda i: i["model/one.weight"]["chunks"].pop()),
        "shards.json: model/one.weight: chunks",
    ),
    "a huge shape": (
        index_of(
            lambda i: [i["model/third"].update(shape=[2**40]), i["model/third"]["chunks"][0].update(sizes=[2**40])]
        ),
        "which is less than the chunks in it",
    ),
    "a tensor less": (
        index_of(lambda i: i.pop("model/one.bias")),
        "part-00000.safetensors: expected 'model/one.bias:0'",
    ),
    "a dtype": (index_of(lambda i: i["model/one.bias"].update(dtype="I32")), "expected 'model/one.bias:0' to be"),
    "no JSON": (lambda c: {**c, "shards.json": b"[NaN]\n"}, "shards.json: holds NaN"),
    "a part exchanged": (
        lambda c: {**c, "part-00001.safetensors": c["part-00000.safetensors"]},
        "part-00001.safetensors: expected",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_source_that_lies_is_refused(shelf, other, lie):
    """Where the digests are right and the content is not, reader and converter say what is wrong."""
    convert((shelf, NAME), (other, NAME), "sharded", 2)
    change, reason = LIES[lie]
    reseal(other, NAME, change)
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        convert((other, NAME), (other, "back"), "full")
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        _saved.read(other, NAME)


def test_a_part_of_which_nothing_is_needed_is_verified(shelf, other):
    """A part that the index does not name has the digest that the manifest says."""
    convert((shelf, NAME), (other, NAME), "sharded", 2)
    reseal(other, NAME, lambda c: {**c, "part-00009.safetensors": c["part-00000.safetensors"]})
    path = other.where(NAME) / "part-00009.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"part-00009\.safetensors: expected sha256"):
        convert((other, NAME), (other, "back"), "full")


@attrs.define
class FullDisk(LocalStore):
    """Has no room for the second file."""

    files: int = 0

    def create(self, path):
        self.files += 1
        if self.files == 2:
            raise OSError(28, "No space left on device")
        return super().create(path)


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_target_that_cannot_be_written_is_absent(shelf, tmp_path, form):
    """A failing disk is an error with the reason, and nothing is left."""
    target = LocalShelf(tmp_path / "full", FullDisk())
    with pytest.raises(CheckpointError, match=rf"{NAME} could not be written: No space left on device"):
        convert((shelf, NAME), (target, NAME), form, 2)
    assert list(target.parent.iterdir()) == []


def test_what_makes_no_sense_is_refused(shelf, other):
    """Unknown forms, no parts, and a name of another step."""
    with pytest.raises(ValueError, match="Received: 'pickled', 1"):
        convert((shelf, NAME), (other, NAME), "pickled")
    with pytest.raises(ValueError, match="Received: 'sharded', 0"):
        convert((shelf, NAME), (other, NAME), "sharded", 0)
    with pytest.raises(CheckpointError, match="is no name for a checkpoint of step 4"):
        convert((shelf, NAME), (other, "step-00000005"), "full")
    assert not other.parent.exists()


def test_an_old_tensor_name_that_no_index_can_hold_is_refused(shelf, other):
    """A full checkpoint with a tensor of a strange name has no sharded form."""
    tensors = {"model/../x": torch.ones(2)}
    index, _ = split(tensors, 1)
    assert list(index) == ["model/../x"]

    def rename(contents):
        model = from_safetensors(bytearray(contents["model.safetensors"]))
        from safetensors.torch import save

        return {**contents, "model.safetensors": save({"../x": model.pop("third"), **model})}

    convert((shelf, NAME), (other, NAME), "full")
    reseal(other, NAME, rename)
    with pytest.raises(CheckpointError, match=r"shards\.json: expected names like"):
        convert((other, NAME), (other, "sharded"), "sharded")
