"""Schedules inside of a schedule: made from tables, and built for a part of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import Catalogue, ConfigError
from drivetrain.errors import nearest
from drivetrain.options import option_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from drivetrain import Run

    Factor = Callable[[int], float]


def made(where: str, given: Any, keys: Collection[str] = ()) -> Any:
    """Return the schedule plugin that a table describes.

    Args:
        where: whose table it is, for errors.
        given: {"plugin": a name of the catalogue or an instance, and its options}.
        keys: other keys of the table, which are no options.

    Raises:
        ConfigError: it names no schedule, options that it does not have, or one that acts beside its schedule.
    """
    if not isinstance(given, dict) or "plugin" not in given:
        raise ConfigError(f'{where} needs plugin = "...", the name of a schedule. Received: {given!r}')
    options = {key: value for key, value in given.items() if key != "plugin" and key not in keys}
    named = given["plugin"]
    if isinstance(named, str):
        cls = Catalogue().entry(named).load()
        known = option_fields(cls)
        if unknown := [key for key in options if key not in known]:
            hint = nearest(unknown[0], [*known, *keys])
            raise ConfigError(f"{where}: {named!r} has no option {unknown[0]!r}; {hint}. Received: {given}")
        try:
            part = cls(**options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}. Received: {given}") from error
    elif options:
        raise ConfigError(f"{where}: a plugin that is made already takes no options. Received: {sorted(options)}")
    else:
        part = named
    hooks = {name for name in dir(type(part)) if hasattr(getattr(type(part), name), "drivetrain_impl")}
    if "build_schedule" not in hooks:
        raise ConfigError(f"{where} must be a schedule. Received: {type(part).__name__}")
    if more := sorted(hooks - {"build_schedule"}):
        raise ConfigError(
            f"{where}: {type(part).__name__} is no function of the steps alone, as it follows the run itself: use it "
            f"as the schedule of the whole run. Received: a plugin with the hooks {', '.join(more)}"
        )
    return part


class Segment:
    """A run as a part of a schedule sees it: of another length, else the same."""

    def __init__(self, run: Run, total_steps: int) -> None:
        """Stand for `run`."""
        self._run, self.total_steps = run, total_steps

    def __getattr__(self, name: str) -> Any:
        """Return what the run itself has, now."""
        return getattr(self._run, name)


def whole(run: Any) -> Run:
    """Return the run of which `run` may be a part."""
    while isinstance(run, Segment):
        run = run._run  # noqa: SLF001
    found: Run = run
    return found


def built(part: Any, run: Run, total_steps: int) -> list[Factor]:
    """Return the part's factor of each group, as functions of the steps since its beginning."""
    found = part.build_schedule(Segment(run, total_steps))
    groups = len(run.optimizer.param_groups)
    if found is None:
        return [lambda _: 1.0] * groups
    return [found] * groups if callable(found) else list(found)
