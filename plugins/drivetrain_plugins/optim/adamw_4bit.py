"""AdamW with 4-bit states (Li et al. 2023, https://arxiv.org/abs/2309.01507), by `torchao`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._library import several
from drivetrain_plugins.optim._torchao import build

if TYPE_CHECKING:
    import torch

    from drivetrain import Run

NAME = "adamw-4bit"


@plugin(role="optim", example={"lr": 0.01, "weight_decay": 0.1})
class AdamW4bit:
    """Update with AdamW whose running mean and square are kept in 4 bits.

    Parameters of less than 4096 elements, or that blocks do not divide, keep theirs in their own type. The update is
    computed in float32, compiled or one operation after the other, which is five times slower. Stochastic rounding
    draws from the step's own random stream, so a resumed run draws the same.
    Sharded parameters are refused: the library fails on them (`adamw-8bit` takes them).
    """

    lr: float = option(5e-5, gt=0, lt=float("inf"), help="peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), ge=0, lt=1, help="decay of the running mean and square")
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    block_size: int = option(128, ge=2, lt=2**31, help="elements that share one scale")
    bf16_stochastic_round: bool = option(False, help="round updates of bfloat16 parameters up or down at random")
    compile: bool | None = option(
        None, help="compile the update, half a minute in the first step; None leaves small models on CPUs as they are"
    )

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length, and blocks that are not whole bytes."""
        several("betas", self.betas, 2)
        if self.block_size % 2:
            raise ValueError(f"block_size must be even. Received: {self.block_size}")

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        return build(self, NAME, run, groups, "AdamW4bit", sharded=False)
