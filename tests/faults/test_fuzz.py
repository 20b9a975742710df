"""Checkpoints and recipes with contents that nobody wrote: only the documented errors escape, soon, and nothing else is opened.

The mutations know the structure: a file is changed and its digests are made right again, so that what is behind the
digests is reached.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import faults_worker
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivetrain import CheckpointError, ConfigError, Recipe
from drivetrain_plugins.checkpoint import _manifest, _saved
from drivetrain_plugins.checkpoint._local import LocalShelf
from drivetrain_plugins.checkpoint._store import LocalStore

# Python's own modules, loaded when something is first used, are no files of a checkpoint's making.
INNOCENT = tuple(
    {str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix, *filter(None, sys.path))} | {"/proc", "/sys"}
)
FORBIDDEN = ("pickle.find_class", "marshal.loads", "os.system", "subprocess.Popen", "socket.connect", "ctypes.dlopen")
LIMIT_S = 1.0  # of this process's time: other processes may hold the cores


class Watch:
    """An audit hook: what this thread opens outside a folder, or runs, while it is on."""

    def __init__(self):
        self.folder, self.seen, self.thread = None, [], None
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if self.folder is None or threading.get_ident() != self.thread:
            return
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.fsdecode(args[0])
            inside = not os.path.isabs(path) and os.sep not in path and path != ".."  # noqa: PTH117 - beside an open folder
            if not inside and not os.path.abspath(path).startswith((self.folder, *INNOCENT)):  # noqa: PTH100 - resolving would open
                self.seen.append(path)
        elif event in FORBIDDEN:
            self.seen.append((event, args))

    @contextlib.contextmanager
    def on(self, folder):
        self.folder, self.seen, self.thread = str(folder), [], threading.get_ident()
        try:
            yield
        finally:
            self.folder = None
        assert self.seen == []


@pytest.fixture(scope="module")
def watch():
    return Watch()


def test_the_watch_sees(watch, tmp_path):
    """What the hook is there for, it sees."""
    (tmp_path / "a").write_text("1")
    with watch.on(tmp_path):
        (tmp_path / "a").read_text()
    for path in ("/etc/hostname", tmp_path / "a/../../x"):
        with pytest.raises(AssertionError), watch.on(tmp_path), contextlib.suppress(OSError):
            Path(path).read_text()


# --- mutations -------------------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from([0, 1, -1, 2, 2**31, 2**53, 2**63 - 1, -(2**63), 1.5, -0.0, 1e308])
TEXTS = st.sampled_from(
    ["", "x", "../x", "/etc/passwd", "..", "model", "$tensor", "F32", "a/b", "\x00", "\ud800", "9" * 400]
)
MARKS = st.sampled_from(["$tensor", "$tuple", "$dict", "$int", "$float", "$other"])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS | st.integers(-(2**63), 2**63 - 1)
VALUES = st.recursive(
    LEAVES,
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(TEXTS, inside, max_size=3)
        | st.builds(lambda mark, value: {mark: value}, MARKS, inside)
    ),
    max_leaves=6,
)


def places(value, path=()):
    """Yield every place in a JSON value, the inner ones too."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*path, key)
        if len(path) < 12:
            yield from places(one, (*path, key))


