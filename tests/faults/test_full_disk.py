"""A disk that is full at any byte: what was saved stays, the message says what is missing, the run does as it was told."""

from __future__ import annotations

import errno
import os
import resource

import faults_worker
import pytest
import small_runs
import small_saves

from drivetrain import CheckpointError
from drivetrain_plugins import AsyncCheckpoint, Checkpoint
from drivetrain_plugins.checkpoint._local import LocalShelf
from drivetrain_plugins.checkpoint._store import LocalStore

PAGE, SIZE = 4096, 10 * 4096
TOLD = r"checkpoint {} could not be written: .* \(.*\)\. It needs about \d+ bytes, \d+ are free\. The checkpoints before it"


class Promising(LocalStore):
    """A file system that says there is room: other writers and quotas take it before the save does."""

    def free_bytes(self, path):
        return 2**60


@pytest.fixture
def disk(tmp_path):
    """Return a function that mounts a tmpfs of a size and returns its folder, and one that resizes it."""
    with small_saves.mounted(tmp_path / "disk", "size=16m,nr_inodes=500") as remount:
        parent = tmp_path / "disk" / "checkpoints"
        parent.mkdir()
        yield parent, remount


def failure(parent, step, **options):
    """Save; return the error, or None."""
    try:
        small_saves.save(parent, step, **options)
    except CheckpointError as error:
        return error
    return None


def used(parent):
    """Return the bytes in use where `parent` is."""
    about = os.statvfs(parent)
    return (about.f_blocks - about.f_bfree) * about.f_frsize


def full_at(parent, remount, store, sizes, size=SIZE):
    """Save onto a disk with each of these numbers of bytes free; return after which of them the save worked."""
    small_saves.save(parent, 2, size=size)
    before, worked = used(parent), []
    for free in sizes:
        remount(f"size={before + free}")
        error = failure(parent, 4, size=size, store=store)
        if error is None:
            worked.append(free)
            LocalShelf(parent, store).remove("step-00000004")
        else:
            assert error.__cause__.errno == errno.ENOSPC
            assert str(parent / "step-00000004") in str(error)
            numbers = f"{small_saves.parcel(4, size).size} bytes, {store.free_bytes(parent)} are free"
            assert f"It needs about {numbers}" in str(error)
        assert small_saves.check(parent, clean=True) == [2]
        assert used(parent) == before
    return worked


@pytest.mark.parametrize("store", [LocalStore, Promising])
def test_a_disk_of_any_size(disk, store):
    """On a disk with 0 bytes to a checkpoint's free, page by page, the one before stays and nothing half is left."""
    sizes = range(0, small_saves.needed(SIZE) + 4 * PAGE, PAGE)
    worked = full_at(*disk, store(), sizes)
    assert worked
    assert worked == [free for free in sizes if free >= worked[0]]
    assert worked[0] >= small_saves.parcel(4, SIZE).size


@pytest.mark.slow
@pytest.mark.parametrize("store", [LocalStore, Promising])
def test_a_larger_disk_of_any_size(disk, store):
    """The same for a model of several writes, each 64 KiB."""
    size = 3 * 2**20
    worked = full_at(*disk, store(), range(0, small_saves.needed(size) + 2**16, 2**16), size)
    assert len(worked) in (1, 2)


def test_a_disk_without_names(disk):
    """Where bytes are free and inodes are not, any number of them that is too small is the same error."""
    parent, remount = disk
    small_saves.save(parent, 2)
    failed = []
    for inodes in range(7, 14):  # the root, this folder, and a checkpoint of four files
        remount(f"nr_inodes={inodes}")
        error = failure(parent, 4)
        if error is None:
            break
        assert error.__cause__.errno == errno.ENOSPC
        failed.append(inodes)
        assert small_saves.check(parent, clean=True) == [2]
    assert failed == [*range(7, failed[-1] + 1)]
    assert small_saves.check(parent, clean=True) == [2, 4]


