"""StableAdamW (Wortsman et al. 2023, https://arxiv.org/abs/2304.13013), by `torch-optimi`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._library import library, refuse_unfit, several

if TYPE_CHECKING:
    from drivetrain import Run

NAME = "stable-adamw"


@plugin(role="optim", example={"lr": 0.01, "weight_decay": 0.1})
class StableAdamW:
    """Update with AdamW whose step is limited, parameter by parameter, as Adafactor's is; it needs no clipping.

    The schedule scales the rate as everywhere. With `decouple_lr`, what decays the weights is `weight_decay` times the
    schedule's factor, whatever the rate is: the library's `max_lr` is each group's own peak rate, which is what
    schedules start from. A decay that is then as large as AdamW's shrinks the weights by as much in each step: values
    like 1e-5 are usual (the library warns of 1e-3 and more).
    """

    lr: float = option(1e-3, gt=0, lt=float("inf"), help="peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.99), ge=0, lt=1, help="decay of the running mean and square")
    eps: float = option(1e-6, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    decouple_lr: bool = option(False, help="decay by weight_decay alone, not by the rate times weight_decay")
    kahan_sum: bool | None = option(
        None, help="keep what rounding to half precision loses of updates; None does it for half precision"
    )
    triton: bool | None = option(None, help="the library's Triton kernels; None takes them where the device has them")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length."""
        several("betas", self.betas, 2)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups.

        Raises:
            ConfigError: Triton was asked for where it is not.
        """
        optimi = library("optimi", NAME)
        refuse_unfit(NAME, run, groups, coarse=(torch.float16,))
        if self.triton and run.device.type == "cpu":
            do = "leave triton out: it is taken where the device has it"
            raise ConfigError([Problem(f"{NAME} has Triton kernels for GPUs only", "triton=True on cpu", do)])
        filled = with_decay(groups, self.weight_decay)
        for group in filled:
            group["max_lr"] = group.get("lr", self.lr) if self.decouple_lr else None
        made: torch.optim.Optimizer = optimi.StableAdamW(
            filled, lr=self.lr, betas=several("betas", self.betas, 2), eps=self.eps, weight_decay=self.weight_decay,
            decouple_lr=self.decouple_lr, kahan_sum=self.kahan_sum, triton=self.triton,
        )  # fmt: skip
        return made
