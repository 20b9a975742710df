"""What stands where a run saves, told from manifests alone: no plugin of the run is imported, no tensor is loaded."""

from __future__ import annotations

import contextlib
import errno
import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import CheckpointError, ConfigError
from drivetrain.errors import nearest
from drivetrain_plugins.checkpoint import _compare, _manifest, _saved
from drivetrain_plugins.checkpoint._local import LocalShelf
from drivetrain_plugins.checkpoint._lock import NAME as LOCK
from drivetrain_plugins.checkpoint._lock import RunLock
from drivetrain_plugins.checkpoint._place import checkpoint_at, shelf_of
from drivetrain_plugins.checkpoint._retention import Entry, Retention
from drivetrain_plugins.checkpoint._shelf import step_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drivetrain_plugins.checkpoint._shelf import Shelf

VERSIONS = "drivetrain", "torch", "numpy", "python"


@attrs.frozen
class Place:
    """Where checkpoints stand."""

    shelf: Shelf
    names: list[str]  # those of steps, and in a folder those that somebody named
    run: Path | None = None  # the run's folder, which one process owns at a time; None where it is not known
    alone: bool = False  # one checkpoint is meant, not what stands around it

    def named(self, name: str) -> tuple[Shelf, str]:
        """Return the checkpoint that a name, a step, a path or a URL means.

        Raises:
            ConfigError: there is none of that name here.
        """
        if "/" in name:
            return checkpoint_at(name)
        known = f"step-{int(name):08d}" if name.isascii() and name.isdigit() else name
        if known not in self.names:
            where = self.shelf.where("")
            raise ConfigError(f"there is no checkpoint {name!r} in {where}: {nearest(known, self.names)}")
        return self.shelf, known


