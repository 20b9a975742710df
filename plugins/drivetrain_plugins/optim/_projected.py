"""What GaLore and APOLLO share: which matrices are projected, and a state that consists of tensors and numbers.

Both libraries keep a projector object in a parameter's state. A checkpoint holds tensors and JSON values, so what such
an object has learned is written out, and the object is built again from the group's options when it is read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from drivetrain import Run

TARGETS = "regular expressions, searched in the names of nn.Linear modules; none: all of them but an output embedding"


def parse_targets(value: Any) -> tuple[str, ...]:
    """Read a list of regular expressions."""
    if isinstance(value, str):
        raise ValueError(f"targets is a list of regular expressions. Received: {value!r}. Write [{value!r}]")  # noqa: TRY004
    for pattern in value:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"targets are regular expressions ({error}). Received: {pattern!r}") from error
    return tuple(value)


def with_projection(
    run: Run, groups: list[dict[str, Any]], targets: Sequence[str], projection: dict[str, Any], *, plugin: str
) -> list[dict[str, Any]]:
    """Return `groups`, each split into what is projected and what is not.

    Projected are weights of `torch.nn.Linear` whose smaller side is larger than the rank (others would save nothing),
    and which are no embedding: neither the model's output embedding nor tied to an input embedding, as in the paper.

    Args:
        run: with its model.
        groups: dicts with "params", a list of (name, parameter).
        targets: regular expressions searched in the names of modules; all modules if empty.
        projection: the options of a projected group, "rank" among them.
        plugin: whose name an error has.

    Raises:
        ConfigError: nothing is left to project, or a pattern finds nothing.
    """
    chosen, rank = _targets(run.model, targets, plugin), projection["rank"]
    made: list[dict[str, Any]] = []
    count = 0
    for group in groups:
        projected = [item for item in group["params"] if id(item[1]) in chosen and min(item[1].shape) > rank]
        taken = {id(p) for _, p in projected}
        others = [item for item in group["params"] if id(item[1]) not in taken]
        made += [{**group, "params": others}] if others else []
        made += [{**group, "params": projected, **projection}] if projected else []
        count += len(projected)
    if not count:
        received = f"targets={list(targets)}, rank={rank}, {len(chosen)} matrices found"
        do = "give targets that find larger nn.Linear modules, a smaller rank, or take a plain optimizer"
        raise ConfigError([Problem(f"{plugin}: there is no matrix to project", received, do)])
    return made


def _targets(model: Any, targets: Sequence[str], plugin: str) -> set[int]:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for pattern in targets:
        if not any(re.search(pattern, name) for name in linear):
            do = f"these are there: {', '.join(list(linear)[:8])}{', ...' if len(linear) > 8 else ''}"  # noqa: PLR2004
            raise ConfigError([Problem(f"{plugin}: a target finds no nn.Linear", repr(pattern), do)])
    if targets:
        return {id(m.weight) for name, m in linear.items() if any(re.search(pattern, name) for pattern in targets)}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return {id(m.weight) for m in linear.values() if m is not output} - embeddings


def writing_out(made: type[Any], build: Callable[[Any, dict[str, Any], dict[str, Any]], Any]) -> type[Any]:
    """Return a subclass of the optimizer `made` whose state dict consists of tensors, numbers and text.

    Args:
        made: a `torch.optim.Optimizer` that keeps an object under "projector" in the state of some parameters.
        build: from (optimizer, group, the parameter's state) to such an object, fresh.
    """

    class WritingOut(made):  # type: ignore[misc]
        def state_dict(self) -> dict[str, Any]:
            """Return the state with projectors written out."""
            state = torch.optim.Optimizer.state_dict(self)  # bitsandbytes would hide tensors from FSDP
            return {**state, "state": {number: _written(entry) for number, entry in state["state"].items()}}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Load what `state_dict` returned; projectors are built anew."""
            super().load_state_dict(state_dict)
            parameters = [(group, p) for group in self.param_groups for p in group["params"]]
            numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
            for number, (group, p) in zip(numbers, parameters, strict=True):
                saved = state_dict["state"].get(number, {}).get("projector")
                if saved is not None:
                    self.state[p]["projector"] = projector = build(self, group, self.state[p])
                    _read(projector, saved, p.device)

    WritingOut.__name__ = WritingOut.__qualname__ = made.__name__
    return WritingOut


def _written(entry: dict[str, Any]) -> dict[str, Any]:
    if "projector" not in entry:
        return entry
    kept = vars(entry["projector"])
    matrices = kept["ortho_matrix"]
    several = isinstance(matrices, list)
    learned = matrices if several else [] if matrices is None else [matrices]
    # Products of a transposed matrix may round otherwise: the layout in memory belongs to the state.
    written = {
        "matrices": [matrix.contiguous() for matrix in learned],
        "strides": [list(matrix.stride()) for matrix in learned],
        "several": several,
        **{name: kept[name] for name in ("seed", "svd_count") if name in kept},
    }
    return {**entry, "projector": written}


def _read(projector: Any, saved: dict[str, Any], device: torch.device) -> None:
    learned = []
    for matrix, stride in zip(saved["matrices"], saved["strides"], strict=True):
        learned.append(torch.empty_strided(matrix.shape, stride, dtype=matrix.dtype, device=device).copy_(matrix))
    projector.ortho_matrix = learned if saved["several"] else learned[0] if learned else None
    for name in ("seed", "svd_count"):
        if name in saved:
            setattr(projector, name, saved[name])
