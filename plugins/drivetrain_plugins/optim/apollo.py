"""APOLLO (Zhu et al. 2024, https://arxiv.org/abs/2412.05270), by `apollo-torch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._groups import two, with_decay
from drivetrain_plugins.optim._in_backward import Layerwise
from drivetrain_plugins.optim._library import library, refuse_unfit
from drivetrain_plugins.optim._projected import TARGETS, parse_targets, with_projection, writing_out

if TYPE_CHECKING:
    import torch

    from drivetrain import Run

NAME = "apollo"


@plugin(role="optim", example={"lr": 0.01, "rank": 2, "update_proj_gap": 2, "weight_decay": 0.1})
class Apollo(Layerwise):
    """Update with gradients that are scaled, a channel at a time, by what AdamW would do in a random low rank.

    Matrices of `torch.nn.Linear` are treated so, the other parameters are updated by AdamW. All of the options hold for
    both. Each matrix draws its projections from a stream of its own, `("apollo", its number in the model)`.
    `layerwise` updates in the backward pass, as `optimizer-in-backward` does. The library's limit on the growth of
    an update's norm reads it on the host, once a matrix and step.
    """

    NAME = NAME

    lr: float = option(1e-3, gt=0, lt=float("inf"), help="peak learning rate")
    rank: int = option(128, ge=1, help="rows of the projected gradients; smaller matrices are not projected")
    update_proj_gap: int = option(200, ge=1, help="steps after which the projection is made anew")
    scale: float = option(1.0, gt=0, lt=float("inf"), help="its root is the factor of the projected updates")
    proj: str = option("random", choices=["random", "svd"], help="draw the projection, or take singular vectors")
    proj_type: str = option(
        "std", choices=["std", "reverse_std", "right", "left"], help="which side of a matrix is projected"
    )
    scale_type: str = option("channel", choices=["channel", "tensor"], help="what has a factor of its own")
    scale_front: bool = option(False, help="scale before the limit on the norm's growth instead of after it")
    limit_growth: bool = option(True, help="let the norm of an update grow by 1 % a step at most")
    targets: tuple[str, ...] = option((), converter=parse_targets, help=TARGETS)
    betas: tuple[float, float] = option((0.9, 0.999), ge=0, lt=1, help="decay of the running mean and square")
    eps: float = option(1e-6, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    layerwise: bool = option(False, help="update each parameter in the backward pass, and free its gradient")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length."""
        two("betas", self.betas)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups, each split into projected matrices and the rest.

        Raises:
            ConfigError: there is nothing to project.
        """
        refuse_unfit(NAME, run, groups, sharded=False)
        apollo = library("apollo_torch", NAME, "apollo-torch")
        names = ("rank", "proj", "scale_type", "update_proj_gap", "scale", "proj_type")
        split = with_projection(run, groups, self.targets, {name: getattr(self, name) for name in names}, plugin=NAME)

        def build(optimizer: Any, group: dict[str, Any], state: dict[str, Any]) -> Any:
            return optimizer._initialize_projector(group, state)  # noqa: SLF001 - the library's own way

        optimizer: torch.optim.Optimizer = writing_out(apollo.APOLLOAdamW, build)(
            with_decay(split, self.weight_decay), lr=self.lr, betas=two("betas", self.betas), eps=self.eps,
            scale_front=self.scale_front, disable_nl=not self.limit_growth,
        )  # fmt: skip
        for number, p in enumerate(run.model.parameters()):  # the library takes the place in the groups as it is
            if p in optimizer.state:
                optimizer.state[p]["seed"] = run.seed_for(NAME, number)
        return optimizer
