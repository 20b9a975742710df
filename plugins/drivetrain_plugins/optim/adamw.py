"""AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101), by `torch.optim.AdamW`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._fused_adamw import FusedAdamW
from drivetrain_plugins.optim._groups import with_decay

if TYPE_CHECKING:
    from drivetrain import Run

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


@plugin(role="optim", example={"lr": 0.01, "weight_decay": 0.1})
class AdamW:
    """Update with AdamW, fused where the device has it."""

    lr: float = option(5e-5, gt=0, lt=float("inf"), help="peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), ge=0, lt=1, help="decay of the running mean and square")
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    fused: bool | None = option(None, help="one kernel for all parameters; None takes it where the device has it")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length."""
        if len(self.betas) != 2:  # noqa: PLR2004
            raise ValueError(f"betas must be two numbers. Received: {self.betas!r}")

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        fused = run.device.type in FUSED_DEVICES if self.fused is None else self.fused
        groups = with_decay(groups, self.weight_decay)
        made = FusedAdamW if fused else torch.optim.AdamW
        return made(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=fused)
