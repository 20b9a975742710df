"""AdEMAMix (Pagliardini et al. 2024, https://arxiv.org/abs/2409.03137) with state in 8 bits, by `bitsandbytes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import hookimpl, option, plugin
from drivetrain_plugins.optim._bnb import build
from drivetrain_plugins.optim._library import several

if TYPE_CHECKING:
    import torch

    from drivetrain import Run

NAME = "bnb-ademamix"


@plugin(role="optim", example={"lr": 0.01, "weight_decay": 0.1, "min_8bit_size": 16, "warmup_steps": 4})
class BnbAdEMAMix:
    """Update with AdEMAMix of bitsandbytes: state in 8 or 32 bits, paged where it does not fit.

    The state is quantized in blocks of 256 elements (Dettmers et al. 2022). Embeddings and small parameters keep theirs
    in 32 bits. It runs on CPUs too, slower than in 32 bits; sharded parameters are refused, as the library cannot.
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
    bits: int = option(8, choices=(8, 32), help="bits of the state of an element")
    min_8bit_size: int = option(4096, ge=0, lt=2**53, help="parameters of fewer elements are kept in 32 bits")
    embedding_bits: int = option(32, choices=(8, 32), help="the same for the weights of embeddings; 32 trains stably")
    paged: bool = option(False, help="let the state move to the host's memory where the GPU's is full; GPUs only")

    def __attrs_post_init__(self) -> None:
        """Refuse betas of another length, and betas of which there is no logarithm to grow from."""
        first, _, _ = several("betas", self.betas, 3)
        if self.warmup_steps is not None and (first == 0 or self.betas[2] == 0):
            raise ValueError(f"warmup_steps needs a first and third beta above 0. Received: betas={self.betas}")

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups."""
        return build(
            self,
            NAME,
            run,
            groups,
            "AdEMAMix",
            betas=several("betas", self.betas, 3),
            eps=self.eps,
            alpha=self.alpha,
            t_alpha=self.warmup_steps,
            t_beta3=self.warmup_steps,
        )
