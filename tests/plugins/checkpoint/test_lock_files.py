"""`run.lock` of other machines and containers, damaged, or where it cannot be written."""

from __future__ import annotations

import json
import os
import stat
import textwrap
import threading
import time

import pytest
from lock_rivals import (
    dead_number,
    names,
    needs,
    output,
    python,
    rivals,
    write,
)

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint._lock import NAME, Owner, RunLock


@pytest.fixture
def rival(tmp_path):
    """Return a function that starts another process."""
    with rivals(tmp_path) as start:
        yield start


@pytest.fixture
def lock(tmp_path):
    """Return a lock that is given up after the test."""
    made = RunLock(tmp_path)
    yield made
    made.release()


@pytest.mark.parametrize("age", [50, 70, -50, -70])
def test_an_owner_elsewhere_is_judged_by_its_heartbeat(tmp_path, lock, age):
    """On another host a minute without a sign of life is death, and so is a sign from a future that is not ours."""
    told = write(tmp_path, age, host="elsewhere", pid=1).read_bytes()
    if abs(age) > 60:
        lock.acquire()
        return
    text = "process 1 on 'elsewhere' .*; from here it is taken for dead after 60 s without one"
    with pytest.raises(CheckpointError, match=text):
        lock.acquire()
    assert (tmp_path / NAME).read_bytes() == told
    assert names(tmp_path) == [NAME]


