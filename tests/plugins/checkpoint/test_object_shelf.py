"""Checkpoints in an object store: what readers see, what is refused, and that nothing waits beyond its deadline."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from drivetrain import ConfigError, MissingDependency
from drivetrain_plugins.checkpoint import _bucket, _object, _reliable, _retry
from drivetrain_plugins.checkpoint._object import ObjectShelf
from drivetrain_plugins.checkpoint._retry import Deadline

NAME = "step-00000010"


class Flawed(MemoryFileSystem):
    """A store in memory that does what a test tells it before it does what it is asked."""

    protocol = "flawed"
    before = staticmethod(lambda call, path: None)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self.before("put", path)
        super().pipe_file(path, value, mode, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.before("get", path)
        return super().cat_file(path, start, end, **kwargs)

    def rm_file(self, path):
        self.before("remove", path)
        super().rm_file(path)

    def _open(self, path, mode="rb", **kwargs):
        self.before("open", path)
        return super()._open(path, mode, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flawed://"))


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Give each test an empty store, in parts of a mebibyte."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(_reliable, "PART", 2**20)
    monkeypatch.setattr(_retry, "FIRST_PAUSE_S", 0.01)
    fsspec.register_implementation("flawed", Flawed, clobber=True)
    return MemoryFileSystem.store


@pytest.fixture
def shelf():
    """Return a shelf in memory."""
    return ObjectShelf.open("memory://run/checkpoints", 5.0)


@pytest.fixture
def flawed(monkeypatch):
    """Return a shelf whose store fails as a test tells it, and what tells it."""

    def tell(before):
        monkeypatch.setattr(Flawed, "before", staticmethod(before))

    return ObjectShelf.open("flawed://run/checkpoints", 5.0), tell


def save(shelf, name=NAME, **files):
    """Save files, and a manifest that is no more than a text."""
    draft = shelf.begin(name)
    told_of = {file: draft.write(file, [content]) for file, content in (files or {"a": b"content"}).items()}
    draft.commit(json.dumps(told_of).encode())
    return draft


def manifest(shelf, name=NAME):
    """Return the manifest's bytes."""
    return bytes(shelf.read(name, "manifest.json", limit=2**20))


# --- what readers see ------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(shelf):
    """Files come back as they were, short ones and those sent in parts, and their sizes and digests are told."""
    shelf.prepare()
    long = os.urandom(2**20) * 3 + b"end"
    draft = shelf.begin(NAME)
    answer = draft.write("long", [long[:10], memoryview(long)[10:]])
    assert answer == {"size": len(long), "sha256": hashlib.sha256(long).hexdigest()}
    assert draft.write("empty", []) == {"size": 0, "sha256": hashlib.sha256().hexdigest()}
    draft.commit(b"the manifest")
    reader = ObjectShelf.open("memory://run/checkpoints/", 5.0)
    assert reader.names() == [NAME]
    assert reader.files(NAME) == ["empty", "long", "manifest.json"]
    assert reader.read(NAME, "long", limit=2**30, size=len(long)) == long
    assert reader.read(NAME, "empty", limit=0, size=0) == b""
    assert manifest(reader) == b"the manifest"
    assert reader.where(NAME) == f"memory://run/checkpoints/{NAME}"
    assert reader.where("") == "memory://run/checkpoints"
    assert reader.free_bytes() is None


def test_commit_comes_last_and_pins_the_manifest(flawed):
    """COMMIT is put after everything else, once, and names the attempt and the manifest's digest."""
    shelf, tell = flawed
    puts = []
    tell(lambda call, path: puts.append(path.rpartition("/")[2]) if call == "put" else None)
    draft = save(shelf, b=b"2", a=b"1")
    assert puts == ["b", "a", "manifest.json", "COMMIT"]
    commit = json.loads(shelf.bucket.look(shelf.bucket.path(NAME, "COMMIT"), 1.0)[0])
    assert commit == {"attempt": draft.token, "sha256": hashlib.sha256(manifest(shelf)).hexdigest()}


