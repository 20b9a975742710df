"""Checkpoints in S3 when requests fail, hang, get lost, and when the process dies: proved against a real S3 server.

Whatever happens, a COMMIT stands only where all data does, the checkpoints before are as they were, and nothing takes
longer than its deadline.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import s3fs
from s3_server import BUCKET, S3Server
from s3_worker import FILES, SMALL_PART, Saver, save, whole

from drivetrain import MissingDependency
from drivetrain_plugins.checkpoint import _object, _reliable, _retry
from drivetrain_plugins.checkpoint._object import ObjectShelf

OLD, NEW = "step-00000005", "step-00000010"
SECRET = "canary-secret-of-the-store"
SHORT = {"state.json": b"{}"}
counter = itertools.count()


@pytest.fixture(scope="session")
def server():
    """Start the server, and let S3 clients of this process and its children find it."""
    made = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": made.url,
            "AWS_ACCESS_KEY_ID": "canary-id",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }.items():
            patch.setenv(name, value)
        yield made
    made.close()


@pytest.fixture(scope="session")
def saver(server):
    """Return a function that saves in a forked process."""
    made = Saver()
    yield made
    made.close()


@pytest.fixture
def url(server):
    """Return a new place, which holds a checkpoint of step 5; afterwards nothing is injected any more."""
    place = f"s3://{BUCKET}/run {next(counter)} ü"
    save(ObjectShelf.open(place, 30.0), OLD, "old", SHORT)
    server.rules()
    yield place
    server.rules()


@pytest.fixture
def shelf(url):
    """Return a shelf there, with some patience."""
    return ObjectShelf.open(url, 30.0)


@pytest.fixture
def hasty(url):
    """Return a shelf there which gives up after 0.7 s."""
    return ObjectShelf.open(url, 0.7)


@pytest.fixture
def afresh():
    """Let fsspec make new clients, which read the environment, and forget them afterwards."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Send files of more than 5 MiB in parts, and pause for a short time only."""
    monkeypatch.setattr(_reliable, "PART", SMALL_PART)
    monkeypatch.setattr(_retry, "FIRST_PAUSE_S", 0.03)


def standing(url):
    """Return the tags of the checkpoints that a new reader sees, every byte of which is verified."""
    reader = ObjectShelf.open(url, 30.0)
    return {name: whole(reader, name) for name in reader.names()}


def left(url):
    """Return the objects below a place that belong to no checkpoint, and the uploads that were never finished."""
    bucket = ObjectShelf.open(url, 30.0).bucket
    found = bucket.find(bucket.root, 30.0)
    named = {json.loads(bucket.look(bucket.path(p), 30.0)[0])["attempt"] for p in found if p.endswith("/COMMIT")}
    objects = sorted(p for p in found if not p.endswith("/COMMIT") and not named & {*p.split("/")})
    name, _, prefix = bucket.root.partition("/")
    uploads = bucket.fs.call_s3("list_multipart_uploads", Bucket=name, Prefix=prefix).get("Uploads", [])
    return objects + [upload["Key"] for upload in uploads]


def start_and_save(shelf):
    """Do what a run does until its first checkpoint stands."""
    shelf.prepare()
    save(shelf, NEW)


