"""Averages of a run's weights, and how they take the weights' place for evaluations and exports."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain import Exporter, hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from drivetrain import Run


class Averages:
    """A second set of values for some of a model's tensors: parameters, or buffers.

    Values of half-precision tensors are kept in float32, all others in the tensor's own type.
    """

    def __init__(self, named: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Copy the tensors, which have the given names in states."""
        self.names = [name for name, _ in named]
        self.tensors = [tensor for _, tensor in named]
        self.values = [tensor.detach().to(_kept(tensor.dtype), copy=True) for tensor in self.tensors]
        self._alike = all(v.dtype == t.dtype for v, t in zip(self.values, self.tensors, strict=True))
        self._trained: list[torch.Tensor] | None = None  # while the values are in the model

    @classmethod
    def of_parameters(cls, run: Run, *, buffers: bool = False) -> Averages:
        """Take those that the optimizer updates (others do not move), and the buffers of real numbers if asked to."""
        updated = {id(p) for p in run.parameters}
        named: list[tuple[str, torch.Tensor]] = [(n, p) for n, p in run.model.named_parameters() if id(p) in updated]
        if buffers:
            named += [(name, buffer) for name, buffer in run.model.named_buffers() if buffer.is_floating_point()]
        return cls(named)

    @property
    def present(self) -> bool:
        """Tell whether the values are in the model."""
        return self._trained is not None

    @torch.no_grad()
    def lerp(self, weight: float) -> None:
        """Move the values towards the model's tensors: value += weight (tensor - value)."""
        tensors = self.tensors
        if not self._alike:
            tensors = [t.to(v.dtype) for t, v in zip(tensors, self.values, strict=True)]
        torch._foreach_lerp_(self.values, tensors, weight)

    @torch.no_grad()
    def write(self) -> None:
        """Copy the values into the model's tensors, for good."""
        torch._foreach_copy_(self.tensors, self.values)

    def enter(self) -> None:
        """Put the values in the tensors' place; nothing is copied where the types are the same."""
        self._trained = [tensor.data for tensor in self.tensors]
        for tensor, value in zip(self.tensors, self.values, strict=True):
            tensor.data = value.to(tensor.dtype)

    def leave(self) -> None:
        """Put the tensors' own data back, which nobody has touched; nothing happens where they have it."""
        if self._trained is not None:
            for tensor, own in zip(self.tensors, self._trained, strict=True):
                tensor.data = own
            self._trained = None

    def forget(self) -> None:
        """Start anew from what the tensors hold now, in whatever memory that is."""
        self.values = [t.detach().to(v.dtype, copy=True) for t, v in zip(self.tensors, self.values, strict=True)]
        self._trained = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the values by name."""
        return dict(zip(self.names, self.values, strict=True))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take values that `state_dict` returned.

        They get memory of their own: where values were in the model, the weights just loaded lie in theirs.

        Raises:
            ValueError: names or shapes differ.
        """
        if different := sorted(set(self.names) ^ state.keys()):
            raise ValueError(f"the averages and the saved ones differ in {different[:8]} ({len(different)} names)")
        for name, value in zip(self.names, self.values, strict=True):
            if state[name].shape != value.shape:
                raise ValueError(f"{name!r} is {tuple(state[name].shape)} in the saved averages, not {value.shape}")
        self.values = [torch.empty_like(v).copy_(state[n]) for n, v in zip(self.names, self.values, strict=True)]
        self._trained = None


def _kept(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


class AveragedWeights:
    """The hooks of a plugin that keeps averages of the weights: they are what is evaluated and exported.

    Training never sees them. For an evaluation the parameters' data is exchanged, and put back whatever happens, so no
    bit of the weights changes. Exports made by plugins around `fit` find the averages in the model, and those asked for
    later (`Trainer.export`, `drivetrain export`) too, as long as they are.
    """

    in_exports: bool
    in_model: bool
    _averages: Averages
    _asking: bool

    def ready(self) -> bool:
        """Tell whether there are averages yet."""
        return True

    def enter(self, run: Run) -> None:
        """Put the averages into the model."""
        del run
        self._averages.enter()

    def leave(self) -> None:
        """Take them out."""
        self._averages.leave()

    @contextlib.contextmanager
    def averaged(self, run: Run) -> Iterator[None]:
        """Let the model hold the averages within a `with` block; the weights are back afterwards, bit for bit."""
        if self._averages.present or not self.ready():
            yield
            return
        try:
            self.enter(run)
            yield
        finally:
            self.leave()

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run, split: str) -> Generator[None, Any, Any]:
        """Evaluate the averages."""
        del split
        with self.averaged(run):
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)  # the outermost: exports are made within
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Put the trained weights back once the exports are made, or leave the averages if asked to."""
        try:
            result = yield
            if self.in_model and self.ready():
                self._stay(run)
            return result
        finally:
            self.leave()

    @torch.no_grad()
    def _stay(self, run: Run) -> None:
        """Copy the averages into the model, for good."""
        if not self._averages.present:
            self.enter(run)
        shown = [(tensor, tensor.data) for tensor in self.held()]
        self.leave()
        for tensor, value in shown:
            tensor.copy_(value)

    @hookimpl(wrapper=True, trylast=True, specname="fit")  # the innermost: training is over, exports come
    def fit_inside(self, run: Run) -> Generator[None, Any, Any]:
        """Put the averages into the model for the exports that are made at the end of the run."""
        result = yield
        if self.in_exports and self.ready():
            self.enter(run)
        return result

    @hookimpl(trylast=True)  # the last of a format is taken
    def export(self, run: Run) -> list[Exporter]:
        """Offer the run's formats with the averages in place of the weights."""
        if not self.in_exports or self._asking:
            return []
        self._asking = True
        try:
            found = [exporter for exporters in run.hooks.export(run) for exporter in exporters]
        finally:
            self._asking = False
        return [attrs.evolve(exporter, write=self._of_averages(exporter.write)) for exporter in found]

    def _of_averages(self, write: Callable[[Run, Path], None]) -> Callable[[Run, Path], None]:
        def averaged(run: Run, path: Path) -> None:
            with self.averaged(run):
                write(run, path)

        return averaged

    def held(self) -> list[torch.Tensor]:
        """Return the model's tensors that averages take the place of."""
        return self._averages.tensors