def mutate(data, value):
    """Change up to three places of a JSON value: replaced, removed, renamed, doubled, or exchanged with another."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        there = [p for p in places(value) if len(p) < 3 or p[-1] in (0, 1) or not isinstance(p[-1], int)]
        if not there:
            break
        path = data.draw(st.sampled_from(there), label="place")
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = data.draw(st.sampled_from(["replace", "replace", "remove", "add", "rename", "exchange"]), label="what")
        if action == "replace":
            parent[path[-1]] = data.draw(VALUES, label="with")
        elif action == "remove":
            del parent[path[-1]]
        elif action == "add" and isinstance(parent, dict):
            parent[data.draw(TEXTS | MARKS, label="key")] = data.draw(VALUES, label="value")
        elif action == "add":
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif action == "rename" and isinstance(parent, dict):
            parent[data.draw(TEXTS | MARKS, label="key")] = parent.pop(path[-1])
        elif action == "exchange":
            other = data.draw(st.sampled_from(there), label="other")
            with contextlib.suppress(KeyError, IndexError, TypeError):
                source = value
                for key in other:
                    source = source[key]
                parent[path[-1]] = copy.deepcopy(source)
    return value


def dumps(value):
    return (json.dumps(value) + "\n").encode()


class Subject:
    """A real checkpoint of a small run, in memory, and a folder to put changed ones into."""

    def __init__(self, run, tmp):
        self.source, self.tmp = run / "checkpoints" / "step-00000010", tmp
        self.files = {p.name: p.read_bytes() for p in self.source.iterdir()}
        content = json.loads(self.files.pop("manifest.json"))
        self.manifest = {k: v for k, v in content.items() if k not in ("magic", "schema", "sha256")}
        self.folder = tmp / "checkpoints" / "step-00000010"
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, files, manifest=None, *, sealed=True):
        """Put a checkpoint there, with right digests of all files."""
        about = {n: {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} for n, raw in files.items()}
        content = copy.deepcopy(self.manifest) | {"files": about} if manifest is None else manifest
        for name, raw in files.items():
            (self.folder / name).write_bytes(raw)
        body = {"magic": _manifest.MAGIC, "schema": _manifest.SCHEMA, **content} if sealed else content
        text = json.dumps(body).encode()
        if sealed and isinstance(body, dict):
            with contextlib.suppress(ValueError):
                digest = hashlib.sha256(_manifest.dump_json(body)).hexdigest()
                text = _manifest.dump_json({**body, "sha256": digest}, indent=1)
        (self.folder / "manifest.json").write_bytes(text)

    def read(self, watch):
        """Read it; return it, or None where it was refused. Anything but a CheckpointError escapes."""
        started = time.process_time()
        saved = None
        with watch.on(self.tmp), contextlib.suppress(CheckpointError):
            saved = _saved.read(LocalShelf(self.folder.parent, LocalStore()), self.folder.name)
        assert time.process_time() - started < LIMIT_S
        return saved


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def full(finished, tmp):
    return Subject(finished[0], tmp / "full")


@pytest.fixture(scope="module")
def sharded(tmp):
    made, rows = faults_worker.build(faults_worker.Job(folder=str(tmp / "made")), LocalStore())
    made.plugins["checkpoint"].form = "sharded"
    torch.set_num_threads(1)
    made.fit(rows)
    return Subject(tmp / "made", tmp / "sharded")


def fuzz(examples):
    health = [
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ]
    return settings(max_examples=examples, deadline=None, suppress_health_check=health, database=None)


# --- the reader ------------------------------------------------------------------------------------------------------


def change_manifest(watch, subject, data):
    content = {**copy.deepcopy(subject.manifest), "files": {
        n: {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} for n, raw in subject.files.items()
    }}  # fmt: skip
    subject.write(subject.files, mutate(data, content), sealed=data.draw(st.integers(0, 9)) > 0)
    subject.read(watch)


def change_json(watch, subject, file, data):
    changed = mutate(data, json.loads(subject.files[file]))
    subject.write({**subject.files, file: dumps(changed)})
    subject.read(watch)


def change_header(watch, subject, file, data):
    raw = subject.files[file]
    length = int.from_bytes(raw[:8], "little")
    header = dumps(mutate(data, json.loads(raw[8 : 8 + length])))
    declared = data.draw(st.sampled_from([len(header)] * 8 + [0, 1, 2**40, 2**63, 2**64 - 1]), label="length")
    rest = raw[8 + length :][: data.draw(st.sampled_from([None, None, None, 0, 7]), label="rest")]
    subject.write({**subject.files, file: declared.to_bytes(8, "little") + header + rest})
    subject.read(watch)


def change_bytes(watch, subject, data):
    file = data.draw(st.sampled_from(sorted(subject.files)), label="file")
    raw = bytearray(subject.files[file])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(raw), 4000) - 1), label="at")
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4), label="bytes")
    subject.write({**subject.files, file: bytes(raw)})
    subject.read(watch)


KINDS = {
    "manifest": lambda w, f, s, d: change_manifest(w, d.draw(st.sampled_from([f, s])), d),
    "state": lambda w, f, s, d: change_json(w, d.draw(st.sampled_from([f, s])), "state.json", d),
    "index": lambda w, f, s, d: change_json(w, s, "shards.json", d),
    "header": lambda w, f, s, d: change_header(w, f, d.draw(st.sampled_from(["model.safetensors", "state.safetensors"])), d),
    "part": lambda w, f, s, d: change_header(w, s, "part-00000.safetensors", d),
    "bytes": lambda w, f, s, d: change_bytes(w, d.draw(st.sampled_from([f, s])), d),
}  # fmt: skip


def reader(watch, full, sharded, kind, examples):
    @fuzz(examples)
    @given(st.data())
    def run(data):
        KINDS[kind](watch, full, sharded, data)

    run()


def test_what_is_unchanged_is_read(watch, full, sharded):
    """The tools change nothing by themselves."""
    for subject in (full, sharded):
        subject.write(subject.files)
        assert subject.read(watch).manifest["step"] == 10


@pytest.mark.parametrize("kind", KINDS)
def test_the_reader(watch, full, sharded, kind):
    """Whatever is in a checkpoint, `read` returns or raises CheckpointError, within a second, opening nothing else."""
    reader(watch, full, sharded, kind, 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_reader_for_long(watch, full, sharded, kind):
    """The same, many times."""
    reader(watch, full, sharded, kind, 8000)


# --- the run ---------------------------------------------------------------------------------------------------------


def restoring(watch, full, examples):
    trainer, rows = faults_worker.build(faults_worker.Job(folder=str(full.tmp)), LocalStore())
    trainer.plugins["checkpoint"].on_change = "accept"

    @fuzz(examples)
    @given(st.data())
    def run(data):
        state = json.loads(full.files["state.json"])
        content = copy.deepcopy(full.manifest)
        if data.draw(st.booleans(), label="manifest"):
            content = mutate(data, content)
        else:
            state = mutate(data, state)
        files = {**full.files, "state.json": dumps(state)}
        if isinstance(content.get("files", {}), dict):
            content["files"] = {n: {"size": len(r), "sha256": hashlib.sha256(r).hexdigest()} for n, r in files.items()}
        full.write(files, content)
        assembled = trainer.assemble(rows)
        with contextlib.suppress(CheckpointError):
            assembled.hooks.load(assembled, full.folder)

    run()


def test_the_run(watch, full):
    """Whatever state.json and the manifest say, loading it into a run works or raises CheckpointError."""
    restoring(watch, full, 60)


@pytest.mark.slow
def test_the_run_for_long(watch, full):
    """The same, many times."""
    restoring(watch, full, 3000)


# --- recipes ---------------------------------------------------------------------------------------------------------

RECIPE = """\
[run]
output = "runs/x"
steps = 3
seed = 1
log_every = "2 steps"