def limited(parent, limit, step):
    """Save with a limit on the size of a file; return the error's text, and its cause's number."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    error = failure(parent, step, size=SIZE)
    return (str(error), error.__cause__.errno) if error else ("", 0)


def file_too_large(parent, limits):
    parent.mkdir()
    small_saves.save(parent, 2, size=SIZE)
    largest = max(p.stat().st_size for p in (parent / "step-00000002").iterdir())
    for limit in limits:
        told, code = small_saves.in_a_child(lambda limit=limit: limited(parent, limit, 4))
        assert code == (errno.EFBIG if limit < largest else 0)
        assert (str(parent / "step-00000004") in told) == (limit < largest)
        assert small_saves.check(parent, clean=True) == ([2] if limit < largest else [2, 4])
    assert limits[0] < largest <= limits[-1]


def test_a_limit_on_the_size_of_files(tmp_path):
    """A save that runs into a limit on files, at any of them and in the middle of a write, changes nothing."""
    file_too_large(tmp_path / "checkpoints", [*range(0, 1000, 60), *range(1000, SIZE + 2 * PAGE, PAGE)])


@pytest.mark.slow
def test_any_limit_on_the_size_of_files(tmp_path):
    """The same with limits 16 bytes apart where the small files end, and 512 bytes beyond."""
    file_too_large(tmp_path / "checkpoints", [*range(0, 1000, 16), *range(1000, SIZE + PAGE, 512)])


# --- making room ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [LocalStore, Promising])
def test_room_is_made(disk, caplog, store):
    """Where what the rotation would remove takes enough space, it goes first, and the save is tried once more."""
    parent, remount = disk
    for step in (2, 4):
        small_saves.save(parent, step, size=SIZE)
    remount(f"size={used(parent) + PAGE}")
    small_saves.save(parent, 6, size=SIZE, store=store())
    assert small_saves.check(parent, clean=True) == [4, 6]
    assert "making room first: step-00000002" in caplog.text


@pytest.mark.parametrize(("keep", "steps"), [(1, [2]), (3, [2, 4])])
def test_room_is_not_made_of_what_is_kept(disk, keep, steps):
    """The newest there is never goes for one that is not there yet, nor does any that the rule keeps."""
    parent, remount = disk
    for step in steps:
        small_saves.save(parent, step, size=SIZE, keep=keep)
    remount(f"size={used(parent) + PAGE}")
    with pytest.raises(CheckpointError, match=TOLD.format(".*step-00000006")):
        small_saves.save(parent, 6, size=SIZE, keep=keep)
    assert small_saves.check(parent, clean=True) == steps


def test_room_that_does_not_suffice(tmp_path):
    """A disk that is full at a write and all those after it takes what the rotation would remove, and no more."""

    class Full(LocalStore):
        left = 0

        def write(self, handle, chunk):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(handle, chunk)

    for writes in range(4):
        parent, store = tmp_path / str(writes), Full()
        parent.mkdir()
        for step in (2, 4):
            small_saves.save(parent, step)
        store.left = writes
        with pytest.raises(CheckpointError, match=TOLD.format(".*step-00000006")) as caught:
            small_saves.save(parent, 6, store=store)
        assert caught.value.__cause__.errno == errno.ENOSPC
        assert small_saves.check(parent, clean=True) == [4]


# --- runs ----------------------------------------------------------------------------------------------------------


class Sometimes(LocalStore):
    """A disk that is full while the checkpoints of some steps are written, by whatever writes them."""

    def __init__(self, steps):
        self.steps, self.handles = steps, set()

    def create(self, path):
        handle = super().create(path)
        if int(path.parent.name.split("-")[1]) in self.steps:
            self.handles.add(handle)
        return handle

    def write(self, handle, chunk):
        if handle in self.handles:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(handle, chunk)

    def close(self, handle):
        self.handles.discard(handle)
        super().close(handle)


def train(folder, checkpoint, full):
    """Train on a disk that is full for the saves of some steps; return what was seen, and the error."""
    checkpoint._store = Sometimes(full)
    return small_runs.train(folder, checkpoint)


def test_the_run_goes_on_without_a_save(tmp_path, caplog):
    """With on_failure="continue" a save that fails is told and left out; one that works begins the count anew."""
    kind = Checkpoint(every="1 step", keep=20, on_failure="continue", failures=3)
    seen, raised = train(tmp_path / "run", kind, full={2, 3, 5, 6, 9})
    assert raised is None
    assert seen.saved_steps == [1, 4, 7, 8, 10]
    assert small_saves.steps_in(tmp_path / "run" / "checkpoints") == [1, 4, 7, 8, 10]
    assert "failure 2 of 3 in a row: checkpoint " in caplog.text


@pytest.mark.parametrize(("full", "ends"), [({3, 4, 5, 6, 7}, 5), ({2, 10}, 10)], ids=["three in a row", "the last"])
def test_the_run_ends_after_all(tmp_path, full, ends):
    """Three failures in a row, or a failure of the last save, end the run with the error, and what was saved stays."""
    kind = Checkpoint(every="1 step", keep=20, on_failure="continue", failures=3)
    seen, raised = train(tmp_path / "run", kind, full)
    assert seen.step == ends
    assert str(tmp_path / "run" / "checkpoints" / f"step-{ends:08d}") in str(raised)
    assert raised.__cause__.errno == errno.ENOSPC
    assert seen.saved_steps == [n for n in range(1, ends) if n not in full]
    assert faults_worker.newest(tmp_path / "run").manifest["step"] == seen.saved_steps[-1]


def test_the_run_ends_at_once(tmp_path):
    """By default the first failure ends the run."""
    seen, raised = train(tmp_path / "run", Checkpoint(every="2 steps"), full={4})
    assert (seen.step, seen.saved_steps) == (4, [2])
    assert raised is not None


@pytest.mark.parametrize("how", ["thread", "fork"])
def test_a_save_beside_the_training_tells_it_later(tmp_path, how):
    """The error of `async-checkpoint` comes at a step after the one that was saved, with path, need and free bytes."""
    seen, raised = train(tmp_path / "run", AsyncCheckpoint(every="3 steps", how=how), full={6})
    assert 6 < seen.step <= 9
    place = str(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert str(raised).startswith(f"checkpoint {place} could not be written: No space left on device")
    assert "It needs about" in str(raised)
    assert small_saves.steps_in(tmp_path / "run" / "checkpoints") == [3]


@pytest.mark.parametrize("how", ["thread", "fork"])
def test_the_last_save_beside_the_training(tmp_path, how):
    """An asynchronous save that fails is left out with "continue", except the last one, for which the end waits."""
    kind = AsyncCheckpoint(every="2 steps", keep=20, how=how, on_failure="continue", failures=9)
    seen, raised = train(tmp_path / "run", kind, full={4, 10})
    assert seen.step == 10
    assert "step-00000010 could not be written: No space left" in str(raised)
    assert seen.saved_steps == [2, 6, 8]
