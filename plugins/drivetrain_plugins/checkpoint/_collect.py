"""From a run to what a save writes."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import torch

from drivetrain_plugins.checkpoint import _compare, _manifest
from drivetrain_plugins.checkpoint._format import MAX_DEPTH, MODEL, STATE, Encoded, encode, local_part
from drivetrain_plugins.checkpoint._parcel import Parcel
from drivetrain_plugins.checkpoint._random import random_states
from drivetrain_plugins.checkpoint._ranks import gather_texts, share_text, together

if TYPE_CHECKING:
    from collections.abc import Callable

    from drivetrain import Run
    from drivetrain_plugins.checkpoint._saved import Layout
    from drivetrain_plugins.checkpoint._shards import ShardPlan

_MOMENT = re.compile(r"state/optimizer\.state\.(\d+)\..+")
MODEL_AT = ("model",)  # where the tree holds what goes to model.safetensors


def collect(  # noqa: PLR0917 - what is saved, in the order of the docstring
    run: Run,
    name: str,
    notes: dict[str, Any],
    built: list[dict[str, Any]],
    sample: Callable[[], str | None],
    form: str = "auto",
) -> Parcel:
    """Return what this rank writes of the run's state as it is now; nothing is copied. All ranks must call it.

    Args:
        run: stands at a step boundary.
        name: the checkpoint's.
        notes: `kind`, `metrics` and `milestone` of the manifest.
        built: the settings of the optimizer's groups as the plugins built them.
        sample: returns the digest of some rows.
        form: "full": rank 0 writes it all; "sharded": each rank its part; "auto": that, if the state has DTensors.
    """
    random, state = random_states(run), run.state_dict()
    if notes["kind"] == _manifest.WEIGHTS:
        state = {part: state[part] for part in ("model", "progress")}
    else:
        state |= {"groups": built, "random": random}
    sharded = form == "sharded" or (form == "auto" and any_shards(state))
    if not sharded:
        state = gather_shards(run, state)
    if run.rank and not sharded:
        return Parcel(name, {}, {}, {})
    encoded = together(run, lambda: encode(state, MODEL_AT)) if sharded else encode(state, MODEL_AT)
    about = {
        **notes,
        "metrics": encode(notes["metrics"]).tree,
        "step": run.progress.step,
        "position": state["progress"],
        "aliases": ties_of(run) if sharded else encoded.aliases,
        "plugins": _compare.plugin_list(run),
        "states": _compare.state_versions(run),
        "settings": _compare.settings(run, sample() if run.rank == 0 else None),
        "world_size": run.world_size,
        "environment": _compare.environment(run),
    }
    tree = {"state.json": _manifest.dump_json(encoded.tree)} if run.rank == 0 else {}
    if sharded:
        plan = _plan(run, encoded)
        index = {_manifest.INDEX: _manifest.dump_json(plan.index)} if run.rank == 0 else {}
        return Parcel(name, about, {plan.file: plan.tensors}, {**index, **tree}, shared=True)
    tensors = {f"{part}.safetensors": encoded.tensors[part] for part in (MODEL, STATE)}
    return Parcel(name, about, tensors, tree)


def _plan(run: Run, encoded: Encoded) -> ShardPlan:
    """Divide the state over the ranks; a tied weight of which a rank holds nothing looks untied there."""
    from drivetrain_plugins.checkpoint._shards import plan_shards  # noqa: PLC0415 - loads torch's DCP

    flat = {f"{part}/{key}": tensor for part, tensors in encoded.tensors.items() for key, tensor in tensors.items()}
    names = json.loads(share_text(run, json.dumps(list(flat))))
    mine = {name: flat[name] for name in names if name in flat}
    return plan_shards(mine, run.rank, run.world_size, lambda text: gather_texts(run, text))


def ties_of(run: Run) -> dict[str, str]:
    """Return the model's tied weights: each name but the first of a tensor, with the first."""
    state = run.state_dict()  # first: FSDP2 shards again what a forward has left whole
    if not any_shards(list(run.model.parameters())):
        return encode({"model": state["model"]}, MODEL_AT).aliases
    first: dict[int, str] = {}  # of a shard, a rank may hold nothing that could tell
    named = list(run.model.named_parameters(remove_duplicate=False))
    return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}


def layout_of(run: Run) -> Layout | None:
    """Return how the run's tensors lie over its ranks, by reference; None where each rank has the whole of all."""
    encoded = encode(run.state_dict(), MODEL_AT)
    now = {f"{part}/{key}": t for part, tensors in encoded.tensors.items() for key, t in tensors.items()}
    if not any_shards(now):
        return None
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]

    def layout(reference: str, shape: tuple[int, ...], _dtype: torch.dtype) -> torch.Tensor | None:
        like, match = now.get(reference), _MOMENT.fullmatch(reference)
        if like is None and match and int(match[1]) < len(parameters):  # before the first step there is no such state
            like = parameters[int(match[1])]
        sharded = like is not None and local_part(like) is not like and tuple(like.shape) == shape
        return like if sharded else None

    return layout


def any_shards(value: Any, depth: int = 0) -> bool:
    """Tell whether a state holds a DTensor; not where it is too deep to be saved, which `encode` will say."""
    if isinstance(value, torch.Tensor):
        return local_part(value) is not value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return depth <= MAX_DEPTH and any(any_shards(part, depth + 1) for part in inside)


def gather_shards(run: Run, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state with each DTensor whole, on the CPU of rank 0. All ranks must call it."""
    if not any_shards(state):
        return state
    names: dict[int, str] = {}  # tied weights are gathered once, on all ranks alike
    for name, parameter in run.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    same = {name: names[id(p)] for name, p in run.model.named_parameters(remove_duplicate=False)}
    whole = {name: _whole(run, tensor) for name, tensor in state["model"].items() if same.get(name, name) == name}
    model = {name: whole[same.get(name, name)] for name in state["model"]}
    return {"model": model, **{part: _whole(run, value) for part, value in state.items() if part != "model"}}


def _whole(run: Run, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if local_part(value) is value:
            return value
        full: torch.Tensor = value.full_tensor()  # type: ignore[attr-defined]
        return full.to("cpu") if run.rank == 0 else None
    if isinstance(value, dict):
        return {key: _whole(run, inside) for key, inside in value.items()}
    return type(value)(_whole(run, inside) for inside in value) if type(value) in (list, tuple) else value
