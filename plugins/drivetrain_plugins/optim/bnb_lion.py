"""Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675) with state in 8 bits, by `bitsandbytes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._bnb import build
from drivetrain_plugins.optim._library import several

if TYPE_CHECKING:
    import torch

    from drivetrain import Run

NAME = "bnb-lion"


@plugin(role="optim", example={"lr": 0.003, "weight_decay": 0.1, "min_8bit_size": 16})
class BnbLion:
    """Update with Lion of bitsandbytes: momentum in 8 or 32 bits, paged where it does not fit.

    The state is quantized in blocks of 256 elements (Dettmers et al. 2022). Embeddings and small parameters keep theirs
    in 32 bits. It runs on CPUs too, slower than in 32 bits; sharded parameters are refused, as the library cannot.
    """

    lr: float = option(1e-4, gt=0, lt=float("inf"), help="peak learning rate")
    betas: tuple[float, float] = option(
        (0.9, 0.99), ge=0, lt=1, help="share of the momentum in the update, and its decay"
    )
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    bits: int = option(8, choices=(8, 32), help="bits of the state of an element")
    min_8bit_size: int = option(4096, ge=0, lt=2**53, help="parameters of fewer elements are kept in 32 bits")
    embedding_bits: int = option(32, choices=(8, 32), help="the same for the weights of embeddings; 32 trains stably")
    paged: bool = option(False, help="let the state move to the host's memory where the GPU's is full; GPUs only")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length."""
        several("betas", self.betas, 2)

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        return build(self, NAME, run, groups, "Lion", betas=several("betas", self.betas, 2))
