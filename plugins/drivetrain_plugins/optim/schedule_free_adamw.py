"""Schedule-free AdamW (Defazio et al. 2024, https://arxiv.org/abs/2405.15682), by `schedulefree`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import two, with_decay
from drivetrain_plugins.optim._library import library, refuse_unfit
from drivetrain_plugins.optim._schedule_free import CONFLICTS, WARMUP, ScheduleFree, check_warmup

if TYPE_CHECKING:
    import torch

    from drivetrain import Run


@plugin(
    role="optim",
    provides=["averaged-weights"],
    conflicts=CONFLICTS,
    example={"lr": 0.01, "warmup": 0.4, "weight_decay": 0.1},
)
class ScheduleFreeAdamW(ScheduleFree):
    """Update with AdamW at a constant rate, and evaluate, save and export the average of the weights."""

    NAME = "schedule-free-adamw"

    lr: float = option(2.5e-3, gt=0, lt=float("inf"), help="learning rate; about ten times that of a schedule")
    betas: tuple[float, float] = option((0.9, 0.999), gt=0, lt=1, help="share of the average, decay of the mean square")
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decay, at y; biases and norms are spared")
    warmup: float = option(0.0, ge=0, lt=2**53, help=WARMUP)
    r: float = option(0.0, ge=0, lt=float("inf"), help="power of the step in the weights of the average")
    weight_lr_power: float = option(2.0, ge=0, lt=float("inf"), help="power of the rate in the weights of the average")
    foreach: bool = option(True, help="one kernel for all parameters, for some memory")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length and a part of a step."""
        two("betas", self.betas)
        check_warmup(self.warmup)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        refuse_unfit(self.NAME, run, groups)
        schedulefree = library("schedulefree", self.NAME)
        made: torch.optim.Optimizer = schedulefree.AdamWScheduleFree(
            with_decay(groups, self.weight_decay), lr=self.lr, betas=two("betas", self.betas), eps=self.eps,
            r=self.r, weight_lr_power=self.weight_lr_power, foreach=self.foreach,
        )  # fmt: skip
        return made
