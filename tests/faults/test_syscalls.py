"""Every system call of a save fails, or is the last one: real ones, by strace, exhaustively."""

from __future__ import annotations

import errno
import shutil

import pytest
import small_saves
import traced

from drivetrain_plugins.checkpoint._local import LocalShelf
from drivetrain_plugins.checkpoint._store import LocalStore

ROOM = ("ENOSPC", "EDQUOT")
FAULTS = {
    "statfs": ["EIO", "ENOSYS"],
    "mkdir": ["EACCES", "EROFS", "EDQUOT", "ENOENT"],
    "openat": ["EMFILE", "EACCES", "ENOSPC", "EIO", "ELOOP"],
    "write": ["ENOSPC", "EIO", "EDQUOT", "EFBIG"],
    "fsync": ["EIO", "ENOSPC", "EROFS", "EINVAL"],
    "close": ["EIO", "EDQUOT"],
    "rename": ["EXDEV", "EACCES", "ENOSPC", "EIO", "ENOENT"],
    "getdents64": ["EIO", "ESTALE"],
    "unlink": ["EACCES", "EIO", "ENOENT"],
    "rmdir": ["ENOTEMPTY", "EACCES"],
}
SHORT = {"write": 2, "rename": 2}  # how many of them are tried in a short run of the suite; elsewhere the first


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """Return a folder with the checkpoints of steps 2 and 4, two of which are kept, and the calls of a third save."""
    folder = tmp_path_factory.mktemp("before")
    if reason := traced.why_not(tmp_path_factory.mktemp("probe")):
        pytest.skip(reason)
    for step in (2, 4):
        (folder / "checkpoints").mkdir(exist_ok=True)
        small_saves.save(folder / "checkpoints", step)
    shutil.copytree(folder / "checkpoints", folder / "counted")
    ended = traced.save(folder / "counted", 6, folder / "log")
    assert small_saves.check(folder / "counted", clean=True) == [4, 6]
    return folder / "checkpoints", ended.calls


class Save:
    """The save of step 6, with a fault at the call `number` of those that are named `call`."""

    def __init__(self, before, folder, call, number):
        saved, calls = before
        self.parent = shutil.copytree(saved, folder / "checkpoints")
        self.log, self.call, self.number = folder / "log", call, number
        self.at = [i for i, name in enumerate(calls) if name == call][number - 1]
        self.commit = next(i for i, name in enumerate(calls) if name.startswith("rename"))
        self.synced = self.commit + calls[self.commit :].index("close")  # of the folder, after its fsync

    def with_fault(self, fault, again=""):
        return traced.save(self.parent, 6, self.log, f"{self.call}:{fault}:when={self.number}{again}")

    def then_start(self):
        """Start anew: what was left unfinished goes, every checkpoint is whole, and the next save works."""
        LocalShelf(self.parent, LocalStore()).prepare()
        steps = small_saves.check(self.parent, clean=True)
        small_saves.save(self.parent, 8)
        assert small_saves.check(self.parent, clean=True)[-1] == 8
        shutil.rmtree(self.parent)
        return steps


def each(before, folder, call):
    """Give the save with each of its calls of this name as the one with the fault."""
    for number in traced.points(before[1], call):
        yield Save(before, folder, call, number)


def fails_once(before, folder, call, name):
    for save in each(before, folder, call):
        point = f"{call} {save.number}: {name}"
        ended, code = save.with_fault(f"error={name}"), getattr(errno, name)
        assert ended.status == 0, point
        steps = small_saves.check(save.parent)
        if save.at == 1:  # the folder that is there already: who finds it does not ask
            assert (ended.error, steps) == (None, [4, 6]), point
        elif save.at > save.synced:  # the new one is complete: what fails now is told, and no more
            assert ended.error is None, point
            assert steps[-1] == 6, point
        elif ended.error is None:  # made room by what the rotation would remove, and tried again
            assert name in ROOM, point
            assert steps == [4, 6], point
        else:
            assert ended.errno == code, point
            assert str(save.parent / "step-00000006") in ended.error, point
            assert "The checkpoints before it are as they were" in ended.error
            assert steps == ([2, 4, 6] if save.at > save.commit else [2, 4]), point
        if save.at < save.commit:
            assert not [p for p in save.parent.iterdir() if p.name.startswith(".")], point
        assert save.then_start() == steps, point