def test_the_local_clock_is_not_asked(tmp_path, lock, monkeypatch):
    """A machine whose clock is a day ahead of the file server's neither takes a living owner for dead nor is one."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 86400)
    write(tmp_path, 5, host="elsewhere")
    with pytest.raises(CheckpointError, match=r"last sign of life [56] s ago"):
        lock.acquire()
    write(tmp_path, 65, host="elsewhere")
    lock.acquire()
    lock.beat()
    assert (tmp_path / NAME).stat().st_mtime < real() + 60


def test_the_same_number_in_another_container(tmp_path, lock):
    """A process in a namespace of its own cannot be asked from here: its heartbeat decides."""
    needs("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    code = "RunLock(sys.argv[1]).acquire(); print(os.getpid(), flush=True); sys.stdin.read()"
    owner = python(code, tmp_path, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    try:
        assert owner.stdout.readline() == "1\n"
        with pytest.raises(CheckpointError, match=r"process 1 on .* from here it is taken for dead after 60 s"):
            lock.acquire()
    finally:
        owner.kill()
        owner.communicate()
    with pytest.raises(CheckpointError, match="from here it is taken for dead"):
        lock.acquire()
    os.utime(tmp_path / NAME, (0, 0))
    lock.acquire()


def test_a_namespace_without_its_own_proc(tmp_path):
    """Where /proc shows the numbers of another namespace, a living owner is not mistaken for one of those."""
    around = ("unshare", "--pid", "--fork")
    needs(*around)
    code = """
        lock = RunLock(sys.argv[1])
        lock.acquire()
        if os.fork() == 0:
            try:
                RunLock(sys.argv[1]).acquire()
                print("taken", flush=True)
            except CheckpointError as error:
                print(error, flush=True)
            os._exit(0)
        os.wait()
        lock.beat()
        print(lock.lost)
    """
    told = output(python(code, tmp_path, *around))
    assert "from here it is taken for dead" in told
    assert told.endswith("False")


WITHOUT_PROC = """
    lock = RunLock(sys.argv[1])
    lock.acquire()
    reading, writing = os.pipe()
    def other():
        if (child := os.fork()) == 0:
            try:
                RunLock(sys.argv[1]).acquire()
                print("taken", flush=True)
            except CheckpointError as error:
                print(error, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
    other()
    if (child := os.fork()) == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.path.exists(lock.path)
    lock.release()
    if (child := os.fork()) == 0:
        RunLock(sys.argv[1]).acquire()
        os._exit(0)
    os.waitpid(child, 0)
    other()
"""


def judge_without_proc(told):
    alive, dead = told.splitlines()
    assert "from here it is taken for dead after 60 s" in alive  # the number exists; is it the owner?
    assert dead == "taken"


def test_without_proc(tmp_path):
    """With no /proc at all a dead owner is followed at once, and a living number is judged by the heartbeat."""
    around = ("unshare", "--mount", "sh", "-c", 'umount -l /proc && exec "$@"', "-")
    needs(*around)
    judge_without_proc(output(python(WITHOUT_PROC, tmp_path, *around)))


def test_where_proc_tells_nothing(tmp_path):
    """The same without rights: on a system that has no such files."""
    code = "_lock.Path = lambda name: Path('/nowhere' + str(name)) if str(name).startswith('/proc') else Path(name)\n"
    judge_without_proc(output(python(code + textwrap.dedent(WITHOUT_PROC), tmp_path)))


GOOD = json.loads(Owner("elsewhere", "m", 1, 1, "then", "t").dump())
DAMAGED = {
    "empty": b"",
    "no JSON": b"\0\xff{",
    "a list": b"[1, 2]",
    "nested": b"[" * 4000,
    "half": b'{"host": "a", "pid": 1',
    "another field": json.dumps({**GOOD, "more": 1}).encode(),
    "a field less": json.dumps({k: v for k, v in GOOD.items() if k != "pid"}).encode(),
    "long": json.dumps(GOOD).encode() + b" " * 5000 + b"x",
    **{
        f"pid {value}": json.dumps({**GOOD, "pid": value}).encode()
        for value in (0, -1, True, 1.5, "1", None, 10**30, [1])
    },
    "host": json.dumps({**GOOD, "host": 5}).encode(),
    "started": json.dumps({**GOOD, "started": "x"}).encode(),
}


@pytest.mark.parametrize("raw", DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_names_nobody(tmp_path, lock, raw):
    """Content that no run wrote is refused while it is fresh, and taken over when it is a minute old."""
    path = tmp_path / NAME
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"\d+ bytes that name nobody, last sign of life 0 s ago; from here"):
        lock.acquire()
    assert path.read_bytes() == raw
    os.utime(path, (1, 1))
    lock.acquire()
    assert names(tmp_path) == [NAME]


NO_FILES = {
    "folder": (lambda path: path.mkdir(), "no regular file"),
    "pipe": (os.mkfifo, "no regular file"),
    "link": (lambda path: path.symlink_to(path.parent / "elsewhere"), "a symbolic link"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused(tmp_path, lock, kind):
    """A folder, a pipe or a link under the name is refused at once, however old, followed nowhere, and left alone."""
    make, told = NO_FILES[kind]
    (tmp_path / "elsewhere").write_text("untouched")
    os.utime(tmp_path / "elsewhere", (1, 1))
    make(tmp_path / NAME)
    with pytest.raises(CheckpointError, match=f"Remove it. Received: {told}"):
        lock.acquire()
    assert names(tmp_path) == ["elsewhere", NAME]
    assert (tmp_path / "elsewhere").stat().st_mtime == 1


def test_a_claim_that_is_a_copy_of_the_lock(tmp_path, lock):
    """A claim with the content of what it claims, which no process leaves, is refused instead of claimed for ever."""
    path = write(tmp_path, pid=dead_number())
    claim = lock._claim(path.read_bytes())
    claim.write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{claim.name} must be a file that a run wrote. Remove it"):
        lock.acquire()


def test_left_over_files_are_swept(tmp_path, lock):
    """Temporary files of dead processes go with the next start; those of living ones, and other files, stay."""
    dead, alive, other = (tmp_path / f".{NAME}-{character * 32}" for character in "abc")
    dead.write_bytes(write(tmp_path, pid=dead_number()).read_bytes())
    alive.write_bytes(write(tmp_path, host="elsewhere").read_bytes())
    (tmp_path / NAME).unlink()
    other.mkdir()
    (tmp_path / f".{NAME}-notes").write_text("mine")
    lock.acquire()
    assert names(tmp_path) == [alive.name, other.name, f".{NAME}-notes", NAME]


def test_a_folder_that_cannot_be_written_to(tmp_path, lock):
    """No folder, a file in its place, or a read-only one: an error that says so, and no thread left."""
    threads = threading.active_count()
    for folder in (tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match=r"cannot be taken: (No such file|Not a directory).* choose another"):
            RunLock(folder).acquire()
    assert threading.active_count() == threads
    code = """
        try:
            RunLock(sys.argv[1]).acquire()
        except CheckpointError as error:
            print(error)
    """
    if os.getuid() == 0:
        mount = 'mount -t tmpfs -o ro none "$0" && exec "$@"'
        needs("unshare", "--mount", "sh", "-c", mount, str(tmp_path))
        around, told = ("unshare", "--mount", "sh", "-c", mount, str(tmp_path)), "Read-only file system"
    else:
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        around, told = (), "Permission denied"
    out, err = python(code, tmp_path, *around).communicate(timeout=30)
    tmp_path.chmod(0o755)
    assert told in out
    assert err == ""


FULL = """
    try:
        RunLock(sys.argv[1]).acquire()
    except CheckpointError as error:
        print(os.listdir(sys.argv[1]), error)
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    """Without space for the lock file the start fails with the reason, and nothing half written is left."""
    mount = 'mount -t tmpfs -o size=4k none "$0" && exec "$@"'
    around = ("unshare", "--mount", "sh", "-c", mount, str(tmp_path))
    needs(*around)
    fill = 'open(sys.argv[1] + "/full", "wb").write(bytes(4096))\n'
    told = output(python(fill + textwrap.dedent(FULL), tmp_path, *around))
    assert told.startswith("['full'] the run's folder cannot be taken: No space left on device")


def test_a_file_that_can_only_be_written_in_part(tmp_path):
    """The same where the limit is the process's own."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    told = output(python(limit + textwrap.dedent(FULL), tmp_path))
    assert told.startswith("[] the run's folder cannot be taken: ")


def test_a_file_system_without_links(tmp_path, lock, rival, monkeypatch):
    """Where links are refused the file is made in place, and the rules are the same."""

    def refused(source, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    first = rival()
    assert first.do("acquire") is None
    with pytest.raises(CheckpointError, match="it runs"):
        lock.acquire()
    first.kill()
    lock.acquire()
    assert names(tmp_path) == [NAME]
    lock.release()
    assert names(tmp_path) == []


def test_an_interrupted_start_leaves_nothing(tmp_path, lock, monkeypatch):
    """Ctrl-C between the lock file and the first heartbeat gives the folder up again."""

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lock.acquire()
    monkeypatch.undo()
    assert names(tmp_path) == []
    lock.acquire()
