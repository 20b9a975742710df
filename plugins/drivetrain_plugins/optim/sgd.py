"""Stochastic gradient descent, by `torch.optim.SGD`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import with_decay

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="optim", example={"lr": 0.05, "momentum": 0.9})
class SGD:
    """Update with gradient descent, momentum and Nesterov's variant optional."""

    lr: float = option(0.01, gt=0, lt=float("inf"), help="peak learning rate")
    momentum: float = option(0.0, ge=0, lt=1, help="share of the last update that is kept")
    nesterov: bool = option(False, help="look ahead along the momentum (Sutskever et al. 2013)")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="L2 penalty; biases and norms are spared")

    def __attrs_post_init__(self) -> None:
        """Refuse Nesterov's variant of no momentum."""
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0. Received: momentum=0.0")

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        fused = run.device.type in ("cpu", "cuda", "mps")
        groups = with_decay(groups, self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=fused)
