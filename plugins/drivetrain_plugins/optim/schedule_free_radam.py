"""Schedule-free RAdam (Defazio et al. 2024, https://arxiv.org/abs/2405.15682), by `schedulefree`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import two, with_decay
from drivetrain_plugins.optim._library import library, refuse_unfit
from drivetrain_plugins.optim._schedule_free import CONFLICTS, ScheduleFree

if TYPE_CHECKING:
    import torch

    from drivetrain import Run


@plugin(
    role="optim",
    provides=["averaged-weights"],
    conflicts=CONFLICTS,
    example={"lr": 0.01, "betas": [0.9, 0.9], "weight_decay": 0.1},
)
class ScheduleFreeRAdam(ScheduleFree):
    """Update with rectified Adam, which needs no warm-up, and evaluate, save and export the average of the weights."""

    NAME = "schedule-free-radam"

    lr: float = option(2.5e-3, gt=0, lt=float("inf"), help="learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), gt=0, lt=1, help="share of the average, decay of the mean square")
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decay, at y; biases and norms are spared")
    r: float = option(0.0, ge=0, lt=float("inf"), help="power of the step in the weights of the average")
    weight_lr_power: float = option(2.0, ge=0, lt=float("inf"), help="power of the rate in the weights of the average")
    silent_sgd_phase: bool = option(True, help="move nothing while the mean square is too young to be rectified")
    foreach: bool = option(True, help="one kernel for all parameters, for some memory")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length."""
        two("betas", self.betas)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        refuse_unfit(self.NAME, run, groups)
        schedulefree = library("schedulefree", self.NAME)
        made: torch.optim.Optimizer = schedulefree.RAdamScheduleFree(
            with_decay(groups, self.weight_decay), lr=self.lr, betas=two("betas", self.betas), eps=self.eps,
            r=self.r, weight_lr_power=self.weight_lr_power, silent_sgd_phase=self.silent_sgd_phase,
            foreach=self.foreach,
        )  # fmt: skip
        return made
