"""The plugin `async-checkpoint`: checkpoints that are written while the training goes on."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import CheckpointError, ConfigError, Run, Step, hookimpl, option, plugin
from drivetrain_plugins.checkpoint._flight import Flight, ForkFlight, ThreadFlight
from drivetrain_plugins.checkpoint._local import LocalShelf
from drivetrain_plugins.checkpoint._parcel import Parcel, write
from drivetrain_plugins.checkpoint._parts import SharedDraft
from drivetrain_plugins.checkpoint._ranks import gather_texts, share_text, together
from drivetrain_plugins.checkpoint.checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from drivetrain_plugins.checkpoint._retention import Kept

log = logging.getLogger("drivetrain")
_RUNNING, _WELL = "", "well"


@attrs.frozen
class _Under:
    """A save that is under way: what every rank knows of it, and what writes it on the rank that does."""

    kept: Kept
    parcel: Parcel
    flight: Flight | None
    last: bool  # of the run: not to be gone without
    draft: SharedDraft | None = None  # where every rank writes a part


@plugin(role="checkpoint", effect="observes", provides=["checkpoint"], example={"every": "2 steps"})
class AsyncCheckpoint(Checkpoint):
    """Save as `checkpoint` does, while the training goes on; what is written is the state at the call, bit for bit.

    "fork" writes in a child process that sees memory as it was: the run stands still for the fork alone, and memory
    that the next steps change is copied as they change it. It needs a model on the CPU and a local folder. "thread"
    copies the state into memory that is used again at each save, and writes in a thread. One save is under way at a
    time: the next one waits for it, and so does the end of the run. A save that fails is told at the next step.
    """

    how: str = option("auto", choices=["auto", "thread", "fork"], help='what writes; "auto": fork where it can')
    _under: _Under | None = attrs.field(init=False, default=None)
    _copies: dict[tuple[str, str], torch.Tensor] = attrs.field(init=False, factory=dict)  # the snapshot's memory

    @hookimpl
    def step_end(self, step: Step) -> None:
        """Look whether the save under way has ended, then ask for one when it is due."""
        if self._under is not None:
            self._land(step.run, wait=False)
        super().step_end(step)

    @hookimpl(wrapper=True)
    def epoch(self, run: Run) -> Generator[None, Any, Any]:
        """Wait for the last save where the run ends: while signals are still heard, and before anything is exported."""
        result = yield
        if run.finished:
            self._land(run, wait=True)
        return result

    @hookimpl
    def load(self, run: Run, path: Path | str | None) -> Path | str | None:
        """Wait for the save under way, then restore.

        Raises:
            CheckpointError: as for `checkpoint`.
        """
        self._land(run, wait=True)
        return super().load(run, path)

    def _prepare(self, run: Run) -> None:
        super()._prepare(run)
        if self.how == "fork" and (reason := _no_fork(run.device, self._shelf(run))):
            raise ConfigError(f"async-checkpoint cannot fork: {reason}. Take how = 'thread', or 'auto'")

    def _deliver(self, run: Run, kept: Kept, parcel: Parcel) -> None:
        """Start to write."""
        self._land(run, wait=True)
        last = self._is_last(run)
        if parcel.shared:
            parcel = self._snapshot(parcel)
            draft = SharedDraft.begin(run, kept, parcel)
            self._under = _Under(kept, parcel, ThreadFlight(draft.write), last, draft)
            return
        flight = together(run, lambda: self._start(run, kept, parcel) if run.rank == 0 else None)
        self._under = _Under(kept, parcel, flight, last)

    def _start(self, run: Run, kept: Kept, parcel: Parcel) -> Flight:
        retention, protected = self._retention(run, kept), self._protected(kept)
        if self._forks(run, kept, parcel):
            contents = {file: list(chunks) for file, chunks in parcel.contents().items()}  # views, made by torch
            return ForkFlight(partial(write, kept, parcel, retention, protected, contents))
        return ThreadFlight(partial(write, kept, self._snapshot(parcel), retention, protected))

    def _forks(self, run: Run, kept: Kept, parcel: Parcel) -> bool:
        if self.how == "thread" or _no_fork(run.device, kept):
            return False
        tensors = [t for group in parcel.tensors.values() for t in group.values()]
        return not any(_moves(t) for t in tensors)

    def _snapshot(self, parcel: Parcel) -> Parcel:
        """Copy the tensors into memory that is kept for it."""
        before, self._copies = self._copies, {}
        copied: dict[str, dict[str, torch.Tensor]] = {file: {} for file in parcel.tensors}
        for file, tensors in parcel.tensors.items():
            for key, tensor in tensors.items():
                copy = before.get((file, key))
                if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
                copied[file][key] = self._copies[file, key] = copy.copy_(tensor)
        return attrs.evolve(parcel, tensors=copied)

    def _land(self, run: Run, *, wait: bool) -> None:
        """Take the outcome of the save under way, on all ranks alike, where there is one.

        Raises:
            CheckpointError: it failed, and the run is not to go on without it.
        """
        if self._under is None:
            return
        under, told = self._under, _RUNNING
        if under.flight is not None and (outcome := under.flight.poll(wait=wait)) is not None:
            told = _WELL if outcome.error is None else f"-{outcome.error}"
        texts = gather_texts(run, told) if under.draft is not None else [share_text(run, told)]
        if _RUNNING in texts:
            return
        self._under = None
        try:
            if failed := next((text for text in texts if text != _WELL), None):
                raise CheckpointError(failed[1:])  # noqa: TRY301 - as a save that fails at once
            if under.draft is not None:
                under.draft.commit(self._retention(run, under.kept), self._protected(under.kept))
        except CheckpointError as error:
            if under.draft is not None:
                under.draft.discard()
            self._bear(error, last=under.last)
            return
        if run.rank == 0:
            under.kept.add(under.parcel.entry())
        self._done(run, under.kept, under.parcel.name)

    def _abandon(self) -> None:
        """Let a save under way end when the run ends with an error: no rank waits for another here."""
        under, self._under = self._under, None
        if under is not None and under.flight is not None:
            outcome = under.flight.poll(wait=True)
            if under.draft is not None:
                under.draft.discard()  # the other ranks may not be there any more
            if outcome is not None and outcome.error is not None:
                log.warning("checkpoint: %s", outcome.error)


def _moves(tensor: torch.Tensor) -> bool:
    """Tell whether a child would see the tensor change, or not at all."""
    return tensor.device.type != "cpu" or bool(tensor.is_shared())  # type: ignore[no-untyped-call]


def _no_fork(device: torch.device, kept: Kept) -> str:
    """Return why a forked child cannot write, or nothing."""
    if not hasattr(os, "fork"):
        return "this system has no fork()"
    if device.type != "cpu":
        return f"the model is on {device.type}, whose memory a child does not have"
    if not isinstance(kept.shelf, LocalShelf):
        return "connections to a store do not survive a fork"
    return ""
