"""The plugin `save-on-error`: what was trained since the last save is not lost when a run fails."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from drivetrain import CheckpointError, hookimpl, option, plugin
from drivetrain.loop import checkpoint_path

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from drivetrain import Run, Step

log = logging.getLogger("drivetrain")


@plugin(role="checkpoint", effect="observes", requires=["checkpoint"])
class SaveOnError:
    """Save when a run fails between two steps: at its data, in an evaluation, by Ctrl-C while it waits for a batch.

    There the state is exactly that of a step boundary, and the checkpoint is one like any other: a run that goes on
    from it ends as if nothing had happened. An evaluation that failed is not made again by it. A failure inside a step
    leaves weights or plugins half changed, so then nothing is saved, nor when the save itself failed, nor with several
    ranks, of which none may save alone. The log says what was done, why, and which checkpoint is the newest. The error
    that ended the run is raised whatever becomes of the save.
    """

    _at_boundary: bool = option(False, init=False)  # no step has begun since every `step_end` was over
    _saving: bool = option(False, init=False)
    _held: int = option(0, init=False)  # the step whose state a save has got, or that the run started from
    _newest: Path | str | None = option(None, init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:  # noqa: ARG002 - the hook's argument
        """Forget the run before."""
        self._at_boundary = self._saving = False
        self._newest = None

    @hookimpl(wrapper=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Note where the run starts: that state is on the disk, or is no step's."""
        self._held = run.progress.step
        return (yield)

    @hookimpl(wrapper=True, tryfirst=True)  # the outermost: whoever else fails around it fails at the boundary
    def plan_step(self) -> Generator[None, Step | None, Step | None]:
        """See the boundary: before the next step's batches have come, everyone has heard the end of the last one."""
        self._at_boundary = True
        step = yield
        self._at_boundary = step is None
        return step

    @hookimpl(wrapper=True, tryfirst=True)
    def agree(self) -> Generator[None, int, int]:
        """See the boundary: evaluations and saves follow, and no step until the next `plan_step`."""
        self._at_boundary = True
        return (yield)

    @hookimpl(wrapper=True)
    def save(self, run: Run) -> Generator[None, Any, Any]:
        """Note what has been saved."""
        self._saving = True
        result = yield
        self._saving, self._held = False, run.progress.step
        return result

    @hookimpl
    def saved(self, path: Path) -> None:
        """Note which checkpoint is the newest."""
        self._newest = path

    @hookimpl
    def loaded(self, path: Path) -> None:
        """Note which checkpoint is the newest."""
        self._newest = path

    @hookimpl
    def failed(self, run: Run, error: BaseException) -> None:
        """Save, if the state is that of a step boundary and not saved yet."""
        step, known = run.progress.step, self._newest
        newest = f"the newest checkpoint is {known}" if known is not None else "there is no checkpoint of this run"
        if reason := self._reason_not_to(run, error):
            log.warning("save-on-error: nothing is saved at step %d: %s; %s", step, reason, newest)
            return
        try:
            path = checkpoint_path(run)
            run.hooks.save(run, path)
        except BaseException as second:  # noqa: BLE001 - the error that ended the run must be the one that is raised
            failure = f"the state of step {step} could not be saved: {type(second).__name__}: {second}; {newest}"
            log.error("save-on-error: %s", failure)  # noqa: TRY400 - the traceback that counts is the first error's
            error.add_note(f"save-on-error: {failure}")
            return
        complete = str(self._newest).endswith(path.name)  # an asynchronous save is complete when the run has ended
        done = f"is saved as {self._newest}" if complete else "has been handed over to be saved"
        log.warning("save-on-error: the run fails with %s; the state of step %d %s", type(error).__name__, step, done)

    def _reason_not_to(self, run: Run, error: BaseException) -> str:
        if not self._at_boundary:
            return "the failure came inside a step, whose changes are half done"
        if self._saving or isinstance(error, CheckpointError):
            return "it was the save that failed"
        if run.progress.step == self._held:
            return "its state has been saved, or is the one that the run started with"
        if run.world_size > 1:
            return f"one of {run.world_size} ranks cannot save by itself"
        return ""
