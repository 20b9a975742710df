"""From a run to what a save writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain_plugins.checkpoint import _compare, _manifest
from drivetrain_plugins.checkpoint._format import MODEL, STATE, encode
from drivetrain_plugins.checkpoint._parcel import Parcel
from drivetrain_plugins.checkpoint._random import random_states

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run

MODEL_AT = ("model",)  # where the tree holds what goes to model.safetensors


def collect(
    run: Run, name: str, notes: dict[str, Any], built: list[dict[str, Any]], sample: Callable[[], str | None]
) -> Parcel:
    """Return what this rank writes of the run's state as it is now; nothing is copied. All ranks must call it.

    Args:
        run: stands at a step boundary.
        name: the checkpoint's.
        notes: `kind`, `metrics` and `milestone` of the manifest.
        built: the settings of the optimizer's groups as the plugins built them.
        sample: returns the digest of some rows.
    """
    random = random_states(run)
    if run.rank != 0:
        return Parcel(name, {}, {}, {})
    state = run.state_dict()
    if notes["kind"] == _manifest.WEIGHTS:
        state = {part: state[part] for part in ("model", "progress")}
    else:
        state |= {"groups": built, "random": random}
    encoded = encode(state, MODEL_AT)
    about = {
        **notes,
        "metrics": encode(notes["metrics"]).tree,
        "step": run.progress.step,
        "position": state["progress"],
        "aliases": encoded.aliases,
        "plugins": _compare.plugin_list(run),
        "states": _compare.state_versions(run),
        "settings": _compare.settings(run, sample()),
        "world_size": run.world_size,
        "environment": _compare.environment(run),
    }
    tensors = {f"{part}.safetensors": encoded.tensors[part] for part in (MODEL, STATE)}
    return Parcel(name, about, tensors, {"state.json": _manifest.dump_json(encoded.tree)})