def test_a_draft_is_not_seen(shelf):
    """A step without a COMMIT is no checkpoint, and beside an older one of its name the older one stays."""
    draft = shelf.begin(NAME)
    draft.write("a", [b"new"])
    assert shelf.names() == []
    for work in (lambda: shelf.files(NAME), lambda: manifest(shelf), lambda: shelf.remove(NAME)):
        with pytest.raises(FileNotFoundError, match="no COMMIT"):
            work()
    save(shelf, a=b"old")
    beside = shelf.begin(NAME)
    beside.write("a", [b"newer"])
    assert shelf.read(NAME, "a", limit=9) == b"old"


def test_only_steps_are_listed(shelf, memory):
    """Other folders and objects are no checkpoints of the run; one with a name of its own can be read by it."""
    save(shelf, "step-00000002")
    save(shelf, "copy", a=b"copied")
    for path in ("notes.txt", "step-3/COMMIT", "step-00000004/deeper/COMMIT", "COMMIT", "step-00000005"):
        shelf.bucket.put(shelf.bucket.path(path), b"{}", 1.0)
    shelf.bucket.put("/run/checkpoints-of-another/step-00000006/COMMIT", b"{}", 1.0)
    assert shelf.names() == ["step-00000002"]
    assert shelf.read("copy", "a", limit=9) == b"copied"


def test_ranks_write_into_one_draft(shelf):
    """What another process writes into a draft by its token is part of the checkpoint."""
    draft = shelf.begin(NAME)
    other = ObjectShelf.open("memory://run/checkpoints", 5.0).join(NAME, draft.token)
    other.write("part-00001", [b"1"])
    draft.write("part-00000", [b"0"])
    draft.commit(b"{}")
    assert shelf.files(NAME) == ["manifest.json", "part-00000", "part-00001"]


def test_a_save_of_the_same_step_replaces_it(shelf, memory):
    """A later save of a step takes the place of the one there was, whose files go, and no file of which is mixed in."""
    save(shelf, a=b"1", only_old=b"")
    save(ObjectShelf.open("memory://run/checkpoints", 5.0), a=b"2")
    assert shelf.read(NAME, "a", limit=9) == b"2"
    assert shelf.files(NAME) == ["a", "manifest.json"]
    assert len(memory) == 3


def test_what_is_removed_is_gone(flawed, memory):
    """COMMIT goes first, so that no reader sees a part; then the files go, and drafts of the step stay."""
    shelf, tell = flawed
    save(shelf)
    draft = shelf.begin(NAME)
    draft.write("a", [b"draft"])
    removed = []
    tell(lambda call, path: removed.append(path.rpartition("/")[2]) if call == "remove" else None)
    shelf.remove(NAME)
    assert removed == ["COMMIT", "a", "manifest.json"]
    assert shelf.names() == []
    assert [path.split("/")[-2:] for path in memory] == [[draft.token, "a"]]


def test_a_discarded_draft_leaves_nothing(shelf, memory):
    """Discarding removes what was written, twice as well, and what comes after is refused."""
    draft = shelf.begin(NAME)
    draft.write("a", [b"1"])
    draft.discard()
    draft.discard()
    assert memory == {}
    for work in (lambda: draft.write("b", [b""]), lambda: draft.commit(b"{}")):
        with pytest.raises(OSError, match="given up"):
            work()
    assert memory == {}


# --- what is refused -------------------------------------------------------------------------------------------------


def test_sizes_are_checked_before_reading(flawed):
    """A file of another size than expected, or beyond the limit, is refused, and nothing of it is read."""
    shelf, tell = flawed
    save(shelf, a=b"12345")
    gets = []
    tell(lambda call, path: gets.append(path) if call == "get" and not path.endswith("COMMIT") else None)
    with pytest.raises(ValueError, match="expected 4 bytes, found 5"):
        shelf.read(NAME, "a", limit=9, size=4)
    with pytest.raises(ValueError, match="expected at most 4 bytes, found 5"):
        shelf.read(NAME, "a", limit=4)
    assert gets == []


def test_a_file_that_ends_early_is_refused(flawed, memory):
    """A file that is cut while it is read is noticed."""
    shelf, tell = flawed
    save(shelf, a=bytes(2**20 + 5))
    [path] = [path for path in memory if path.endswith("/a")]

    def cut(call, at):
        if (call, at) == ("get", path):
            memory[path].truncate(2**20 + 2)

    tell(cut)
    with pytest.raises(ValueError, match="expected 1048581 bytes, the file ended after 1048578"):
        shelf.read(NAME, "a", limit=2**30)


