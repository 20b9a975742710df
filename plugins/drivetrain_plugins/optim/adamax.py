"""Adamax (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, section 7.1), by `torch.optim.Adamax`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import two, with_decay
from drivetrain_plugins.optim._torch import implementation

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="optim", example={"lr": 0.01, "weight_decay": 0.1})
class Adamax:
    """Update with Adam under the infinity norm: divide by a decaying maximum of the gradients."""

    lr: float = option(2e-3, gt=0, lt=float("inf"), help="peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), ge=0, lt=1, help="decay of the running mean and maximum")
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the gradients' magnitudes")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="L2 penalty; biases and norms are spared")
    foreach: bool | None = option(None, help="one call an operation for all parameters; None leaves it to the device")
    capturable: bool = option(False, help="keep step counts on the GPU, so that a CUDA graph can hold the update")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length."""
        two("betas", self.betas)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        groups = with_decay(groups, self.weight_decay)
        chosen = implementation("adamax", run, groups, foreach=self.foreach, capturable=self.capturable)
        return torch.optim.Adamax(
            groups, lr=self.lr, betas=two("betas", self.betas), eps=self.eps,
            capturable=self.capturable, **chosen,
        )  # fmt: skip
