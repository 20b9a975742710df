"""Shampoo (Gupta et al. 2018, https://arxiv.org/abs/1802.09568), by `pytorch_optimizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from drivetrain import ConfigError, Problem, hookimpl, option, plugin
from drivetrain_plugins.optim._groups import with_decay
from drivetrain_plugins.optim._library import library, refuse_unfit

if TYPE_CHECKING:
    from drivetrain import Run

NAME = "shampoo"


@plugin(role="optim", example={"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9})
class Shampoo:
    """Update with Shampoo: the gradient times roots of its statistics, one for each side of a tensor.

    A side of n elements keeps two tensors of n x n, one of which is decomposed every `precondition_frequency` steps, in
    time that grows with the cube of n. So it is for small models, and longer sides than `max_dim` are refused before
    training: `soap` passes over them. Weights in half precision and sharded ones are refused: the library fails.
    """

    lr: float = option(1e-3, gt=0, lt=float("inf"), help="peak learning rate")
    momentum: float = option(0.0, ge=0, lt=1, help="share of the last update that is mixed into the gradient")
    weight_decay: float = option(0.0, ge=0, lt=float("inf"), help="decoupled decay; biases and norms are spared")
    precondition_frequency: int = option(1, ge=1, lt=2**53, help="steps between decompositions; nothing moves before")
    matrix_eps: float = option(1e-6, gt=0, lt=float("inf"), help="the statistics start as this times the unit matrix")
    max_dim: int = option(4096, ge=1, lt=2**31, help="longest side that is taken")

    @hookimpl
    def build_optimizer(self, run: Run, groups: Any) -> torch.optim.Optimizer:
        """Build it over the run's groups.

        Raises:
            ConfigError: a parameter has a side that is too long, or none.
        """
        optimizers = library("pytorch_optimizer", NAME)
        refuse_unfit(NAME, run, groups, sharded=False, coarse=(torch.float16, torch.bfloat16))
        named = [(name, p) for group in groups for name, p in group["params"]]
        if odd := [(name, p) for name, p in named if p.ndim == 0 or max(p.shape) > self.max_dim]:
            found = ", ".join(f"{name} {tuple(p.shape)}" for name, p in odd[:4])
            what = f"{NAME} keeps and decomposes a square matrix for each side of a parameter"
            do = f"raise max_dim above {self.max_dim}, freeze it, or take soap, which passes over long sides"
            raise ConfigError([Problem(what, f"{found} ({len(odd)} such parameters)", do)])
        made: torch.optim.Optimizer = optimizers.Shampoo(
            with_decay(groups, self.weight_decay),
            lr=self.lr,
            momentum=self.momentum,
            weight_decouple=True,
            preconditioning_compute_steps=self.precondition_frequency,
            matrix_eps=self.matrix_eps,
        )
        return made
