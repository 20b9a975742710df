"""Which parameters belong to embeddings, to which layer, and to the head of a model."""

from __future__ import annotations

import re
from typing import Any

import torch

from drivetrain import ConfigError, Problem
from drivetrain_plugins.optim import _names

NUMBERED = (torch.nn.ModuleList, torch.nn.Sequential)
TOKENS = ("cls_token", "mask_token", "dist_token", "register_tokens")  # parameters that stand beside embedded patches
HEADS = (
    "head", "heads", "lm_head", "classifier", "classification_head", "cls", "score", "qa_outputs", "fc", "fc_out",
    "logits_proj", "output_projection", "predictions",
)  # fmt: skip


def layer_lists(model: torch.nn.Module, patterns: tuple[str, ...]) -> dict[str, int]:
    """Return the numbered lists of layers by name, with their lengths; found by themselves, or named by `patterns`.

    By themselves: outermost `ModuleList`s (else one `Sequential`) of modules of one class that have parts.

    Raises:
        ConfigError: there are none, or it is not clear which.
    """
    found: dict[str, tuple[torch.nn.Module, int]] = {}
    named = [(_names.plain(name), module) for name, module in _names.unwrapped(model).named_modules()]
    for name, module in named:
        children = dict(module.named_children())
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if inside or len(children) < 2 or not all(child.isdigit() for child in children):  # noqa: PLR2004
            continue
        if patterns:
            chosen = any(_names.matches(pattern, name) for pattern in patterns)
        else:
            alike = len({type(child) for child in children.values()}) == 1
            chosen = isinstance(module, NUMBERED) and alike and all(any(c.children()) for c in children.values())
        if chosen:
            found[name] = module, len(children)
    if not patterns:
        lists = {name: entry for name, entry in found.items() if isinstance(entry[0], torch.nn.ModuleList)}
        found = lists or found
        if not lists and len(found) > 1:
            _refuse("several modules could hold the layers", ", ".join(found), "name those that do in layers")
    if not found:
        numbered = [name for name, module in named if name and any(c.isdigit() for c, _ in module.named_children())]
        received = f"numbered modules: {', '.join(numbered[:5]) or 'none'}; layers={list(patterns)}"
        _refuse("layer_decay finds no layers in the model", received, "name the numbered list in layers")
    return {name: length for name, (_, length) in found.items()}


def _refuse(what: str, received: str, do: str) -> None:
    raise ConfigError([Problem(f"parameter-groups: {what}", received, do)])


def place(name: str, lists: dict[str, int]) -> tuple[str, int] | None:
    """Return the layer that a parameter is in and how many layers lie above it, or None."""
    for prefix, length in lists.items():
        found = re.match(rf"{re.escape(prefix)}\.(\d+)\.", f"{name}.") if prefix else re.match(r"(\d+)\.", f"{name}.")
        if found:
            return found[0][:-1], length - 1 - int(found[1])
    return None


def embeddings(model: torch.nn.Module, names: list[str], patterns: tuple[str, ...], inside: set[str]) -> set[str]:
    """Return the names of the parameters of embeddings, positions and normalisation beside them included.

    Args:
        model: where they are.
        names: of all parameters.
        patterns: name them instead.
        inside: names of parameters that are in layers, which are none.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    if patterns:
        return {name for pattern in patterns for name in _names.select(pattern, names, "parameter-groups")}
    tables = tuple(
        f"{_names.plain(prefix)}."
        for prefix, module in _names.unwrapped(model).named_modules()
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag))
    )
    found = {n for n in names if n.startswith(tables) or "embed" in n.lower() or n.rpartition(".")[2] in TOKENS}
    return found - inside


def head(model: Any, names: list[str], patterns: tuple[str, ...], inside: set[str]) -> set[str]:
    """Return the names of the parameters of the head; arguments as `embeddings` has them.

    In a model of `transformers` it is what lies outside its base model, elsewhere what is named as heads are.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    if patterns:
        return {name for pattern in patterns for name in _names.select(pattern, names, "parameter-groups")}
    model = _names.unwrapped(model)
    base = getattr(model, "base_model_prefix", "")
    if base and isinstance(getattr(model, base, None), torch.nn.Module):
        found = {name for name in names if not name.startswith(f"{base}.")}
    else:
        found = {name for name in names if any(part in HEADS for part in name.split(".")[:-1])}
    return found - inside
