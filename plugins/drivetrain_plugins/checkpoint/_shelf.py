"""Where a run's checkpoints stand: each has a name, and is complete or absent for a reader at every instant.

A save begins a draft, writes files into it, and commits it with its manifest; the files are on the disk (or in the
store) before the manifest is, and nobody sees a draft that is not committed. Names are "step-00000500"; other folders
that someone gave a name of their own (a copy, a converted one) can be read too.

Every method raises OSError where the file system or the store fails, FileNotFoundError where a thing is missing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

STEP_NAME = re.compile(r"step-([0-9]{8,15})")


def step_of(name: str) -> int | None:
    """Return the step that a checkpoint is named for."""
    match = STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


class Draft(Protocol):
    """A checkpoint that is being written."""

    token: str  # what another process needs to write into the same draft: `shelf.join(name, token)`

    def write(self, file: str, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
        """Write the new file `file` and return {"size": bytes, "sha256": hex digest}; then it is synced."""

    def commit(self, manifest: bytes) -> None:
        """Write the manifest and make the checkpoint visible in one step, in place of an older one of this name.

        Raises:
            FileExistsError: somebody else committed a checkpoint of this name since the draft was begun.
        """

    def discard(self) -> None:
        """Remove what was written, as far as possible; never raises."""


class Shelf(Protocol):
    """Where a run's checkpoints stand."""

    def where(self, name: str) -> Path | str:
        """Return the path or the URL of a checkpoint."""

    def prepare(self) -> None:
        """Find out whether a save can work, with a probe, and clear what saves left unfinished."""

    def names(self) -> list[str]:
        """Return the names that stand for steps and that a reader should look at, sorted; damaged ones included."""

    def begin(self, name: str) -> Draft:
        """Begin to write the checkpoint `name`."""

    def join(self, name: str, token: str) -> Draft:
        """Return another process's draft, to write files into it; only who began it commits it."""

    def files(self, name: str) -> list[str]:
        """Return the names of the files that the checkpoint `name` holds, the manifest included, sorted."""

    def read(self, name: str, file: str, *, limit: int, size: int | None = None) -> bytearray:
        """Return the bytes of a file of a checkpoint, which is `size` bytes long, or of any size up to `limit`.

        Raises:
            ValueError: it is of another size, or no plain file.
        """

    def remove(self, name: str) -> None:
        """Remove a checkpoint, so that no reader ever sees a part of it."""

    def free_bytes(self) -> int | None:
        """Return how much can be written, or None where nobody knows."""
