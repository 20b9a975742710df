"""GaLore (Zhao et al. 2024, https://arxiv.org/abs/2403.03507), by `galore-torch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.optim._groups import two, with_decay
from drivetrain_plugins.optim._in_backward import Layerwise
from drivetrain_plugins.optim._library import library, refuse_unfit
from drivetrain_plugins.optim._projected import TARGETS, parse_targets, with_projection, writing_out

if TYPE_CHECKING:
    import torch

    from drivetrain import Run

NAME = "galore"
CUDA_ONLY = ("adamw-8bit",)  # the library waits for CUDA in each step
BETAS, EPS, CLIP_THRESHOLD, DECAY_RATE, MIN_8BIT_SIZE = (0.9, 0.999), 1e-6, 1.0, -0.8, 4096
ADAMW = {"betas": BETAS, "eps": EPS}
OWN: dict[str, dict[str, Any]] = {  # options that a base has to itself
    "adamw": ADAMW,
    "adamw-8bit": {**ADAMW, "min_8bit_size": MIN_8BIT_SIZE},
    "adafactor": {"clip_threshold": CLIP_THRESHOLD, "decay_rate": DECAY_RATE},
}


@plugin(role="optim", example={"lr": 0.01, "rank": 2, "update_proj_gap": 2, "weight_decay": 0.1})
class GaLore(Layerwise):
    """Update with moments of gradients that are projected to a low rank, on their largest singular vectors.

    Matrices of `torch.nn.Linear` are projected, the other parameters are updated by the base optimizer as it is. All of
    the options hold for both. `layerwise` updates in the backward pass, as `optimizer-in-backward` does.
    """

    NAME = NAME

    base: str = option(
        "adamw", choices=["adamw", "adamw-8bit", "adafactor"], help="the optimizer; adamw-8bit needs CUDA"
    )
    lr: float = option(1e-3, gt=0, lt=float("inf"), help="peak learning rate")
    rank: int = option(128, ge=1, help="rows of the projected gradients; smaller matrices are not projected")
    update_proj_gap: int = option(200, ge=1, help="steps after which the projection is computed anew")
    scale: float = option(0.25, gt=0, lt=float("inf"), help="factor of the projected updates")
    proj_type: str = option(
        "std", choices=["std", "reverse_std", "right", "left", "full"], help="which side of a matrix is projected"
    )
    targets: tuple[str, ...] = option((), converter=parse_targets, help=TARGETS)
    betas: tuple[float, float] = option(BETAS, ge=0, lt=1, help="decay of mean and square, of the base adamw")
    eps: float = option(EPS, gt=0, lt=float("inf"), help="added to the root of the mean square, of the base adamw")
    clip_threshold: float = option(CLIP_THRESHOLD, gt=0, help="largest root mean square of an update, of adafactor")
    decay_rate: float = option(DECAY_RATE, lt=0, help="power of the step in the decay of the mean square, of adafactor")
    min_8bit_size: int = option(MIN_8BIT_SIZE, ge=1, help="smaller states stay in 32 bits, of adamw-8bit")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    layerwise: bool = option(False, help="update each parameter in the backward pass, and free its gradient")

    def __attrs_post_init__(self) -> None:
        """Refuse options of the other base."""
        two("betas", self.betas)
        others = {name: default for own in OWN.values() for name, default in own.items() if name not in OWN[self.base]}
        for name, default in others.items():
            value = tuple(getattr(self, name)) if name == "betas" else getattr(self, name)
            if value != default:
                raise ValueError(f"{name} is no option of the base {self.base!r}. Received: {value!r}")

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups, each split into projected matrices and the rest.

        Raises:
            ConfigError: there is nothing to project, or the device is not one that the base runs on.
        """
        if self.base in CUDA_ONLY and run.device.type != "cuda":
            do = "use base = 'adamw', or a CUDA device"
            raise ConfigError([Problem(f"{NAME}: the base adamw-8bit of galore-torch needs CUDA", str(run.device), do)])
        refuse_unfit(NAME, run, groups, sharded=False)
        galore = library("galore_torch", NAME, "galore-torch")
        projection = {
            "rank": self.rank, "update_proj_gap": self.update_proj_gap, "scale": self.scale, "proj_type": self.proj_type
        }  # fmt: skip
        split = with_projection(run, groups, self.targets, projection, plugin=NAME)
        built = with_decay(split, self.weight_decay)
        options: dict[str, Any] = {"lr": self.lr, "betas": two("betas", self.betas), "eps": self.eps}
        if self.base == "adamw":
            made, options["no_deprecation_warning"] = galore.GaLoreAdamW, True
        elif self.base == "adamw-8bit":
            made, options["min_8bit_size"] = galore.GaLoreAdamW8bit, self.min_8bit_size
        else:
            made = galore.GaLoreAdafactor
            options = {"lr": self.lr, "clip_threshold": self.clip_threshold, "decay_rate": self.decay_rate}
            options |= {"relative_step": False, "scale_parameter": False}  # the rate is the schedule's

        def build(_optimizer: Any, group: dict[str, Any], _state: dict[str, Any]) -> Any:
            return galore.galore_projector.GaLoreProjector(**{name: group[name] for name in projection})

        optimizer: torch.optim.Optimizer = writing_out(made, build)(built, **options)
        return optimizer