def test_another_manifest_is_refused(shelf, memory):
    """A manifest that COMMIT does not pin is refused, whoever wrote it."""
    save(shelf)
    [path] = [path for path in memory if path.endswith("manifest.json")]
    shelf.bucket.put(path, manifest(shelf) + b" ", 1.0)
    with pytest.raises(ValueError, match=r"expected sha256 \w{64}, which COMMIT pins, found \w{64}"):
        manifest(shelf)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"\xff", b'{"attempt": "0123456789abcdef"}', b'{"attempt": "../../x", "sha256": "%s"}' % (b"0" * 64),
        b'{"attempt": "0123456789abcdef", "sha256": 1}', b'{"attempt": "0123456789abcdef", "sha256": "xyz"}',
        b"[" * 60000,
    ],
)  # fmt: skip
def test_a_damaged_commit_is_told_and_replaced(shelf, memory, content):
    """A COMMIT that is none is listed, refused with a ValueError, can be removed, and is replaced by the next save."""
    save(shelf)
    path = shelf.bucket.path(NAME, "COMMIT")
    shelf.bucket.put(path, content, 1.0)
    assert shelf.names() == [NAME]
    for work in (lambda: manifest(shelf), lambda: shelf.files(NAME)):
        with pytest.raises(ValueError):
            work()
    save(shelf, a=b"again")
    assert shelf.read(NAME, "a", limit=9) == b"again"
    shelf.bucket.put(path, content, 1.0)
    shelf.remove(NAME)
    assert shelf.names() == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a"])
def test_names_are_plain(shelf, name):
    """No name of a file or a checkpoint, whoever gives it, leads elsewhere."""
    save(shelf)
    draft = shelf.begin(NAME)
    for work in (
        lambda: draft.write(name, [b""]),
        lambda: shelf.read(NAME, name, limit=9),
        lambda: shelf.read(name, "a", limit=9),
        lambda: shelf.begin(name),
        lambda: shelf.remove(name),
        lambda: shelf.join(name, draft.token),
        lambda: shelf.join(NAME, name),
    ):
        with pytest.raises(ValueError, match="expected"):
            work()


def test_another_run_that_saves_the_same_step_is_noticed(shelf):
    """A COMMIT that appeared since the draft was begun belongs to somebody else and stays."""
    late = shelf.begin(NAME)
    late.write("a", [b"late"])
    save(ObjectShelf.open("memory://run/checkpoints", 5.0), a=b"first")
    with pytest.raises(FileExistsError, match="two runs save to one place") as caught:
        late.commit(b"{}")
    assert caught.value.errno == errno.EEXIST
    late.discard()
    assert shelf.read(NAME, "a", limit=9) == b"first"


# --- URLs ------------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named():
    """A scheme whose package is missing says what to install."""
    with pytest.raises(MissingDependency, match=r"(?s)'gcsfs', which is not installed.*do: .*install gcsfs"):
        ObjectShelf.open("gs://bucket/run", 1.0)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("memori://a/b", "(?s)no store is known for memori://.*did you mean 'memory'"),
        ("s3://", "(?s)cannot be kept at this URL.*received: s3://"),
        ("simplecache::s3://a/b", "cannot be kept at this URL"),
        ("file:///tmp/x", "is no object store"),
        ("local:///tmp/x", "is no object store"),
        ("tar://user:canary@a/b", r"(?s)cannot be opened.*received: tar://\*\*\*@a/b"),
    ],
)
def test_urls_that_name_no_store_are_refused(url, text):
    """A URL that names no place in an object store is a clear ConfigError, without the password it may hold."""
    with pytest.raises(ConfigError, match=text) as caught:
        ObjectShelf.open(url, 1.0)
    assert "canary" not in str(caught.value)


# --- failures --------------------------------------------------------------------------------------------------------


def failing(times, error, *, call="put", path=""):
    """Return what raises `error` the first times that a path is asked for, and the list of those times."""
    hits = []

    def before(this, at):
        if this == call and at.endswith(path):
            hits.append(at)
            if len(hits) <= times:
                raise error

    return before, hits


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "x"), ConnectionResetError(), TimeoutError(), OSError("no number")], ids=repr
)
@pytest.mark.parametrize("path", ["/a", "manifest.json", "COMMIT"])
def test_what_fails_for_a_moment_is_tried_again(flawed, error, path):
    """Errors of the network and of the service cost a save some time only."""
    shelf, tell = flawed
    before, hits = failing(3, error, path=path)
    tell(before)
    save(shelf)
    assert len(hits) == 4
    assert shelf.files(NAME) == ["a", "manifest.json"]


