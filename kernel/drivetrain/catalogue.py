"""Entry points as a lazy catalogue: installed is not active, and only what a run names is imported."""

from __future__ import annotations

import functools
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

import attrs

from drivetrain.errors import ConfigError, Problem, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

GROUP = "drivetrain.plugins.v1"


@attrs.frozen
class Entry:
    """One name in the catalogue, not imported."""

    name: str
    value: str
    distribution: str
    version: str
    _point: metadata.EntryPoint = attrs.field(repr=False, eq=False)

    def load(self) -> type:
        """Import the module and return the plugin's class.

        Raises:
            ConfigError: it cannot be imported, or is no class.
        """
        try:
            loaded = self._point.load()
        except Exception as error:
            raise ConfigError(
                [
                    Problem(
                        f"plugin {self.name!r} of {self.distribution} {self.version} cannot be imported",
                        f"{self.value}: {type(error).__name__}: {error}",
                        f"reinstall {self.distribution}, or take {self.name!r} out of the run",
                    )
                ]
            ) from error
        if not isinstance(loaded, type):
            raise ConfigError(f"plugin {self.name!r} ({self.value}) is no class. Received: {loaded!r}")
        return loaded


@functools.cache  # reading what every installed distribution says takes longer than assembling a small run
def _installed(find: Callable[..., Any], path: tuple[str, ...]) -> Any:  # noqa: ARG001 - where `find` looks
    return find(group=GROUP)


@functools.cache
def _origin(distribution: metadata.Distribution | None) -> tuple[str, str]:
    return ("?", "?") if distribution is None else (distribution.name, distribution.version)


class Catalogue:
    """Every plugin that installed distributions offer, by name."""

    def __init__(self, points: Iterable[metadata.EntryPoint] | None = None) -> None:
        """Read the installed entry points, or take `points` (for tests)."""
        self._entries: dict[str, list[Entry]] = {}
        for point in _installed(metadata.entry_points, tuple(sys.path)) if points is None else points:
            entry = Entry(point.name, point.value, *_origin(point.dist), point)
            if entry not in self._entries.setdefault(point.name, []):  # the same distribution may be found twice
                self._entries[point.name].append(entry)

    @property
    def names(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._entries)

    def entry(self, name: str) -> Entry:
        """Return the entry called `name` (a label after ":" does not count).

        Raises:
            ConfigError: nobody offers it (the nearest names are given), or two distributions do.
        """
        offers = self._entries.get(name.partition(":")[0])
        if not offers:
            raise ConfigError([Problem(f"there is no plugin {name!r}", do=nearest(name, self.names), kind="unknown")])
        if len(offers) > 1:
            who = " and ".join(f"{e.distribution} {e.version} ({e.value})" for e in offers)
            raise ConfigError([Problem(f"two distributions offer plugin {name!r}", who, "uninstall one of them")])
        return offers[0]

    def entry_of(self, plugin: object) -> Entry | None:
        """Return the entry whose class made `plugin`, if it came from the catalogue."""
        cls: Any = type(plugin)
        value = f"{cls.__module__}:{cls.__qualname__}"
        return next((e for entries in self._entries.values() for e in entries if e.value == value), None)
