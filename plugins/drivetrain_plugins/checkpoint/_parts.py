"""A save of which every rank writes a part: one draft, one commit, one outcome."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain_plugins.checkpoint import _manifest
from drivetrain_plugins.checkpoint._parcel import Parcel, cannot_write, settle, write_files
from drivetrain_plugins.checkpoint._ranks import gather_texts, share_text, together

if TYPE_CHECKING:
    from collections.abc import Iterable

    from drivetrain import Run
    from drivetrain_plugins.checkpoint._retention import Kept, Retention
    from drivetrain_plugins.checkpoint._shelf import Draft


@attrs.define
class SharedDraft:
    """The draft of all ranks; rank 0 began it and commits it."""

    run: Run
    kept: Kept
    parcel: Parcel
    draft: Draft
    files: dict[str, Any] = attrs.field(factory=dict)  # what this rank has written

    @classmethod
    def begin(cls, run: Run, kept: Kept, parcel: Parcel) -> SharedDraft:
        """Begin it on rank 0, and join it on the others. All ranks must call it."""

        def start() -> Draft | None:
            return _guarded(kept, parcel, lambda: kept.shelf.begin(parcel.name)) if run.rank == 0 else None

        first = together(run, start)
        token = share_text(run, first.token if first is not None else "")
        return cls(run, kept, parcel, first if first is not None else kept.shelf.join(parcel.name, token))

    def write(self) -> None:
        """Write this rank's files; no rank waits for another here.

        Raises:
            CheckpointError: a file could not be written.
        """
        self.files = _guarded(self.kept, self.parcel, lambda: write_files(self.draft, self.parcel.contents()))

    def commit(self, retention: Retention, protected: Iterable[str]) -> None:
        """Commit on rank 0 what all ranks have written. All ranks must call it."""
        files = {k: v for text in gather_texts(self.run, json.dumps(self.files)) for k, v in json.loads(text).items()}
        manifest = _manifest.seal({**self.parcel.about, "files": files})

        def finish() -> None:
            if self.run.rank == 0:
                _guarded(self.kept, self.parcel, lambda: self.draft.commit(manifest))
                settle(self.kept, self.parcel.entry(), retention, protected)

        together(self.run, finish)

    def discard(self) -> None:
        """Remove on rank 0 what was written."""
        if self.run.rank == 0:
            self.draft.discard()


def write_shared(run: Run, kept: Kept, parcel: Parcel, retention: Retention, protected: Iterable[str]) -> None:
    """Write the whole checkpoint, each rank its part, then remove those that are not to be kept any more.

    Raises:
        CheckpointError: on all ranks: one could not write; the checkpoints before are as they were.
    """
    draft = SharedDraft.begin(run, kept, parcel)
    try:
        together(run, draft.write)
        draft.commit(retention, protected)
    except BaseException:
        draft.discard()
        raise


def _guarded(kept: Kept, parcel: Parcel, work: Any) -> Any:
    try:
        return work()
    except OSError as error:
        raise cannot_write(kept.shelf, parcel, error) from error
