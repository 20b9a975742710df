"""LOMO (Lv et al. 2023, https://arxiv.org/abs/2306.09782), by `lomo-optim`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._in_backward import CONFLICTS
from drivetrain_plugins.optim._library import library, refuse_unfit
from drivetrain_plugins.optim._lomo import VALUE, Fused, FusedUpdates

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="optim", conflicts=(*CONFLICTS, "optimizer-in-backward"), example={"lr": 0.05, "weight_decay": 0.1})
class Lomo(Fused):
    """Update with gradient descent in the backward pass, so that neither gradients nor a state take memory.

    The weights are those of `torch.optim.SGD(foreach=False)`. A step is one micro-batch, and the rates of the groups
    follow the schedule.
    """

    NAME = "lomo"

    lr: float = option(1e-3, gt=0, lt=float("inf"), help="peak learning rate")
    clip_grad_value: float | None = option(None, gt=0, help=VALUE)
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> FusedUpdates:
        """Build one of the library's optimizers for each of the run's groups."""
        refuse_unfit(self.NAME, run, groups, sharded=False)
        lomo = library("lomo_optim", self.NAME, "lomo-optim")

        def make(model: Any, group: dict[str, Any]) -> Any:
            decay = group["weight_decay"]
            return lomo.Lomo(model, lr=group["lr"], clip_grad_value=self.clip_grad_value, weight_decay=decay)

        return FusedUpdates(with_decay(groups, self.weight_decay), make, self.lr)
