"""RAdam (Liu et al. 2020, https://arxiv.org/abs/1908.03265), by `torch.optim.RAdam`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import two, with_decay
from drivetrain_plugins.optim._torch import implementation

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="optim", example={"lr": 0.05, "betas": [0.9, 0.9], "weight_decay": 0.1})
class RAdam:
    """Update with Adam, without its adaptive rate while that would vary too much, in place of a warm-up."""

    lr: float = option(1e-3, gt=0, lt=float("inf"), help="peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), ge=0, lt=1, help="decay of the running mean and square")
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decay of weights; biases and norms are spared")
    decoupled_weight_decay: bool = option(False, help="decay as AdamW does, not as an L2 penalty")
    foreach: bool | None = option(None, help="one call an operation for all parameters; None leaves it to the device")
    capturable: bool = option(False, help="keep step counts on the GPU, so that a CUDA graph can hold the update")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length."""
        two("betas", self.betas)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        groups = with_decay(groups, self.weight_decay)
        chosen = implementation("radam", run, groups, foreach=self.foreach, capturable=self.capturable)
        return torch.optim.RAdam(
            groups, lr=self.lr, betas=two("betas", self.betas), eps=self.eps,
            decoupled_weight_decay=self.decoupled_weight_decay,
            capturable=self.capturable, **chosen,
        )  # fmt: skip
