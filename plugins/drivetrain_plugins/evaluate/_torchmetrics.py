"""Objects of torchmetrics as metrics of an evaluation."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import TrainingError, require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType

    from drivetrain import Micro


def library(module: str, plugin: str) -> ModuleType:
    """Return torchmetrics or one of its modules, "torchmetrics.regression"."""
    return require(module, plugin=plugin, extra="metrics")


def built(cls: type, device: torch.device, *, validate: bool = False, **arguments: Any) -> Any:
    """Return a metric on `device`; unless `validate`, without checks of each batch, which wait for the device."""
    makers = [getattr(base, maker) for base in cls.__mro__ for maker in ("__init__", "__new__") if maker in vars(base)]
    if not validate and any("validate_args" in inspect.signature(maker).parameters for maker in makers):
        arguments = {"validate_args": False, **arguments}
    with warnings.catch_warnings():  # that all values are kept is said by the plugins that offer such metrics
        warnings.filterwarnings("ignore", ".*will save all", UserWarning)
        return cls(**arguments).to(device)


def merge(metrics: Iterable[Any], world_size: int, device: torch.device) -> int:
    """Give every rank the states of all ranks and return how often all of them were updated.

    The library's own way gathers a state tensor by tensor. It waits for ever where ranks saw different numbers of
    batches and a state is a list that is not concatenated (all of retrieval), and takes the states of a rank without
    rows for float32. Here whole states travel at once.
    """
    parts = [part for metric in metrics for part in metric.modules() if hasattr(part, "_reductions")]
    updates = [int(part.update_count) for part in parts]
    if world_size > 1:
        states = [_moved({name: getattr(part, name) for name in _reductions(part)}, "cpu") for part in parts]
        ranks: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(ranks, (updates, states))
        updates = [sum(counts) for counts in zip(*(counts for counts, _ in ranks), strict=True)]
        for number, part in enumerate(parts):
            _put(part, [_moved(states[number], device) for _, states in ranks], updates[number])
    return sum(updates)


def _reductions(part: Any) -> Mapping[str, Any]:
    return part._reductions  # type: ignore[no-any-return]  # noqa: SLF001 - the library lists its states only there


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, dict):
        return {name: _moved(each, device) for name, each in value.items()}
    return [_moved(each, device) for each in value] if isinstance(value, list) else value


def _put(part: Any, states: list[dict[str, Any]], updates: int) -> None:
    """Reduce the states of all ranks as the metric says."""
    for name, reduction in _reductions(part).items():
        values = [state[name] for state in states]
        merged: Any
        if isinstance(values[0], list):
            merged = [one for value in values for one in value]
        else:
            merged = torch.stack(values)
            merged = merged if reduction is None else reduction(merged)
        setattr(part, name, merged)
    part._update_count, part._computed = updates, None  # noqa: SLF001 - as its own update() would leave them
    part.distributed_available_fn = _never  # it is done


def _never() -> bool:
    return False


def numbers(name: str, value: Any) -> dict[str, float]:
    """Return the numbers in what a metric computed: `name`, or `name_0`, `name_1` ..., or `name_KEY` of a mapping."""
    if isinstance(value, Mapping):
        return {n: v for key, each in value.items() for n, v in numbers(f"{name}_{key}", each).items()}
    if isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.ndim):
        return {n: v for at, each in enumerate(value) for n, v in numbers(f"{name}_{at}", each).items()}
    return {name: float(value)}


@attrs.define(eq=False)
class Streamed:
    """Objects of torchmetrics by name, updated together."""

    plugin: str
    metrics: Mapping[str, Any]
    inputs: Callable[[Micro], tuple[Any, ...] | None]  # what `update` takes, None if the batch holds nothing for it
    world_size: int
    device: torch.device

    def update(self, micro: Micro) -> None:
        """Add a batch."""
        given = self.inputs(micro)
        if given is None:
            return
        for name, metric in self.metrics.items():
            try:
                metric.update(*given)
            except (ValueError, RuntimeError, TypeError) as error:
                shapes = ", ".join(f"{tuple(one.shape)} {one.dtype}" for one in given)
                raise TrainingError(
                    f"{self.plugin}: {name} cannot be measured of these outputs and labels: {error}. Received: {shapes}"
                ) from error

    def compute(self) -> dict[str, float]:
        """Return the numbers over all ranks; none, where nothing was counted."""
        if not merge(self.metrics.values(), self.world_size, self.device):
            return {}
        return {n: v for name, metric in self.metrics.items() for n, v in numbers(name, metric.compute()).items()}
