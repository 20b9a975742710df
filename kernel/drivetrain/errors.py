"""Every error drivetrain raises on purpose, in one tree.

DrivetrainError
├── ConfigError          a recipe, an option or an argument is wrong; `.problems` holds all of them
│   ├── RecipeError      ... found while reading a recipe (file and line are in each problem)
│   ├── PlanError        ... found while composing the plugins, before step 0
│   └── MissingDependency  a plugin needs a package that is not installed
├── DataError            a row or a batch is wrong (source, row, field, reason)
├── CheckpointError      a checkpoint is missing, damaged, or belongs to another run
└── TrainingError        training cannot go on (the message says at which step)
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@attrs.frozen
class Problem:
    """One thing that is wrong: what happened, what was received, what to do, and where."""

    what: str
    received: str = ""
    do: str = ""
    where: str = ""
    kind: str = "invalid"

    def __str__(self) -> str:
        """Render the problem on as many lines as it has parts."""
        head = f"{self.where}: {self.what}" if self.where else self.what
        return "\n    ".join([head, *(f"{k}: {v}" for k, v in (("received", self.received), ("do", self.do)) if v)])


class DrivetrainError(Exception):
    """The root of the tree."""


class ConfigError(DrivetrainError):
    """A configuration is wrong; `problems` lists everything found, not only the first."""

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        """Take all problems at once, or one as a plain sentence."""
        self.problems = [Problem(problems)] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        head = "" if count == 1 else f"{count} problems:\n"
        super().__init__(head + "\n".join(f"- {p}" if count > 1 else str(p) for p in self.problems))


class RecipeError(ConfigError):
    """A recipe cannot be read or holds wrong values."""


class PlanError(ConfigError):
    """The plugins cannot be composed into a run."""


class MissingDependency(ConfigError):  # noqa: N818 - names what is missing
    """A plugin needs a package that is not installed; the message has the install line."""


class DataError(DrivetrainError):
    """A row or batch cannot be used."""


class CheckpointError(DrivetrainError):
    """A checkpoint cannot be used."""


class TrainingError(DrivetrainError):
    """Training cannot go on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the closest of `known`, or all of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(names) if names else "there are none"
