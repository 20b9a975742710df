"""NAdam (Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ), by `torch.optim.NAdam`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import two, with_decay
from drivetrain_plugins.optim._torch import implementation

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="optim", example={"lr": 0.01, "weight_decay": 0.1})
class NAdam:
    """Update with Adam under Nesterov's momentum."""

    lr: float = option(2e-3, gt=0, lt=float("inf"), help="peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), ge=0, lt=1, help="decay of the running mean and square")
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decay of weights; biases and norms are spared")
    decoupled_weight_decay: bool = option(False, help="decay as AdamW does, not as an L2 penalty")
    momentum_decay: float = option(4e-3, ge=0, lt=float("inf"), help="how fast the momentum rises to the first beta")
    foreach: bool | None = option(None, help="one call an operation for all parameters; None leaves it to the device")
    capturable: bool = option(False, help="keep step counts on the GPU, so that a CUDA graph can hold the update")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length."""
        two("betas", self.betas)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        groups = with_decay(groups, self.weight_decay)
        chosen = implementation("nadam", run, groups, foreach=self.foreach, capturable=self.capturable)
        return torch.optim.NAdam(
            groups, lr=self.lr, betas=two("betas", self.betas), eps=self.eps, momentum_decay=self.momentum_decay,
            decoupled_weight_decay=self.decoupled_weight_decay,
            capturable=self.capturable, **chosen,
        )  # fmt: skip
