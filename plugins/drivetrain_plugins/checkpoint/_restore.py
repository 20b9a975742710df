"""Putting a checkpoint back into a run, once it is known to belong to it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from typing import TYPE_CHECKING

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _compare, _manifest, _state
from drivetrain_plugins.checkpoint._collect import ties_of
from drivetrain_plugins.checkpoint._format import first_difference
from drivetrain_plugins.checkpoint._random import restore_random_states

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drivetrain import Run
    from drivetrain_plugins.checkpoint._parcel import Parcel
    from drivetrain_plugins.checkpoint._saved import Saved

log = logging.getLogger("drivetrain")
_WRONG = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError)


def restore(run: Run, saved: Saved, on_change: str, sample: str | None) -> list[str]:
    """Put the state of `saved` into `run`; return what differs between the two runs.

    Args:
        run: assembled, from the same plugins or others.
        saved: the checkpoint.
        on_change: what differences between the two runs mean: "error", "warn" or "accept".
        sample: the digest of some of the run's rows.

    Raises:
        CheckpointError: the checkpoint belongs to another run, or does not fit this one.
    """
    with _fitting(saved, _manifest.NAME):
        _compare.check_plugins(saved.manifest["plugins"])
        changes = _compare.differences(saved.manifest, run, ties_of(run), sample)
    if changes and on_change != "accept":
        diff = f"{saved.path} belongs to a run that differs from this one:\n    " + "\n    ".join(changes)
        if on_change == "error":
            raise CheckpointError(
                f"{diff}\nMake the run as it was, or allow it: checkpoint.on_change = 'warn'. "
                "What differs is then taken as this run has it"
            )
        log.warning("checkpoint: %s", diff)
    _compare.warn_about_environment(saved.manifest, run)
    with _fitting(saved, "state.json"):
        _state.check(saved.tree, saved.manifest)
        state = {part: value for part, value in saved.tree.items() if part not in ("random", "groups")}
        _state.tell_fresh(state["plugins"], run)
        state["plugins"] = _state.migrate(state["plugins"], saved.manifest["states"], run)
        if changes:
            state["optimizer"] = _state.regroup(run, state["optimizer"], saved.tree.get("groups"))
        run.load_state_dict(state)
        _state.fit_moments(run, state["optimizer"])
        now = run.state_dict()
        for part in ("model", "optimizer"):
            if (place := first_difference(state[part], now[part])) is not None:
                raise ValueError(f"{part}{place} is not what was saved after restoring it")
        restore_random_states(saved.tree["random"], run)  # last: nothing draws after it
    if not _same_states(saved, run):
        changes = [*changes, "other states of plugins"]
    return changes


@contextlib.contextmanager
def _fitting(saved: Saved, file: str) -> Iterator[None]:
    """Turn whatever the content of a file causes into a CheckpointError that names it."""
    try:
        yield
    except _WRONG as error:
        raise CheckpointError(f"{saved.path}: {file} does not fit this run: {type(error).__name__}: {error}") from error


def _same_states(saved: Saved, run: Run) -> bool:
    """Tell whether the run has the plugins with a state that the checkpoint has, none of them migrated."""
    then, now = saved.manifest["states"], _compare.state_versions(run)
    return set(saved.tree["plugins"]) == set(now) and all(then.get(name, 1) == now[name] for name in now)


def verify(saved: Saved, parcel: Parcel, changes: list[str]) -> None:
    """Compare the digests of what the run would save now with those of the files it has come from.

    Where the runs differ in their plugins, so does their state, and the model alone is compared; where they differ in
    how the ranks share the state, nothing can be.

    Raises:
        CheckpointError: a file differs, though nothing else does.
    """
    listed = saved.manifest["files"]
    for file, chunks in parcel.contents().items():
        if file not in listed or (changes and file != "model.safetensors"):
            continue
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        if digest.hexdigest() != listed[file]["sha256"]:
            raise CheckpointError(
                f"{saved.path}: {file}: after restoring, the run's state has the sha256 {digest.hexdigest()}; "
                f"expected {listed[file]['sha256']}"
            )
    log.info("checkpoint: the run's state has the digests of %s", saved.path)
