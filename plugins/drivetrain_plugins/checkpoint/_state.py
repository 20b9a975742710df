"""The state of a run that a checkpoint holds, and putting it back into a run that may differ from the one before."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import CheckpointError
from drivetrain.state import Progress

if TYPE_CHECKING:
    from drivetrain import Run

log = logging.getLogger("drivetrain")
_OURS = ("params", "param_names")  # of an optimizer's group: what is no setting
_PLAIN = (bool, int, float, str, type(None), tuple, list)


def built_settings(run: Run) -> list[dict[str, Any]]:
    """Return the settings of each group of the optimizer as the plugins built it, before anything was loaded."""
    groups = run.optimizer.param_groups
    return [{k: copy.copy(v) for k, v in g.items() if k not in _OURS and isinstance(v, _PLAIN)} for g in groups]


def check(tree: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Refuse a state in which a part is missing that nothing else would miss.

    Raises:
        ValueError: counters, generators or groups are not as a save writes them.
    """
    if missing := [f.name for f in attrs.fields(Progress) if f.default == 0 and f.name not in tree["progress"]]:
        raise ValueError(f"expected all counters, found none for {missing}")
    random, ranks = tree["random"], manifest["world_size"]
    if isinstance(random, list) and len(random) != ranks:  # schema 1: those of rank 0
        raise ValueError(f"expected the generators' states of {ranks} ranks, found {len(random)}")
    groups = tree.get("groups")
    if groups is not None and not (type(groups) is list and all(type(g) is dict for g in groups)):
        raise ValueError(f"expected the settings of the optimizer's groups, found {str(groups)[:80]}")


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


def regroup(run: Run, saved: dict[str, Any], built: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Return the optimizer's saved state with its parameters in the groups that this run puts them in.

    A weight decay where there was none makes two groups of one. The settings are then those of this run; what the
    optimizer itself has changed in a group since it was built stays.

    Args:
        run: before anything is loaded.
        saved: the optimizer's state as it was saved.
        built: the settings of the saved groups as the plugins had built them.
    """
    then, now = saved["param_groups"], run.optimizer.state_dict()["param_groups"]
    names = [[group.get("param_names") for group in groups] for groups in (then, now)]
    flat = [sorted(name for own in groups for name in own or ()) for groups in names]
    if names[0] == names[1] or flat[0] != flat[1] or not flat[0] or built is None:
        return saved
    number = {name: n for group in then for name, n in zip(group["param_names"], group["params"], strict=True)}
    home = {name: index for index, own in enumerate(names[0]) for name in own}
    groups, state = [], {}
    for group in now:
        index = home[group["param_names"][0]]
        moved = {k: v for k, v in then[index].items() if k not in _OURS and k in built[index] and built[index][k] != v}
        own = {k: v for k, v in then[index].items() if k not in _OURS and k not in group}
        groups.append({**group, **own, **{k: v for k, v in moved.items() if k not in ("lr", "initial_lr")}})
        for name, n in zip(group["param_names"], group["params"], strict=True):
            if (entry := saved["state"].get(str(number[name]))) is not None:
                state[str(n)] = entry
    log.warning("checkpoint: the optimizer has other groups than before; it takes their settings of this run")
    return {"state": state, "param_groups": groups}


def fit_moments(run: Run, saved: dict[str, Any]) -> None:
    """Lay the optimizer's tensors out as it makes them, and refuse those it would read past the end.

    A file holds elements in the order of their indices, and fused kernels go through memory: they would pair a
    channels-last parameter with other elements of its moments, and check no sizes.

    Args:
        run: with the state loaded.
        saved: the optimizer's state as it was saved.

    Raises:
        ValueError: there is a state of a parameter that is not there, or of another size.
    """
    groups, state = run.optimizer.param_groups, run.optimizer.state
    number = sum(len(group["params"]) for group in groups)
    if strange := [key for key in saved["state"] if not 0 <= int(key) < number]:
        raise ValueError(f"expected the state of {number} parameters of the optimizer, found one of {strange[:4]}")
    for group in groups:
        for parameter in group["params"]:
            entry = state.get(parameter, {})
            for key, value in entry.items():
                if not isinstance(value, torch.Tensor):
                    continue
                if value.shape == parameter.shape:
                    entry[key] = _laid_out_as(parameter, value)
                elif group.get("fused") and not (key == "step" and value.numel() == 1):
                    raise ValueError(
                        f"expected {key!r} of the optimizer's state to have its parameter's shape "
                        f"{tuple(parameter.shape)}, found {tuple(value.shape)}"
                    )


def _laid_out_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if parameter.is_contiguous() and value.is_contiguous():
        return value
    like = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
    return value if like.stride() == value.stride() else like.copy_(value)


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