@pytest.mark.parametrize(
    ("call", "name"), [(call, name) for call, names in FAULTS.items() for name in names[: SHORT.get(call, 1)]]
)
def test_a_call_that_fails(before, tmp_path, call, name):
    """An error of any call is a CheckpointError with its number, or after the commit a warning; nothing is lost."""
    fails_once(before, tmp_path, call, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "name"), [(call, name) for call, names in FAULTS.items() for name in names[SHORT.get(call, 1) :]]
)
def test_a_call_that_fails_otherwise(before, tmp_path, call, name):
    """The same with every other error that the call may return."""
    fails_once(before, tmp_path, call, name)


def test_every_call_is_tried(before):
    """The save makes no call that changes or reads files and is not among those that fail here."""
    assert set(before[1]) == set(FAULTS)
    assert len(before[1]) > 40


@pytest.mark.parametrize("call", FAULTS)
def test_killed_before_a_call(before, tmp_path, call):
    """A process killed at the entry of any call leaves whole checkpoints, the newest of them the one that was there."""
    for save in each(before, tmp_path, call):
        assert save.with_fault("signal=SIGKILL").status == -9
        steps = small_saves.check(save.parent)
        # a rotation takes nothing before the commit is on the disk
        assert steps == [2, 4] if save.at <= save.commit else steps in ([2, 4, 6], [4, 6])
        assert save.at > save.synced or steps[:2] == [2, 4]
        assert save.then_start() == steps


@pytest.mark.parametrize(
    ("call", "name"), [("write", "ENOSPC"), ("fsync", "EIO"), ("rename", "EXDEV"), ("unlink", "EACCES")]
)
def test_a_call_that_fails_from_then_on(before, tmp_path, call, name):
    """A disk that is full, broken or not permitting from a call on: typed, and the newest that was there stays."""
    for save in each(before, tmp_path, call):
        ended = save.with_fault(f"error={name}", again="+")
        steps = small_saves.check(save.parent)
        if save.at <= save.synced:
            assert ended.errno == getattr(errno, name)
            assert 4 in steps
        else:
            assert ended.error is None
            assert steps[-1] == 6
        save.then_start()


@pytest.mark.parametrize("call", ["openat", "write", "fsync"])
def test_an_interrupted_call_is_made_again(before, tmp_path, call):
    """A call that a signal interrupts is repeated: the save is as if nothing had been; at most a removal waits."""
    for save in each(before, tmp_path, call):
        assert save.with_fault("error=EINTR").error is None
        steps = small_saves.check(save.parent, clean=save.at <= save.synced)
        assert steps == [4, 6] if save.at <= save.synced else steps in ([4, 6], [2, 4, 6])
        shutil.rmtree(save.parent)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["error=ENOSPC", "error=EIO", "signal=SIGKILL"])
def test_any_write_of_a_larger_one(before, tmp_path, fault):
    """A model that takes several writes: each of them fails, or is the last one."""
    size, number = 5 * 2**20 + 12, 0
    while True:
        number += 1
        parent = shutil.copytree(before[0], tmp_path / "checkpoints")
        ended = traced.save(parent, 6, tmp_path / "log", f"write:{fault}:when={number}", size=size)
        steps = small_saves.check(parent)
        assert 4 in steps
        shutil.rmtree(parent)
        if number > ended.calls.count("write"):
            break
        assert ended.error or ended.status == -9 or (fault == "error=ENOSPC" and steps == [4, 6])
    assert number == 10  # six writes of the model, one of each other file, and none
