"""AdamW with chosen types of state and Kahan summation, as PyTorch's AnyPrecision optimizer published it.

The algorithm is that of torchdistX's AnyPrecisionAdamW (https://github.com/pytorch/torchdistx), which is on no package
index. One thing is better here: with Kahan summation the weight decay is compensated too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._anyprecision import AnyPrecision
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._library import refuse_unfit, several

if TYPE_CHECKING:
    from drivetrain import Run

NAME = "adamw-anyprecision"
DTYPES = ("float32", "bfloat16", "float16")


@plugin(role="optim", example={"lr": 0.01, "weight_decay": 0.1, "use_kahan_summation": True})
class AnyPrecisionAdamW:
    """Update with AdamW whose state has chosen types, and whose sums of weights in half precision lose nothing.

    For weights in bfloat16 (a model loaded so, not autocast): Kahan summation with a compensation in bfloat16 trains
    nearly as float32 weights do, at 4 bytes a weight instead of 6. A variance in bfloat16 halves its memory, but with a
    second beta near 1 it cannot decay: 0.999 of a bfloat16 number rounds to the number itself, so the rate only falls.
    A variance in float16 is not offered: squares of small gradients would be 0 in it.
    """

    lr: float = option(5e-5, gt=0, lt=float("inf"), help="peak learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), ge=0, lt=1, help="decay of the running mean and square")
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    use_kahan_summation: bool = option(False, help="keep what rounding loses of each update, and add it to the next")
    momentum_dtype: str = option("float32", choices=DTYPES, help="type of the running mean")
    variance_dtype: str = option("float32", choices=DTYPES[:2], help="type of the running mean of squares")
    compensation_dtype: str = option("bfloat16", choices=DTYPES, help="type of what Kahan summation keeps")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length."""
        several("betas", self.betas, 2)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        refuse_unfit(NAME, run, groups)
        beta1, beta2 = several("betas", self.betas, 2)
        return AnyPrecision(
            with_decay(groups, self.weight_decay),
            lr=self.lr,
            betas=(beta1, beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            momentum_dtype=getattr(torch, self.momentum_dtype),
            variance_dtype=getattr(torch, self.variance_dtype),
            compensation_dtype=getattr(torch, self.compensation_dtype) if self.use_kahan_summation else None,
        )
