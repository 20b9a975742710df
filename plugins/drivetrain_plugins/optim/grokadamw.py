"""GrokAdamW (Hartford 2024, https://github.com/cognitivecomputations/grokadamw), by `grokadamw`.

AdamW on gradients to which a slow mean of theirs is added (Lee et al. 2024, Grokfast, https://arxiv.org/abs/2405.20233).
"""

from __future__ import annotations

import contextlib
import importlib
import types
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._library import library, refuse_unfit, several

if TYPE_CHECKING:
    from drivetrain import Run, Step

NAME = "grokadamw"


class _Kept(torch.optim.Optimizer):
    """What stands before the library's class: a state where torch looks for it.

    The library keeps its state in the groups, keyed by the parameters themselves. Copies of the parameters are the keys
    after loading, so it finds nothing for its own and starts anew. Here the groups point to the state that torch saves
    and loads, as long as a step takes.
    """

    _step_impl: ClassVar[Any]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["state"] = self.state
        try:
            return self._step_impl(closure)
        finally:
            for group in self.param_groups:
                del group["state"]


@cache
def _class_of(base: Any) -> Any:
    """Return the library's class with our state, and without its `torch.cuda.amp.autocast`.

    That changes nothing in operations in place on tensors of one type, and warns in each step.
    """
    names = {**vars(importlib.import_module(base.__module__)), "autocast": contextlib.nullcontext}
    update = types.FunctionType(base._update_group.__code__, names)  # noqa: SLF001 - the library's step
    return type("KeptGrokAdamW", (_Kept, base), {"_update_group": staticmethod(update)})


@plugin(role="optim", example={"lr": 0.01, "weight_decay": 0.1})
class GrokAdamW:
    """Update with GrokAdamW: AdamW on gradients amplified by what they have long had in common.

    The first beta shrinks from one parameter of a group to the next. The library keeps its three tensors a parameter in
    the host's memory: on a GPU each step copies them there and back, and waits. Sharded parameters are refused.
    """

    lr: float = option(1e-3, gt=0, lt=float("inf"), help="peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), ge=0, lt=1, help="decay of the running mean and square")
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    alpha_init: float = option(0.98, ge=0, le=1, help="decay of the slow mean of gradients, before any signal")
    lamb: float = option(2.0, ge=0, lt=float("inf"), help="weight of the slow mean beside the gradient")
    gamma: float = option(0.1, ge=0, lt=1, help="how much the first beta shrinks from a parameter to the next")
    gradient_clipping: float = option(
        1.0, ge=0, lt=float("inf"), help="largest norm of the gradient of a parameter; 0 leaves gradients alone"
    )
    signal: bool = option(
        False, help="shorten the slow mean by how far an evaluation's loss is above the training loss (needs evaluate)"
    )
    grokking_signal_decay_rate: float = option(
        0.1, ge=0, lt=float("inf"), help="how strongly the signal shortens the slow mean"
    )
    _loss: Any = attrs.field(init=False, default=None)

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length."""
        several("betas", self.betas, 2)

    @property
    def requires(self) -> tuple[str, ...]:
        """Without evaluations there is no signal."""
        return ("evaluation",) if self.signal else ()

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        grokadamw = library("grokadamw", NAME, "grokadamw")
        refuse_unfit(NAME, run, groups, sharded=False, coarse=(torch.float16,))
        names = ("lr", "eps", "alpha_init", "lamb", "gamma", "gradient_clipping", "grokking_signal_decay_rate")
        made: torch.optim.Optimizer = _class_of(grokadamw.GrokAdamW)(
            with_decay(groups, self.weight_decay),
            betas=several("betas", self.betas, 2),
            **{name: getattr(self, name) for name in names},
        )
        return made

    @hookimpl
    def assembled(self) -> None:
        """Forget the last run's loss."""
        self._loss = None

    @hookimpl
    def step_end(self, step: Step) -> None:
        """Keep the step's loss, where it is."""
        self._loss = step.loss

    @hookimpl
    def evaluated(self, run: Run, metrics: dict[str, float]) -> None:
        """Give the library the losses of the last step and of this evaluation; its groups keep them."""
        if not self.signal or self._loss is None or "loss" not in metrics:
            return
        loss = self._loss.clone()
        if run.world_size > 1:
            torch.distributed.all_reduce(loss)  # each rank's is its share of the mean
        for group in run.optimizer.param_groups:
            group.update(train_loss=loss.item(), eval_loss=metrics["loss"])
