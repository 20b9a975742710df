"""Plugins that watch, count, stop and break a run, for tests of other plugins."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import attrs
import torch

from drivetrain.data import InProcess
from drivetrain.hooks import Hooks, hookimpl
from drivetrain.options import option, plugin
from drivetrain.state import Stage, Transform

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from types import FrameType

    from drivetrain.dispatch import Manager
    from drivetrain.state import Micro, Run, Step


@plugin(role="optim")
class BaseOptimizer:
    """Gradient descent with momentum: the optimizer of the kit's base composition."""

    lr: float = option(default=0.1, gt=0, help="learning rate")

    @hookimpl
    def build_optimizer(self, groups: Any) -> torch.optim.Optimizer:
        """Build it in its plainest form."""
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)


@plugin(role="report", effect="observes")
class Recorder:
    """Record every hook that is fired, in order, as (name, step); hooks that plugins bring are recorded too."""

    events: list[tuple[str, int]] = option(factory=list, init=False)
    _run: Any = option(None, init=False)

    @property
    def names(self) -> list[str]:
        """Return the names of the hooks fired, in order."""
        return [name for name, _ in self.events]

    def at(self, step: int) -> list[str]:
        """Return the names of the hooks fired while `step` optimizer steps were done."""
        return [name for name, number in self.events if number == step]

    def _note(self, name: str) -> None:
        self.events.append((name, self._run.progress.step if self._run is not None else 0))

    @hookimpl
    def add_hooks(self, manager: Manager) -> None:
        """Listen to all calls that go through pluggy; hot ones are recorded where they are frozen."""
        self._run = None
        self.events.clear()

        def before(name: str, _impls: Any, _arguments: Any) -> None:
            spec = getattr(manager.hook, name).spec
            if spec is not None and not spec.function.drivetrain_hot:
                self._note(name)

        manager.add_hookcall_monitoring(before, lambda *_: None)
        self._hot = [name for name in manager.names if manager.spec_of(name).drivetrain_hot]
        self._manager = manager

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Put a note before each hot hook."""
        self._run = run
        for name in self._manager.names:
            if self._manager.spec_of(name).drivetrain_hot:
                setattr(run.hooks, name, self._noting(name, getattr(run.hooks, name)))

    def _noting(self, name: str, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def noted(carrier: Any) -> Any:
            self._note(name)
            return call(carrier)

        return noted


@plugin(role="control")
class StopAt:
    """Stop when a number of optimizer steps is done."""

    step: int = option(default=1, ge=1, help="how many")

    @hookimpl
    def step_end(self, step: Step) -> None:
        """Ask for it."""
        if step.run.progress.step == self.step:
            step.run.request_stop("the test asked for it")


@plugin(role="report", effect="observes")
class CallCounter:
    """Count the Python calls of each step, those inside the model left out."""

    steps: list[int] = option(factory=list, init=False)
    _calls: int = option(0, init=False)
    _inside: int = option(0, init=False)

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Look away while the model runs."""
        self.steps = []
        run.model.register_forward_pre_hook(self._enter)
        run.model.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self._inside += 1

    def _leave(self, *_: Any) -> None:
        self._inside -= 1

    def _count(self, _frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call" and not self._inside:
            self._calls += 1

    @hookimpl(wrapper=True)
    def epoch(self) -> Generator[None, Any, Any]:
        """Count while an epoch lasts."""
        before = sys.getprofile()
        sys.setprofile(self._count)
        try:
            return (yield)
        finally:
            sys.setprofile(before)

    @hookimpl
    def step_end(self) -> None:
        """Close the step's count."""
        self.steps.append(self._calls)
        self._calls = 0

    @property
    def per_step(self) -> int:
        """Return the median over the steps."""
        return sorted(self.steps)[len(self.steps) // 2]


class Sabotage(Exception):  # noqa: N818 - it is raised to see what happens
    """What a saboteur raises."""


def saboteur(hook: str, declared: type = Hooks) -> Any:
    """Return a plugin that raises `Sabotage` in `hook`: at once in a cold one, the second time in a hot one."""
    spec: Any = getattr(declared, hook)
    patience = 1 if spec.drivetrain_hot else 0

    def wrapper(self: Any) -> Generator[None, Any, Any]:
        self.fired += 1
        if self.fired > patience:
            raise Sabotage(hook)
        return (yield)

    def listener(self: Any) -> None:
        self.fired += 1
        if self.fired > patience:
            raise Sabotage(hook)

    made: Any = wrapper if spec.drivetrain_kind == "operation" else listener
    made.__code__ = made.__code__.replace(co_name=hook)
    marked = hookimpl(made, wrapper=inspect.isgeneratorfunction(made))
    return type("Saboteur", (), {hook: marked, "fired": 0})()


@plugin(role="report", effect="observes")
class Watch:
    """Hear of a failure, and see that the wrappers around it unwind."""

    heard: list[BaseException] = option(factory=list, init=False)
    unwound: bool = option(False, init=False)

    @hookimpl(wrapper=True)
    def fit(self) -> Generator[None, Any, Any]:
        """Notice the end, good or bad."""
        try:
            return (yield)
        finally:
            self.unwound = True

    @hookimpl
    def failed(self, error: BaseException) -> None:
        """Keep the error."""
        self.heard.append(error)


@plugin(role="report", effect="observes")
class Gradients:
    """Keep the gradients of the last step as `gradients_ready` finds them; belongs at the end of the list."""

    kept: dict[str, torch.Tensor] = option(factory=dict, init=False)

    @hookimpl
    def gradients_ready(self, step: Step) -> None:
        """Copy them."""
        named = step.run.model.named_parameters()
        self.kept = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


@plugin(role="precision")
class Exact:
    """Make the model float64 and free of dropout, so that sums can be compared to the last digits."""

    @hookimpl
    def transforms(self) -> list[Transform]:
        """Change the model in place."""
        return [Transform(Stage.ADAPT, self._exact)]

    @staticmethod
    def _exact(model: torch.nn.Module) -> torch.nn.Module:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name, value in vars(module).items():  # attention often keeps its own rate
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
        return model.double()


@attrs.define(eq=False)
class _Ragged(InProcess):
    """Micro-batches of given sizes, one after the other; they make the whole epoch."""

    sizes: tuple[int, ...] = ()

    @property
    def rows_per_epoch(self) -> int:
        return sum(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Micro]:
        order, position = self.sampler.order(epoch), 0
        for size in self.sizes:
            if position >= start:
                yield self.fetch(order[position : position + size], epoch, position)
            position += size


@plugin(role="data")
class Ragged:
    """Make one step of each epoch, from micro-batches of the given sizes."""

    sizes: tuple[int, ...] = option(default=(8,), ge=1, help="rows of each micro-batch")

    @property
    def facts(self) -> dict[str, Any]:
        """Declare how many make a step."""
        return {"accumulation": len(self.sizes)}

    @hookimpl
    def build_batches(self, split: str, fetch: Any, sampler: Any) -> InProcess:
        """Cut the training rows as asked."""
        return _Ragged(fetch, sampler, 8, sizes=self.sizes) if split == "train" else InProcess(fetch, sampler, 8)
