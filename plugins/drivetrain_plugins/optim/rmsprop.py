"""RMSprop (Tieleman & Hinton 2012, lecture 6.5 of "Neural networks for machine learning"), by `torch.optim.RMSprop`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._torch import implementation

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="optim", example={"lr": 0.01, "momentum": 0.5})
class RMSprop:
    """Divide by the root of a running mean of squared gradients; momentum and centring are optional."""

    lr: float = option(0.01, gt=0, lt=float("inf"), help="peak learning rate")
    alpha: float = option(0.99, ge=0, lt=1, help="decay of the running mean of squares")
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="L2 penalty; biases and norms are spared")
    momentum: float = option(0.0, ge=0, lt=1, help="share of the last update that is kept")
    centered: bool = option(False, help="divide by the running variance (Graves 2013)")
    foreach: bool | None = option(None, help="one call an operation for all parameters; None leaves it to the device")
    capturable: bool = option(False, help="keep step counts on the GPU, so that a CUDA graph can hold the update")

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        groups = with_decay(groups, self.weight_decay)
        chosen = implementation("rmsprop", run, groups, foreach=self.foreach, capturable=self.capturable)
        return torch.optim.RMSprop(
            groups, lr=self.lr, alpha=self.alpha, eps=self.eps, momentum=self.momentum, centered=self.centered,
            capturable=self.capturable, **chosen,
        )  # fmt: skip
