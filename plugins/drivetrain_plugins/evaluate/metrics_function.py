"""Metrics that the user's function makes of all predictions."""

from __future__ import annotations

import inspect
import numbers
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch

from drivetrain import ConfigError, Problem, TrainingError, hookimpl, import_object, option, plugin
from drivetrain_plugins.evaluate._buffer import GrowingBuffer
from drivetrain_plugins.evaluate._gather import from_rank_0, gathered
from drivetrain_plugins.evaluate._outputs import LABELS, described, labels_of, output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from drivetrain import Micro, Run

NAME = "metrics-function"
BOTH = 2  # predictions and labels


@attrs.frozen(eq=False)
class Predictions:
    """All rows of an evaluation: what a function of one argument gets. It unpacks: `predictions, labels = given`."""

    predictions: Any  # (N, ...), or a dict of such where several are kept
    label_ids: Any  # the same
    inputs: dict[str, NDArray[Any]] | None = None  # by the field of the batch, where inputs are kept

    def __iter__(self) -> Iterator[Any]:
        """Yield predictions, labels and, where they are kept, inputs."""
        yield from (self.predictions, self.label_ids, *(() if self.inputs is None else (self.inputs,)))

    def __getitem__(self, index: int) -> Any:
        """Return one of them by its place."""
        return (*self,)[index]


