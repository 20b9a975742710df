"""Stochastic gradient descent, by `torch.optim.SGD`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._torch import implementation

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="optim", example={"lr": 0.05, "momentum": 0.9})
class SGD:
    """Update with gradient descent, momentum and Nesterov's variant optional."""

    lr: float = option(0.01, gt=0, lt=float("inf"), help="peak learning rate")
    momentum: float = option(0.0, ge=0, lt=1, help="share of the last update that is kept")
    nesterov: bool = option(False, help="look ahead along the momentum (Sutskever et al. 2013)")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="L2 penalty; biases and norms are spared")
    dampening: float = option(0.0, ge=0, le=1, help="share of the gradient that the momentum does not take in")
    fused: bool | None = option(None, help="one kernel for all parameters; None takes it where the device has it")
    foreach: bool | None = option(None, help="one call an operation for all parameters; None leaves it to the device")

    def __attrs_post_init__(self) -> None:
        """Refuse what means nothing without a momentum, and Nesterov's variant with dampening."""
        for word in ("nesterov", "dampening"):
            if getattr(self, word) and self.momentum == 0:
                raise ValueError(f"{word} needs a momentum above 0. Received: momentum=0.0")
        if self.nesterov and self.dampening:
            raise ValueError(f"nesterov is defined without dampening. Received: dampening={self.dampening}")

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        groups = with_decay(groups, self.weight_decay)
        chosen = implementation(
            "sgd", run, groups, foreach=self.foreach, fused=self.fused, fused_on=("cpu", "cuda", "mps")
        )
        return torch.optim.SGD(
            groups, lr=self.lr, momentum=self.momentum, dampening=self.dampening, nesterov=self.nesterov, **chosen
        )
