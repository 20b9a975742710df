"""AdEMAMix (Pagliardini et al. 2024, https://arxiv.org/abs/2409.03137), by `pytorch_optimizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._library import library, refuse_unfit, several

if TYPE_CHECKING:
    from drivetrain import Run

NAME = "ademamix"


@plugin(role="optim", example={"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 4})
class AdEMAMix:
    """Update with AdEMAMix: AdamW whose momentum is a fast mean plus a slow one, which remembers old gradients.

    It keeps three tensors a parameter, of the parameter's type. `bnb-ademamix` keeps them in 8 bits.
    """

    lr: float = option(1e-3, gt=0, lt=float("inf"), help="peak learning rate")
    betas: tuple[float, float, float] = option(
        (0.9, 0.999, 0.9999), ge=0, lt=1, help="decay of the fast mean, of the mean square and of the slow mean"
    )
    alpha: float = option(5.0, ge=0, lt=float("inf"), help="weight of the slow mean beside the fast one")
    warmup_steps: int | None = option(
        None, ge=1, lt=2**53, help="steps over which alpha and the slow mean's decay grow; None has them whole at once"
    )
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    foreach: bool | None = option(None, help="one call an operation for all parameters; None leaves it to the library")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length, and a first one of which there is no logarithm to grow from."""
        first, _, _ = several("betas", self.betas, 3)
        if self.warmup_steps is not None and (first == 0 or self.betas[2] == 0):
            raise ValueError(f"warmup_steps needs a first and third beta above 0. Received: betas={self.betas}")

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        optimizers = library("pytorch_optimizer", NAME)
        refuse_unfit(NAME, run, groups, coarse=(torch.float16,))
        made: torch.optim.Optimizer = optimizers.AdEMAMix(
            with_decay(groups, self.weight_decay), lr=self.lr, betas=several("betas", self.betas, 3), eps=self.eps,
            alpha=self.alpha, t_alpha_beta3=self.warmup_steps, weight_decouple=True, foreach=self.foreach,
        )  # fmt: skip
        return made
