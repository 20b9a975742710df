"""Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675), by `lion-pytorch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._library import library, refuse_unfit, several

if TYPE_CHECKING:
    import torch

    from drivetrain import Run

NAME = "lion"


@plugin(role="optim", example={"lr": 0.003, "weight_decay": 0.1})
class Lion:
    """Update with Lion: the sign of a mix of gradient and momentum.

    Every weight moves by the learning rate, so it is chosen 3 to 10 times smaller, and the weight decay as many times
    larger, than AdamW's. The momentum has the type of its parameter.
    """

    lr: float = option(1e-4, gt=0, lt=float("inf"), help="peak learning rate: how far each weight moves in a step")
    betas: tuple[float, float] = option(
        (0.9, 0.99), ge=0, lt=1, help="share of the momentum in the update, and its decay"
    )
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length."""
        several("betas", self.betas, 2)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        lion = library("lion_pytorch", NAME)
        refuse_unfit(NAME, run, groups)
        made: torch.optim.Optimizer = lion.Lion(
            with_decay(groups, self.weight_decay), lr=self.lr, betas=several("betas", self.betas, 2)
        )
        return made
