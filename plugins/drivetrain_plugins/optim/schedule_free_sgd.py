"""Schedule-free gradient descent (Defazio et al. 2024, https://arxiv.org/abs/2405.15682), by `schedulefree`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._library import library, refuse_unfit
from drivetrain_plugins.optim._schedule_free import CONFLICTS, WARMUP, ScheduleFree, check_warmup

if TYPE_CHECKING:
    import torch

    from drivetrain import Run


@plugin(role="optim", provides=["averaged-weights"], conflicts=CONFLICTS, example={"lr": 0.5, "warmup": 2})
class ScheduleFreeSGD(ScheduleFree):
    """Update with gradient descent at a constant rate, and evaluate, save and export the average of the weights."""

    NAME = "schedule-free-sgd"

    lr: float = option(1.0, gt=0, lt=float("inf"), help="learning rate; much larger than that of a schedule")
    momentum: float = option(0.9, gt=0, lt=1, help="share of the average in the weights that are trained at")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="L2 penalty, at y; biases and norms are spared")
    warmup: float = option(0.0, ge=0, lt=2**53, help=WARMUP)
    r: float = option(0.0, ge=0, lt=float("inf"), help="power of the step in the weights of the average")
    weight_lr_power: float = option(2.0, ge=0, lt=float("inf"), help="power of the rate in the weights of the average")
    foreach: bool = option(True, help="one kernel for all parameters, for some memory")

    def __attrs_post_init__(self) -> None:
        """Refuse a part of a step."""
        check_warmup(self.warmup)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        refuse_unfit(self.NAME, run, groups)
        schedulefree = library("schedulefree", self.NAME)
        made: torch.optim.Optimizer = schedulefree.SGDScheduleFree(
            with_decay(groups, self.weight_decay), lr=self.lr, momentum=self.momentum,
            r=self.r, weight_lr_power=self.weight_lr_power, foreach=self.foreach,
        )  # fmt: skip
        return made
