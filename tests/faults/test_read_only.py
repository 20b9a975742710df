"""A run's folder that cannot be written to: told before step 0; in the middle of a run, the run does as it was told."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import faults_worker
import pytest
import small_runs
import small_saves

from drivetrain import ConfigError, DrivetrainError
from drivetrain_plugins import Checkpoint
from drivetrain_plugins.checkpoint._store import LocalStore


def refused(folder, place=None, store=None, errors=DrivetrainError):
    """Start a run; return its error, which names `place` and comes before step 0."""
    kind = Checkpoint(every="2 steps")
    kind._store = store or LocalStore()
    seen, raised = small_runs.train(folder, kind, errors=errors)
    assert (seen.step, seen.saved_steps) == (0, [])
    assert str(place or folder) in str(raised)
    return raised


@pytest.fixture
def public():
    """Return a folder that everybody may enter, after a run that has imported what runs import."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        small_runs.train(Path(folder) / "first", Checkpoint(), steps=1)
        yield Path(folder)


class ReadOnly(LocalStore):
    """A file system that is read-only while `is_set`: what needs no root."""

    is_set = True


def _refusing(name):
    def call(self, path, *rest):
        if self.is_set:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return getattr(LocalStore, name)(self, path, *rest)

    return call


for _name in ("make_folder", "create", "rename", "remove", "remove_folder"):
    setattr(ReadOnly, _name, _refusing(_name))


# --- at the start --------------------------------------------------------------------------------------------------


def test_missing_parents_are_made(tmp_path):
    """A run's folder need not exist, nor its parents."""
    seen, raised = small_runs.train(tmp_path / "a" / "b" / "c", Checkpoint(every="5 steps"))
    assert (seen.saved_steps, raised) == ([5, 10], None)
    assert small_saves.check(tmp_path / "a" / "b" / "c" / "checkpoints", clean=True) == [5, 10]


@pytest.mark.parametrize("below", ["", "run", "a/b/c"])
def test_a_file_where_the_folder_goes(tmp_path, below):
    """A file in the place of the run's folder, or of one above it, is refused, and stays."""
    (tmp_path / "file").write_text("mine")
    assert isinstance(refused(tmp_path / "file" / below), ConfigError)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "link", "link to nothing", "pipe"])
def test_something_else_where_the_checkpoints_go(tmp_path, kind):
    """A file, a link or a pipe in the place of the folder of checkpoints is refused, and nothing is written into it."""
    place, elsewhere = tmp_path / "run" / "checkpoints", tmp_path / "elsewhere"
    place.parent.mkdir()
    if kind == "file":
        place.write_text("mine")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.mkdir()
    refused(tmp_path / "run", place)
    assert not elsewhere.exists() or not any(elsewhere.iterdir())


def test_a_read_only_file_system(tmp_path):
    """On a file system that is mounted read-only, a run that would save there does not start."""
    with small_saves.mounted(tmp_path / "disk", "size=8m") as remount:
        remount("ro")
        assert isinstance(refused(tmp_path / "disk" / "run"), ConfigError)


def test_checkpoints_on_a_read_only_file_system(tmp_path):
    """The same where only the checkpoints lie on it: the probe fails, and its reason is told."""
    place = tmp_path / "run" / "checkpoints"
    place.parent.mkdir()
    with small_saves.mounted(place, "size=8m") as remount:
        remount("ro")
        raised = refused(tmp_path / "run", place)
        assert raised.__cause__.errno == errno.EROFS
        assert not list(place.iterdir())


def test_a_store_that_is_read_only(tmp_path):
    """The same without a mount."""
    raised = refused(tmp_path / "run", tmp_path / "run" / "checkpoints", ReadOnly())
    assert raised.__cause__.errno == errno.EROFS


def _told(folder, place):
    raised = refused(folder, place)
    return [type(raised).__name__, getattr(raised.__cause__, "errno", None)]


def test_nobody_may_write_the_checkpoints(public):
    """A user without the right to write into the folder of checkpoints is told before step 0."""
    place = public / "run" / "checkpoints"
    place.mkdir(parents=True)
    place.parent.chmod(0o777)
    place.chmod(0o555)
    told = small_saves.as_nobody(lambda: _told(public / "run", place))
    assert told == ["CheckpointError", errno.EACCES]
    place.chmod(0o755)
    assert not list(place.iterdir())


def test_nobody_may_make_the_folder(public):
    """The same for the run's folder, where it does not exist."""
    (public / "closed").mkdir()
    (public / "closed").chmod(0o555)
    told = small_saves.as_nobody(lambda: _told(public / "closed" / "run", public / "closed" / "run"))
    assert told == ["ConfigError", errno.EACCES]


def test_an_existing_folder_on_a_read_only_file_system(tmp_path):
    """A run's folder that exists and cannot be written to is an error of drivetrain's."""
    with small_saves.mounted(tmp_path / "disk", "size=8m") as remount:
        (tmp_path / "disk" / "run").mkdir()
        remount("ro")
        refused(tmp_path / "disk" / "run")


def test_an_existing_folder_fails_at_the_start(public):
    """A run's folder that exists and that this user may not write to is told before step 0, whatever the error is."""
    folder = public / "run"
    folder.mkdir()
    folder.chmod(0o555)
    assert small_saves.as_nobody(lambda: refused(folder, errors=(DrivetrainError, OSError)) is not None)


