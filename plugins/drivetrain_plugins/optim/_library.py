"""Importing a library of optimizers, and what most of them cannot be right with."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, MissingDependency, Problem
from drivetrain.options import require

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from drivetrain import Run


def library(module: str, plugin: str, install: str | None = None) -> Any:
    """Return the module, imported in silence.

    Args:
        module: its name, e.g. "torchao.optim".
        plugin: the name of the plugin that needs it.
        install: the package, where it asks for other versions of torch than are installed and so is no part of the
            extra "optimizers": it is then named as `pip install --no-deps INSTALL`.

    Raises:
        MissingDependency: it is not installed; the message has the line that installs it.
    """
    with silence():
        if install is None:
            return require(module, plugin=plugin, extra="optimizers")
        try:
            return importlib.import_module(module)
        except ImportError as error:
            what = f"plugin {plugin!r} needs the package {error.name or module!r}"
            raise MissingDependency([Problem(what, str(error), f"pip install --no-deps {install}")]) from error


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Drop warnings, and leave logging as it was: some libraries tell of kernels of other machines, one sets it up."""
    root = logging.getLogger()
    disabled, handlers, level = root.manager.disable, list(root.handlers), root.level
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


def refuse_unfit(
    plugin: str,
    run: Run,
    groups: Sequence[dict[str, Any]],
    *,
    sharded: bool = True,
    coarse: Sequence[torch.dtype] = (),
) -> None:
    """Refuse, before step 0, what the library would stumble over in it.

    Args:
        plugin: its name.
        run: whose model it is.
        groups: with "params", pairs of name and parameter.
        sharded: whether parameters may be `DTensor`.
        coarse: types that parameters must not have, as the library keeps sums of their gradients' squares in them.

    Raises:
        ConfigError: gradients will be sparse, or parameters are complex, or sharded or coarse where they must not be.
    """
    problems = []
    tables = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    found = [(name, module) for name, module in run.model.named_modules() if isinstance(module, tables)]
    sparse = [name for name, module in found if module.sparse and module.weight.requires_grad]
    if sparse:
        what, do = f"{plugin} takes no sparse gradients", "build the embedding with sparse=False"
        problems.append(Problem(what, f"sparse=True in {', '.join(sparse[:4])}", do))
    named = [(name, p) for group in groups for name, p in group["params"]]
    if names := [name for name, p in named if p.is_complex()]:
        what = f"{plugin} takes no complex parameters"
        problems.append(Problem(what, ", ".join(names[:4]), "take adamw, or freeze them"))
    if not sharded and (names := [name for name, p in named if isinstance(p, _dtensor())]):
        what = f"{plugin} takes no sharded parameters: its library works on plain tensors"
        problems.append(Problem(what, f"DTensor: {', '.join(names[:4])}", "take adamw, or keep whole copies (ddp)"))
    if names := [f"{name} {p.dtype}" for name, p in named if p.dtype in coarse]:
        what = f"{plugin} keeps squares of gradients in the parameters' type, which must be finer for them"
        do = "use float32 weights (the computation may be in half precision: bf16), or take adamw-anyprecision"
        problems.append(Problem(what, f"{', '.join(names[:4])} ({len(names)} such parameters)", do))
    if problems:
        raise ConfigError(problems)


def _dtensor() -> Any:
    """Return the class, or nothing where it is not imported and so has no instances."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def several(name: str, values: Sequence[float], count: int) -> tuple[float, ...]:
    """Return `values` as a tuple of floats, which is what the libraries take.

    Raises:
        ValueError: they are not `count`.
    """
    if len(values) != count:
        raise ValueError(f"{name} must be {count} numbers. Received: {values!r}")
    return tuple(float(value) for value in values)
