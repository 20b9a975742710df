"""AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101), by `torch.optim.AdamW`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._fused_adamw import FusedAdamW
from drivetrain_plugins.optim._groups import two, with_decay
from drivetrain_plugins.optim._torch import FUSED_DEVICES, implementation

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="optim", example={"lr": 0.01, "weight_decay": 0.1})
class AdamW:
    """Update with AdamW, fused where the device has it."""

    lr: float = option(5e-5, gt=0, lt=float("inf"), help="peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), ge=0, lt=1, help="decay of the running mean and square")
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    amsgrad: bool = option(False, help="divide by the largest mean square so far (Reddi et al. 2018)")
    fused: bool | None = option(None, help="one kernel for all parameters; None takes it where the device has it")
    foreach: bool | None = option(None, help="one call an operation for all parameters; None leaves it to the device")
    capturable: bool = option(False, help="keep step counts on the GPU, so that a CUDA graph can hold the update")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length."""
        two("betas", self.betas)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        groups = with_decay(groups, self.weight_decay)
        chosen = implementation(
            "adamw", run, groups,
            foreach=self.foreach, fused=self.fused, fused_on=FUSED_DEVICES, capturable=self.capturable,
        )  # fmt: skip
        betas, plain = two("betas", self.betas), not (self.amsgrad or self.capturable)
        if chosen["fused"] and plain:
            return FusedAdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=True)
        return torch.optim.AdamW(
            groups, lr=self.lr, betas=betas, eps=self.eps, amsgrad=self.amsgrad, capturable=self.capturable, **chosen
        )
