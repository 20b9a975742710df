"""The plugin `checkpoint`: exact, atomic checkpoints of a run, and going on from them."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

from drivetrain import CheckpointError, ConfigError, Run, Step, Trigger, hookimpl, option, plugin
from drivetrain.state import SAVE, STOP
from drivetrain_plugins.checkpoint import _compare, _folder
from drivetrain_plugins.checkpoint._format import encode, first_difference
from drivetrain_plugins.checkpoint._ranks import share_text, together
from drivetrain_plugins.checkpoint._sample import sample_of
from drivetrain_plugins.checkpoint._store import LocalStore

if TYPE_CHECKING:
    from collections.abc import Generator

log = logging.getLogger("drivetrain")
MODEL_AT = ("model",)  # where the tree holds what goes to model.safetensors


def _whole(value: Any) -> Any:
    if isinstance(value, float):
        raise ValueError(f"keep is a number of checkpoints, which must be whole. Received: {value!r}")  # noqa: TRY004
    return value


@plugin(role="checkpoint", effect="observes", example={"every": "2 steps"})
class Checkpoint:
    """Save the whole run, and go on from it bit for bit; a checkpoint is complete or absent.

    Each is a folder of safetensors and JSON, `OUTPUT/checkpoints/step-00000500`; nothing in it is pickled. Resuming
    takes the newest one of which every byte is as it was written, and says which it passed over and why. A run that
    starts from the beginning refuses a folder that holds checkpoints.
    """

    every: Trigger = option("500 steps", converter=Trigger.parse, help="how often to save")
    keep: int = option(
        3, ge=1, converter=_whole, help="how many of the newest to keep; the one resumed from stays as well"
    )
    at_end: bool = option(True, help="save when the run ends or is stopped, too")
    on_change: str = option(
        "error", choices=["error", "warn", "accept"], help="when plugins, seed, data or ranks differ at resume"
    )
    _store: LocalStore = attrs.field(init=False, factory=LocalStore)
    _source: Path | None = attrs.field(init=False, default=None)  # what this run went on from
    _sample: tuple[str | None, ...] = attrs.field(init=False, default=())  # the digest of some rows, once it is made

    @hookimpl
    def assembled(self, run: Run) -> None:  # noqa: ARG002 - the hook's argument
        """Forget the run before."""
        self._source, self._sample = None, ()

    @hookimpl(wrapper=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Find out before step 0 whether saving can work, and clear what an earlier process left unfinished."""
        if run.settings.output is None:
            raise ConfigError("saving needs the run's folder: Trainer(..., output=...) or [run] output = ...")
        together(run, lambda: self._prepare(run) if run.rank == 0 else None)
        self.every.start(run)
        return (yield)

    @hookimpl
    def step_end(self, step: Step) -> None:
        """Ask for a save when it is due, and after the last step."""
        run = step.run
        if self.every.due(run):
            run.request_save(f"every {self.every}")
        elif self.at_end and run.finished:
            run.request_save("the run ends")

    @hookimpl(wrapper=True)
    def agree(self, run: Run, votes: int) -> Generator[None, int, int]:  # noqa: ARG002 - the hook's arguments
        """Save before a stop that all ranks have agreed on."""
        agreed = yield
        return agreed | SAVE if self.at_end and agreed & STOP else agreed

    @hookimpl
    def save(self, run: Run, path: Path) -> None:
        """Write the checkpoint `path`, then remove old ones, then tell `saved`.

        Raises:
            CheckpointError: it could not be written (on all ranks); the ones before are as they were.
        """
        path = Path(path)
        together(run, lambda: self._save(run, path) if run.rank == 0 else None)
        run.hooks.saved(run, path)

    @hookimpl
    def load(self, run: Run, path: Path | None) -> Path | None:
        """Restore `path`, or the newest valid checkpoint of the run; return its path, or None if there is none.

        Raises:
            CheckpointError: `path` is not valid, none of several is, or it belongs to another run.
        """
        saved = together(run, lambda: self._find(run, path) if run.rank == 0 else None)
        chosen = share_text(run, str(saved.path) if saved else "")
        if not chosen:
            return None
        saved = together(run, lambda: saved or _folder.read(self._store, Path(chosen)))
        together(run, lambda: self._restore(run, saved))
        self._source = saved.path
        return saved.path

    def _rows_sample(self, run: Run) -> str | None:
        if not self._sample:
            self._sample = (sample_of(run),)
        return self._sample[0]

    # --- the parts -----------------------------------------------------------------------------------------------

    def _prepare(self, run: Run) -> None:
        parent, store = _checkpoints(run), self._store
        try:
            store.make_folders(parent)
            probe = _folder.scratch(parent, "tmp", 0)
            store.make_folder(probe)
            store.remove_folder(probe)
            _folder.sweep(store, parent)
            store.sync_folder(parent.parent)
            names = [n for n in store.listdir(parent) if _folder.step_of(n) is not None]
        except OSError as error:
            raise CheckpointError(f"{parent} cannot be written to: {error.strerror or error}") from error
        if names and self._source is None:
            raise CheckpointError(
                f"this run starts from the beginning, but {parent} holds checkpoints of another. "
                f"Received: {', '.join(names[-3:])}. Resume that run, choose another output folder, or remove them"
            )

    def _save(self, run: Run, path: Path) -> None:
        state = {**run.state_dict(), "random": random_state(run.device)}
        encoded = encode(state, MODEL_AT)
        about = {
            "step": run.progress.step,
            "position": state["progress"],
            "aliases": encoded.aliases,
            "plugins": _compare.plugin_list(run),
            "settings": _compare.settings(run, self._rows_sample(run)),
            "world_size": run.world_size,
            "environment": _compare.environment(run),
        }
        _folder.write(self._store, path, encoded, about)
        if run.settings.output is not None and path.parent == _checkpoints(run):
            _folder.rotate(self._store, path, self.keep, self._source)

    def _find(self, run: Run, path: Path | None) -> _folder.Saved | None:
        if path is not None:
            return _folder.read(self._store, Path(path).absolute())
        if run.settings.output is None:
            raise CheckpointError("resuming needs the run's folder (output), or the path of a checkpoint")
        passed_over = "checkpoint: passed over: %s"
        return _folder.newest(self._store, _checkpoints(run), lambda reason: log.warning(passed_over, reason))

    def _restore(self, run: Run, saved: _folder.Saved) -> None:
        ties = encode({"model": run.state_dict()["model"]}, MODEL_AT).aliases
        changes = _compare.differences(saved.manifest, run, ties, self._rows_sample(run))
        if changes and self.on_change != "accept":
            diff = f"{saved.path} belongs to a run that differs from this one:\n    " + "\n    ".join(changes)
            if self.on_change == "error":
                raise CheckpointError(f"{diff}\nMake the run as it was, or allow it: checkpoint.on_change = 'warn'")
            log.warning("checkpoint: %s", diff)
        _compare.warn_about_environment(saved.manifest, run)
        try:
            state = {part: value for part, value in saved.tree.items() if part != "random"}
            run.load_state_dict(state)
            now = run.state_dict()
            for part in ("model", "optimizer"):
                if (place := first_difference(state[part], now[part])) is not None:
                    raise ValueError(f"{part}{place} is not what was saved after restoring it")  # noqa: TRY301
            restore_random_state(saved.tree["random"], run.device)  # last: nothing draws after it
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{saved.path}: state.json does not fit this run: {reason}") from error


def _checkpoints(run: Run) -> Path:
    return Path(run.settings.output or "").absolute() / "checkpoints"


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every global generator."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one
    state = {
        "python": random.getstate(),
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002 - the global one
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
