"""Contents that no save writes, in files whose digests are right: each is refused, with place, file and reason."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tracemalloc

import faults_worker
import pytest
import torch
from safetensors.torch import save as to_bytes

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _manifest
from drivetrain_plugins.checkpoint._format import from_safetensors, to_safetensors

NAME = "step-00000010"


class Forged:
    """A checkpoint of a finished run, whose parts can be changed and sealed again."""

    def __init__(self, folder):
        self.run, self.folder = folder, folder / "checkpoints" / NAME
        shutil.rmtree(folder / "checkpoints" / "step-00000008")
        self.state = json.loads((self.folder / "state.json").read_text())
        content = json.loads((self.folder / "manifest.json").read_text())
        self.manifest = {k: v for k, v in content.items() if k not in ("magic", "schema", "sha256")}

    def tensors(self, file):
        return from_safetensors(bytearray((self.folder / file).read_bytes()))

    def write(self, file, raw):
        """Replace a file, and say so in the manifest."""
        (self.folder / file).write_bytes(raw)
        self.manifest["files"][file] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    def write_tensors(self, file, tensors):
        self.write(file, b"".join(bytes(piece) for piece in to_safetensors(tensors)))

    def seal(self):
        """Write what was changed, with right digests."""
        self.write("state.json", _manifest.dump_json(self.state))
        (self.folder / "manifest.json").write_bytes(_manifest.seal(self.manifest))

    def load(self):
        """Load it as resuming does."""
        trainer, rows = faults_worker.build(faults_worker.Job(folder=str(self.run)), faults_worker.LocalStore())
        run = trainer.assemble(rows)
        return run, run.hooks.load(run, self.folder)

    def refused(self, reason, file):
        """Expect both the reader or the run to refuse it, naming folder and file."""
        with pytest.raises(CheckpointError, match=reason) as caught:
            self.load()
        assert f"{self.folder}: {file}" in str(caught.value)


@pytest.fixture
def forged(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return Forged(tmp_path / "run")


def test_what_is_only_sealed_again_is_loaded(forged):
    """The forger's tools change nothing by themselves: what they seal is read and restored."""
    forged.write_tensors("state.safetensors", forged.tensors("state.safetensors"))
    forged.seal()
    run, path = forged.load()
    assert path == forged.folder
    assert run.progress.step == 10


# --- counters --------------------------------------------------------------------------------------------------------


def both(**values):
    """Change counters in the manifest and in the state alike."""

    def change(forged):
        for position in (forged.manifest["position"], forged.state["progress"]):
            position.update(values)

    return change


def without(name):
    def change(forged):
        for position in (forged.manifest["position"], forged.state["progress"]):
            del position[name]

    return change


COUNTERS = {
    "negative": (both(rows=-1), "not negative, found {'rows': -1}", "manifest.json"),
    "a float": (both(items=1.5), "not negative, found {'items': 1.5}", "manifest.json"),
    "a bool": (both(epoch=True), "not negative, found {'epoch': True}", "manifest.json"),
    "text": (both(epoch="1"), "not negative, found {'epoch': '1'}", "manifest.json"),
    "null": (both(epoch=None), "not negative, found {'epoch': None}", "manifest.json"),
    "another step": (both(step=9), "expected a position at step 10", "manifest.json"),
    "more applied than taken": (both(applied=11), "expected a position at step 10", "manifest.json"),
    "more rows in the epoch than in all": (both(rows=3), "a position in an epoch of 90 rows", "manifest.json"),
    "beyond the epoch": (both(rows_in_epoch=90), "a position in an epoch of 90 rows", "manifest.json"),
    "two positions": (lambda f: f.state["progress"].update(rows=91), "the manifest's position", "state.json"),
    "one is missing": (without("rows"), r"expected all counters, found none for \['rows'\]", "state.json"),
    "one too many": (both(extra=1), "unexpected keyword argument 'extra'", "state.json"),
    "no counter of skipped steps": (lambda f: f.state.pop("counters"), "KeyError: 'counters'", "state.json"),
}