class within:
    """A block that may take so many seconds."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        self.start = time.monotonic()

    def __exit__(self, *_):
        taken = time.monotonic() - self.start
        assert taken < self.seconds, f"took {taken:.2f} s"


# --- for a moment ----------------------------------------------------------------------------------------------------

REQUESTS = {
    "probe": {"method": "PUT", "key": "probe"},
    "the look at COMMIT": {"method": "GET", "key": "COMMIT"},
    "a short file": {"method": "PUT", "key": "state.json"},
    "the start of a long file": {"method": "POST", "query": "uploads"},
    "a part": {"method": "PUT", "query": "partNumber=2"},
    "the end of a long file": {"method": "POST", "query": "uploadId"},
    "the manifest": {"method": "PUT", "key": "manifest"},
    "COMMIT": {"method": "PUT", "key": "COMMIT"},
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize(
    "fault", [{"action": "status", "status": 503, "code": "SlowDown"}, {"action": "reset"}, {"action": "lost"}], ids=str
)
def test_a_save_survives_what_fails_for_a_moment(server, url, shelf, request_, fault):
    """Any request that is answered 503, reset, or done without an answer, twice in a row, costs a save nothing but time."""
    server.rules({**request_, **fault, "times": 2})
    shelf.prepare()
    save(shelf, NEW, "new")
    assert len([r for r in server.requests() if r.startswith(request_["method"])]) > 2
    server.rules()
    assert standing(url) == {OLD: "old", NEW: "new"}
    # An upload that was started without an answer cannot be known to the writer; `prepare` clears it later.
    lost_upload = fault["action"] == "lost" and request_.get("query") == "uploads"
    assert len(left(url)) == (2 if lost_upload else 0)


def test_a_long_file_that_was_completed_without_an_answer(server, url, shelf):
    """Where the second try is told that there is no such upload, the object is there: the first has completed it."""
    end = REQUESTS["the end of a long file"]
    server.rules(
        {**end, "action": "lost", "times": 1}, {**end, "action": "status", "status": 404, "code": "NoSuchUpload"}
    )
    save(shelf, NEW, "new")
    assert standing(url) == {OLD: "old", NEW: "new"}
    server.rules({**end, "action": "status", "status": 404, "code": "NoSuchUpload"})
    with pytest.raises(FileNotFoundError):
        save(shelf, NEW, "newer")
    server.rules()
    assert standing(url) == {OLD: "old", NEW: "new"}


@pytest.mark.parametrize("fault", [{"action": "status", "status": 500}, {"action": "reset"}], ids=str)
def test_reading_survives_what_fails_for_a_moment(server, url, fault):
    """Listings and reads that fail twice in a row succeed."""
    reader = ObjectShelf.open(url, 30.0)
    for method, key in (("GET", f"^/{BUCKET}/?$"), ("GET", "COMMIT"), ("HEAD", "manifest"), ("GET", "state.json")):
        server.rules({"method": method, "key": key, "times": 2, **fault})
        assert [whole(reader, name) for name in reader.names()] == ["old"]
        assert len(server.requests()) >= 9


def test_what_was_just_written_may_be_missing_for_a_moment(server, url, shelf):
    """A store that answers 404 for an object that is there, for a moment after the write, is asked again."""
    for method, key in (("HEAD", "manifest"), ("GET", "manifest"), ("GET", "state.json"), ("GET", "probe")):
        server.rules({"method": method, "key": key, "action": "status", "status": 404, "code": "NoSuchKey", "times": 2})
        shelf.prepare()
        assert standing(url) == {OLD: "old"}


def test_a_commit_that_cannot_be_seen_yet(server, url, shelf):
    """A COMMIT of which the answer was lost, and which is not found afterwards at first, is taken for what it is."""
    server.rules(
        {"method": "PUT", "key": "COMMIT", "action": "lost", "times": 1},
        {"method": "GET", "key": "COMMIT", "action": "status", "status": 404, "code": "NoSuchKey", "times": 3},
    )
    save(shelf, NEW, "new", SHORT)
    assert [r.split("/")[-1] for r in server.requests() if r.startswith("PUT")].count("COMMIT") == 3
    server.rules()
    assert standing(url) == {OLD: "old", NEW: "new"}


def test_a_listing_without_the_new_key(server, url, shelf):
    """A reader whose listing lags takes the checkpoint before; the new one is whole for who knows its name."""
    save(shelf, NEW, "new", SHORT)
    server.rules({"query": "list-type", "action": "hide", "hidden": f"{NEW}.*COMMIT"})
    assert standing(url) == {OLD: "old"}
    assert whole(shelf, NEW) == "new"
    server.rules()
    assert standing(url) == {OLD: "old", NEW: "new"}


# --- for good --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", list(REQUESTS.values())[1:], ids=list(REQUESTS)[1:])
def test_a_save_that_cannot_succeed_ends_in_time(server, url, hasty, request_):
    """Any request that is answered 503 for ever ends the save at its deadline; nothing of it is ever seen."""
    server.rules({**request_, "action": "status", "status": 503, "code": "SlowDown", "text": "Please reduce your rate"})
    with within(1.5), pytest.raises(TimeoutError, match=r"no success within 0.7 s .*Please reduce your rate") as caught:
        save(hasty, NEW)
    assert caught.value.filename.startswith(f"{url}/{NEW}")
    assert 3 <= len(server.requests()) <= 60
    server.rules()
    assert standing(url) == {OLD: "old"}
    if request_ is not REQUESTS["COMMIT"]:
        assert left(url) == []


def test_starting_on_a_store_that_is_down_ends_in_time(server, hasty):
    """`prepare`, listings and reads end at their deadline, too."""
    server.rules({"action": "status", "status": 503, "code": "SlowDown"})
    for work in (hasty.prepare, hasty.names, lambda: whole(hasty, OLD), lambda: hasty.remove(OLD)):
        with within(2.0), pytest.raises(TimeoutError):
            work()


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_refusal_is_not_tried_again(server, url, shelf, request_):
    """A 403 ends a save at once and says what it was about; nothing of it is ever seen, or left."""
    server.rules({**request_, "action": "status", "status": 403, "code": "AccessDenied", "text": "Access Denied"})
    with within(5.0), pytest.raises(PermissionError, match="access denied: Access Denied; check the credentials"):
        start_and_save(shelf)
    hits = [r for r in server.requests() if r.startswith(request_["method"]) and request_.get("key", "?") in r]
    assert len([r for r in hits if request_.get("query", "") in r]) == 1
    server.rules()
    assert standing(url) == {OLD: "old"}
    assert left(url) == []


def test_a_bucket_that_is_missing(server):
    """A bucket that is not there is told at once."""
    shelf = ObjectShelf.open("s3://nobodys/run", 30.0)
    with within(5.0), pytest.raises(FileNotFoundError, match="bucket does not exist"):
        shelf.prepare()
    with within(5.0), pytest.raises(FileNotFoundError, match="bucket does not exist"):
        shelf.names()


def test_the_completion_of_a_long_file_fails(server, url, hasty):
    """A CompleteMultipartUpload that fails for good ends the save in time, and the upload is aborted."""
    server.rules({"method": "POST", "query": "uploadId", "action": "status", "status": 500, "code": "InternalError"})
    with within(1.5), pytest.raises(TimeoutError):
        save(hasty, NEW)
    server.settle()
    assert [r for r in server.requests() if r.startswith("DELETE") and "uploadId" in r]
    server.rules()
    assert left(url) == []
    assert standing(url) == {OLD: "old"}


def test_a_body_that_raises_leaves_no_file(server, url, shelf):
    """An error while a long file is being read aborts the upload, in place of finishing it."""

    def chunks():
        yield bytes(SMALL_PART + 1)
        raise KeyError("the source")

    draft = shelf.begin(NEW)
    with pytest.raises(KeyError, match="the source"):
        draft.write("state.safetensors", chunks())
    assert any("partNumber" in r for r in server.requests())
    assert left(url) == []


def test_an_upload_that_nobody_knows_is_aborted(server, url, shelf):
    """A long file whose start was answered to nobody, and which then fails, leaves no upload behind."""
    server.rules(
        {"method": "POST", "query": "uploads", "action": "lost", "times": 1},
        {"method": "PUT", "query": "partNumber", "action": "status", "status": 403, "code": "AccessDenied"},
    )
    with pytest.raises(PermissionError):
        save(shelf, NEW)
    assert len([r for r in server.requests() if r.endswith("?uploads")]) == 2
    assert left(url) == []


@pytest.mark.parametrize("status", [500, 503])
def test_one_try_is_one_request(server, shelf, status):
    """s3fs and botocore try nothing again of their own: how long that takes would be out of our hands."""
    server.rules({"action": "status", "status": status, "code": "SlowDown"})
    for call in (
        lambda: shelf.bucket.put(shelf.bucket.path("x"), b"", 5.0),
        lambda: shelf.bucket.look("bucket/x", 5.0),
    ):
        before = len(server.requests())
        with pytest.raises(OSError):
            call()
        assert len(server.requests()) == before + 1


# --- what hangs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_request_that_hangs_is_left_at_the_deadline(server, url, hasty, request_):
    """A request that is not answered ends a save at its deadline; when it is answered later, nothing torn is seen."""
    server.rules({**request_, "action": "delay", "seconds": 60})
    with within(2.0), pytest.raises(TimeoutError, match=r"no (success|answer) within 0.7 s"):
        start_and_save(hasty)
    for thread in [t for t in threading.enumerate() if t.name == "drivetrain-store"]:
        thread.join(5)
        assert not thread.is_alive()  # the request was cancelled, though the server still holds it
    server.rules()
    server.settle()
    assert standing(url) in ({OLD: "old"}, {OLD: "old", NEW: ""})
    assert (NEW in standing(url)) <= (request_ is REQUESTS["COMMIT"])


def test_a_commit_that_arrives_late_is_whole(server, url, hasty):
    """A COMMIT that was given up and is written later names files that are all there, and the next save replaces it."""
    server.rules({"method": "PUT", "key": "COMMIT", "action": "delay", "seconds": 60})
    with pytest.raises(TimeoutError):
        save(hasty, NEW, "late", SHORT)
    assert standing(url) == {OLD: "old"}
    drafted = hasty.begin(NEW)  # before the late one is seen
    server.rules()
    server.settle()
    assert standing(url) == {OLD: "old", NEW: "late"}
    drafted.write("state.json", [b"{}"])
    drafted.commit(json.dumps({"tag": "", "files": {}}).encode())
    server.settle()
    assert left(url) == []


def test_one_request_that_hangs_does_not_take_all_the_time(server, url, shelf, monkeypatch):
    """A request that hangs is given up after a while and made again, long before the deadline."""
    monkeypatch.setattr(_retry, "PATIENCE_S", 0.5)
    server.rules({"method": "PUT", "action": "delay", "seconds": 60, "times": 1})
    with within(5.0):
        save(shelf, NEW, "new", SHORT)
    assert standing(url) == {OLD: "old", NEW: "new"}


def test_a_draft_that_was_given_up_is_never_committed(server, url, shelf):
    """A draft that is discarded while its last request before COMMIT hangs does not put COMMIT when it goes on."""
    draft = shelf.begin(NEW)
    draft.write("state.json", [b"{}"])
    server.rules({"method": "GET", "key": "COMMIT", "action": "delay", "seconds": 60})
    caught = []

    def commit():
        try:
            draft.commit(b"{}")
        except OSError as error:
            caught.append(error)

    writer = threading.Thread(target=commit)
    writer.start()
    draft.discard()
    server.rules()
    writer.join()
    assert "given up" in str(caught[0])
    server.settle()
    assert standing(url) == {OLD: "old"}
    with pytest.raises(OSError, match="given up"):
        draft.write("state.json", [b"{}"])


# --- others ----------------------------------------------------------------------------------------------------------


def begun(shelf, tag):
    """Begin a save of step 10, and return what commits it."""
    draft = shelf.begin(NEW)
    told = {"state.json": draft.write("state.json", [b"{}", tag.encode()])}
    return draft, lambda: draft.commit(json.dumps({"tag": tag, "files": told}).encode())


@pytest.mark.parametrize("replaces", [False, True])
def test_of_two_jobs_that_save_one_step_one_loses(server, url, replaces):
    """Of two saves of a step that were begun before either was committed, the second fails, and the first stays."""
    shelves = [ObjectShelf.open(url, 30.0) for _ in range(2)]
    if replaces:
        save(shelves[0], NEW, "older", SHORT)
        shelves[0].own.clear()  # another process wrote it
    (_, first), (draft, second) = begun(shelves[0], "first"), begun(shelves[1], "second")
    first()
    with pytest.raises(FileExistsError, match="another run has committed this step meanwhile") as caught:
        second()
    assert caught.value.filename == f"{url}/{NEW}/COMMIT"
    draft.discard()
    assert standing(url) == {OLD: "old", NEW: "first"}
    assert left(url) == []


@pytest.mark.parametrize("replaces", [False, True])
def test_two_commits_at_the_same_moment(server, url, replaces):
    """Two commits that both looked before either wrote: the store's condition lets one of them through."""
    shelves = [ObjectShelf.open(url, 30.0) for _ in range(2)]
    if replaces:
        save(shelves[0], NEW, "older", SHORT)
        shelves[0].own.clear()
    (_, first), (_, second) = begun(shelves[0], "first"), begun(shelves[1], "second")
    caught = []

    def lose():
        try:
            second()
        except FileExistsError as error:
            caught.append(error)

    server.rules({"method": "PUT", "key": "COMMIT", "action": "delay", "seconds": 60, "times": 1})
    loser = threading.Thread(target=lose)
    loser.start()
    while not any(r.startswith("PUT") and r.endswith("COMMIT") for r in server.requests()):
        time.sleep(0.01)  # the request is under way when the server has it
    first()
    server.rules()
    loser.join()
    assert "another run has committed this step" in str(caught[0])
    assert standing(url) == {OLD: "old", NEW: "first"}