@pytest.mark.parametrize(
    "error",
    [PermissionError("no"), OSError(errno.ENOSPC, "full"), OSError(errno.EINVAL, "bad"), RuntimeError("bug")],
    ids=repr,
)
def test_what_will_not_change_is_not_tried_again(flawed, error):
    """A refusal ends a save at once, as an OSError with the object's URL, whatever the library raised."""
    shelf, tell = flawed
    before, hits = failing(9, error, path="/a")
    tell(before)
    with pytest.raises(OSError) as caught:
        save(shelf)
    assert len(hits) == 1
    assert str(error.args[-1]) in caught.value.strerror
    assert caught.value.filename.startswith(f"flawed://run/checkpoints/{NAME}/")
    assert caught.value.filename.endswith("/a")
    assert shelf.names() == []


def test_a_store_that_hangs_is_left_at_the_deadline(flawed):
    """A call that never returns raises TimeoutError when the time is over, and so does what comes after it in the save."""
    shelf, tell = flawed
    shelf.deadline_s = 0.3
    release = threading.Event()
    tell(lambda call, path: release.wait(30) if path.endswith("/a") else None)
    draft = shelf.begin(NAME)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no success within 0.3 s"):
        draft.write("a", [b"1"])
    with pytest.raises(TimeoutError):
        draft.commit(b"{}")
    draft.discard()
    assert time.monotonic() - start < 1.0
    release.set()
    assert shelf.names() == []


def hanging_commit(shelf, tell, call):
    """Commit a draft of which a call about COMMIT hangs until the deadline; return it, and what lets that call go on."""
    release, reached = threading.Event(), threading.Event()

    def hang(this, path):
        if this == call and path.endswith("COMMIT"):
            reached.set()
            release.wait(30)

    draft = shelf.begin(NAME)
    draft.write("a", [b"1"])
    draft.deadline = Deadline(0.3)
    tell(hang)
    with pytest.raises(TimeoutError):
        draft.commit(b"{}")
    assert reached.is_set()
    tell(lambda this, path: None)

    def go_on():
        release.set()
        settle()

    return draft, go_on


def settle():
    """Wait for what the shelf does beside its caller."""
    for thread in [t for t in threading.enumerate() if t.name == "drivetrain-store"]:
        thread.join(5)


def test_a_commit_that_hangs_may_arrive_late(flawed):
    """The files of a draft whose COMMIT was sent and not answered stay: when it is written after all, it is whole."""
    draft, go_on = hanging_commit(*flawed, "put")
    draft.discard()
    go_on()
    shelf = flawed[0]
    assert shelf.names() == [NAME]
    assert shelf.files(NAME) == ["a", "manifest.json"]


@pytest.mark.parametrize("discarded", [False, True])
def test_a_commit_that_was_given_up_is_not_sent(flawed, discarded, memory):
    """A draft that hangs before its COMMIT is sent, until nobody waits for it, does not send it when it goes on."""
    draft, go_on = hanging_commit(*flawed, "get")
    if discarded:
        draft.discard()
    go_on()
    assert flawed[0].names() == []
    draft.discard()
    settle()
    assert memory == {}


def test_a_late_commit_of_this_process_is_replaced(flawed):
    """A COMMIT of ours that appears after the next save of the step was begun is known, and gives way."""
    shelf, _ = flawed
    first = shelf.begin(NAME)
    first.write("a", [b"1"])
    second = shelf.begin(NAME)
    second.write("a", [b"2"])
    first.commit(b"{}")
    second.commit(b"{}")
    assert shelf.read(NAME, "a", limit=9) == b"2"
    assert len(MemoryFileSystem.store) == 3


