"""The plugin `checkpoint`: exact, atomic checkpoints of a run, and going on from them."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain import CheckpointError, ConfigError, Run, Step, hookimpl, option, plugin
from drivetrain.state import SAVE, STOP
from drivetrain_plugins.checkpoint import _manifest, _place, _saved, _state
from drivetrain_plugins.checkpoint._collect import collect, layout_of
from drivetrain_plugins.checkpoint._lock import RunLock
from drivetrain_plugins.checkpoint._moments import Moments
from drivetrain_plugins.checkpoint._parcel import Parcel, write
from drivetrain_plugins.checkpoint._parts import write_shared
from drivetrain_plugins.checkpoint._ranks import share_text, together
from drivetrain_plugins.checkpoint._restore import restore, verify
from drivetrain_plugins.checkpoint._retention import Kept, Retention
from drivetrain_plugins.checkpoint._sample import sample_of
from drivetrain_plugins.checkpoint._store import LocalStore

if TYPE_CHECKING:
    from collections.abc import Generator

log = logging.getLogger("drivetrain")
ALL = Retention(keep=2**62)


def _whole(value: Any) -> Any:
    if isinstance(value, float):
        raise ValueError(f"a number of checkpoints must be whole. Received: {value!r}")  # noqa: TRY004
    return value


def _moment(value: Any) -> Moments | None:
    return None if value is None else Moments.parse(value)


@plugin(role="checkpoint", effect="observes", example={"every": "2 steps"})
class Checkpoint:
    """Save the whole run, and go on from it bit for bit; a checkpoint is complete or absent.

    Each is a folder of safetensors and JSON, `OUTPUT/checkpoints/step-00000500`; nothing in it is pickled. Resuming
    takes the newest one of which every byte is as it was written, and says which it passed over and why. A run that
    starts from the beginning refuses a folder that holds checkpoints, and a folder that another process runs in.

    With `best`, an evaluation that is among the best is saved at once, whether or not a save is due.
    """

    every: Moments = option("500 steps", converter=Moments.parse, help='how often to save; several: "1 epoch or 1 h"')
    keep: int = option(3, ge=1, converter=_whole, help="how many of the newest to keep; the one resumed from stays")
    best: int = option(0, ge=0, converter=_whole, help="how many of the best by `metric` to keep besides")
    metric: str = option("evaluate/loss", help='what is best: "SPLIT/NAME" as it is logged')
    mode: str = option("min", choices=["min", "max"], help="whether a small or a large value of `metric` is good")
    milestones: Moments | None = option(None, converter=_moment, help="how often to save one that is kept for ever")
    at_end: bool = option(True, help="save when the run ends or is stopped, too")
    what: str = option("run", choices=["run", "weights"], help="all that resuming needs, or the model alone")
    form: str = option(
        "auto", choices=["auto", "full", "sharded"], help="one file, or a part of each rank; auto: as the weights are"
    )
    store: str | None = option(None, help='where checkpoints go, such as "s3://bucket/run"; OUTPUT/checkpoints if None')
    deadline_s: float = option(600.0, gt=0, help="seconds after which a save into a store is given up")
    on_failure: str = option("raise", choices=["raise", "continue"], help="what a save that fails does to the run")
    failures: int = option(3, ge=1, help="with `continue`: the run ends at this many failures in a row")
    on_change: str = option(
        "error", choices=["error", "warn", "accept"], help="when plugins, options, seed or data differ at resume"
    )
    verify_resume: bool = option(False, help="after loading, compare the digests of the run's state with the manifest")
    _store: LocalStore = attrs.field(init=False, factory=LocalStore)
    _kept: Kept | None = attrs.field(init=False, default=None)  # the run's shelf, once it is needed
    _source: Path | str | None = attrs.field(init=False, default=None)  # what this run went on from
    _sample: tuple[str | None, ...] = attrs.field(init=False, default=())  # the digest of some rows, once it is made
    _built: list[dict[str, Any]] = attrs.field(init=False, factory=list)  # the groups' settings as they were built
    _measured: tuple[int, dict[str, float]] = attrs.field(init=False, default=(-1, {}))  # the last evaluation's step
    _milestone: int = attrs.field(init=False, default=-1)  # the step that is to be one
    _failures: int = attrs.field(init=False, default=0)  # in a row
    _stopping: bool = attrs.field(init=False, default=False)
    _lock: RunLock | None = attrs.field(init=False, default=None)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Forget the run before.

        Raises:
            ConfigError: the best are to be kept, and nothing measures them.
        """
        self._kept = self._source = None
        self._sample, self._measured, self._milestone = (), (-1, {}), -1
        self._failures, self._stopping = 0, False
        self._built = _state.built_settings(run)
        split = self.metric.rpartition("/")[0]
        if self.best and (run.plan.hooks["evaluate"].owner is None or split not in _evaluated(run)):
            splits = [s for s in _evaluated(run) if s.startswith("evaluate")]
            raise ConfigError(
                f"checkpoint keeps the best by {self.metric!r}, but nothing evaluates {split!r}: add `evaluate` and "
                f"that split, or name another metric. Received: splits to evaluate {splits}"
            )

    @hookimpl(wrapper=True, tryfirst=True)  # before anyone opens a file in a folder that is not this run's
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Find out before step 0 whether saving can work, and clear what an earlier process left unfinished."""
        if run.settings.output is None:
            raise ConfigError("saving needs the run's folder: Trainer(..., output=...) or [run] output = ...")
        self._lock = RunLock(run.settings.output) if run.rank == 0 else None
        together(run, self._lock.acquire if self._lock else lambda: None)
        try:
            together(run, lambda: self._prepare(run) if run.rank == 0 else None)
            self.every.start(run)
            if self.milestones is not None:
                self.milestones.start(run)
            return (yield)
        finally:
            self._abandon()
            if self._lock is not None:
                self._lock.release()

    @hookimpl
    def step_end(self, step: Step) -> None:
        """Ask for a save when it is due, and after the last step."""
        run = step.run
        if self.every.due(run):
            run.request_save(f"every {self.every}")
        elif self.at_end and run.finished:
            run.request_save("the run ends")
        if self.milestones is not None and self.milestones.due(run):
            self._milestone = run.progress.step
            run.request_save(f"a milestone, every {self.milestones}")

    @hookimpl
    def evaluated(self, run: Run, split: str, metrics: dict[str, float]) -> None:
        """Ask for a save of what is among the best.

        Raises:
            ConfigError: the evaluation did not measure what is to be best.
        """
        step, named = run.progress.step, {f"{split}/{name}": float(value) for name, value in metrics.items()}
        before = self._measured[1] if self._measured[0] == step else {}
        self._measured = step, {**before, **named}
        if not self.best or self.metric.rpartition("/")[0] != split:
            return
        if self.metric not in named:
            raise ConfigError(
                f"checkpoint keeps the best by {self.metric!r}, which the evaluation does not measure. "
                f"Received: {sorted(named)}"
            )
        wanted = together(run, lambda: run.rank == 0 and self._is_best(run, named[self.metric], step))
        if wanted:
            run.request_save(f"among the best {self.best} by {self.metric}")

    @hookimpl(wrapper=True)
    def agree(self, run: Run, votes: int) -> Generator[None, int, int]:  # noqa: ARG002 - the hook's arguments
        """Save before a stop that all ranks have agreed on."""
        agreed = yield
        self._stopping = bool(agreed & STOP)
        return agreed | SAVE if self.at_end and self._stopping else agreed

    @hookimpl
    def save(self, run: Run, path: Path) -> None:
        """Write the checkpoint `path`, then remove old ones, then tell `saved`.

        Raises:
            CheckpointError: it could not be written (on all ranks); the ones before are as they were.
        """
        kept, name = self._place_of(run, Path(path))
        try:
            together(run, lambda: self._check_owner(run))
            parcel = together(run, lambda: self._collect(run, name))
            self._deliver(run, kept, parcel)
        except CheckpointError as error:
            self._bear(error, last=self._is_last(run))

    @hookimpl
    def load(self, run: Run, path: Path | str | None) -> Path | str | None:
        """Restore `path`, or the newest valid checkpoint of the run; return its path, or None if there is none.

        Raises:
            CheckpointError: `path` is not valid, none of several is, or it belongs to another run.
        """
        found = together(run, lambda: self._find(run, path) if run.rank == 0 else None)
        chosen = share_text(run, found.name if found else "")
        if not chosen:
            return None
        saved: _saved.Saved = together(run, lambda: found or self._read(run, path, chosen))
        changes = together(run, lambda: restore(run, saved, self.on_change, self._rows_sample(run)))
        if self.verify_resume:
            form = "sharded" if _manifest.INDEX in saved.manifest["files"] else "full"
            notes = {name: saved.manifest[name] for name in ("kind", "metrics", "milestone")}
            now = together(run, lambda: collect(run, saved.name, notes, self._built, lambda: None, form))
            together(run, lambda: verify(saved, now, changes))
        _state.keep_new_settings(run, saved.tree.get("groups"), self._built)
        self._source = saved.path
        return saved.path

    def ranked(self, run: Run) -> tuple[Kept, Retention]:
        """Return what stands on the run's shelf, and the rule that ranks it."""
        return self._shelf(run), self._retention(run, self._shelf(run))

    # --- the parts -----------------------------------------------------------------------------------------------

    def _shelf(self, run: Run) -> Kept:
        if self._kept is None:
            self._kept = Kept(_place.shelf_of(self.store or _checkpoints(run), self._store, self.deadline_s))
        return self._kept

    def _place_of(self, run: Run, path: Path) -> tuple[Kept, str]:
        """Return where a save goes: the run's shelf, unless it is of a path elsewhere."""
        if path.absolute().parent == _checkpoints(run):
            return self._shelf(run), path.name
        return Kept(_place.shelf_of(path.absolute().parent, self._store, self.deadline_s)), path.name

    def _retention(self, run: Run, kept: Kept) -> Retention:
        return Retention(self.keep, self.best, self.metric, self.mode == "max") if kept is self._shelf(run) else ALL

    def _protected(self, kept: Kept) -> set[str]:
        """Return the name of what the run went on from, if it stands on this shelf, whatever way its path goes."""
        source, name = self._source, str(self._source).rpartition("/")[2]
        where = kept.shelf.where(name)
        if isinstance(where, Path) and isinstance(source, Path):
            where, source = Path(os.path.realpath(where)), Path(os.path.realpath(source))
        return {name} if where == source else set()

    def _prepare(self, run: Run) -> None:
        kept = self._shelf(run)
        place = kept.shelf.where("")
        try:
            kept.shelf.prepare()
            names, free = kept.shelf.names(), kept.shelf.free_bytes()
        except OSError as error:
            raise CheckpointError(f"{place} cannot be written to: {error.strerror or error}") from error
        if names and self._source is None:
            raise CheckpointError(
                f"this run starts from the beginning, but {place} holds checkpoints of another. "
                f"Received: {', '.join(names[-3:])}. Resume that run, choose another output folder, or remove them"
            )
        _place.check_space(run, place, free)

    def _is_best(self, run: Run, value: float, step: int) -> bool:
        kept = self._shelf(run)
        try:
            return self._retention(run, kept).is_best(value, step, kept.entries())
        except OSError as error:
            log.warning("checkpoint: %s cannot be listed, so this one is saved: %s", kept.shelf.where(""), error)
            return True

    def _rows_sample(self, run: Run) -> str | None:
        if not self._sample:
            self._sample = (sample_of(run),)
        return self._sample[0]

    def _check_owner(self, run: Run) -> None:
        if self._lock is not None and self._lock.lost:
            raise CheckpointError(f"another process has taken {run.settings.output} over: this one no longer saves")

    def _collect(self, run: Run, name: str) -> Parcel:
        step = run.progress.step
        notes = {
            "kind": _manifest.RUN if self.what == "run" else _manifest.WEIGHTS,
            "metrics": self._measured[1] if self._measured[0] == step else {},
            "milestone": self._milestone == step,
        }
        return collect(run, name, notes, self._built, lambda: self._rows_sample(run), self.form)

    def _deliver(self, run: Run, kept: Kept, parcel: Parcel) -> None:
        """Write now, and tell `saved`."""
        retention = self._retention(run, kept)
        if parcel.shared:
            write_shared(run, kept, parcel, retention, self._protected(kept))
        else:
            together(run, lambda: write(kept, parcel, retention, self._protected(kept)) if run.rank == 0 else None)
        self._done(run, kept, parcel.name)

    def _done(self, run: Run, kept: Kept, name: str) -> None:
        self._failures = 0
        run.hooks.saved(run, kept.shelf.where(name))

    def _is_last(self, run: Run) -> bool:
        """Tell whether the save of this step is the run's last."""
        return run.finished or self._stopping

    def _bear(self, error: CheckpointError, *, last: bool) -> None:
        """End the run for a save that failed, or go on without it; the last save of a run is never gone without."""
        self._failures += 1
        enough = last or self._failures >= self.failures
        if self.on_failure == "raise" or enough or (self._lock is not None and self._lock.lost):
            raise error
        log.warning("checkpoint: failure %d of %d in a row: %s", self._failures, self.failures, error)

    def _abandon(self) -> None:
        """Leave what is under way when the run ends with an error; here, nothing is."""

    def _find(self, run: Run, path: Path | str | None) -> _saved.Saved | None:
        if path is not None:
            return self._read(run, path, "")
        if run.settings.output is None and self.store is None:
            raise CheckpointError("resuming needs the run's folder (output), or the path of a checkpoint")
        passed_over = "checkpoint: passed over: %s"
        return _saved.newest(self._shelf(run).shelf, lambda reason: log.warning(passed_over, reason), layout_of(run))

    def _read(self, run: Run, path: Path | str | None, name: str) -> _saved.Saved:
        place = (self._shelf(run).shelf, name)
        if path is not None:
            place = _place.checkpoint_at(path, self._store, self.deadline_s)
        return _saved.read(*place, layout_of(run), every=run.rank == 0, resume=True)


def _checkpoints(run: Run) -> Path:
    return Path(run.settings.output or "").absolute() / "checkpoints"


def _evaluated(run: Run) -> list[str]:
    """Return the splits that are measured, as far as is known when the run is assembled."""
    return list(run.facts.get("evaluated_sets", run.batches))
