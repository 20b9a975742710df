"""AdaLomo (Lv et al. 2023, https://arxiv.org/abs/2310.10195), by `lomo-optim`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.optim._groups import two, with_decay
from drivetrain_plugins.optim._in_backward import CONFLICTS
from drivetrain_plugins.optim._library import library, refuse_unfit
from drivetrain_plugins.optim._lomo import VALUE, Fused, FusedUpdates

if TYPE_CHECKING:
    from drivetrain import Run


@plugin(role="optim", conflicts=(*CONFLICTS, "optimizer-in-backward"), example={"lr": 0.05, "weight_decay": 0.1})
class AdaLomo(Fused):
    """Update in the backward pass with gradients normalized by a factored mean square, as Adafactor does.

    A step is one micro-batch, and the rates of the groups follow the schedule. The library reads the size of each
    parameter on the host when it updates it.
    """

    NAME = "adalomo"

    lr: float = option(1e-3, gt=0, lt=float("inf"), help="peak learning rate, relative to the size of a parameter")
    eps: tuple[float, float] = option((1e-30, 1e-3), gt=0, help="added to the square; smallest size of a parameter")
    clip_threshold: float = option(1.0, gt=0, help="largest root mean square of an update")
    decay_rate: float = option(-0.8, lt=0, help="power of the step in the decay of the mean square")
    loss_scale: float = option(1024.0, gt=0, help="factor of the loss, taken back from the gradients")
    clip_grad_value: float | None = option(None, gt=0, help=VALUE)
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")

    def __attrs_post_init__(self) -> None:
        """Refuse eps of another length."""
        two("eps", self.eps)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> FusedUpdates:
        """Build one of the library's optimizers for each of the run's groups.

        Raises:
            ConfigError: a parameter is neither a vector nor a matrix.
        """
        refuse_unfit(self.NAME, run, groups, sharded=False)
        lomo = library("lomo_optim", self.NAME, "lomo-optim")
        odd = [(name, list(p.shape)) for group in groups for name, p in group["params"] if p.ndim not in (1, 2)]
        if odd:
            what, do = (
                f"{self.NAME} keeps means over rows and columns, of vectors and matrices",
                "freeze it, or take lomo",
            )
            raise ConfigError([Problem(what, f"{odd[0][0]} {odd[0][1]}, {len(odd)} such parameters", do)])

        def make(model: Any, group: dict[str, Any]) -> Any:
            return lomo.AdaLomo(
                model, lr=group["lr"], loss_scale=self.loss_scale, eps=(self.eps[0], self.eps[1]),
                clip_threshold=self.clip_threshold, decay_rate=self.decay_rate,
                clip_grad_value=self.clip_grad_value, weight_decay=group["weight_decay"],
            )  # fmt: skip

        return FusedUpdates(with_decay(groups, self.weight_decay), make, self.lr)
