"""LOMO's optimizers as the loop knows them: groups with rates, and a state that can be saved.

The library's objects update in hooks of the parameters, during the backward pass. They are made here over one group
each, so that every group has its own rate and decay; their hooks are registered when a run starts and removed when it
ends, and what AdaLomo keeps stands on the parameter's device (the library itself asks for CUDA) and in `state`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from drivetrain import ConfigError, Problem, hookimpl
from drivetrain_plugins.optim._in_backward import OneBackward, hooked, refuse_whole_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from drivetrain import Micro, Run

VALUE = "gradients are clamped to plus and minus this value; a limit on their norm would need a second backward pass"


class _Named:
    """What the library asks of a model; it finds nothing to hook or to keep a state for when it is built."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters, self.built = parameters, False
        self._named = [(str(number), p) for number, p in enumerate(parameters)]

    def parameters(self) -> list[torch.nn.Parameter]:
        return self._parameters

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return self._named if self.built else []


class FusedUpdates(torch.optim.Optimizer):
    """One optimizer of `lomo-optim` a group, whose updates are part of the backward pass.

    Args:
        groups: with "params" and any option.
        make: from (what stands for a model, group) to `lomo_optim.Lomo` or `lomo_optim.AdaLomo`.
        lr: of groups without one.
    """

    def __init__(self, groups: Any, make: Callable[[Any, dict[str, Any]], Any], lr: float) -> None:
        """Build the parts."""
        super().__init__(groups, {"lr": lr})
        self._models = [_Named(group["params"]) for group in self.param_groups]
        self.parts = [make(model, group) for model, group in zip(self._models, self.param_groups, strict=True)]
        for model, group, part in zip(self._models, self.param_groups, self.parts, strict=True):
            model.built = True
            if hasattr(part, "step_num"):
                group["step_num"] = 0
                for p in group["params"]:
                    self.state[p] = _means(p)

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Let backward passes update, as long as the context lasts."""
        with contextlib.ExitStack() as hooks:
            for model, group, part in zip(self._models, self.param_groups, self.parts, strict=True):
                if hasattr(part, "step_num"):
                    part.step_num = group["step_num"]
                for name, p in model.named_parameters():
                    for kept, mean in self.state.get(p, {}).items():
                        getattr(part, kept)[name] = mean
                    hooks.callback(hooked(p, p.register_hook, part.grad_func).remove)
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of `loss` and update with each of them.

        Args:
            loss: 0-dim.
        """
        first, *others = self.parts
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.lr = group["lr"]
        for part in others:
            if hasattr(part, "step_num"):
                part.step_num += 1
        first.fused_backward(loss, first.lr)
        for part in others:
            part.grad_func(0)  # the last gradient of its group; `fused_backward` did it for the first one
        for part, group in zip(self.parts, self.param_groups, strict=True):
            if "step_num" in group:
                group["step_num"] = part.step_num

    def step(self, closure: Any = None) -> Any:  # noqa: ARG002 - as torch has it
        """Refuse: there is nothing left to do after a backward pass."""
        raise RuntimeError("LOMO updates in the backward pass: call .backward(loss) instead of .step()")


def _means(p: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return AdaLomo's state of a parameter: running means of its squared gradient, by row and column."""
    if p.ndim == 1:
        return {"exp_avg_sq": torch.zeros(p.shape[0], dtype=torch.float32, device=p.device)}
    sides = {"exp_avg_sq_row": p.shape[0], "exp_avg_sq_col": p.shape[1]}
    return {name: torch.zeros(size, dtype=torch.float32, device=p.device) for name, size in sides.items()}


class Fused(OneBackward):
    """The hooks of both plugins."""

    NAME: ClassVar[str]

    @hookimpl
    def assembled(self, run: Run) -> None:
        """Refuse what LOMO cannot be right with.

        Raises:
            ConfigError: a plugin needs whole gradients or several backward passes, or parameters are float16.
        """
        refuse_whole_gradients(run, self.NAME)
        if any(p.dtype == torch.float16 for p in run.parameters):
            what = f"{self.NAME}: the library scales the loss of float16 weights by itself, for a limit on the norm"
            raise ConfigError([Problem(what, "torch.float16", "use bfloat16 or float32 weights")])

    @hookimpl(wrapper=True)
    def fit(self, run: Run) -> Generator[None, Any, Any]:
        """Register the library's hooks, and remove them when the run ends or fails."""
        with run.optimizer.acting():
            return (yield)

    @hookimpl
    def backward(self, micro: Micro) -> None:
        """Update during the backward pass."""
        micro.run.optimizer.backward(micro.loss)