@attrs.define(eq=False)
class Kept:
    """Keep every batch; at the end call the function on all rows."""

    plugin: MetricsFunction
    run: Run
    buffers: dict[tuple[str, str], GrowingBuffer] = attrs.field(factory=dict)  # by what it is and its name
    order: list[int] = attrs.field(factory=list)  # which of the rank's micro-batches each is

    def update(self, micro: Micro) -> None:
        """Keep what the function wants of a batch."""
        named = self.plugin.labels_of(micro.batch)
        for name, value in named.items():
            self._add("labels", name, value)
        for name, value in self.plugin.predictions(micro, one_or_all(named)).items():
            self._add("predictions", name, value)
        if self.plugin.inputs:
            for name, value in _fields(micro.batch).items():
                self._add("inputs", name, value)
        self.order.append(len(self.order) if micro.number is None else micro.number)

    def compute(self) -> dict[str, float]:
        """Return the function's numbers, the same on all ranks."""
        plugin, run = self.plugin, self.run
        if plugin.gather == "sharded" and run.world_size > 1:
            return self._averaged()
        arrays = gathered(self.buffers, self.order, run, plugin.limit_bytes)
        self.buffers = {}
        return from_rank_0(run, NAME, lambda: plugin.call(arrays))

    def _add(self, kind: str, name: str, value: torch.Tensor) -> None:
        buffer = self.buffers.get((kind, name))
        if buffer is None:
            buffer = self.buffers[kind, name] = GrowingBuffer(self.plugin.limit_bytes)
        buffer.append(value)

    def _averaged(self) -> dict[str, float]:
        """Return the mean of what the function returns on each rank, weighed by the rank's rows."""
        rows = next(iter(self.buffers.values())).num_rows if self.buffers else 0
        mine, error = {}, None
        try:
            mine = self.plugin.call({key: buffer.finish() for key, buffer in self.buffers.items()})
        except Exception as raised:  # noqa: BLE001 - told to the other ranks before it is raised
            error = raised
        ranks: list[Any] = [None] * self.run.world_size
        torch.distributed.all_gather_object(ranks, (rows, mine, error and f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        if failed := [(rank, told) for rank, (_, _, told) in enumerate(ranks) if told]:
            raise TrainingError(f"{NAME} failed on rank {failed[0][0]}: {failed[0][1]}")
        ranks = [(count, values) for count, values, _ in ranks if count]
        if len({frozenset(values) for _, values in ranks}) > 1:
            raise TrainingError(
                f"{self.plugin.named} must return the same names on every rank where gather is 'sharded'. "
                f"Received: {[sorted(values) for _, values in ranks]}"
            )
        total = sum(count for count, _ in ranks)
        return (
            {name: sum(count * values[name] for count, values in ranks) / total for name in ranks[0][1]}
            if ranks
            else {}
        )


@plugin(role="evaluate", effect="observes", requires=["evaluation"], example={"function": "kit_module:metrics"})
class MetricsFunction:
    """Call your function with the predictions and labels of all rows, as `compute_metrics` of other trainers.

    Rows come in the order of the data. Batches padded to different lengths are padded to one with -100. The labels
    are those of the batch: a function of a causal language model's shifts them itself. A micro-batch in which every
    label is -100 is not evaluated, and its rows are not among them.
    """

    function: Any = option(
        help="f(predictions, labels), or f(p) with p.predictions and p.label_ids, -> numbers by name; "
        '"package.module:name" or the function itself'
    )
    preprocess: Any = option(
        None, help="f(logits, labels) -> what to keep of a batch, e.g. the argmax, which takes much less memory"
    )
    keep: str | list[str] = option("logits", help="the model's output to keep; of several, predictions are a dict")
    labels: list[str] = option(
        (),
        converter=list,
        help='fields of the batch that are the labels; "labels" if none is named; of several, a dict',
    )
    inputs: bool = option(False, help="keep the other fields of the batches too: p.inputs, or a third argument")
    limit_mb: float = option(2048, ge=0, help="megabytes of an array beyond which it is on disk, on each rank")
    gather: Literal["rank-0", "sharded"] = option(
        "rank-0",
        choices=["rank-0", "sharded"],
        help="call it on rank 0 with all rows, or on each rank with its own and average the numbers by rows: "
        "exact only for numbers that are means over rows",
    )
    prefix: str = option("", help="goes before the names of the numbers")
    _function: Any = option(None, init=False)
    _preprocess: Any = option(None, init=False)
    _takes_one: bool = option(False, init=False)

    @property
    def conflicts(self) -> tuple[str, ...]:
        """Logits cannot be kept where a loss never holds them."""
        return (
            ("chunked-cross-entropy",) if "logits" in ([self.keep] if isinstance(self.keep, str) else self.keep) else ()
        )

    @property
    def limit_bytes(self) -> int:
        """The limit in bytes."""
        return int(self.limit_mb * 1e6)

    @property
    def named(self) -> str:
        """The plugin and the function, for errors."""
        return f"{NAME}: the function {getattr(self._function, '__qualname__', repr(self._function))!r}"

    @hookimpl
    def assembled(self, run: Run) -> None:  # noqa: ARG002 - the hook's
        """Find the functions, and whether the metrics' takes one argument or more.

        Raises:
            ConfigError: it cannot be called with what it would get.
        """
        self._function = _callable(self.function, "function")
        self._preprocess = None if self.preprocess is None else _callable(self.preprocess, "preprocess")
        if not self.keep:
            raise ConfigError([Problem(f"{NAME}: keep must name an output", repr(self.keep), 'keep = "logits"')])
        self._takes_one = _required(self._function) == 1
        given = 1 if self._takes_one else BOTH + self.inputs
        try:
            inspect.signature(self._function).bind(*range(given))
        except ValueError:  # something built in that does not tell
            pass
        except TypeError as error:
            takes = "predictions, labels" + (", inputs" if self.inputs else "")
            do = f"let it take ({takes}), or one argument that has .predictions and .label_ids"
            raise ConfigError([Problem(f"{self.named} cannot be called: {error}", do=do)]) from error

    @hookimpl
    def metrics(self, run: Run) -> list[Kept]:
        """Return empty buffers for this evaluation."""
        return [Kept(self, run)]

    def labels_of(self, batch: Any) -> dict[str, torch.Tensor]:
        """Return the labels of a batch by field; "" where it is one.

        Raises:
            TrainingError: the batch has no such field.
        """
        names = self.labels or [""]
        found = {name: batch.get(name) if name and hasattr(batch, "get") else labels_of(batch) for name in names}
        for name, value in found.items():
            if not isinstance(value, torch.Tensor):
                raise TrainingError(f"{NAME} needs batches with {name or 'labels'!r}. Received: {described(batch)}")
        return found if len(found) > 1 else {"": found[names[0]]}

    def predictions(self, micro: Micro, labels: Any) -> dict[str, torch.Tensor]:
        """Return what is kept of a batch by name; "" where it is one.

        Raises:
            TrainingError: the model does not return it, or it is no tensor.
        """
        if isinstance(self.keep, str):
            kept: Any = self._output(micro, self.keep)
        else:
            kept = {name: self._output(micro, name) for name in self.keep}
        if self._preprocess is not None:
            kept = self._preprocess(kept, labels)
        if isinstance(kept, torch.Tensor) and kept.ndim:
            return {"": kept}
        parts = kept if hasattr(kept, "items") else {"": kept}
        if not parts or not all(isinstance(value, torch.Tensor) and value.ndim for value in parts.values()):
            raise TrainingError(
                f"{NAME} keeps tensors (B, ...), or a dict of them from preprocess. Received: {_told(parts)}"
            )
        return dict(parts)

    @staticmethod
    def _output(micro: Micro, name: str) -> torch.Tensor:
        value = output(micro.outputs, name)
        if not isinstance(value, torch.Tensor):
            what = described(micro.outputs) if value is None else type(value).__name__
            raise TrainingError(f"{NAME} keeps the output {name!r}, a tensor. Received: {what}")
        return value

    def call(self, arrays: Mapping[tuple[str, str], NDArray[Any]]) -> dict[str, float]:
        """Return the function's numbers; none where there are no rows."""
        if not arrays:
            return {}
        parts: dict[str, Any] = {
            part: {name: array for (kind, name), array in arrays.items() if kind == part}
            for part in ("predictions", "labels", "inputs")
        }
        predictions, labels = one_or_all(parts["predictions"]), one_or_all(parts["labels"])
        given = Predictions(predictions, labels, parts["inputs"] if self.inputs else None)
        result = self._function(given) if self._takes_one else self._function(*given)
        return self._plain(result)

    def _plain(self, result: Any) -> dict[str, float]:
        """Return the numbers of `result`.

        Raises:
            TrainingError: it is no dict of numbers, or one is called "loss".
        """
        if not hasattr(result, "items"):
            raise TrainingError(f"{self.named} must return numbers by name, a dict. Received: {type(result).__name__}")
        plain = {f"{self.prefix}{name}": _number(value) for name, value in result.items()}
        if wrong := {name: type(result[name]).__name__ for name in result if _number(result[name]) is None}:
            raise TrainingError(f"{self.named} must return plain numbers by name. Received: {wrong}")
        if "loss" in plain:
            raise TrainingError(f"{self.named} returns a 'loss', which the evaluation has: rename it, or set prefix")
        return {name: value for name, value in plain.items() if value is not None}


def one_or_all(named: Mapping[str, Any]) -> Any:
    """Return what stands under "", which is the only one then, or else all by name."""
    return named[""] if named.keys() == {""} else named


def _number(value: Any) -> float | None:
    """Return a number of Python, numpy or torch as a float, or None."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) else None


def _required(function: Any) -> int | None:
    """Return how many arguments a function must be given by place; None where it does not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return None
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in by_place and p.default is p.empty for p in parameters)


def _callable(given: Any, name: str) -> Callable[..., Any]:
    found: Any = import_object(given, plugin=NAME) if isinstance(given, str) else given
    if not callable(found):
        do = 'give a function, or "package.module:name" of one'
        raise ConfigError([Problem(f"{NAME}: {name} must be callable", repr(found)[:200], do)])
    return found  # type: ignore[no-any-return]


def _fields(batch: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch by field, or by place in a tuple, without its labels."""
    fields = dict(batch.items()) if hasattr(batch, "items") else {str(i): part for i, part in enumerate(batch[:-1])}
    labels = next((name for name in LABELS if name in fields), None) if hasattr(batch, "items") else None
    return {name: part for name, part in fields.items() if isinstance(part, torch.Tensor) and name != labels}


def _told(parts: Mapping[str, Any]) -> str:
    """Return names and types, for an error."""
    told = {n: f"shape {tuple(p.shape)}" if isinstance(p, torch.Tensor) else type(p).__name__ for n, p in parts.items()}
    return told[""] if told.keys() == {""} else str(told)
