"""A schedule for each group of the optimizer."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Any

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.schedule._parts import built, made

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run


@plugin(role="schedule", example={"groups": {"*": {"plugin": "linear", "warmup": 1}}})
class GroupSchedules:
    """Follow another schedule in each parameter group, by the group's name, a pattern of names, or its number.

    A name or number goes before patterns, and the first pattern that fits before others; groups that none fits follow
    `default`. Names are those that `parameter-groups` gives; the rate that a factor multiplies is the group's own.
    """

    groups: dict[str, Any] = option(help='by name, pattern or number: {head = {plugin = "linear", warmup = 0.1}}')
    default: dict[str, Any] = option(factory=lambda: {"plugin": "constant"}, help="for all other groups")
    _made: dict[str, Any] = option(factory=dict, init=False)
    _default: Any = option(None, init=False)

    def __attrs_post_init__(self) -> None:
        """Make the schedules, so that what is wrong with one is told before a run.

        Raises:
            ConfigError: one of them is wrong.
        """
        if not self.groups:
            raise ConfigError("group-schedules: there are no groups. Received: {}")
        self._made = {key: made(f"group-schedules: {key!r}", given) for key, given in self.groups.items()}
        self._default = made("group-schedules: the default", self.default)

    @hookimpl
    def build_schedule(self, run: Run) -> list[Callable[[int], float]]:
        """Return the factor of each group as a function of the applied steps.

        Raises:
            ConfigError: no group of the optimizer has such a name.
        """
        names = [str(group.get("name", index)) for index, group in enumerate(run.optimizer.param_groups)]
        keys = [self._key(name, index) for index, name in enumerate(names)]
        if unused := [key for key in self._made if key not in keys]:
            what = f"group-schedules: no group of the optimizer follows {unused[0]!r}"
            do = "name the groups with `parameter-groups`, or use one of these; patterns are tried in their order"
            raise ConfigError([Problem(what, f"groups: {names}", do)])
        schedules = {
            key: built(part, run, run.total_steps) for key, part in [*self._made.items(), (None, self._default)]
        }
        return [schedules[key][index] for index, key in enumerate(keys)]

    def _key(self, name: str, index: int) -> str | None:
        for own in (name, str(index)):
            if own in self._made:
                return own
        return next((key for key in self._made if fnmatch.fnmatchcase(name, key)), None)

    def state_dict(self) -> dict[str, Any]:
        """Return what the schedules keep, by name."""
        return {key: part.state_dict() for key, part in self._made.items() if hasattr(part, "state_dict")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on."""
        for key, kept in state.items():
            self._made[key].load_state_dict(kept)