@pytest.mark.parametrize("case", COUNTERS)
def test_counters_that_cannot_be(forged, case):
    """Counters that are negative, no whole numbers, missing, or contradict each other are refused."""
    change, reason, file = COUNTERS[case]
    change(forged)
    forged.seal()
    forged.refused(reason, file)


# --- generators ------------------------------------------------------------------------------------------------------


def generator(**values):
    return lambda forged: forged.state["random"][0].update(values)


def inside(kind, place, value):
    def change(forged):
        content = forged.state["random"][0][kind]
        (content["$tuple"] if isinstance(content, dict) else content)[place] = value

    return change


def python_state(internal):
    return inside("python", 1, {"$tuple": internal})


GENERATORS = {
    "none": (lambda f: f.state.update(random=[]), "generators' states of 1 ranks, found 0"),
    "of two ranks": (lambda f: f.state.update(random=f.state["random"] * 2), "of 1 ranks, found 2"),
    "missing": (lambda f: f.state.pop("random"), "KeyError: 'random'"),
    "text": (lambda f: f.state.update(random="0"), "TypeError"),
    "torch too short": (generator(torch="00" * 16), "RuntimeError: .*of size 5056"),
    "torch empty": (generator(torch=""), "RuntimeError: .*of size 5056"),
    "torch no hex": (generator(torch="xy"), "non-hexadecimal"),
    "torch a number": (generator(torch=3), "TypeError"),
    "torch all ones": (
        lambda f: f.state["random"][0].update(torch="f" * len(f.state["random"][0]["torch"])),
        "Invalid",
    ),
    "numpy of another kind": (inside("numpy", 0, "PCG64"), "ValueError"),
    "numpy too short": (inside("numpy", 1, [1, 2, 3]), "ValueError"),
    "numpy too long": (inside("numpy", 1, [1] * 625), "ValueError"),
    "numpy beyond 32 bits": (inside("numpy", 1, [2**40] * 624), "OverflowError"),
    "numpy past its end": (inside("numpy", 2, 625), "a position in numpy's 624 words, found 625"),
    "numpy far past its end": (inside("numpy", 2, 2**31 - 1), "a position in numpy's 624 words"),
    "numpy before its start": (inside("numpy", 2, -1), "a position in numpy's 624 words, found -1"),
    "numpy at a float": (inside("numpy", 2, 1.5), "a position in numpy's 624 words, found 1.5"),
    "python of another version": (inside("python", 0, 9), "state with version 9"),
    "python too short": (python_state([1, 2]), "wrong size"),
    "python beyond 64 bits": (python_state([{"$int": hex(2**70)}] * 625), "OverflowError"),
    "python negative": (python_state([-1] * 625), "OverflowError|TypeError|ValueError"),
    "python past its end": (python_state([1] * 624 + [9999]), "invalid state"),
}


@pytest.mark.parametrize("case", GENERATORS)
def test_generators_that_cannot_be(forged, case):
    """A generator's state of another length, type or range is refused, also where its library would take it."""
    change, reason = GENERATORS[case]
    change(forged)
    forged.seal()
    forged.refused(reason, "state.json does not fit this run")


# --- plugins ---------------------------------------------------------------------------------------------------------


def test_the_state_of_an_unknown_plugin_is_left_out_and_told(forged, caplog):
    """A state that no plugin of the run takes is left out, and that is said."""
    forged.state["plugins"]["stranger"] = {"x": 1}
    forged.seal()
    with caplog.at_level(logging.WARNING, "drivetrain"):
        forged.load()
    assert any("the state of stranger" in r.getMessage() for r in caplog.records)


def test_the_state_of_an_unknown_version_is_refused(forged):
    """A state of a version that the plugin cannot read is refused by name."""
    forged.manifest["states"]["recorder"] = 3
    forged.seal()
    with pytest.raises(CheckpointError, match="'recorder' has version 3, the plugin that is installed reads up to 1"):
        forged.load()