def test_a_long_file_is_not_half_sent_twice(flawed):
    """Where a part cannot be sent again, a long file that fails is given up, and its upload dropped."""
    shelf, tell = flawed
    before, hits = failing(1, OSError(errno.EIO, "broken"), call="open", path="/a")
    tell(before)
    save(shelf, a=bytes(2**21))  # opening is tried again
    assert len(hits) == 2

    def chunks():
        yield bytes(2**20)
        Broken.broken = True
        yield bytes(2**20)

    class Broken:
        broken, discarded = False, False

        def write(self, data):
            if self.broken:
                raise OSError(errno.EIO, "broken")

        def discard(self):
            Broken.discarded = True

    shelf.bucket.start = lambda path, limit_s: Broken()
    with pytest.raises(OSError, match="broken"):
        shelf.begin(NAME).write("a", chunks())
    assert Broken.discarded


def test_an_unfinished_file_is_not_finished_by_the_garbage_collector():
    """A file of fsspec's that was dropped is not made an object when it is collected."""

    class Counted(fsspec.spec.AbstractBufferedFile):
        finished = 0

        def _upload_chunk(self, final=False):
            Counted.finished += final

    file = Counted(fsspec.filesystem("memory"), "x", "wb", block_size=4)
    bucket = ObjectShelf.open("memory://run", 1.0).bucket
    bucket.send(file, 1, b"12345", 1.0)
    bucket.abort(file, 1.0)
    del file
    assert Counted.finished == 0


@pytest.mark.parametrize("error", [NotImplementedError("x"), ValueError("mode"), TypeError("mode")], ids=repr)
def test_a_store_without_conditional_writes_is_warned_of(flawed, monkeypatch, caplog, error):
    """A store that cannot write on condition is told of when the run starts, and works."""
    shelf, _ = flawed

    def pipe_file(self, path, value, mode="overwrite", **_):
        if mode == "create":
            raise error
        MemoryFileSystem.pipe_file(self, path, value)

    monkeypatch.setattr(Flawed, "pipe_file", pipe_file)
    with caplog.at_level(logging.WARNING, "drivetrain"):
        shelf.prepare()
    assert "flawed://run/checkpoints has no conditional writes: two runs" in caplog.text
    for known in (shelf, ObjectShelf.open("flawed://run/checkpoints", 5.0)):
        save(known)
    assert shelf.files(NAME) == ["a", "manifest.json"]


def test_prepare_tells_what_is_read_back_wrong(flawed, monkeypatch, memory):
    """A store that gives back something else than was written is refused at the start, and the probe is removed."""
    shelf, _ = flawed
    monkeypatch.setattr(Flawed, "cat_file", lambda self, path, **_: b"else")
    with pytest.raises(OSError, match="is read back as b'else'"):
        shelf.prepare()
    assert memory == {}


def test_prepare_clears_what_is_old(shelf, memory, caplog):
    """Attempts of no COMMIT go when they are old; what is recent, committed, or not ours stays."""
    save(shelf, a=b"committed")
    for name in (NAME, "step-00000011"):
        shelf.begin(name).write("a", [b"attempt"])
    shelf.bucket.put(shelf.bucket.path("step-00000011", "notes", "a"), b"", 1.0)
    shelf.bucket.put(shelf.bucket.path("step-00000012", "COMMIT"), b"damaged", 1.0)
    shelf.bucket.put(shelf.bucket.path("step-00000012", "0123456789abcdef", "a"), b"", 1.0)
    before = set(memory)
    assert len(before) == 8
    shelf.prepare()
    assert set(memory) == before
    shelf._clear(time.time() + _object.STALE_S + 10, Deadline(5.0))
    gone = before - set(memory)
    assert len(gone) == 2
    assert {path.rpartition("/")[2] for path in gone} == {"a"}
    assert shelf.read(NAME, "a", limit=99) == b"committed"


def test_what_cannot_be_cleared_is_told(flawed, caplog):
    """A failure to clear old files is a warning: the run can save."""
    shelf, tell = flawed
    shelf.bucket.put(shelf.bucket.path(".probe-0123456789abcdef"), b"", 1.0)
    before, _ = failing(9, PermissionError("no"), call="remove", path="probe-0123456789abcdef")
    tell(before)
    shelf.bucket.stat = lambda path, limit_s: _bucket.Stat(1, time.time() + 9999)
    with caplog.at_level(logging.WARNING, "drivetrain"):
        shelf.prepare()
    assert "could not be cleared" in caplog.text
