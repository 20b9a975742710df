"""What differs between a checkpoint and the run that is to go on from it."""

from __future__ import annotations

import logging
import platform
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import drivetrain
from drivetrain_plugins.checkpoint import _manifest
from drivetrain_plugins.checkpoint._format import encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run

log = logging.getLogger("drivetrain")


def plugin_list(run: Run) -> dict[str, Any]:
    """Return what the manifest says about each plugin of the run, in the run's order."""
    listed = {}
    for name, about in run.plan.plugins.items():
        kept = {key: about[key] for key in ("role", "class", "distribution", "version")}
        effect = getattr(run.plugins[name], "effect", "changes")
        listed[name] = {**kept, "effect": effect, "options": encode(about["options"]).tree}
    return listed


def state_versions(run: Run) -> dict[str, int]:
    """Return the version of each plugin's state: its class attribute `state_version`, or 1."""
    return {n: getattr(p, "state_version", 1) for n, p in run.plugins.items() if hasattr(p, "state_dict")}


def settings(run: Run, sample: str | None) -> dict[str, Any]:
    """Return the settings and facts on which the course of the run depends; `sample` is the digest of some rows."""
    rows = {"rows_per_epoch": run.rows_per_epoch, "rows_sample": sample}
    return {"seed": run.settings.seed, "total_steps": run.total_steps, **rows}


def environment(run: Run) -> dict[str, Any]:
    """Return what the exact bits of a step depend on outside the run."""
    return {
        "drivetrain": drivetrain.__version__,
        "contract": drivetrain.CONTRACT,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": run.device.type,
    }


def differences(manifest: dict[str, Any], run: Run, ties: dict[str, str], sample: str | None) -> list[str]:
    """Return a line for each difference after which the run would not be the one that was saved.

    Plugins that only observe may come, go and change, and so may the options that a plugin names in `free_options`,
    such as how many processes make its batches. Those in `per_rank_options` may change with the number of ranks.
    """
    then, now = _changing(manifest["plugins"]), _changing(plugin_list(run))

    def allowed(name: str, key: str, values: tuple[Any, Any]) -> bool:
        free = key in getattr(run.plugins[name], "free_options", ())
        return free or _same_over_ranks(run, name, key, values, manifest["world_size"])

    lines = _plugin_changes(then, now, allowed)
    old, new = manifest["settings"], settings(run, sample)
    lines += [
        f"~ run: {k} was {old.get(k)!r}, is {new[k]!r}" for k in ("seed", "rows_per_epoch") if old.get(k) != new[k]
    ]
    if old.get("rows_sample") not in (None, new["rows_sample"]) and old.get("rows_per_epoch") == new["rows_per_epoch"]:
        lines.append("~ data: the training rows are as many as before, but not the same")
    return lines + _tie_changes(manifest["aliases"], ties)


def between(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each difference between two manifests: of all plugins, and of everything else they tell.

    Raises:
        ValueError: one of them does not describe its plugins as a save does.
    """
    for manifest in (then, now):
        check_plugins(manifest["plugins"])
    lines = _value_changes("checkpoint", _form(then), _form(now))
    for part in ("position", "metrics"):
        lines += _value_changes(part, then[part], now[part])
    lines += _plugin_changes(then["plugins"], now["plugins"], lambda *_: False)
    for part in ("states", "settings", "environment"):
        lines += _value_changes(part, then[part], now[part])
    return lines + _tie_changes(then["aliases"], now["aliases"])


def check_plugins(plugins: dict[str, Any]) -> None:
    """Refuse a manifest's list of plugins that is not as `plugin_list` makes it.

    Raises:
        ValueError: the plugin and what was found are named.
    """
    keys = {"role", "class", "distribution", "version", "effect", "options"}
    for name, about in plugins.items():
        if not isinstance(about, dict) or about.keys() != keys or not isinstance(about["options"], dict):
            raise ValueError(f"expected {sorted(keys)} of the plugin {name[:80]!r}, found {str(about)[:80]!r}")


def form_of(manifest: dict[str, Any]) -> str:
    """Return "full", or "sharded" with the number of parts."""
    parts = len(_manifest.parts(manifest["files"]))
    return f"sharded ({parts} part{'s'[: parts != 1]})" if parts else "full"


def _form(manifest: dict[str, Any]) -> dict[str, Any]:
    told = {key: manifest[key] for key in ("schema", "step", "kind", "milestone", "world_size")}
    return {**told, "form": form_of(manifest)}


def _plugin_changes(
    then: dict[str, Any], now: dict[str, Any], allowed: Callable[[str, str, tuple[Any, Any]], bool]
) -> list[str]:
    """Return a line for each plugin that came or went, each option that may not differ, and the order."""
    lines = [f"- {name} {_brief(then[name])}" for name in then if name not in now]
    lines += [f"+ {name} {_brief(now[name])}" for name in now if name not in then]
    for name in (n for n in then if n in now):
        lines += _value_changes(name, _flat(then[name]), _flat(now[name]), lambda key, *v, n=name: allowed(n, key, v))
    order = [[n for n in names if n in then and n in now] for names in (then, now)]
    if order[0] != order[1]:
        lines.append(f"~ order: was {', '.join(order[0])}; is {', '.join(order[1])}")
    return lines


def _value_changes(
    what: str, old: dict[str, Any], new: dict[str, Any], allowed: Callable[..., bool] = lambda *_: False
) -> list[str]:
    pairs = ((key, old.get(key, "absent"), new.get(key, "absent")) for key in sorted(old.keys() | new.keys()))
    return [f"~ {what}: {key} was {a!r}, is {b!r}" for key, a, b in pairs if a != b and not allowed(key, a, b)]


def _tie_changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    lines = []
    for name in sorted(old.keys() | new.keys()):
        was, is_now = (f"tied to {t[name]}" if name in t else "not tied" for t in (old, new))
        if was != is_now:
            lines.append(f"~ model: {name} was {was}, is {is_now}")
    return lines


def warn_about_environment(manifest: dict[str, Any], run: Run) -> None:
    """Say that bits may differ, where the machine or the libraries do."""
    then, now = manifest["environment"], environment(run)
    pairs = {k: (then.get(k, now[k]), now[k]) for k in ("contract", "torch", "cpu_capability", "threads", "device")}
    pairs["world size"] = (manifest["world_size"], run.world_size)  # the order of rows is the same, sums are not
    if changed := [f"{k} was {a!r}, is {b!r}" for k, (a, b) in pairs.items() if a != b]:
        log.warning("checkpoint: going on bit for bit is not promised here: %s", ", ".join(changed))


def _same_over_ranks(run: Run, name: str, key: str, values: tuple[Any, Any], ranks_then: int) -> bool:
    """Tell whether an option of each rank, such as a batch size, comes to the same over all ranks."""
    default = getattr(run.plugins[name], "per_rank_options", {}).get(key)
    if default is None or ranks_then == run.world_size:
        return False
    then, now = (default if value is None else value for value in values)
    return bool(then * ranks_then == now * run.world_size)


def _changing(plugins: dict[str, Any]) -> dict[str, Any]:
    return {name: about for name, about in plugins.items() if about["effect"] != "observes"}


def _flat(about: dict[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in about.items() if k != "options"}, **about["options"]}


def _brief(about: dict[str, Any]) -> str:
    source = f"{about['distribution']} {about['version']}" if about["distribution"] else about["class"]
    return f"({source}) " + ", ".join(f"{k}={v!r}" for k, v in about["options"].items())