PLUGINS = {
    "a list": (lambda f: f.state.update(plugins=[]), "state.json"),
    "missing": (lambda f: f.state.pop("plugins"), "state.json"),
    "of another form": (lambda f: f.state["plugins"].update(recorder={"rows": []}), "state.json"),
    "no state at all": (lambda f: f.state["plugins"].update(recorder=None), "state.json"),
    "listed as text": (lambda f: f.manifest["plugins"].update(adamw="AdamW"), "manifest.json"),
    "listed without effect": (lambda f: f.manifest["plugins"]["adamw"].pop("effect"), "manifest.json"),
    "options that are a list": (lambda f: f.manifest["plugins"]["adamw"].update(options=[]), "manifest.json"),
    "metrics that are text": (lambda f: f.manifest["metrics"].update(loss="low"), "manifest.json"),
    "metrics of an unknown mark": (lambda f: f.manifest["metrics"].update(loss={"$float": "1.0"}), "manifest.json"),
    "groups that are numbers": (lambda f: f.state.update(groups=[1]), "state.json"),
}


@pytest.mark.parametrize("case", PLUGINS)
def test_plugins_that_cannot_be(forged, case):
    """Whatever is written about plugins, their states and metrics, only a CheckpointError escapes."""
    change, file = PLUGINS[case]
    change(forged)
    forged.seal()
    forged.refused("expected|does not fit", file)


# --- model and optimizer ---------------------------------------------------------------------------------------------


def test_a_model_of_other_tensors(forged):
    """A tensor that is missing, too many, of another shape or another type is refused by name."""
    original = forged.tensors("model.safetensors")
    changes = {
        "differ in .*'head.bias'": lambda t, s: (t.pop("head.bias"), s.pop("head.bias")),
        "differ in .*'more'": lambda t, s: (t.update(more=torch.ones(1)), s.update(more={"$tensor": "model/more"})),
        r"'head.bias' is torch.float32 \(3,\)": lambda t, s: t.update({"head.bias": torch.ones(3)}),
        r"'head.bias' is torch.float64 \(12,\)": lambda t, s: t.update({"head.bias": t["head.bias"].double()}),
    }
    state = json.loads(json.dumps(forged.state))
    for reason, change in changes.items():
        tensors, forged.state = dict(original), json.loads(json.dumps(state))
        change(tensors, forged.state["model"])
        forged.write_tensors("model.safetensors", tensors)
        forged.seal()
        forged.refused(reason, "state.json")


def test_ties_that_cannot_be(forged):
    """A tie to an unknown weight, a circle of ties, and a tie that the model has not are another model."""
    assert forged.manifest["aliases"] == {"head.weight": "embed.weight"}
    for aliases in ({"head.weight": "nowhere"}, {"head.weight": "head.weight"}, {"a": "b", "b": "a"}, {}):
        forged.manifest["aliases"] = aliases
        forged.seal()
        with pytest.raises(CheckpointError, match=r"~ model: .* tied"):
            forged.load()


def moments(forged, change):
    """Change the optimizer's tensors."""
    tensors = forged.tensors("state.safetensors")
    change(tensors)
    forged.write_tensors("state.safetensors", tensors)