def test_a_store_without_conditional_writes(server, url, shelf, caplog):
    """A store that ignores conditions is told of when a run starts; saves are still whole, and a look finds the other."""
    server.rules({"action": "blind", "method": "PUT"})
    with caplog.at_level(logging.WARNING, "drivetrain"):
        shelf.prepare()
    assert "has no conditional writes" in caplog.text
    draft, second = begun(ObjectShelf.open(url, 30.0), "second")
    save(shelf, NEW, "new", SHORT)
    with pytest.raises(FileExistsError, match="another run"):
        second()
    draft.discard()
    assert standing(url) == {OLD: "old", NEW: "new"}


def test_what_saves_left_long_ago_is_cleared(server, url, shelf):
    """Attempts without a COMMIT and unfinished uploads go when they are old, and stay while another job may write."""
    bucket = shelf.bucket
    for name in (NEW, OLD):  # one of a step of its own, one beside a checkpoint
        shelf.begin(name).write("state.json", [b"{}"])
    bucket.put(bucket.path(".probe-0123456789abcdef"), b"probe", 30.0)
    shelf.prepare()
    assert len(left(url)) == 3
    shelf._clear(time.time() + _object.STALE_S - 10, _retry.Deadline(30.0))
    assert len(left(url)) == 3
    bucket.start(bucket.path(NEW, "0123456789abcdef", "state.safetensors"), 30.0)
    bucket.abort_uploads(bucket.root, 0.0, 30.0)  # this server tells 2010 of every upload's begin
    assert len(left(url)) == 4
    shelf._clear(time.time() + _object.STALE_S + 10, _retry.Deadline(30.0))
    assert left(url) == []
    assert standing(url) == {OLD: "old"}


