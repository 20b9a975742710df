"""Parameters by name, and glob patterns on their names."""

from __future__ import annotations

import difflib
import fnmatch
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable

HELP = 'globs on names of parameters, or of modules that hold them, such as "encoder.layer.*.attention"'
WRAPPED = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def parse(value: Any) -> tuple[str, ...]:
    """Read a list of patterns."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) and part for part in value):
        raise ValueError(f"patterns are a list of strings. Received: {value!r}")
    return tuple(value)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside what compiles it or reduces its gradients."""
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif (inner := model._modules.get("_orig_mod")) is not None:  # noqa: SLF001 - torch.compile's
            model = inner
        else:
            return model


def plain(name: str) -> str:
    """Return `name` without what wrappers of parts of a model put into it."""
    for part in WRAPPED:
        name = name.replace(part, "")
    return name


def named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters by the names they have in the model as it was built; tied ones once."""
    return {plain(name): parameter for name, parameter in unwrapped(model).named_parameters()}


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


def matches(pattern: str, name: str) -> bool:
    """Tell whether a glob matches a parameter's name or that of a module it is in; "*" matches dots, too."""
    regex, parts = _regex(pattern), name.split(".")
    return any(regex.match(".".join(parts[:end])) for end in range(len(parts), 0, -1))


def select(pattern: str, names: Iterable[str], plugin: str) -> list[str]:
    """Return the names that `pattern` matches.

    Raises:
        ConfigError: there are none; names that are near are told.
    """
    names = list(names)
    found = [name for name in names if matches(pattern, name)]
    if not found:
        do = f"the parameters are named like {near(pattern, names)}"
        raise ConfigError([Problem(f"{plugin}: a pattern matches no parameter of the model", repr(pattern), do)])
    return found


def near(pattern: str, names: Iterable[str]) -> str:
    """Return up to five names of parameters or modules that are near a pattern, or the first ones."""
    names = list(names)
    prefixes = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 1)}
    bare = pattern.strip("*.?")
    close = difflib.get_close_matches(bare, [*names, *sorted(prefixes)], n=5, cutoff=0.5)
    last = {name: name.rpartition(".")[2] for name in [*names, *sorted(prefixes)]}
    close += [n for n, end in last.items() if n not in close and difflib.SequenceMatcher(None, bare, end).ratio() > 0.6]  # noqa: PLR2004
    return ", ".join(map(repr, close[:5] or names[:5]))
