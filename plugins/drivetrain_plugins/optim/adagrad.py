"""Adagrad (Duchi et al. 2011, https://jmlr.org/papers/v12/duchi11a.html), by `torch.optim.Adagrad`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._torch import implementation

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="optim", example={"lr": 0.05, "lr_decay": 0.1})
class Adagrad:
    """Divide by the root of the sum of all squared gradients so far, fused where the device has it (a CPU)."""

    lr: float = option(0.01, gt=0, lt=float("inf"), help="peak learning rate")
    lr_decay: float = option(0.0, ge=0, lt=float("inf"), help="the rate of update t is divided by 1 + (t - 1) lr_decay")
    initial_accumulator_value: float = option(0.0, ge=0, lt=float("inf"), help="what the sum of squares starts from")
    eps: float = option(1e-10, gt=0, lt=float("inf"), help="added to the root of the sum of squares")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="L2 penalty; biases and norms are spared")
    fused: bool | None = option(None, help="one kernel for all parameters; None takes it where the device has it")
    foreach: bool | None = option(None, help="one call an operation for all parameters; None leaves it to the device")

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        groups = with_decay(groups, self.weight_decay)
        chosen = implementation(
            "adagrad", run, groups, foreach=self.foreach, fused=self.fused, fused_on=("cpu",)
        )  # torch refuses it on a GPU
        return torch.optim.Adagrad(
            groups, lr=self.lr, lr_decay=self.lr_decay, initial_accumulator_value=self.initial_accumulator_value,
            eps=self.eps, **chosen,
        )  # fmt: skip