# --- the process dies ------------------------------------------------------------------------------------------------


def kill_everywhere(server, saver, url, action, *, before, files):
    """Kill a start and a save at each of its requests; return how often the new checkpoint was there all the same."""
    reader, seen, job = ObjectShelf.open(url, 30.0), 0, {"url": url, "name": NEW, "files": list(files)}
    assert saver(lambda _: server.rules(), tag="0", **job) == 0
    total = len(server.requests())
    assert total >= 12
    for number in range(1, total + 1):
        if NEW not in before:
            reader.remove(NEW) if NEW in reader.names() else None
        else:
            before = standing(url)
        rule = {"action": action, "skip": number - 1, "times": 1}
        assert saver(lambda pid, rule=rule: server.rules({**rule, "pid": pid}), tag=str(number), **job) == -9
        server.rules()
        found = standing(url)
        assert found in (before, {**before, NEW: str(number)}), number
        seen += found != before
    save(reader, NEW, "again")
    assert standing(url) == {OLD: "old", NEW: "again"}
    return seen


@pytest.mark.parametrize("action", ["kill", pytest.param("killed", marks=pytest.mark.slow)])
def test_killed_at_every_request(server, saver, url, action):
    """SIGKILL at any request of a start and a save, or with it done, leaves whole checkpoints, and room for the next."""
    assert kill_everywhere(server, saver, url, action, before={OLD: "old"}, files=FILES) == (
        1 if action == "killed" else 0
    )