# --- in the middle of a run ----------------------------------------------------------------------------------------


@pytest.fixture(params=["mounted", "told"])
def lapse(request, tmp_path):
    """Return a run's folder, its store, and a function that makes it read-only or not: by a mount, or by the store."""
    if request.param == "told":
        store = ReadOnly()
        store.is_set = False
        yield tmp_path / "run", store, lambda read_only: setattr(store, "is_set", read_only)
        return
    with small_saves.mounted(tmp_path / "disk", "size=8m") as remount:
        yield tmp_path / "disk" / "run", LocalStore(), lambda read_only: remount("ro" if read_only else "rw")
        remount("rw")


def kind_of(store, **options):
    made = Checkpoint(every="2 steps", keep=9, **options)
    made._store = store
    return made


def test_read_only_in_the_middle(lapse):
    """A folder that becomes read-only ends the run at the next save, with the reason; what was saved is whole."""
    folder, store, change = lapse
    seen, raised = small_runs.train(folder, kind_of(store), small_runs.Seen(3, lambda: change(True)))
    assert (seen.step, seen.saved_steps) == (4, [2])
    assert raised.__cause__.errno == errno.EROFS
    assert str(folder / "checkpoints" / "step-00000004") in str(raised)
    assert small_saves.check(folder / "checkpoints", clean=True) == [2]


def test_read_only_for_good(lapse):
    """With "continue" the run ends when as many saves in a row have failed as it bears."""
    folder, store, change = lapse
    kind = kind_of(store, on_failure="continue", failures=2)
    seen, raised = small_runs.train(folder, kind, small_runs.Seen(3, lambda: change(True)))
    assert (seen.step, seen.saved_steps) == (6, [2])
    assert raised.__cause__.errno == errno.EROFS
    assert small_saves.check(folder / "checkpoints", clean=True) == [2]


def test_read_only_for_a_while(lapse):
    """With "continue" the run goes on saving when the folder can be written to again."""
    folder, store, change = lapse

    class While(small_runs.Seen):
        def act_at(self, step):
            if step in (3, 7):
                change(step == 3)

    kind = kind_of(store, on_failure="continue")
    seen, raised = small_runs.train(folder, kind, While())
    assert (seen.saved_steps, raised) == ([2, 8, 10], None)
    assert small_saves.check(folder / "checkpoints", clean=True) == [2, 8, 10]


def by_file(folder):
    shutil.rmtree(folder)
    folder.write_text("mine")


@pytest.mark.parametrize("policy", ["raise", "continue"])
@pytest.mark.parametrize("what", ["", "checkpoints"], ids=["the run's folder", "the checkpoints"])
def test_a_file_in_its_place_in_the_middle(tmp_path, what, policy):
    """A folder that is replaced by a file ends the run as its policy says, and the file stays."""
    place = tmp_path / "run" / what
    kind = kind_of(LocalStore(), on_failure=policy)
    seen, raised = small_runs.train(tmp_path / "run", kind, small_runs.Seen(3, lambda: by_file(place)))
    assert (seen.step, seen.saved_steps) == (4 if policy == "raise" else 8, [2])
    assert raised.__cause__.errno in (errno.ENOTDIR, errno.EEXIST)
    assert str(tmp_path / "run" / "checkpoints") in str(raised)
    assert place.read_text() == "mine"


@pytest.mark.parametrize("policy", ["raise", "continue"])
@pytest.mark.parametrize("what", ["", "checkpoints"], ids=["the run's folder", "the checkpoints"])
def test_a_folder_that_is_removed_in_the_middle(tmp_path, what, policy):
    """A folder that is removed is made again, or ends the run as its policy says, with an error that names it."""
    place = tmp_path / "run" / what
    kind = kind_of(LocalStore(), on_failure=policy)
    seen, raised = small_runs.train(tmp_path / "run", kind, small_runs.Seen(3, lambda: shutil.rmtree(place)))
    if raised is None:
        assert small_saves.check(tmp_path / "run" / "checkpoints", clean=True) == [4, 6, 8, 10]
        return
    assert (seen.step, seen.saved_steps) == (4 if policy == "raise" else 8, [2])
    assert raised.__cause__.errno == errno.ENOENT
    assert str(tmp_path / "run" / "checkpoints") in str(raised)


def test_an_empty_folder_that_is_removed(tmp_path):
    """The same before the first save; what comes after is a new start, which makes it again."""
    folder = tmp_path / "run"
    act = small_runs.Seen(1, (folder / "checkpoints").rmdir)
    small_runs.train(folder, kind_of(LocalStore()), act)
    shutil.rmtree(folder, ignore_errors=True)
    _, raised = small_runs.train(folder, kind_of(LocalStore()), resume="auto")
    assert raised is None
    assert faults_worker.newest(folder).manifest["step"] == 10


def test_a_save_elsewhere_makes_its_folder(tmp_path):
    """A save of a path outside the run's folder makes the folder that it goes to."""
    kind = kind_of(LocalStore())
    place = tmp_path / "new" / "step-00000003"
    seen = small_runs.Seen(3, lambda: kind.save(seen.run, place))
    _, raised = small_runs.train(tmp_path / "run", kind, seen)
    assert raised is None
    assert faults_worker.read(place).manifest["step"] == 3