[[plugin]]
use = "adamw"
lr = 1e-3
betas = [0.9, 0.95]

[[plugin]]
use = "checkpoint"
every = ["2 steps", "1 epoch"]
keep = 2
"""
WORDS = st.sampled_from([
    "=", "[", "]", "[[", "]]", '"', "'", '"""', "#", "\n", ",", ".", "{", "}", "nan", "inf", "-1", "1e999", "0x", "true", "\x00",
    "use", "run", "plugin", "lr", "{env = 'HOME'}", "{file = '/etc/passwd'}", "9" * 50, "1979-05-27", "\ufeff", "\\u0000", "[run]",
])  # fmt: skip


def recipes(watch, tmp, examples):
    folder = tmp / "recipes"
    folder.mkdir(exist_ok=True)

    @fuzz(examples)
    @given(st.data())
    def run(data):
        text = RECIPE
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(text)))
            cut = data.draw(st.sampled_from([0, 0, 1, 5, 20]))
            text = text[:at] + data.draw(WORDS | st.text(max_size=4)) + text[at + cut :]
        path = folder / "recipe.toml"
        path.write_bytes(text.encode(errors="surrogatepass"))
        started = time.process_time()
        with watch.on(folder), contextlib.suppress(ConfigError):
            Recipe.load(path)
        assert time.process_time() - started < LIMIT_S

    run()


def test_recipes(watch, tmp):
    """Whatever a recipe's text is, `Recipe.load` returns or raises ConfigError, and opens no other file."""
    recipes(watch, tmp, 150)


@pytest.mark.slow
def test_recipes_for_long(watch, tmp):
    """The same, many times."""
    recipes(watch, tmp, 20_000)
