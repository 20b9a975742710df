"""A run's model as a graph: traced on the CPU with a real batch of the run, labels left out."""

from __future__ import annotations

import inspect
import itertools
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from drivetrain import ConfigError, Problem
from drivetrain_plugins.export._exporting import caster, first_lines
from drivetrain_plugins.shared.exports import export_model, remade
from drivetrain_plugins.shared.generators import kept_generators

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from drivetrain import Run

ANSWERS = ("start_positions", "end_positions")  # what question answering calls its labels


@attrs.frozen(eq=False)
class Traced:
    """A program that takes `inputs` by name and returns `outputs`: the model's logits for them."""

    program: torch.export.ExportedProgram
    inputs: dict[str, torch.Tensor]
    outputs: torch.Tensor
    model: Called

    @property
    def fixed(self) -> list[str]:
        """The inputs whose first dimension the program fixes: it takes no other number of rows."""
        named = {node.name: node for node in self.program.graph.nodes if node.op == "placeholder"}
        return [name for name in self.inputs if _is_fixed(named[name].meta["val"])]


def _is_fixed(value: torch.Tensor) -> bool:
    return value.ndim > 0 and bool(is_concrete_int(value.shape[0]))


class Called(torch.nn.Module):
    """A model that takes tensors under given names, passes them as the loop does, and returns its logits alone."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str], *, by_name: bool) -> None:
        """Take the names of the inputs; `by_name=False` passes them by position."""
        super().__init__()
        self.model, self._names, self._by_name = model, list(names), by_name
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

        def forward(*given: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            return self._call({**dict(zip(self._names, given, strict=False)), **named})

        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
        self.forward = forward  # torch.export reads the inputs' names off the signature

    def _call(self, named: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self._by_name:
            return logits_of(self.model(**named))
        return logits_of(self.model(*(named[name] for name in self._names)))


def logits_of(outputs: Any) -> torch.Tensor:
    """Return the logits of a model's outputs: those under that name, or the first tensor that is not the loss."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if hasattr(outputs, "keys"):
        if outputs.get("logits") is not None:
            return outputs["logits"]  # type: ignore[no-any-return]
        outputs = [value for name, value in outputs.items() if name != "loss"]
    return next(value for value in outputs if isinstance(value, torch.Tensor))


def batch_of(run: Run) -> Any:
    """Return the first batch of an evaluation split, or of the training data; the run's position does not move."""
    split = next((s for s in run.batches if s.startswith("evaluate")), "train")
    with kept_generators(run.device):
        stream = run.batches[split].iterate(0, 0)
        try:
            return next(iter(stream)).batch
        finally:
            if hasattr(stream, "close"):
                stream.close()


def inputs_of(batch: Any, wanted: Sequence[str], model: Any, plugin: str) -> tuple[dict[str, torch.Tensor], bool]:
    """Return the tensors of a batch that the model is called with, by name, and whether they are passed by name.

    Args:
        batch: what the collator made.
        wanted: names of the inputs; if empty, everything but labels.
        model: on the CPU; one with a decoder is asked for the decoder's inputs, where labels alone gave them.
        plugin: whose error it is.
    """
    by_name = hasattr(batch, "keys")
    if by_name:
        named = dict(batch.items())
    else:
        parts = batch if isinstance(batch, (tuple, list)) else [batch]
        named = {f"input_{number}": part for number, part in enumerate(parts)}
    tensors = {name: part.cpu() for name, part in named.items() if isinstance(part, torch.Tensor)}
    if unknown := [name for name in wanted if name not in tensors]:
        what = f"{plugin}: the batch has no tensor {unknown[0]!r}"
        raise ConfigError([Problem(what, f"inputs={list(wanted)}; tensors: {list(tensors)}", "name some of these")])
    chosen = {n: t for n, t in tensors.items() if (n in wanted if wanted else not _is_label(n))}
    if not by_name and not wanted and len(tensors) > 1:  # (inputs, labels), as tuples are
        chosen.pop(f"input_{len(named) - 1}", None)
    makes = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if makes is not None and not wanted and "labels" in tensors and "decoder_input_ids" not in chosen:
        chosen["decoder_input_ids"] = makes(labels=tensors["labels"])
    if not chosen:
        what = f"{plugin}: the run's batches hold no tensor that could be an input"
        do = "collate rows to tensors (`tokenize` and `pad`), or name the inputs: inputs = [...]"
        raise ConfigError([Problem(what, f"{list(named)}", do)])
    return {name: _several(tensor) for name, tensor in chosen.items()}, by_name


def _is_label(name: str) -> bool:
    return "label" in name or name in ANSWERS


def _several(tensor: torch.Tensor) -> torch.Tensor:
    """Repeat a single row: what has size 1 in the example would have it for ever."""
    return torch.cat([tensor, tensor]) if tensor.ndim and tensor.shape[0] == 1 else tensor.contiguous()


def trace(run: Run, plugin: str, *, dtype: str | None, inputs: Sequence[str]) -> Traced:
    """Return the run's model, in evaluation mode on the CPU, as a program for any number of rows and any length.

    The run's own model is neither moved nor called.

    Raises:
        ConfigError: the model cannot be called with such inputs, or torch cannot make a graph of it.
    """
    cast = caster(dtype)
    model = remade(run, export_model(run), lambda tensor: cast(tensor.to("cpu", copy=True))).eval()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # past keys and values are no output of a graph
    given, by_name = inputs_of(batch_of(run), inputs, model, plugin)
    given = {name: cast(tensor) for name, tensor in given.items()}
    called = Called(model, list(given), by_name=by_name)
    with kept_generators(run.device), torch.no_grad():
        outputs = _told(plugin, model, given, called)
        program = _program(plugin, model, given, called)
    traced = Traced(program, given, outputs, called)
    _forget(program)
    return traced


def _told(plugin: str, model: Any, given: dict[str, torch.Tensor], called: Called) -> torch.Tensor:
    try:
        return called(**given)  # type: ignore[no-any-return]
    except Exception as error:  # whatever the model raises
        what = f"{plugin}: {type(model).__name__} cannot be called with the inputs {list(given)}"
        do = "give its other arguments defaults (labels, too), or name the inputs that it needs: inputs = [...]"
        raise ConfigError([Problem(what, f"{type(error).__name__}: {first_lines(error)}", do)]) from error


def _program(plugin: str, model: Any, given: dict[str, torch.Tensor], called: Called) -> torch.export.ExportedProgram:
    automatic = torch.export.Dim.AUTO
    shapes = {name: dict.fromkeys(range(tensor.ndim), automatic) for name, tensor in given.items()}
    try:
        return torch.export.export(called, (), kwargs=given, dynamic_shapes=shapes)
    except Exception as error:  # torch raises many kinds
        what = f"{plugin}: torch.export cannot make a graph of {type(model).__name__}"
        do = "let no value of a tensor decide what its forward does, or take export-safetensors or export-hf"
        raise ConfigError([Problem(what, f"{type(error).__name__}: {first_lines(error)}", do)]) from error


def _forget(program: torch.export.ExportedProgram) -> None:
    """Drop what would be written and is the run's own: paths of source files, and rows of the data."""
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)
    program.example_inputs = None


def rows_doubled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the batch followed by itself, (2B, ...)."""
    return {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}


def count_of(inputs: dict[str, torch.Tensor]) -> int | None:
    """Return the number of rows, where all inputs have the same."""
    counts = {tensor.shape[0] if tensor.ndim else 0 for tensor in itertools.chain(inputs.values())}
    return counts.pop() if len(counts) == 1 else None