@pytest.mark.parametrize("action", ["kill", pytest.param("killed", marks=pytest.mark.slow)])
def test_killed_while_replacing(server, saver, url, action):
    """A save in place of an older checkpoint of the step that is killed anywhere leaves the one or the other whole."""
    save(ObjectShelf.open(url, 30.0), NEW, "older", SHORT)
    replaced = kill_everywhere(server, saver, url, action, before={OLD: "old", NEW: "older"}, files=SHORT)
    assert replaced >= 3  # killed while the older one's files went


def test_a_forked_process_saves_beside_its_parent(server, url):
    """A shelf that has been used works in a forked child, and in the parent while and after the child uses it."""
    code = f"""
import gc, os, weakref
from s3_worker import ObjectShelf, save, whole
shelf = ObjectShelf.open({url!r}, 30.0)
save(shelf, {OLD!r}, "parent")
parents = weakref.ref(shelf.bucket.fs)
pid = os.fork()
if pid == 0:
    try:
        save(shelf, {NEW!r}, "child")
        gc.collect()
        assert parents() is not None, "closed in the child, and with it the sockets that it shares with the parent"
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)
    os._exit(0)
save(shelf, {OLD!r}, "parent again")
assert os.waitpid(pid, 0)[1] == 0
assert whole(shelf, {NEW!r}) == "child"
"""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert standing(url) == {OLD: "parent again", NEW: "child"}


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_errors_hold_no_secrets(server, url, shelf, afresh, monkeypatch):
    """Keys do not appear in errors, whatever the service puts in its answers, nor does a password in the endpoint."""
    text = f"key {SECRET} of http://user:canary-password@host/?X-Amz-Signature=canary-signature&amp;x=1"
    server.rules({"action": "status", "status": 400, "code": "InvalidArgument", "text": text})
    with pytest.raises(OSError, match=r"key \*\*\* of http://\*\*\*@host/\?X-Amz-Signature=\*\*\*&x=1") as told:
        shelf.names()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:canary-password@127.0.0.1:1")
    with pytest.raises(OSError) as elsewhere:
        ObjectShelf.open("s3://bucket/run", 0.5).names()
    for caught in (told, elsewhere):
        assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_missing_credentials_are_told(server, url, afresh, monkeypatch):
    """Without keys the error says so at once."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with within(5.0), pytest.raises(PermissionError, match=r"(?i)credentials"):
        ObjectShelf.open(url, 30.0).prepare()


def test_the_library_of_s3_is_an_extra(monkeypatch):
    """Where s3fs is missing, the error has the line that installs it."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(MissingDependency, match=r"pip install 'drivetrain\[s3\]'"):
        ObjectShelf.open("s3://bucket/run", 1.0)
