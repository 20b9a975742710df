"""Putting a checkpoint back into a run, once it is known to belong to it."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

from drivetrain import CheckpointError
from drivetrain_plugins.checkpoint import _compare, _state
from drivetrain_plugins.checkpoint._collect import MODEL_AT, ties_of
from drivetrain_plugins.checkpoint._format import MODEL, encode, first_difference, to_safetensors
from drivetrain_plugins.checkpoint._random import restore_random_states

if TYPE_CHECKING:
    from drivetrain import Run
    from drivetrain_plugins.checkpoint._saved import Saved

log = logging.getLogger("drivetrain")


def restore(run: Run, saved: Saved, on_change: str, sample: str | None, *, verify: bool = False) -> None:
    """Put the state of `saved` into `run`.

    Args:
        run: assembled, from the same plugins or others.
        saved: the checkpoint.
        on_change: what differences between the two runs mean: "error", "warn" or "accept".
        sample: the digest of some of the run's rows.
        verify: encode the run's state after that and compare its digests with the manifest's.

    Raises:
        CheckpointError: the checkpoint belongs to another run, or does not fit this one.
    """
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
    try:
        state = {part: value for part, value in saved.tree.items() if part not in ("random", "groups")}
        _state.tell_fresh(state["plugins"], run)
        state["plugins"] = _state.migrate(state["plugins"], saved.manifest["states"], run)
        run.load_state_dict(state)
        now = run.state_dict()
        for part in ("model", "optimizer"):
            if (place := first_difference(state[part], now[part])) is not None:
                raise ValueError(f"{part}{place} is not what was saved after restoring it")  # noqa: TRY301
        if verify:
            _verify(saved, now, changes)
        restore_random_states(saved.tree["random"], run)  # last: nothing draws after it
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{saved.path}: state.json does not fit this run: {reason}") from error


def _verify(saved: Saved, now: dict[str, Any], changes: list[str]) -> None:
    """Compare the digest of what the run holds with that of the file it came from.

    Raises:
        CheckpointError: a part differs; where the plugins are others, that is no wonder.
    """
    listed = saved.manifest["files"]
    encoded = encode({**now, "groups": saved.tree.get("groups"), "random": saved.tree["random"]}, MODEL_AT)
    for part, tensors in encoded.tensors.items():
        file, digest = f"{part}.safetensors", hashlib.sha256()
        if file not in listed or (part != MODEL and changes):
            continue
        for chunk in to_safetensors(tensors):
            digest.update(chunk)
        if digest.hexdigest() != listed[file]["sha256"]:
            raise CheckpointError(
                f"{saved.path}: {file}: after restoring, the run's state has the sha256 {digest.hexdigest()}; "
                f"expected {listed[file]['sha256']}"
            )
    log.info("checkpoint: the run's state has the digests of %s", saved.path)
