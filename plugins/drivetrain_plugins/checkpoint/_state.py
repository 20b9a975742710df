"""The state of a run that a checkpoint holds, and putting it back into a run that may differ from the one before."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

from drivetrain import CheckpointError

if TYPE_CHECKING:
    from drivetrain import Run

log = logging.getLogger("drivetrain")
_OURS = ("params", "param_names")  # of an optimizer's group: what is no setting
_PLAIN = (bool, int, float, str, type(None), tuple, list)


def built_settings(run: Run) -> list[dict[str, Any]]:
    """Return the settings of each group of the optimizer as the plugins built it, before anything was loaded."""
    groups = run.optimizer.param_groups
    return [{k: copy.copy(v) for k, v in g.items() if k not in _OURS and isinstance(v, _PLAIN)} for g in groups]


def migrate(states: dict[str, Any], versions: dict[str, int], run: Run) -> dict[str, Any]:
    """Return the plugins' states, those of earlier versions changed by their plugin's `migrate_state(state, version)`.

    Raises:
        CheckpointError: a plugin cannot read a state of that version.
    """
    migrated = {}
    for name, state in states.items():
        then, plugin = versions.get(name, 1), run.plugins.get(name)
        now = getattr(plugin, "state_version", 1)
        if plugin is None or then == now:
            migrated[name] = state
        elif then > now:
            raise CheckpointError(
                f"the state of plugin {name!r} has version {then}, the plugin that is installed reads up to {now}: "
                "install the version that wrote it"
            )
        elif not hasattr(plugin, "migrate_state"):
            raise CheckpointError(
                f"the state of plugin {name!r} has version {then}, the plugin has {now} and no migrate_state(): "
                "install the version that wrote it"
            )
        else:
            migrated[name] = plugin.migrate_state(state, then)
            log.warning("checkpoint: the state of plugin %r was migrated from version %d to %d", name, then, now)
    return migrated


def tell_fresh(states: dict[str, Any], run: Run) -> None:
    """Say which plugins have a state of their own but none in the checkpoint, and whose state nobody takes."""
    changing = [n for n, p in run.plugins.items() if getattr(p, "effect", "changes") != "observes"]
    if fresh := [n for n in changing if n not in states and hasattr(run.plugins[n], "state_dict")]:
        log.warning("checkpoint: without a saved state, starting fresh: %s", ", ".join(fresh))
    if left := [n for n in states if n not in run.plugins and states[n]]:
        log.warning("checkpoint: left out, as this run does not have the plugins: the state of %s", ", ".join(left))


def keep_new_settings(run: Run, then: list[dict[str, Any]] | None, now: list[dict[str, Any]]) -> None:
    """Give the optimizer's groups those settings that are asked for now and were not then; loading took the old."""
    groups = run.optimizer.param_groups
    if then is None or not len(then) == len(now) == len(groups):
        return
    told = set()
    for group, before, after in zip(groups, then, now, strict=True):
        for key, value in after.items():
            if key in before and before[key] != value:
                group[key] = copy.copy(value)
                told.add(f"{key} = {value!r} (was {before[key]!r})")
    if told:
        log.warning("checkpoint: the optimizer takes the settings of this run: %s", ", ".join(sorted(told)))