MOMENT = "optimizer.state.0.exp_avg"
OPTIMIZER = {
    "of a parameter that is not there": (
        lambda f: f.state["optimizer"]["state"].update({"99": {"step": 1}}), "parameters of the optimizer, found one of"
    ),
    "of a negative number": (lambda f: f.state["optimizer"]["state"].update({"-1": {"step": 1}}), "found one of"),
    "of no number": (lambda f: f.state["optimizer"]["state"].update({"x": {"step": 1}}), "invalid literal"),
    "a group less": (lambda f: f.state["optimizer"]["param_groups"].pop(), "shorter|longer"),
    "a group more": (lambda f: f.state["optimizer"]["param_groups"].append({}), "shorter|longer"),
    "another name": (
        lambda f: f.state["optimizer"]["param_groups"][0]["param_names"].__setitem__(0, "other"), "in name or order"
    ),
    "a parameter less": (lambda f: f.state["optimizer"]["param_groups"][0]["params"].pop(), "size of optimizer's group"),
    "no groups": (lambda f: f.state["optimizer"].pop("param_groups"), "KeyError: 'param_groups'"),
    "smaller than its parameter": (lambda f: moments(f, lambda t: t.update({MOMENT: torch.ones(1)})), "'exp_avg' .*shape"),
    "larger than its parameter": (
        lambda f: moments(f, lambda t: t.update({MOMENT: torch.ones(5000)})), r"'exp_avg' .*shape.*found \(5000,\)"
    ),
    "without dimensions": (lambda f: moments(f, lambda t: t.update({MOMENT: torch.tensor(1.0)})), r"'exp_avg' .*found \(\)"),
    "many steps": (
        lambda f: moments(f, lambda t: t.update({"optimizer.state.0.step": torch.ones(3)})), "'step' .*shape"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIMIZER)
def test_an_optimizer_of_other_parameters(forged, case):
    """The state of another set of parameters, or of parameters of another size, is refused before a kernel reads it."""
    change, reason = OPTIMIZER[case]
    change(forged)
    forged.seal()
    forged.refused(reason, "state.json does not fit this run")


# --- sizes -----------------------------------------------------------------------------------------------------------


def header(text, length=None):
    raw = text.encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw


def tensor_of(shape, offsets, dtype="F32"):
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


HUGE = {
    "a header of 8 EiB": header("{}", 2**63 - 1),
    "a header of 99 MB": header("{}", 99_000_000),
    "a tensor of 4 EiB": header(tensor_of([2**60], [0, 2**62])),
    "a shape beyond 64 bits": header(tensor_of([2**40, 2**40], [0, 0])),
    "a shape that comes round to nothing": header(tensor_of([2**32, 2**32], [0, 0], "U8")),
    "offsets beyond the file": header(tensor_of([10**9], [0, 4 * 10**9])) + bytes(16),
    "nothing": b"",
}


@pytest.mark.parametrize("case", HUGE)
def test_declared_sizes_are_not_believed(forged, case):
    """A tensor file that declares far more than it holds is refused, and nothing of that size is allocated."""
    forged.write("model.safetensors", HUGE[case])
    forged.seal()
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        faults_worker.read(forged.folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


@pytest.mark.parametrize("size", [2**33, 2**62, 2**63 - 1])
@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_manifest_that_declares_a_huge_file(forged, file, size):
    """A size that the file does not have is refused before anything is read."""
    forged.seal()
    forged.manifest["files"][file]["size"] = size
    (forged.folder / "manifest.json").write_bytes(_manifest.seal(forged.manifest))
    with pytest.raises(CheckpointError, match=rf"{file}: expected {size} bytes, found \d+"):
        faults_worker.read(forged.folder)


def test_a_huge_file_is_not_read(forged):
    """A state.json of many gigabytes, and a manifest of as many, are refused by their size; sparse files cost nothing."""
    forged.seal()
    with (forged.folder / "manifest.json").open("r+b") as file:
        file.truncate(2**35)
    with pytest.raises(CheckpointError, match=r"manifest.json: expected at most \d+ bytes, found 34359738368"):
        faults_worker.read(forged.folder)
    forged.manifest["files"]["state.json"] = {"size": 2**35, "sha256": "0" * 64}
    (forged.folder / "manifest.json").write_bytes(_manifest.seal(forged.manifest))
    with (forged.folder / "state.json").open("r+b") as file:
        file.truncate(2**35)
    with pytest.raises(CheckpointError, match=r"state.json: expected at most \d+ bytes, found 34359738368"):
        faults_worker.read(forged.folder)


def test_a_tensor_file_with_metadata_or_others_layout_is_data_only(forged):
    """A file that another writer of safetensors made, with metadata, is read as data and nothing else."""
    tensors = forged.tensors("model.safetensors")
    forged.write("model.safetensors", to_bytes(tensors, {"__class__": "os.system"}))
    forged.seal()
    assert forged.load()[0].progress.step == 10