def find(text: str) -> Place:
    """Return what a path or a URL names: a run's folder, a folder of checkpoints, or one checkpoint.

    Raises:
        CheckpointError: there is no checkpoint.
        ConfigError: the URL names no store that can be read.
    """
    url, text = "://" in text and not text.startswith("file://"), text.removeprefix("file://")
    do = "Give a run's folder, a folder of checkpoints, one checkpoint, or the URL that the run saves to"
    try:
        found = _in_store(text) if url else _in_folder(Path(text).expanduser().absolute())
    except FileNotFoundError as error:
        raise CheckpointError(f"there is nothing at {error.filename or 'that place'}. {do}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"checkpoints cannot be looked for: {reason}. {do}") from error
    if not found.names:
        raise CheckpointError(f"there is no checkpoint in {found.shelf.where('')}. {do}")
    return found


def _in_store(url: str, run: Path | None = None) -> Place:
    shelf, name = checkpoint_at(url)
    if step_of(name) is not None:
        return Place(shelf, [name], run, alone=True)
    shelf = shelf_of(url)
    return Place(shelf, shelf.names(), run)


def _in_folder(path: Path) -> Place:
    if not stat.S_ISDIR(path.stat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, f"{path} is no folder")
    if step_of(path.name) is not None or _is_one(path):
        return Place(shelf_of(path.parent), [path.name], _run_around(path.parent), alone=True)
    inside = path / "checkpoints"
    if inside.is_dir() and (names := _names(inside)):
        return Place(shelf_of(inside), names, path)
    if (store := _store_of(path)) is not None:
        if "://" in store:
            return _in_store(store, path)
        return attrs.evolve(_in_folder(Path(store).expanduser().absolute()), run=path)
    return Place(shelf_of(path), _names(path), _run_around(path))


def _is_one(path: Path) -> bool:
    return (path / _manifest.NAME).is_file()


def _names(folder: Path) -> list[str]:
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(path.name for path in found if step_of(path.name) is not None or _is_one(path))


def _run_around(folder: Path) -> Path | None:
    run = folder.parent
    return run if (folder.name == "checkpoints" and run.is_dir()) or (run / LOCK).exists() else None


def _store_of(run: Path) -> str | None:
    """Return where the run's plan says that checkpoints go, if it says so."""
    try:
        plugins = json.loads((run / "plan.json").read_bytes())["plugins"].values()
        stores = [about["options"].get("store") for about in plugins if about["role"] == "checkpoint"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return next((store for store in stores if type(store) is str), None)


@contextlib.contextmanager
def owned(run: Path | None) -> Iterator[None]:
    """Own the run's folder meanwhile, so that no run begins or saves there.

    Raises:
        CheckpointError: a process that lives owns it.
    """
    if run is None:
        yield
        return
    lock = RunLock(run)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def run_of(shelf: Shelf) -> Path | None:
    """Return the folder of the run that saves to a shelf, as far as can be seen from there."""
    return _run_around(shelf.parent) if isinstance(shelf, LocalShelf) else None


def exists(shelf: Shelf, name: str) -> bool:
    """Tell whether anything has the name of a checkpoint.

    Raises:
        CheckpointError: it cannot be found out.
        ConfigError: it is no name.
    """
    if not name or name in {".", ".."}:
        raise ConfigError(f"expected the path or the URL of a checkpoint. Received: {shelf.where(name)}")
    if isinstance(shelf, LocalShelf):
        return shelf.store.exists(shelf.where(name))
    try:
        return bool(shelf.files(name))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CheckpointError(f"{shelf.where(name)} cannot be read: {error.strerror or error}") from error


# --- what there is ---------------------------------------------------------------------------------------------------


@attrs.frozen
class Row:
    """One checkpoint: what its manifest tells, or what is wrong with that."""

    name: str
    where: str
    manifest: dict[str, Any] | None = None
    entry: Entry | None = None
    damaged: str | None = None
    kept_for: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the files that the manifest lists."""
        return sum(about["size"] for about in self.manifest["files"].values()) if self.manifest else 0

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        if self.manifest is None or self.entry is None:
            return {"name": self.name, "where": self.where, "damaged": self.damaged}
        same = {key: self.manifest[key] for key in ("step", "position", "kind", "world_size", "schema")}
        environment, parts = self.manifest["environment"], len(_manifest.parts(self.manifest["files"]))
        return {
            "name": self.name,
            "where": self.where,
            "damaged": None,
            **same,
            "form": "sharded" if parts else "full",
            "parts": parts,
            "bytes": self.size,
            "metrics": {k: v if v - v == 0 else str(v) for k, v in self.entry.metrics.items()},  # JSON has no NaN
            "kept_for": list(self.kept_for),
            "versions": {**{k: environment.get(k) for k in VERSIONS}, "states": self.manifest["states"]},
        }


def survey(place: Place) -> tuple[list[Row], Retention | None]:
    """Return the checkpoints, the oldest first, and what the newest one's run keeps, if its manifest tells."""
    rows = sorted(
        (_row(place.shelf, name) for name in place.names), key=lambda r: (_step(r), step_of(r.name) is None, r.name)
    )
    sound = [r for r in rows if r.entry is not None and step_of(r.name) is not None]
    rule = None if place.alone or not sound else _rule(sound[-1].manifest or {})
    entries = [r.entry for r in sound if r.entry is not None]
    newest = {e.name for e in rule.newest_of(entries)} if rule else set()
    best = {e.name for e in rule.best_of(entries)} if rule else set()
    told = []
    for row in rows:
        milestone = row.entry is not None and row.entry.milestone
        reasons = {"newest": row.name in newest, "best": row.name in best, "milestone": milestone}
        told.append(attrs.evolve(row, kept_for=tuple(k for k, yes in reasons.items() if yes)))
    return told, rule


def _step(row: Row) -> int:
    named = step_of(row.name)
    return row.entry.step if row.entry else -1 if named is None else named


def _row(shelf: Shelf, name: str) -> Row:
    where = str(shelf.where(name))
    try:
        manifest = described(shelf, name)
    except CheckpointError as error:
        return Row(name, where, damaged=str(error).removeprefix(f"{where}: "))
    return Row(name, where, manifest, Entry.of(name, manifest))


def described(shelf: Shelf, name: str) -> dict[str, Any]:
    """Return a checkpoint's manifest, in which the plugins are as a save describes them, too.

    Raises:
        CheckpointError: it is damaged, or nobody's save wrote it.
    """
    manifest = _saved.read_manifest(shelf, name)
    with _saved.reading(shelf.where(name), _manifest.NAME):
        _compare.check_plugins(manifest["plugins"])
    return manifest


def _rule(manifest: dict[str, Any]) -> Retention | None:
    kinds = {"keep": int, "best": int, "metric": str, "mode": str}
    for about in manifest["plugins"].values():
        given = {"best": 0, "metric": "", "mode": "min", **about["options"]}  # not all were there from the beginning
        if about["role"] == "checkpoint" and all(type(given.get(k)) is kind for k, kind in kinds.items()):
            return Retention(given["keep"], given["best"], given["metric"], given["mode"] == "max")
    return None


# --- what may go -----------------------------------------------------------------------------------------------------


@attrs.frozen
class Pruning:
    """What would be removed; `damaged` ones stay, as somebody may want to look into them, and count for nothing."""

    go: list[str]
    stay: list[str]
    damaged: dict[str, str]


def prunable(place: Place, rule: Retention) -> Pruning:
    """Return what may go. Every byte of what stays by the rule is verified first; a damaged one does not count.

    The newest from which a run can go on stays, though later ones hold weights only.

    Raises:
        CheckpointError: none is valid.
        ConfigError: the best are to stay, and no checkpoint has the metric.
    """
    rows = [row for row in survey(place)[0] if step_of(row.name) is not None]
    damaged = {row.name: row.damaged for row in rows if row.damaged is not None}
    sound = {row.name: row.entry for row in rows if row.entry is not None}
    runs = {row.name for row in rows if row.manifest is not None and row.manifest["kind"] == _manifest.RUN}
    known = sorted({metric for entry in sound.values() for metric in entry.metrics})
    if rule.best and sound and rule.metric not in known:
        raise ConfigError(f"no checkpoint was saved with the metric {rule.metric!r}: {nearest(rule.metric, known)}")
    verified: set[str] = set()
    while True:
        entries = sorted(sound.values(), key=lambda e: -e.step)
        resumable = next((e for e in entries if e.name in runs), None)
        stay = [*rule.newest_of(entries), *rule.best_of(entries), *([resumable] if resumable else [])]
        unread = {e.name for e in stay} - verified
        if not unread:
            break
        for name in sorted(unread):
            if (wrong := damage(place.shelf, name)) is None:
                verified.add(name)
            else:
                damaged[name] = wrong
                del sound[name]
    if not entries:
        raise CheckpointError(f"no checkpoint in {place.shelf.where('')} is valid, so nothing is removed")
    go = rule.victims(entries, entries[0].step, [e.name for e in stay])
    return Pruning(go, sorted(sound.keys() - set(go)), damaged)


def damage(shelf: Shelf, name: str) -> str | None:
    """Read every byte of a checkpoint, and return what is wrong: the file, what was expected and found."""
    try:
        _saved.check(shelf, name)
    except CheckpointError as error:
        return str(error).removeprefix(f"{shelf.where(name)}: ")
    return None


def remove(shelf: Shelf, names: list[str]) -> None:
    """Remove checkpoints, the oldest first.

    Raises:
        CheckpointError: one could not be removed; those after it are there.
    """
    for name in names:
        try:
            shelf.remove(name)
        except OSError as error:
            raise CheckpointError(f"{shelf.where(name)} could not be removed: {error.strerror or error}") from error
