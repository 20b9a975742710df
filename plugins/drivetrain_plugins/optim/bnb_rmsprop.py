"""RMSprop (Hinton 2012) with state in 8 bits, by `bitsandbytes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._bnb import build

if TYPE_CHECKING:
    import torch

    from drivetrain import Run

NAME = "bnb-rmsprop"


@plugin(role="optim", example={"lr": 0.01, "weight_decay": 0.1, "min_8bit_size": 16})
class BnbRMSprop:
    """Update with RMSprop of bitsandbytes: mean square in 8 or 32 bits.

    The state is quantized in blocks of 256 elements (Dettmers et al. 2022). Embeddings and small parameters keep theirs
    in 32 bits. It runs on CPUs too, slower than in 32 bits; sharded parameters are refused, as the library cannot.
    The library ignores a momentum, refuses the centered variant and has no paged RMSprop: `rmsprop` has the first two.
    """

    lr: float = option(0.01, gt=0, lt=float("inf"), help="peak learning rate")
    alpha: float = option(0.99, gt=0, lt=1, help="decay of the mean square")
    eps: float = option(1e-8, gt=0, lt=float("inf"), help="added to the root of the mean square")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="L2 penalty; biases and norms are spared")
    bits: int = option(8, choices=(8, 32), help="bits of the state of an element")
    min_8bit_size: int = option(4096, ge=0, lt=2**53, help="parameters of fewer elements are kept in 32 bits")
    embedding_bits: int = option(32, choices=(8, 32), help="the same for the weights of embeddings; 32 trains stably")

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        return build(self, NAME, run, groups, "RMSprop", alpha=self.alpha, eps=self.eps)
